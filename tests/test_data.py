"""Tokenised datasets: mapped, counted, split, in batches; and the data in datasets/."""

import itertools
import json
import re
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import REPO, TOKENIZERS
from test_rows import CHAT, FILES
from test_templates import CHATML, ByteTokenizer, chat_encoder

from datasets import Dataset
from llama.tokenizer import Tokenizer
from llama.tuning.data import (
    LengthGrouped,
    collate,
    column,
    init_ids,
    split_dataset,
    tokenize_dataset,
)
from llama.tuning.options import TuningOptions
from llama.tuning.rows import read_rows
from llama.tuning.templates import alpaca_prompt

SHORT_ANSWERS = REPO / "datasets" / "short_answers.json"


def write_rows(path: Path, *rows: tuple[str, ...]) -> Path:
    """A JSON array of (instruction, output) or (instruction, output, input)."""
    keys = ("instruction", "output", "input")
    path.write_text(json.dumps([dict(zip(keys, row)) for row in rows]), encoding="utf-8")
    return path


def tokenized(path: Path, tokenizer=None, max_seq_len: int = 512, **options) -> list[dict]:
    """The rows of a file as lists of numbers."""
    rows = tokenize_dataset(path, tokenizer or ByteTokenizer(), max_seq_len, **options).rows
    return [{name: tensor.tolist() for name, tensor in row.items()} for row in rows]


def prompt_length(instruction: str) -> int:
    return len(ByteTokenizer().encode(alpaca_prompt(instruction)))


def learned(row: dict) -> list[int]:
    return [label for label in row["labels"] if label != -100]


def test_tokens_lie_in_a_mapped_file_that_has_no_name(tmp_path):
    path = write_rows(tmp_path / "rows.json", *[("Say it", f"answer {i}") for i in range(500)])
    before = {*Path(tempfile.gettempdir()).iterdir()}
    rows = tokenize_dataset(path, ByteTokenizer(), 512).rows
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "deleted" in line]
    assert any(line.split()[-2].startswith(tempfile.gettempdir()) for line in maps)
    assert {*Path(tempfile.gettempdir()).iterdir()} <= before
    assert isinstance(rows, Dataset)
    assert bytes(learned({"labels": rows[499]["labels"].tolist()})[:-1]) == b"answer 499"
    lengths = [len(row["input_ids"]) for row in rows]
    assert column(rows, "length") == lengths
    assert column(rows.select([7, 3]), "n_learned") == [len("answer 7") + 1] * 2


def test_the_hash_of_tokens_depends_on_rows_template_and_labels_not_on_the_format(tmp_path):
    rows = [{"instruction": "Say it", "input": "", "output": str(i)} for i in range(300)]
    tokenizer = chat_encoder(tmp_path / "m", CHATML).template.tokenizer
    found = {}
    for name, write in FILES.items():
        write(tmp_path / name, rows)
        found[name] = tokenize_dataset(tmp_path / name, tokenizer, 512).hashes
    assert len({x["tokens_sha256"] for x in found.values()}) == 1
    assert found["rows.csv"]["dataset_sha256"] != found["rows.json"]["dataset_sha256"]
    assert found["saved"]["dataset_sha256"] != found["saved_with_splits"]["dataset_sha256"]
    ways = [{"template": "chat"}, {"template": "none"}, {"train_on_inputs": True}]
    ways += [{"columns": "output=instruction,instruction=output"}, {"max_seq_len": 138}]
    others = [
        tokenize_dataset(tmp_path / "rows.json", tokenizer, **({"max_seq_len": 512} | way))
        for way in ways
    ]
    assert len({x.hashes["tokens_sha256"] for x in others} | {found["rows"]["tokens_sha256"]}) == 6
    templates = [x.chat_template for x in others]
    assert templates[:2] == [CHATML, None]
    assert "### Instruction" in templates[2]


