"""Sample answers: what the model says, with the prompt as it is, at every evaluation."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from transformers.trainer_callback import TrainerState

from llama import cli, parallel
from llama.files import naming_refusals, parse_json, read_lines, write_whole
from llama.tokenizer import Tokenizer
from llama.tuning.model import soft_prompt_of
from llama.tuning.rows import Dataset
from llama.tuning.run_folder import SAMPLES
from llama.tuning.templates import question_of

N_SAMPLES = 3  # rows
LONGEST_SAMPLE = 64  # tokens

# The texts that follow prompts, which are token ids, with a soft prompt in front of each.
Answer = Callable[[list[list[int]], torch.Tensor], list[str]]


class Samples(transformers.TrainerCallback):
    """Ask the first rows that were held out; show the answers, and keep them in samples.jsonl.

    A row that learns all of its tokens asks nothing: it is what the model writes by itself.
    """

    def __init__(self, rows: Dataset, tokenizer: Tokenizer, answer: Answer) -> None:
        some = rows.select(range(min(N_SAMPLES, len(rows))))
        self.questions, self.answer = [question_of(row, tokenizer) for row in some], answer
        self.prompts = [tokenizer.decode(question.ids) for question in self.questions]

    @torch.no_grad()
    def on_evaluate(
        self,
        args: transformers.TrainingArguments,
        state: TrainerState,
        control: object,
        model: peft.PeftModel,
        **_: object,
    ) -> None:
        prompt_ids = [question.ids for question in self.questions]
        answers = self.answer(prompt_ids, soft_prompt_of(model).detach())
        lines = []
        for prompt, question, answer in zip(self.prompts, self.questions, answers):
            asked = cli.shown(prompt, 80, ending=80)  # what differs stands at the end
            cli.say(f"step {state.global_step}, sample: {asked} -> {cli.shown(answer)}")
            found = {"step": state.global_step, "prompt": prompt}
            lines.append(found | {"expected": question.wanted, "answer": answer})
        if parallel.rank() == 0:
            path = Path(args.output_dir) / SAMPLES
            with naming_refusals(path):
                append(path, lines)


def append(path: Path, lines: list[dict]) -> None:
    """Add lines of a step; those of it and of later ones go, which a resumed run comes to again."""
    before = [parse_json(*line) for line in read_lines(path)] if path.is_file() else []
    kept = [line for line in before if line.get("step", 0) < lines[0]["step"]]
    with write_whole(path) as partial:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept + lines)
        partial.write_text(text, encoding="utf-8")
