r"""Is a tuned prompt better? Its loss and its answers, beside those of the model alone.

torchrun --nproc_per_node 4 -m llama.tuning.evaluate --ckpt_dir ckpts/7B_fs4 \
    --dataset_path datasets/short_answers.json --tuning_ckpt_paths saved/a,saved/b

python -m llama.tuning.evaluate --help shows all options.
"""

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama import cli
from llama.tuning.options import EvaluationOptions

if TYPE_CHECKING:  # torch and what stands on it are imported where they are used: see main()
    from llama.checkpoint.weights import Source
    from llama.generation import LLaMA
    from llama.tokenizer import Tokenizer
    from llama.tuning.data import TokenizedDataset
    from llama.tuning.rows import Dataset
    from llama.tuning.templates import Question

BASE = "the model alone"
SPARE_TOKENS = 8  # by which an answer may be longer than the longest that is wanted
LONGEST_ANSWER = 256  # tokens, where nobody says how long it may be


@dataclass
class Score:
    """What a prompt, or the model alone, comes to.

    wrong: the answers that are not those wanted, each with its row, from 1; of n_asked.
    """

    loss: float
    wrong: list[dict]
    n_asked: int

    def as_cells(self) -> str:
        """The line of the table behind the name."""
        right = self.n_asked - len(self.wrong)
        cells = f"  {self.loss:14.4f}  {math.exp(self.loss):10.2f}"
        if self.n_asked:
            cells += f"  {right} of {self.n_asked} ({right / self.n_asked:.1%})"
        return cells

    def as_json(self, path: str | None) -> str:
        """The line of --json."""
        found: dict[str, object] = {"tuning_ckpt_path": path, "loss": self.loss}
        found["perplexity"] = math.exp(self.loss)
        if self.n_asked:
            found["exact_match"] = self.n_asked - len(self.wrong)
            found |= {"rows": self.n_asked, "wrong": self.wrong}
        return json.dumps(found)


def main(flags: EvaluationOptions) -> None:
    """Load model and rows once; print a line for the model alone, and one for each adapter."""
    # here and not above, so that --help need not wait for torch
    from llama import parallel

    parallel.setup()  # before libraries that ask for cards
    from llama.checkpoint.formats import open_pair
    from llama.files import sha256_of
    from llama.tuning.adapter import load_soft_prompt
    from llama.tuning.data import tokenize_dataset
    from llama.tuning.templates import question_of

    ckpt, tokenizer = open_pair(flags.ckpt_dir, flags.tokenizer_path, flags.quantize)
    prompts = {path: load_soft_prompt(path, ckpt.args.dim) for path in flags.adapters()}
    # All are asked the same: the rows for which the longest prompt leaves room.
    virtual = max(map(len, prompts.values()), default=0)
    data = tokenize_dataset(
        flags.dataset_path,
        tokenizer,
        flags.max_seq_len,
        virtual,
        template=flags.template,
        columns=flags.columns,
    )
    parallel.check_same(
        [data.hashes, *map(sha256_of, prompts.values())],
        "the ranks read different datasets or adapters; give all machines the same files",
    )
    rows = choose(data.rows, flags)
    questions = [question_of(row, tokenizer) for row in rows] if flags.exact_match else []
    if not all(question.ids for question in questions):
        raise ValueError(
            f"{flags.dataset_path}: nothing stands before an answer, so nothing asks for it: give "
            "--exact_match False"
        )
    longest_answer = max((question.n_tokens for question in questions), default=0)
    max_gen_len = flags.max_gen_len or min(longest_answer + SPARE_TOKENS, LONGEST_ANSWER)
    generator = build(flags, ckpt, tokenizer, rows, virtual, max_gen_len)
    for path in prompts:
        say_what_differs(path, generator, data)

    names = [BASE, *prompts] if flags.base else list(prompts)
    width = max(map(len, names))
    if not flags.json:
        cli.show(f"{'':{width}}  loss per token  perplexity{'  exact match' * bool(questions)}\n")
    for name in names:
        generator.soft_prompt = prompts.get(name)
        # So all may write as much, and where an answer was cut, no more than is wanted.
        generator.max_seq_len = flags.max_seq_len - virtual + generator.num_virtual_tokens
        loss = mean_loss(generator, rows, name)
        wrong = wrong_answers(generator, questions, max_gen_len, name) if questions else []
        ckpt.check_unchanged()
        score = Score(loss, wrong, len(questions))
        if flags.json:
            cli.show(score.as_json(name if name in prompts else None) + "\n")
        else:
            cli.show(f"{name:{width}}{score.as_cells()}\n")


