"""Sample answers: what is asked, and that no step stands in the file twice."""

import json

import torch

from llama.tuning.samples import append
from llama.tuning.templates import IGNORE, Question, question_of


def test_steps_that_a_resumed_run_comes_to_again_are_replaced(tmp_path):
    path = tmp_path / "samples.jsonl"
    for step, answer in ((0, "a"), (5, "b\u2028"), (10, "c"), (5, "d"), (7, "e")):
        append(path, [{"step": step, "answer": answer}, {"step": step, "answer": "…"}])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(line["step"], line["answer"]) for line in lines[::2]] == [(0, "a"), (5, "d"), (7, "e")]
    assert len(lines) == 6
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_the_last_answer_of_a_row_is_expected_and_all_before_it_asks():
    def asked(text, labels):
        ids = torch.tensor([ord(letter) for letter in text])
        labels = torch.tensor([i if x == "x" else IGNORE for i, x in zip(ids.tolist(), labels)])
        return question_of({"input_ids": ids, "labels": labels}, Letters())

    assert asked("ab cd", "..xx.") == Question([97, 98], "c", 2)
    assert asked("abcde", ".xx.x") == Question([97, 98, 99, 100], "e", 1)
    assert asked("abc", "xxx") == Question([], "abc", 3)
