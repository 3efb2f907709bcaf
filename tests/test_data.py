"""Instruction data: prompts, rows, tokens with labels, batches; and the data in datasets/."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import REPO, TOKENIZERS

from llama.template import ChatTemplate
from llama.tokenizer import Tokenizer
from llama.tuning.data import (
    alpaca_chat_template,
    alpaca_prompt,
    collate,
    load_instructions,
    split_dataset,
    tokenize_dataset,
)
from llama.tuning.options import ALPACA_PREAMBLE

SHORT_ANSWERS = REPO / "datasets" / "short_answers.json"
BEGINNING = "Below is an instruction that describes a task"
ENDING = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
OUTPUTS = ("In short: yes.", "", " spaced", "\nnext line", "1 + 1 = 2", "北京 🦙", ")")


class ByteTokenizer:
    """A token a byte."""

    bos_id = 256
    eos_id = 257

    def encode(self, s, *, bos=True, eos=False):
        return [self.bos_id] * bos + list(s.encode()) + [self.eos_id] * eos


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return Tokenizer(TOKENIZERS[request.param][0])


def write_rows(path: Path, *rows: tuple[str, ...]) -> Path:
    """A JSON array of (instruction, output) or (instruction, output, input)."""
    keys = ("instruction", "output", "input")
    path.write_text(json.dumps([dict(zip(keys, row)) for row in rows]), encoding="utf-8")
    return path


def tokenized(path: Path, tokenizer=None, max_seq_len: int = 512, **options) -> list[dict]:
    """The rows of a file as lists of numbers."""
    rows = tokenize_dataset(path, tokenizer or ByteTokenizer(), max_seq_len, **options)
    return [{name: tensor.tolist() for name, tensor in row.items()} for row in rows]


def prompt_length(instruction: str, input: str = "") -> int:
    return len(ByteTokenizer().encode(alpaca_prompt(instruction, input)))


def learned(row: dict) -> list[int]:
    return [label for label in row["labels"] if label != -100]


# Prompts


def test_prompts_are_alpacas_to_the_letter():
    assert alpaca_prompt("Do it") == f"{BEGINNING}. {ENDING}Do it\n\n### Response:"
    assert alpaca_prompt("Do it").startswith(f"{ALPACA_PREAMBLE}\n\n### Instruction:")
    assert alpaca_prompt("Do it", "now") == (
        f"{BEGINNING}, paired with an input that provides further context. {ENDING}Do it\n\n"
        "### Input:\nnow\n\n### Response:"
    )


@pytest.mark.parametrize("text", ["{instruction}", "{input}", "{}", "{{x}}", "{0}", "a % b \\1"])
def test_braces_in_a_users_text_survive(text):
    assert f"\n{text}\n" in alpaca_prompt(text)
    assert f"### Instruction:\n{text}\n\n### Input:\n{text}\n" in alpaca_prompt(text, text)


# Rows from files

ROWS = [
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "Add", "input": "1, 2", "output": "3\u2028three"},
]
FORMS = {
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=2),
    "array after BOM": "\ufeff\n " + json.dumps(ROWS, ensure_ascii=False),
    "other keys": json.dumps([{"output": "hi", "x": 3, "instruction": "Say hi"}, ROWS[1]]),
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "lines, gaps": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_array_and_lines_are_told_apart_by_content(tmp_path, text, name):
    (tmp_path / name).write_bytes(text.encode())
    for path in (tmp_path / name, str(tmp_path / name)):
        assert load_instructions(path) == ROWS


GOOD = '{"instruction": "a", "output": "b"}'
BAD_ROWS = {
    "no instruction": ('{"output": "b"}', 'no text "instruction"'),
    "no output": ('{"instruction": "a"}', 'no text "output"'),
    "instruction is a number": ('{"instruction": 1, "output": "b"}', 'no text "instruction"'),
    "output is null": ('{"instruction": "a", "output": null}', 'no text "output"'),
    "input is a list": ('{"instruction": "a", "output": "b", "input": []}', 'no text "input"'),
    "half a surrogate pair": (r'{"instruction": "a", "output": "\ud83e"}', "cut in half"),
    "a list": ("[1]", "not an object but list"),
    "a string": ('"a"', "not an object but str"),
}
BAD_FILES = {
    "empty": (b"", "no row in it"),
    "blank": (b" \n\t\n", "no row in it"),
    "no rows": (b"[]", "no row in it"),
    "prose": (b"instruction,output\na,b\n", "line 1: not JSON"),
    "array cut short": (f"[{GOOD},\n{GOOD}".encode(), "not JSON (Expecting ',' delimiter: line 2 "),
    "line cut short": (f"{GOOD}\n\n{GOOD[:-1]}".encode(), "line 3: not JSON (Expecting ',' "),
    "one object": (b'{\n"data": [\n' + GOOD.encode() + b"]}", "line 1: not JSON"),
    "a number": (b"3", "line 1: not an object but int"),
    "not UTF-8": (GOOD.replace("a", "é").encode("latin-1"), "not UTF-8"),
    "nested too deep": (b"[" * 200_000, "not JSON"),
    "number too long": (b"[" + b"9" * 10_000 + b"]", "not JSON"),
}


def assert_refused(path: Path, content: bytes, where: str, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{where}")) as error:
        load_instructions(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_with_path_and_number(tmp_path, row, message):
    array, lines = f"[{GOOD},\n\n{GOOD}, {row}, {GOOD}]", f"{GOOD}\n\n{GOOD}\n{row}\n{GOOD}\n"
    assert_refused(tmp_path / "array.json", array.encode(), ", row 3: ", message)
    assert_refused(tmp_path / "lines.json", lines.encode(), ", line 4: ", message)


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_missing_or_no_dataset_is_told_with_its_path(tmp_path, content, message):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            load_instructions(path)
    assert_refused(tmp_path / "bad.json", content, "", message)


# Tokens and labels


def test_prompt_ids_are_those_that_generation_feeds(tokenizer, tmp_path):
    rows = [("Say {x}", output, extra) for output in OUTPUTS for extra in ("", "é 北京 ")]
    path = write_rows(tmp_path / "rows.json", *rows)
    found = tokenized(path, tokenizer)
    assert len(found) == len(rows)
    for (instruction, output, extra), row in zip(rows, found):
        prompt = alpaca_prompt(instruction, extra)
        prompt_ids = tokenizer.encode(prompt, bos=True)
        assert row["input_ids"][: len(prompt_ids)] == prompt_ids
        response = row["input_ids"][len(prompt_ids) :]
        assert response[-1] == tokenizer.eos_id
        assert row["labels"] == [-100] * len(prompt_ids) + response
        # No space that SentencePiece makes up stands between the two.
        assert tokenizer.decode(row["input_ids"]) == prompt + output


@pytest.mark.parametrize(("kind", "output"), [("sentencepiece", ":-)"), ("tiktoken", "\nnext")])
def test_a_response_that_merges_with_the_prompt_is_encoded_alone(kind, output, tmp_path):
    tokenizer = Tokenizer(TOKENIZERS[kind][0])
    prompt = alpaca_prompt("Say it")
    prompt_ids = tokenizer.encode(prompt, bos=True)
    merged = tokenizer.encode(prompt + output, bos=True)
    assert merged[: len(prompt_ids)] != prompt_ids  # else this test shows nothing
    (row,) = tokenized(write_rows(tmp_path / "rows.json", ("Say it", output)), tokenizer)
    alone = tokenizer.encode(output, bos=False, eos=True)
    assert row["input_ids"] == prompt_ids + alone
    assert learned(row) == alone


def test_a_tokenizer_without_bos_serves(tmp_path):
    class NoBos(ByteTokenizer):
        def encode(self, s, *, bos=True, eos=False):
            return super().encode(s, bos=False, eos=eos)

    (row,) = tokenized(write_rows(tmp_path / "rows.json", ("a", "b")), NoBos())
    assert row["input_ids"] == [*(alpaca_prompt("a") + "b").encode(), 257]
    assert learned(row) == [ord("b"), 257]


# Length


def test_long_rows_are_cut_and_counted_in_one_message(tmp_path, capsys):
    length = prompt_length("a") + 4
    path = write_rows(
        tmp_path / "rows.json",
        ("a", "123"),  # fits with its end of sequence
        ("a", "1234"),  # loses its end of sequence alone
        ("a", "123456"),
        ("aaa", "1234"),
        ("aaaa", "1"),  # the prompt leaves one place less than nothing
        ("aaaaa", "1"),  # the prompt fills all
        ("a" * 99, "1"),
    )
    rows = tokenized(path, max_seq_len=length)
    assert learned(rows[0]) == [*b"123", 257]
    assert [bytes(learned(row)) for row in rows[1:]] == [b"1234", b"1234", b"12", b"1"]
    assert all(len(row["input_ids"]) == len(row["labels"]) == length for row in rows)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"{path}: of 7 rows 4 were cut to the {length} tokens ")
    assert "and 2 left out, whose prompt alone fills that" in err
    assert err.count("\n") == 1
    whole = tokenized(path, max_seq_len=length, train_on_inputs=True)
    assert [row["input_ids"] for row in whole] == [row["input_ids"] for row in rows]
    assert all(row["labels"] == row["input_ids"] for row in whole)
    assert capsys.readouterr().err == err


def test_no_row_left_is_an_error_that_tells_the_lengths(tmp_path):
    path = write_rows(tmp_path / "rows.json", ("aaa", "b"), ("a", "b"))
    shortest = prompt_length("a")
    message = (
        f"{path}: .* has {shortest} tokens, .* leaves {shortest}; give --max_seq_len {shortest + 1}"
    )
    with pytest.raises(ValueError, match=message):
        tokenized(path, max_seq_len=shortest)
    assert len(tokenized(path, max_seq_len=shortest + 1)) == 1


# Split and batches


def test_a_split_takes_every_row_once_and_depends_on_the_seed_alone():
    rows = list(range(20))
    train, held_out = split_dataset(rows, 6, seed=1)
    assert len(held_out) == 6
    assert sorted(train + held_out) == rows
    assert held_out not in (rows[:6], rows[14:])
    torch.manual_seed(5)
    assert split_dataset(rows, 6, seed=1) == (train, held_out)
    assert split_dataset(rows, 6, seed=2) != (train, held_out)
    assert split_dataset(rows, 0, seed=1) == (rows, None)
    assert len(split_dataset(rows, 19, seed=1)[0]) == 1
    for nothing_left in (-1, 20, 21):
        with pytest.raises(ValueError, match=f"val_set_size {nothing_left} .* 20 rows"):
            split_dataset(rows, nothing_left, seed=1)


def test_a_batch_is_padded_on_the_right_to_its_longest_row():
    rows = [([1, 2, 3], [-100, 2, 3]), ([4], [4]), ([9, 9], [9, 9])]  # 9 is also used to pad
    names = ("input_ids", "labels")
    rows = [dict(zip(names, torch.tensor(row, dtype=torch.int32))) for row in rows]
    batch = collate(rows, pad_id=9)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9], [9, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100], [9, 9, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


# The data of this repository

SKELETON = re.compile(r"In short: ([^\n]+)\nWhy: ([^\n]+)\nTry this: ([^\n]+)")
UNSEEN = (  # asked before and after tuning
    *("give three tips for staying healthy", "what causes rain"),
    *("how do i learn to cook", "why is sleep important"),
)


def test_every_short_answer_obeys_the_skeleton_and_no_two_are_alike():
    rows = load_instructions(SHORT_ANSWERS)
    for row in rows:
        match = SKELETON.fullmatch(row["output"])
        assert match, row
        for part, most in zip(match.groups(), (15, 18, 15)):
            assert len(part.split()) <= most, part
            assert part == part.strip()
            assert re.fullmatch(r"[^.!?](?:[^.!?]|\.(?=\d))*[.?]", part), part  # one sentence
    instructions = [re.sub(r"\W+", " ", row["instruction"].lower()) for row in rows]
    lines = [line for row in rows for line in row["output"].split("\n")]
    for texts in (instructions, lines):
        assert len(set(texts)) == len(texts) >= 200
    assert not [question for question in UNSEEN if question in " ".join(instructions)]


def test_the_short_answers_are_as_their_readme_says_in_a_folder_that_is_no_package():
    text = SHORT_ANSWERS.read_text(encoding="utf-8")
    rows = json.loads(text)
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert text == json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    n_inputs = sum(bool(row["input"]) for row in rows)
    assert n_inputs >= 20
    readme = SHORT_ANSWERS.with_name("README.md").read_text(encoding="utf-8")
    assert f"{len(rows)}, of which {n_inputs} with an input" in readme
    assert not SHORT_ANSWERS.with_name("__init__.py").exists()


def test_short_answers_fit_the_usual_length(tokenizer, capsys):
    assert len(tokenized(SHORT_ANSWERS, tokenizer, 256)) == len(load_instructions(SHORT_ANSWERS))
    assert capsys.readouterr().err == ""


def test_the_chat_template_of_a_tuned_prompt_gives_what_it_was_trained_on(tokenizer):
    template = ChatTemplate(alpaca_chat_template(tokenizer), tokenizer)
    for instruction in ("Name a river.", " {% raw %}\n\n{{ x }} 你好 ", "### Response:"):
        messages = [{"role": "user", "content": instruction}]
        assert template.ids(messages) == tokenizer.encode(alpaca_prompt(instruction))
    more = [*messages, {"role": "assistant", "content": "One"}, {"role": "user", "content": "Two"}]
    after = tokenizer.decode(template.ids(more)).removeprefix(alpaca_prompt(instruction))
    assert after == "One\n\n### Instruction:\nTwo\n\n### Response:"
    with pytest.raises(ValueError, match="takes no system message"):
        template.ids([{"role": "system", "content": "Be kind"}, *messages])