def build(
    flags: EvaluationOptions,
    ckpt: "Source",
    tokenizer: "Tokenizer",
    rows: "Dataset",
    virtual: int,
    max_gen_len: int,
) -> "LLaMA":
    """Load this rank's part of the model, if what is asked of it may fit into memory."""
    from llama import parallel
    from llama.checkpoint.weights import parse_dtype
    from llama.generation import LLaMA, load_model
    from llama.memory import check_generation
    from llama.plan import Plan
    from llama.tuning.data import column

    dtype, bsz = parse_dtype(flags.dtype), min(flags.batch_size, len(rows))
    most_learned = sorted(column(rows, "n_learned"))[-bsz:]
    plan = Plan(
        ckpt,
        parallel.model_size(),
        dtype or ckpt.dtype,
        bsz,
        min(flags.max_seq_len, virtual + max(column(rows, "length")) + max_gen_len),
        parallel.setup(),
        ckpt.quantize,
        flags.offload,
        num_virtual_tokens=virtual,
        learned=math.ceil(sum(most_learned) / bsz),
    )
    check_generation(plan, chosen=True)
    model = load_model(ckpt, plan.device, dtype, flags.offload)
    return LLaMA(model, tokenizer, max_batch_size=bsz, ckpt=ckpt)


def say_what_differs(path: str, generator: "LLaMA", data: "TokenizedDataset") -> None:
    """Say so where an adapter was trained on another model, or in another template."""
    from llama.tuning.adapter import chat_template_beside, warn_of_another_model

    warn_of_another_model(path, generator.model)
    if chat_template_beside(path) not in (None, data.chat_template):
        cli.say(f"{path}: was trained in another template than these rows are in (--template)")


def choose(rows: "Dataset", flags: EvaluationOptions) -> "Dataset":
    """Those that training held out, or all; of them as many as are wanted."""
    from llama.tuning.data import split_dataset

    if flags.val_set_size:
        rows = split_dataset(rows, flags.val_set_size, flags.seed)[1]
    return rows.select(range(min(len(rows), flags.n_rows or len(rows))))


def mean_loss(generator: "LLaMA", rows: "Dataset", name: str) -> float:
    """The loss of a learned token, as training has it; the mean over those of all rows.

    Raises ValueError where it is NaN or infinite.
    """
    import torch

    from llama.tuning.data import collate, column
    from llama.tuning.model import LlamaForPromptTuning, add_soft_prompt, soft_prompt_of
    from llama.tuning.templates import IGNORE

    prompt, model = generator.soft_prompt, LlamaForPromptTuning(generator.model)
    if prompt is not None:
        model = add_soft_prompt(generator.model, len(prompt), [0], "")
        soft_prompt_of(model).data.copy_(prompt)
    lengths, bsz = column(rows, "length"), generator.max_batch_size
    by_length = sorted(range(len(rows)), key=lengths.__getitem__)  # so that little is padded
    starts = range(0, len(rows), bsz)
    total, n_learned = 0.0, 0
    for start in cli.progress_bar(f"loss of {name}", len(starts), "batch", items=starts):
        batch = collate(
            [rows[i] for i in by_length[start : start + bsz]], generator.tokenizer.pad_id
        )
        batch["labels"][:, 0] = IGNORE  # the model alone has nothing to tell a first token from
        n_learned += int((batch["labels"] != IGNORE).sum())
        with torch.inference_mode():
            on_device = {key: tensor.to(generator.device) for key, tensor in batch.items()}
            total += model(**on_device, num_items_in_batch=1).loss.item()
    loss = total / max(n_learned, 1)
    if not math.isfinite(loss):
        raise ValueError(
            f"{name}: the loss is NaN or infinite; take --dtype bfloat16 or float32, or check the "
            "model: split_model.py --verify"
        )
    return loss


def wrong_answers(
    generator: "LLaMA", questions: "list[Question]", max_gen_len: int, name: str
) -> list[dict]:
    """Answer all questions, always with the likeliest token; those answers that are not wanted."""
    prompts = [question.ids for question in questions]
    outputs = generator.outputs(prompts, max_gen_len=max_gen_len, temperature=0)
    bar = cli.progress_bar(f"answers of {name}", len(questions), "row", items=outputs)
    return [
        {"row": number, "wanted": question.wanted, "given": output.text.strip()}
        for number, (question, output) in enumerate(zip(questions, bar), 1)
        if output.text.strip() != question.wanted
    ]


if __name__ == "__main__":
    cli.run(main, EvaluationOptions)
