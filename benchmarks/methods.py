"""Test losses, right answers and seconds of ways to tune a prompt, as lines of JSON in a file.

python benchmarks/methods.py --out runs.jsonl --dataset short_answers --methods prompt,residual
python benchmarks/methods.py --out runs.jsonl --methods peft_prompt --inits text --hf_dir ckpts/hf

Runs that the file has already are left out, so that it can be added to. peft_…: what PEFT does
with Hugging Face's model, on the same batches. methods_table.py shows what is in the file.
"""

import functools
import gc
import itertools
import json
import tempfile
import time
from pathlib import Path

from llama import cli

REPO = Path(__file__).parent.parent
PEFT_INITS = {"text": "TEXT", "vocab": "SAMPLE_VOCAB", "random": "RANDOM"}
HELD_OUT = 47  # rows of a dataset that has no file of its own for tests; always the same ones


def main(
    out: str,
    dataset: str = "appointments",
    methods: str = "prompt,residual,p_tuning",
    inits: str = "rows",
    lrs: str = "1e-3",
    seeds: str = "0",
    lengths: str = "64",
    schedulers: str = "cosine",
    steps: int = 30,
    batch_size: int = 8,
    every: int = 10,
    test_rows: int = 0,
    exact_match: bool = False,
    ckpt_dir: str = str(REPO / "ckpts/SmolLM2-135M-Instruct"),
    hf_dir: str = "",
) -> None:
    """Train each combination that the file does not have, and add a line for it."""
    from llama import parallel

    device = parallel.setup()
    import transformers

    from llama.checkpoint.formats import open_pair
    from llama.generation import LLaMA, load_model
    from llama.tuning.data import split_dataset, tokenize_dataset
    from llama.tuning.evaluate import mean_loss, wrong_answers
    from llama.tuning.options import TuningOptions
    from llama.tuning.templates import question_of

    transformers.logging.set_verbosity_error()
    ckpt, tokenizer = open_pair(ckpt_dir, None, None)
    generator = LLaMA(load_model(ckpt, device), tokenizer, max_batch_size=16)
    generator.model.recompute_ffn = False
    file = Path(out)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    axes = [axis.split(",") for axis in (methods, inits, lrs, lengths, schedulers, seeds)]
    for method, init, lr, length, scheduler, seed in itertools.product(*axes):
        if method.startswith("peft_"):
            init = "random" if method == "peft_p_tuning" else init
            if init not in PEFT_INITS:
                raise ValueError(f"--inits {init}: PEFT takes {', '.join(PEFT_INITS)}")
        run = {
            **{"dataset": dataset, "method": method, "init": init, "lr": float(lr)},
            **{"num_virtual_tokens": int(length), "lr_scheduler": scheduler, "seed": int(seed)},
            **{"steps": steps, "batch_size": batch_size, "test_rows": test_rows},
        }
        if any(run.items() <= line.items() for line in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = TuningOptions(
                ckpt_dir=ckpt_dir,
                dataset_path=str(REPO / f"datasets/{dataset}.json"),
                output_dir=folder,
                method=method.removeprefix("peft_"),
                init=init,
                lr=float(lr),
                num_virtual_tokens=int(length),
                lr_scheduler=scheduler,
                seed=int(seed),
                max_steps=steps,
                batch_size=batch_size,
                save_steps=10**6,
            )
            sizes = options.max_seq_len, options.num_virtual_tokens
            data = tokenize_dataset(options.dataset_path, tokenizer, *sizes)
            train_rows, tested = data.rows, data.rows
            test = REPO / f"datasets/{dataset}_test.json"
            if test.exists():
                tested = tokenize_dataset(test, tokenizer, *sizes).rows
            else:
                train_rows, tested = split_dataset(data.rows, HELD_OUT, 0)
            tested = tested.select(range(test_rows or len(tested)))
            transformers.set_seed(options.seed)
            make = with_peft if method.startswith("peft_") else with_ours
            trainer = make(generator, options, data, train_rows, hf_dir)
            prompts = kept_prompts(every)
            trainer.add_callback(prompts)
            trainer.run(None) if make is with_ours else trainer.train()
        losses = {}
        for step, (seconds, prompt) in prompts.found.items():
            generator.soft_prompt = prompt
            losses[step] = mean_loss(generator, tested, method), seconds
        run["loss"] = {step: round(loss, 4) for step, (loss, _) in losses.items()}
        run["seconds"] = {step: round(seconds, 1) for step, (_, seconds) in losses.items()}
        if exact_match:
            questions = [question_of(row, tokenizer) for row in tested]
            longest = 8 + max(question.n_tokens for question in questions)
            run["wrong"] = len(wrong_answers(generator, questions, longest, method))
            run["asked"] = len(questions)
        print(json.dumps(run), flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
        generator.soft_prompt = None
        del trainer, prompts
        gc.collect()


def with_ours(generator, options, data, train_rows, _):
    """The Trainer of ft_main.py."""
    from llama.tuning.data import init_ids
    from llama.tuning.model import add_soft_prompt
    from llama.tuning.trainer import PromptTrainer

    model = add_soft_prompt(
        *(generator.model, options.num_virtual_tokens),
        *(init_ids(options, generator.tokenizer, train_rows), options.ckpt_dir),
        *(options.method, options.init),
    )
    return PromptTrainer(model, options, data, train_rows, None, generator.tokenizer.pad_id)


def with_peft(generator, options, data, train_rows, hf_dir):
    """A Trainer as PEFT's documentation has it, with the rows in our order."""
    import peft
    import torch
    import transformers

    from llama.tuning.data import LengthGrouped, collate, column
    from llama.tuning.options import ALPACA_PREAMBLE
    from llama.tuning.trainer import training_arguments

    class InOurOrder(transformers.Trainer):
        def _get_train_sampler(self, _=None):
            lengths = column(train_rows, "length")
            return LengthGrouped(lengths, options.batch_size, options.seed)

    base = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": options.num_virtual_tokens}
    if options.method == "p_tuning":
        config = peft.PromptEncoderConfig(encoder_hidden_size=base.config.hidden_size, **common)
    else:
        config = peft.PromptTuningConfig(
            prompt_tuning_init=PEFT_INITS[options.init],
            prompt_tuning_init_text=ALPACA_PREAMBLE,
            tokenizer_name_or_path=hf_dir,
            **common,
        )
    trainer = InOurOrder(
        model=peft.get_peft_model(base, config),
        args=training_arguments(options, len(train_rows), False, generator.device),
        train_dataset=train_rows,
        data_collator=functools.partial(collate, pad_id=generator.tokenizer.pad_id),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def kept_prompts(every: int):
    """Make a callback that keeps the prompt of every so many steps, and the seconds until then."""
    import transformers

    class Kept(transformers.TrainerCallback):
        def __init__(self):
            self.found = {}

        def on_train_begin(self, args, state, control, **_):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, model, **_):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                seconds = time.perf_counter() - self.began
                prompt = model.get_prompt_embedding_to_save("default").float()
                self.found[state.global_step] = seconds, prompt

    return Kept()


if __name__ == "__main__":
    cli.run(main)
