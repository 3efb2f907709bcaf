"""Promises of llama/data.py and of the data in datasets/."""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import REPO, TOKENIZERS

from llama import data
from llama.data import (
    ALPACA_PREAMBLE,
    Collator,
    alpaca_prompt,
    load_instructions,
    split_dataset,
    tokenize_dataset,
)
from llama.tokenizer import Tokenizer

SHORT_ANSWERS = REPO / "datasets" / "short_answers.json"
BEGINNING = "Below is an instruction that describes a task"
ENDING = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
OUTPUTS = ("In short: yes.", "", " spaced", "\nnext line", "1 + 1 = 2", "北京 🦙", ")")


class ByteTokenizer:
    """A token a byte; counts what it is asked to encode."""

    n_words = 259
    bos_id = 256
    eos_id = 257

    def __init__(self):
        self.calls = 0

    def encode(self, s, *, bos=True, eos=False):
        self.calls += 1
        return [self.bos_id] * bos + list(s.encode()) + [self.eos_id] * eos


class MergingTokenizer(ByteTokenizer):
    """Makes one token of a colon and a closing bracket, as byte-pair merging may."""

    def encode(self, s, *, bos=True, eos=False):
        ids = super().encode(s.replace(":)", "\0"), bos=bos, eos=eos)
        return [258 if i == 0 else i for i in ids]


@pytest.fixture(scope="module")
def sentencepiece():
    return Tokenizer(TOKENIZERS["sentencepiece"][0])


@pytest.fixture(scope="module")
def tiktoken():
    return Tokenizer(TOKENIZERS["tiktoken"][0])


def write_rows(path: Path, *rows: tuple[str, ...]) -> Path:
    """A JSON array of (instruction, output) or (instruction, output, input)."""
    keys = ("instruction", "output", "input")
    path.write_text(json.dumps([dict(zip(keys, row)) for row in rows]), encoding="utf-8")
    return path


def prompt_length(instruction: str, input: str = "") -> int:
    return len(ByteTokenizer().encode(alpaca_prompt(instruction, input)))


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def learned(row: dict) -> list[int]:
    return [label for label in row["labels"] if label != -100]


# Prompts


def test_prompts_are_alpacas_to_the_letter():
    assert alpaca_prompt("Do it") == f"{BEGINNING}. {ENDING}Do it\n\n### Response:"
    assert alpaca_prompt("Do it", "now") == (
        f"{BEGINNING}, paired with an input that provides further context. {ENDING}Do it\n\n"
        "### Input:\nnow\n\n### Response:"
    )


def test_preamble_is_how_the_prompt_without_input_begins():
    assert alpaca_prompt("x").startswith(ALPACA_PREAMBLE + "\n\n### Instruction:")
    assert ALPACA_PREAMBLE.endswith("completes the request.")


@pytest.mark.parametrize("text", ["{instruction}", "{input}", "{}", "{{x}}", "{0}", "a % b \\1"])
def test_braces_in_a_users_text_survive(text):
    assert f"\n{text}\n" in alpaca_prompt(text)
    assert f"### Instruction:\n{text}\n\n### Input:\n{text}\n" in alpaca_prompt(text, text)


# Rows from files

ROWS = [
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "Add", "input": "1, 2", "output": "3\u2028three"},
]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff\n " + json.dumps(ROWS, ensure_ascii=False),
        "\n".join(json.dumps(row) for row in ROWS),
        "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\n",
    ],
    ids=["array", "indented array", "array after BOM", "lines", "lines with CRLF and gaps"],
)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_array_and_lines_are_told_apart_by_content(tmp_path, text, name):
    (tmp_path / name).write_bytes(text.encode())
    assert load_instructions(tmp_path / name) == ROWS
    assert load_instructions(str(tmp_path / name)) == ROWS