def test_a_conversation_that_cannot_be_learned_is_told_with_its_row_and_the_template(tmp_path):
    encoder = chat_encoder(
        tmp_path / "m", CHATML.replace("'content'", "'content'].upper() ~ m['x'")
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    place = f"{tmp_path / 'rows.jsonl'}, line 1: {tmp_path / 'm' / 'chat_template.jinja'}: "
    with pytest.raises(ValueError, match=f"^{re.escape(place)}in this chat template") as error:
        tokenize_dataset(tmp_path / "rows.jsonl", encoder.template.tokenizer, 512)
    assert "\n" not in str(error.value)
    tokenizer = Tokenizer(TOKENIZERS["sentencepiece"][0])
    tokenizer.special_tokens = {}
    with pytest.raises(ValueError, match="comes without a chat template"):
        tokenize_dataset(tmp_path / "rows.jsonl", tokenizer, 512)


def test_a_disk_that_is_too_full_for_the_tokens_is_one_line(tmp_path):
    path = write_rows(tmp_path / "rows.json", *[("Say it", f"answer {i}") for i in range(500)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        message = f"^{tempfile.gettempdir()}: cannot be written: .* bytes free"
        with pytest.raises(OSError, match=message) as error:
            tokenize_dataset(path, ByteTokenizer(), 512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)


# Length


def test_long_rows_are_cut_and_all_are_counted(tmp_path, capsys):
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
    what, counted = err.splitlines()
    assert what == (
        f"{path}: rows of instructions (instruction, output, perhaps input), in Alpaca's template"
    )
    assert counted == (
        f"{path}: 7 rows, of which 4 are cut at the end of the answer, and 2 left out, to fit into "
        f"the {length} tokens that --max_seq_len {length} leaves; 15 of {5 * length} tokens are "
        "learned"
    )
    whole = tokenized(path, max_seq_len=length + 9, num_virtual_tokens=9, train_on_inputs=True)
    assert [row["input_ids"] for row in whole] == [row["input_ids"] for row in rows]
    assert all(row["labels"] == row["input_ids"] for row in whole)
    assert f"--max_seq_len {length + 9} less the tuned prompt's 9 leaves" in capsys.readouterr().err


def test_conversations_that_are_cut_are_counted(tmp_path, capsys):
    tokenizer = chat_encoder(tmp_path / "m", CHATML).template.tokenizer
    path = tmp_path / "rows.jsonl"
    long = [*CHAT, {"role": "user", "content": "x " * 500}]
    rows = [
        CHAT,
        CHAT + CHAT[1:] * 20,
        [*CHAT[:1], {"role": "user", "content": "x " * 500}, CHAT[2]],
        long,
    ]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    assert len(tokenized(path, tokenizer, 100)) == 3
    assert re.search(
        r"4 rows, of which 1 are without their oldest turns, and 1 left out, to fit into the 100 "
        r"tokens .*; 1 end with a question, which is left out; \d+ of \d+ tokens are learned",
        capsys.readouterr().err,
    )


def test_no_row_left_is_an_error_that_tells_the_lengths(tmp_path):
    path = write_rows(tmp_path / "rows.json", ("aaa", "b"), ("a", "b"))
    shortest = prompt_length("a") + 1  # with a token of its answer, of which the end is cut
    message = f"{path}: no row fits into the {shortest - 1} .*: the shortest needs {shortest}; "
    with pytest.raises(ValueError, match=f"{message}give --max_seq_len {shortest} at least"):
        tokenized(path, max_seq_len=shortest - 1)
    assert len(tokenized(path, max_seq_len=shortest)) == 1


# Split and batches


def numbers(rows: Dataset | None) -> list[int]:
    return [] if rows is None else rows["number"][:]


def test_a_split_takes_every_row_once_and_depends_on_the_seed_alone():
    rows = Dataset.from_dict({"number": list(range(20))})
    train, held_out = map(numbers, split_dataset(rows, 6, seed=1))
    assert len(held_out) == 6
    assert sorted(train + held_out) == list(range(20))
    assert held_out not in (list(range(6)), list(range(14, 20)))
    torch.manual_seed(5)
    assert [*map(numbers, split_dataset(rows, 6, seed=1))] == [train, held_out]
    assert [*map(numbers, split_dataset(rows, 6, seed=2))] != [train, held_out]
    assert split_dataset(rows, 0, seed=1) == (rows, None)
    assert len(split_dataset(rows, 19, seed=1)[0]) == 1
    for nothing_left in (-1, 20, 21):
        with pytest.raises(ValueError, match=f"val_set_size {nothing_left} .* 20 rows"):
            split_dataset(rows, nothing_left, seed=1)


def test_a_prompt_starts_from_rows_of_which_the_last_is_whole_or_from_a_text():
    tokens = Dataset.from_dict({"input_ids": [[i] * (2 + i % 3) for i in range(50)]})

    def ids_of(n: int, seed: int = 0, **changes: object) -> list[int]:
        paths = dict.fromkeys(("ckpt_dir", "dataset_path", "output_dir"), "none")
        options = TuningOptions(**paths, num_virtual_tokens=n, seed=seed, **changes)
        return init_ids(options, ByteTokenizer(), tokens.with_format("torch"))

    def rows_of(ids: list[int]) -> list[list[int]]:
        return [list(row) for _, row in itertools.groupby(ids)]

    for n in (1, 10, 60):
        assert len(ids_of(n)) == n
        cut, *whole = rows_of(ids_of(n, init="rows"))
        assert all(row == [row[0]] * (2 + row[0] % 3) for row in whole)
        assert len(cut) <= 2 + cut[0] % 3
    assert ids_of(10) == ids_of(10) != ids_of(10, seed=1)
    total = sum(map(len, tokens["input_ids"]))
    once = ids_of(200)[-total:]  # all there is, behind what is there again
    assert len(ids_of(200)) == 200 > total
    assert sorted(map(tuple, rows_of(once))) == sorted(map(tuple, tokens["input_ids"]))
    assert ids_of(200)[: 200 - total] == once[total - 200 :]
    assert ids_of(5, init="text", init_prompt="Hi") == list(b"Hi")
    assert ids_of(5, init="vocab") == []


@pytest.mark.parametrize("n", [1, 7, 8, 100, 1003])
def test_batches_hold_every_row_once_and_rows_of_like_length(n):
    lengths = [i * 7919 % 200 + 20 for i in range(n)]
    order = LengthGrouped(lengths, batch_size=8, seed=3)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(n)) == list(range(len(order)))
    again = LengthGrouped(lengths, batch_size=8, seed=3)
    again.set_epoch(1)
    torch.manual_seed(5)
    assert list(again) == epochs[1]  # whatever came before
    if n > 8:
        assert epochs[0] != epochs[1] != list(LengthGrouped(lengths, 8, seed=4))
        firsts = [lengths[i] for i in epochs[0][: n - n % 8 : 8]]
        assert sorted(firsts) != firsts != sorted(firsts, reverse=True)
    if n > 100:
        grouped, in_random_order = map(int, re.findall(r"(\d+)%", order.padding()))
        assert grouped < 10 < 30 < in_random_order


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
    rows = [row for _, row in read_rows(SHORT_ANSWERS)[1]]
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


def test_short_answers_fit_the_usual_length(capsys):
    for path, _ in TOKENIZERS.values():
        rows = tokenize_dataset(SHORT_ANSWERS, Tokenizer(path), 256).rows
        assert len(rows) == len(json.loads(SHORT_ANSWERS.read_text(encoding="utf-8")))
        assert f"{SHORT_ANSWERS}: {len(rows)} rows, which all fit; " in capsys.readouterr().err