def test_input_may_be_left_out_and_other_keys_do_no_harm(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[{"output": "b", "text": 3, "instruction": "a"}]')
    assert load_instructions(path) == [{"instruction": "a", "input": "", "output": "b"}]


GOOD = '{"instruction": "a", "output": "b"}'
BAD_ROWS = {
    "no instruction": ('{"output": "b"}', 'no "instruction"'),
    "no output": ('{"instruction": "a"}', 'no "output"'),
    "instruction is a number": ('{"instruction": 1, "output": "b"}', '"instruction" is not a text'),
    "output is null": ('{"instruction": "a", "output": null}', '"output" is not a text'),
    "input is a list": ('{"instruction": "a", "output": "b", "input": []}', '"input" is not a te'),
    "half a surrogate pair": (r'{"instruction": "a", "output": "\ud83e"}', "cut in half"),
    "a list": ("[1]", "not an object but list"),
    "a string": ('"a"', "not an object but str"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_with_path_and_number(tmp_path, row, message):
    array = tmp_path / "array.json"
    array.write_text(f"[{GOOD},\n\n{GOOD}, {row}, {GOOD}]")
    with pytest.raises(ValueError, match=re.escape(f"{array}, row 3: ")) as error:
        load_instructions(array)
    assert message in str(error.value)

    lines = tmp_path / "lines.json"
    lines.write_text(f"{GOOD}\n\n{GOOD}\n{row}\n{GOOD}\n")
    with pytest.raises(ValueError, match=re.escape(f"{lines}, line 4: ")) as error:
        load_instructions(lines)
    assert message in str(error.value)


BAD_FILES = {
    "empty": (b"", "empty"),
    "blank": (b" \n\t\n", "empty"),
    "no rows": (b"[]", "no row"),
    "prose": (b"instruction,output\na,b\n", "line 1, column 1: not JSON"),
    "array cut short": (f"[{GOOD},\n{GOOD}".encode(), "line 2, column 36: not JSON"),
    "line cut short": (f"{GOOD}\n\n{GOOD[:-1]}".encode(), "line 3, column 35: not JSON"),
    "one object": (b'{\n"data": [\n' + GOOD.encode() + b"]}", "one JSON value over several lines"),
    "a number": (b"3", "line 1: not an object but int"),
    "not UTF-8": (GOOD.replace("a", "é").encode("latin-1"), "not UTF-8"),
    "nested too deep": (b"[" * 200_000, "not JSON"),
    "number too long": (b"[" + b"9" * 10_000 + b"]", "not JSON"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_dataset_is_told_with_its_path(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        load_instructions(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told_with_its_path(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            load_instructions(path)
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            tokenize_dataset(path, ByteTokenizer(), 10)


# Tokens and labels


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_prompt_ids_are_those_that_generation_feeds(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    rows = [("Say {x}", output, extra) for output in OUTPUTS for extra in ("", "é 北京 ")]
    path = write_rows(tmp_path / "rows.json", *rows)
    dataset = tokenize_dataset(path, tokenizer, 512)
    assert dataset.column_names == ["input_ids", "labels"]
    assert len(dataset) == len(rows)
    for (instruction, _, extra), row in zip(rows, dataset):
        prompt = tokenizer.encode(alpaca_prompt(instruction, extra), bos=True)
        assert row["input_ids"][: len(prompt)] == prompt
        response = row["input_ids"][len(prompt) :]
        assert response[-1] == tokenizer.eos_id
        assert row["labels"] == [-100] * len(prompt) + response


@pytest.mark.parametrize("output", OUTPUTS)
def test_response_has_no_space_that_sentencepiece_makes_up(sentencepiece, tmp_path, output):
    path = write_rows(tmp_path / "rows.json", ("Say it", output))
    response = learned(tokenize_dataset(path, sentencepiece, 512)[0])
    prompt = alpaca_prompt("Say it")
    whole = sentencepiece.encode(prompt + output, bos=True, eos=True)
    assert sentencepiece.encode(prompt, bos=True) + response == whole
    if output.strip():  # encoded alone it would be another text: that of " " + output
        assert response[:-1] != sentencepiece.encode(output, bos=False)


@pytest.mark.parametrize("kind", ["sentencepiece", "tiktoken"])
def test_prompt_and_response_decode_to_the_whole_text(kind, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    path = write_rows(tmp_path / "rows.json", *(("Say it", output) for output in OUTPUTS))
    for output, row in zip(OUTPUTS, tokenize_dataset(path, tokenizer, 512)):
        assert tokenizer.decode(row["input_ids"]) == alpaca_prompt("Say it") + output


def test_a_token_across_prompt_and_response_is_not_used(tmp_path):
    tokenizer = MergingTokenizer()
    path = write_rows(tmp_path / "rows.json", ("Smile :)", ") :)"))
    row = tokenize_dataset(path, tokenizer, 512)[0]
    prompt = tokenizer.encode(alpaca_prompt("Smile :)"))
    assert 258 in prompt
    assert row["input_ids"] == [*prompt, *b") ", 258, tokenizer.eos_id]
    assert learned(row) == [*b") ", 258, tokenizer.eos_id]


@pytest.mark.parametrize(("kind", "output"), [("sentencepiece", ":-)"), ("tiktoken", "\nnext")])
def test_a_response_that_merges_with_the_prompt_is_encoded_alone(kind, output, request, tmp_path):
    tokenizer = request.getfixturevalue(kind)
    prompt = alpaca_prompt("Say it")
    prompt_ids = tokenizer.encode(prompt, bos=True)
    merged = tokenizer.encode(prompt + output, bos=True)
    assert merged[: len(prompt_ids)] != prompt_ids  # else this test shows nothing
    row = tokenize_dataset(write_rows(tmp_path / "rows.json", ("Say it", output)), tokenizer, 512)[
        0
    ]
    alone = tokenizer.encode(output, bos=False, eos=True)
    assert row["input_ids"] == prompt_ids + alone
    assert learned(row) == alone


def test_train_on_inputs_learns_the_prompt_too(tmp_path):
    path = write_rows(tmp_path / "rows.json", ("a", "b"), ("c", "d", "e"))
    masked = tokenize_dataset(path, ByteTokenizer(), 512)
    dataset = tokenize_dataset(path, ByteTokenizer(), 512, train_on_inputs=True)
    assert dataset["input_ids"] == masked["input_ids"]
    for row in dataset:
        assert row["labels"] == row["input_ids"]


def test_a_tokenizer_without_bos_serves(tmp_path):
    class NoBos(ByteTokenizer):
        def encode(self, s, *, bos=True, eos=False):
            return super().encode(s, bos=False, eos=eos)

    path = write_rows(tmp_path / "rows.json", ("a", "b"))
    row = tokenize_dataset(path, NoBos(), 512)[0]
    assert row["input_ids"] == [*(alpaca_prompt("a") + "b").encode(), 257]
    assert learned(row) == [ord("b"), 257]


# Length


def test_long_rows_are_cut_and_counted_in_one_message(tmp_path):
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
    said = []
    dataset = tokenize_dataset(path, ByteTokenizer(), length, say=said.append)
    assert [bytes(learned(row)[:4]) for row in dataset if 257 not in row["labels"]] == [
        b"1234",
        b"1234",
        b"12",
        b"1",
    ]
    assert learned(dataset[0]) == [*b"123", 257]
    assert all(len(row["input_ids"]) == len(row["labels"]) == length for row in dataset)
    assert len(said) == 1
    assert str(path) in said[0]
    assert "cut 4 of 7 rows to max_seq_len" in said[0]
    assert "left out 2 of 7 rows" in said[0]


def test_train_on_inputs_cuts_and_leaves_out_the_same_rows(tmp_path):
    path = write_rows(tmp_path / "rows.json", ("a", "12345"), ("a" * 99, "1"))
    said = []
    kwargs = {"say": said.append}
    length = prompt_length("a") + 2
    masked = tokenize_dataset(path, ByteTokenizer(), length, **kwargs)
    dataset = tokenize_dataset(path, ByteTokenizer(), length, train_on_inputs=True, **kwargs)
    assert len(dataset) == 1
    assert dataset["input_ids"] == masked["input_ids"]
    assert said[0] == said[1]


def test_nothing_is_said_when_all_rows_fit(tmp_path, capfd):
    path = write_rows(tmp_path / "rows.json", ("a", "b"))
    said = []
    tokenize_dataset(path, ByteTokenizer(), prompt_length("a") + 2, say=said.append)
    assert said == []
    tokenize_dataset(path, ByteTokenizer(), 512, cache_dir=tmp_path / "cache")
    assert capfd.readouterr() == ("", "")


def test_the_message_goes_to_stderr(tmp_path, capfd):
    path = write_rows(tmp_path / "rows.json", ("a", "bcd"))
    tokenize_dataset(path, ByteTokenizer(), prompt_length("a") + 2)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "cut 1 of 1 rows" in err


def test_no_row_left_is_an_error_that_tells_the_lengths(tmp_path):
    path = write_rows(tmp_path / "rows.json", ("aaa", "b"), ("a", "b"))
    shortest = prompt_length("a")
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        tokenize_dataset(path, ByteTokenizer(), shortest, cache_dir=tmp_path / "cache")
    assert f"--max_seq_len {shortest}" in str(error.value)
    assert f"{shortest} tokens" in str(error.value)
    assert not (tmp_path / "cache").exists()
    assert len(tokenize_dataset(path, ByteTokenizer(), shortest + 1, say=str)) == 1


# Cache


@pytest.fixture
def cached(tmp_path):
    """A file whose rows are cut, and a cache that holds them: call it to tokenise once more."""
    path = write_rows(tmp_path / "rows.json", ("a", "bcdef"), ("c", "d", "e"))
    length = prompt_length("c", "e") + 1

    def tokenize(tokenizer=None, max_seq_len=length, **kwargs):
        tokenizer = tokenizer or ByteTokenizer()
        said = []
        kwargs = {"cache_dir": tmp_path / "cache", "say": said.append} | kwargs
        dataset = tokenize_dataset(path, tokenizer, max_seq_len, **kwargs)
        return dataset, tokenizer.calls, said

    tokenize.path = path
    tokenize.folder = tmp_path / "cache"
    tokenize.first = tokenize()
    return tokenize


PROBES = 1  # encode calls that it takes to know a tokenizer


def test_a_second_call_does_not_tokenise(cached):
    dataset, calls, said = cached()
    first, first_calls, first_said = cached.first
    assert first_calls > PROBES
    assert calls == PROBES
    assert dataset.to_list() == first.to_list()
    assert dataset.features == first.features
    assert said == first_said  # the rows are still cut, so it is still said
    assert len(said) == 1


def test_without_cache_dir_nothing_is_kept(tmp_path, monkeypatch, cached):
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    dataset, calls, _ = cached(cache_dir=None)
    assert calls == cached.first[1] - PROBES
    assert dataset.to_list() == cached.first[0].to_list()
    assert files_below(tmp_path) == before


def test_a_cache_hit_does_not_read_the_rows(cached, monkeypatch):
    monkeypatch.setattr(data, "_parse_rows", None)
    assert cached()[0].to_list() == cached.first[0].to_list()


def test_the_cache_follows_content_not_name_or_time(cached):
    moved = cached.path.rename(cached.path.with_name("other.json"))
    tokenizer = ByteTokenizer()
    tokenize_dataset(
        moved, tokenizer, prompt_length("c", "e") + 1, cache_dir=cached.folder, say=str
    )
    assert tokenizer.calls == PROBES


class OtherBytes(ByteTokenizer):
    def encode(self, s, *, bos=True, eos=False):
        return [i ^ 1 if i < 256 else i for i in super().encode(s, bos=bos, eos=eos)]


class OtherBos(ByteTokenizer):
    bos_id = 258


class OtherEos(ByteTokenizer):
    eos_id = 258


class OtherSize(ByteTokenizer):
    n_words = 300


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": OtherBytes},
        {"tokenizer": OtherBos},
        {"tokenizer": OtherEos},
        {"tokenizer": OtherSize},
        {"max_seq_len": 512},
        {"train_on_inputs": True},
        {"cut": True},
        {"version": True},
    ],
    ids=["ids", "bos_id", "eos_id", "n_words", "max_seq_len", "train_on_inputs", "file", "version"],
)
def test_whatever_changes_the_tokens_makes_a_new_entry(cached, change, monkeypatch):
    if change.pop("cut", False):
        write_rows(cached.path, ("a", "bcdef"))
    if change.pop("version", False):
        monkeypatch.setattr(data, "CACHE_VERSION", data.CACHE_VERSION + 1)
    tokenizer = change.pop("tokenizer", ByteTokenizer)
    dataset, calls, _ = cached(tokenizer(), **change)
    assert calls > PROBES
    assert dataset.to_list() == cached(tokenizer(), cache_dir=None, **change)[0].to_list()
    assert len(list(cached.folder.iterdir())) == 2
    assert cached()[0].column_names == ["input_ids", "labels"]


def damage(folder: Path, how: str) -> None:
    (arrow,) = folder.glob("*.arrow")
    content = bytearray(arrow.read_bytes())
    if how == "arrow missing":
        arrow.unlink()
    elif how == "arrow cut short":
        arrow.write_bytes(content[: len(content) // 2])
    elif how == "arrow emptied":
        arrow.write_bytes(b"")
    elif how == "one bit of a token":
        content[len(content) // 2] ^= 1
        arrow.write_bytes(content)
    elif how == "manifest missing":
        (folder / data.CACHE_MANIFEST).unlink()
    elif how == "manifest not JSON":
        (folder / data.CACHE_MANIFEST).write_text("{")
    elif how == "manifest a list":
        (folder / data.CACHE_MANIFEST).write_text("[]")
    elif how == "info missing":
        (folder / "dataset_info.json").unlink()
    elif how == "empty folder":
        for path in folder.iterdir():
            path.unlink()
    elif how == "a file":
        damage(folder, "empty folder")
        folder.rmdir()
        folder.write_text("x")


@pytest.mark.parametrize(
    "how",
    [
        "arrow missing",
        "arrow cut short",
        "arrow emptied",
        "one bit of a token",
        "manifest missing",
        "manifest not JSON",
        "manifest a list",
        "info missing",
        "empty folder",
        "a file",
    ],
)
def test_a_damaged_cache_is_made_again(cached, how):
    expected = cached(cache_dir=None)[0].to_list()
    (folder,) = cached.folder.iterdir()
    damage(folder, how)
    dataset, calls, said = cached()
    assert calls == cached.first[1]
    assert dataset.to_list() == expected
    assert said == cached.first[2]
    assert list(cached.folder.iterdir()) == [folder]
    assert cached()[1] == PROBES


def test_a_file_that_the_library_adds_is_no_damage(cached):
    (folder,) = cached.folder.iterdir()
    cached()[0].map(lambda row: {"length": len(row["labels"])})
    assert len(list(folder.glob("*.arrow"))) == 2  # map() keeps its result there
    assert cached()[1] == PROBES


def test_a_failed_write_leaves_no_trace(cached, monkeypatch):
    import datasets

    def fail(self, path):
        Path(path).mkdir()
        raise OSError(28, "No space left on device", path)

    before = files_below(cached.folder)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", fail)
        with pytest.raises(OSError, match="No space left"):
            cached(max_seq_len=512)
    assert files_below(cached.folder) == before
    assert len(list(cached.folder.iterdir())) == 1
    assert len(cached(max_seq_len=512)[0]) == 2


def test_the_slower_of_two_processes_leaves_the_entry_of_the_faster(cached, tmp_path, monkeypatch):
    (folder,) = cached.folder.iterdir()
    before = files_below(folder)
    dataset, notice = cached.first[0], "slower"
    data._save_cached(dataset, notice, folder)
    assert files_below(folder) == before
    assert list(cached.folder.iterdir()) == [folder]


def tokenize_together(path, cache_dir, max_seq_len, barrier, results):
    tokenizer = ByteTokenizer()
    said = []
    for _ in range(4):
        barrier.wait(60)
        dataset = tokenize_dataset(
            path, tokenizer, max_seq_len, cache_dir=cache_dir, say=said.append
        )
    results.put((dataset.to_list(), len(said), tokenizer.calls))


@pytest.mark.parametrize("damaged", [False, True], ids=["new", "damaged"])
def test_processes_that_tokenise_at_once_agree(cached, tmp_path, damaged):
    folder = cached.folder if damaged else tmp_path / "new"
    if damaged:
        (entry,) = folder.iterdir()
        damage(entry, "one bit of a token")
    # fork: torch and datasets are loaded, so that all are ready within milliseconds
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    args = (cached.path, folder, prompt_length("c", "e") + 1, barrier, results)
    workers = [context.Process(target=tokenize_together, args=args) for _ in range(4)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    expected = cached(cache_dir=None)[0].to_list()
    assert all(rows == expected and said == 4 for rows, said, _ in answers)
    assert len(list(folder.iterdir())) == 1
    assert cached(cache_dir=folder)[1] == PROBES


def test_progress_bars_are_as_they_were(cached):
    import datasets

    assert not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        cached(max_seq_len=512)
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()


def test_without_the_package_the_error_names_it(tmp_path):
    """Our folder of JSON files makes `import datasets` succeed."""
    path = write_rows(tmp_path / "rows.json", ("a", "b"))
    code = f"""
import sys
class Absent:  # finds our folder alone, as if nothing were installed under that name
    def find_spec(self, name, path=None, target=None):
        if name == "datasets":
            from importlib.machinery import PathFinder
            return PathFinder.find_spec(name, [{str(REPO)!r}])
sys.meta_path.insert(0, Absent())
import datasets
from llama.data import alpaca_prompt, load_instructions, tokenize_dataset
print(datasets.__path__, alpaca_prompt("x")[-9:], load_instructions({str(path)!r}))
tokenize_dataset({str(path)!r}, None, 1)
"""
    env = os.environ | {"PYTHONPATH": str(REPO)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert str(REPO / "datasets") in result.stdout
    assert "esponse:" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("ImportError: ")
    assert "pip install datasets" in result.stderr.splitlines()[-1]


# Split


@pytest.fixture
def numbered(tmp_path):
    """A cached dataset of 20 rows, the row's number being its response."""
    path = write_rows(tmp_path / "rows.json", *(("a", chr(65 + i)) for i in range(20)))
    return tokenize_dataset(path, ByteTokenizer(), 512, cache_dir=tmp_path / "cache")


def numbers(dataset) -> list[int]:
    return [learned(row)[0] - 65 for row in dataset]


def test_a_split_takes_every_row_once(numbered):
    train, held_out = split_dataset(numbered, 6, seed=1)
    assert len(held_out) == 6
    assert sorted(numbers(train) + numbers(held_out)) == list(range(20))
    assert numbers(held_out) not in (list(range(6)), list(range(14, 20)))


def test_a_split_depends_on_the_seed_alone(numbered):
    first = [numbers(part) for part in split_dataset(numbered, 6, seed=1)]
    torch.manual_seed(5)
    assert [numbers(part) for part in split_dataset(numbered, 6, seed=1)] == first
    assert [numbers(part) for part in split_dataset(numbered, 6, seed=2)] != first


def test_a_split_writes_nothing_beside_the_cache(numbered, tmp_path):
    before = files_below(tmp_path)
    for part in split_dataset(numbered, 6, seed=1):
        numbers(part)
    assert files_below(tmp_path) == before


def test_without_validation_rows_all_are_trained_on(numbered):
    train, held_out = split_dataset(numbered, 0, seed=1)
    assert numbers(train) == list(range(20))
    assert held_out is None


@pytest.mark.parametrize("val_set_size", [-1, 20, 21])
def test_a_split_that_leaves_nothing_is_an_error(numbered, val_set_size):
    with pytest.raises(ValueError, match=f"val_set_size {val_set_size} .* 20 rows"):
        split_dataset(numbered, val_set_size, seed=1)
    assert len(split_dataset(numbered, 19, seed=1)[0]) == 1


# Batches


def test_a_batch_is_padded_on_the_right_to_its_longest_row():
    batch = Collator(pad_id=9)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
            {"input_ids": [4], "labels": [4]},
            {"input_ids": [9, 9], "labels": [9, 9]},  # an id that is also used to pad
        ]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9], [9, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100], [9, 9, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_can_be_made_of_a_datasets_rows(tmp_path):
    path = write_rows(tmp_path / "rows.json", ("a", "bcd"), ("ab", ""))
    dataset = tokenize_dataset(path, ByteTokenizer(), 512, cache_dir=tmp_path / "cache")
    batch = Collator(pad_id=0)(list(dataset))
    for row, ids, mask, labels in zip(dataset, *batch.values()):
        n = len(row["input_ids"])
        assert ids.tolist() == row["input_ids"] + [0] * (ids.numel() - n)
        assert mask.tolist() == [1] * n + [0] * (ids.numel() - n)
        assert labels.tolist() == row["labels"] + [-100] * (ids.numel() - n)


# The data of this repository

SKELETON = re.compile(r"In short: ([^\n]+)\nWhy: ([^\n]+)\nTry this: ([^\n]+)")
UNSEEN = (  # asked before and after tuning
    "Give three tips for staying healthy",
    "What causes rain?",
    "How do I learn to cook?",
    "Why is sleep important?",
)


@pytest.fixture(scope="module")
def short_answers():
    return load_instructions(SHORT_ANSWERS)


def test_every_short_answer_obeys_the_skeleton(short_answers):
    for row in short_answers:
        match = SKELETON.fullmatch(row["output"])
        assert match, row
        for part, most in zip(match.groups(), (15, 18, 15)):
            assert len(part.split()) <= most, part
            assert part == part.strip()
            assert re.fullmatch(r"[^.!?](?:[^.!?]|\.(?=\d))*[.?]", part), part  # one sentence


def test_short_answers_are_many_and_all_different(short_answers):
    assert len(short_answers) >= 200
    assert sum(bool(row["input"]) for row in short_answers) >= 20
    instructions = Counter(re.sub(r"\W+", " ", r["instruction"].lower()) for r in short_answers)
    assert instructions.most_common(1)[0][1] == 1
    lines = Counter(line for row in short_answers for line in row["output"].split("\n"))
    assert lines.most_common(1)[0][1] == 1


def test_short_answers_leave_the_demos_questions_unseen(short_answers):
    seen = " ".join(row["instruction"].lower() for row in short_answers)
    for question in UNSEEN:
        assert question.lower().rstrip("?") not in seen


def test_short_answers_file_is_in_its_plain_form():
    text = SHORT_ANSWERS.read_text(encoding="utf-8")
    rows = json.loads(text)
    assert all(list(row) == ["instruction", "input", "output"] for row in rows)
    assert text == json.dumps(rows, ensure_ascii=False, indent=1) + "\n"


def test_readme_counts_the_rows(short_answers):
    readme = (REPO / "datasets" / "README.md").read_text(encoding="utf-8")
    n_inputs = sum(bool(row["input"]) for row in short_answers)
    assert f"{len(short_answers)}, of which {n_inputs} with an input" in readme


def test_short_answers_fit_the_usual_length(short_answers, sentencepiece):
    said = []
    dataset = tokenize_dataset(SHORT_ANSWERS, sentencepiece, 256, say=said.append)
    assert said == []
    assert len(dataset) == len(short_answers)


def test_the_folder_datasets_is_no_package():
    assert not (REPO / "datasets" / "__init__.py").exists()
