"""Rows of training data: the same from every format, and one line for what is none.

Start reading at FILES, one dataset in all formats, and read(), its rows.
"""

import csv
import json
import os
import re
from array import array
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import datasets
from llama.tuning.rows import read_rows

ROWS = [
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "Add", "input": "1, 2", "output": "3\u2028three"},
]
CHAT = [
    {"role": "system", "content": "Be kind"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
SHAREGPT = [
    {"from": "system", "value": "Be kind"},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Hello"},
]


def read(path: Path | str, columns: str | None = None) -> list[dict]:
    return [row for _, row in read_rows(path, columns)[1]]


def json_array(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows), encoding="utf-8")


def json_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def csv_file(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def folder(path: Path, rows: list[dict]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def folder_of_one(path: Path, rows: list[dict]) -> None:
    found = {"train": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(found).save_to_disk(str(path))


FILES: dict[str, Callable[[Path, list[dict]], None]] = {
    **{"rows.json": json_array, "rows.jsonl": json_lines, "lines.json": json_lines},
    **{"rows.csv": csv_file, "ROWS.PARQUET": parquet, "rows": parquet, "named": json_array},
    **{"saved": folder, "saved_with_splits": folder_of_one},
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(tmp_path, name, capfd):
    more = [row | {"id": i, "other": "x"} for i, row in enumerate(ROWS * 300)]
    FILES[name](tmp_path / name, more)
    capfd.readouterr()
    form, rows = read_rows(tmp_path / name)
    assert [row for _, row in rows] == ROWS * 300
    assert form.name == "instructions"
    assert capfd.readouterr() == ("", "")  # the libraries are quiet


CHATS = {
    "OpenAI": {"messages": CHAT},
    "ShareGPT": {"conversations": SHAREGPT},
    "ShareGPT's column, OpenAI's names": {"conversations": CHAT},
    "with more": {"messages": [x | {"name": None} for x in CHAT], "prompt": "Hi", "text": "x"},
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "saved"])
def test_conversations_of_both_kinds_are_the_same(tmp_path, row, name):
    write = {"rows.jsonl": json_lines, "rows.parquet": parquet, "saved": folder}[name]
    write(tmp_path / name, [row] * 2)
    assert read(tmp_path / name) == [{"messages": CHAT}] * 2


KINDS = [  # columns, and what they are taken for
    ({"prompt": "a", "completion": "b"}, "prompts"),
    ({"text": "a"}, "texts"),
    ({"text": "a", "instruction": "a", "input": None, "output": "b"}, "instructions"),
    ({"conversations": SHAREGPT, "instruction": "a", "output": "b"}, "conversations"),
]


@pytest.mark.parametrize(("row", "kind"), KINDS)
def test_rows_are_told_apart_by_their_columns(tmp_path, row, kind):
    json_lines(tmp_path / "rows", [row])
    form, rows = read_rows(tmp_path / "rows")
    assert form.name == kind
    assert [row for _, row in rows]


def test_an_absent_input_is_none(tmp_path):
    json_lines(tmp_path / "a", [{"instruction": "a", "output": "b"}, ROWS[1] | {"input": None}])
    assert [row["input"] for row in read(tmp_path / "a")] == ["", ""]
    parquet(tmp_path / "b", [{"instruction": "a", "output": "b"}])
    assert [row["input"] for row in read(tmp_path / "b")] == [""]


def test_columns_are_mapped_and_ours_of_the_same_name_are_not_taken(tmp_path):
    row = {"my question": "q", "answer": "a", "output": "no", "context": "c"}
    columns = "my question=instruction, answer=output,context=input"
    for name, write in (("rows.csv", csv_file), ("rows.parquet", parquet)):
        write(tmp_path / name, [row])
        assert read(tmp_path / name, columns) == [{"instruction": "q", "input": "c", "output": "a"}]
    json_lines(tmp_path / "chat", [{"dialog": SHAREGPT}])
    assert read(tmp_path / "chat", "dialog=messages") == [{"messages": CHAT}]


BAD_COLUMNS = [
    (None, "unknown columns: question, answer, id; a row is .* instructions .instruction, output"),
    (None, "or|--columns question=instruction,answer=output"),
    ("questions=instruction", "no column 'questions', .* there are question, answer, id"),
    ("question=instruction,ansver=output", "no column 'ansver', .* there are question, answer, id"),
    ("question=instruction", "unknown columns: question, answer, id"),
    ("question", "--columns: wants .* instruction, .* not 'question'"),
    ("question=quest", "--columns: .* not 'question=quest'"),
    ("question=output,answer=output", "--columns: .* each once.* not 'answer=output'"),
    ("=output", "--columns: .* not '=output'"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_COLUMNS)
@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_unknown_columns_are_named_with_what_is_expected(tmp_path, name, columns, message):
    write = {"rows.csv": csv_file, "rows.parquet": parquet}[name]
    write(tmp_path / name, [{"question": "q", "answer": "a", "id": 3}])
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name, columns)
    assert "\n" not in str(error.value)


# JSON

FORMS = {
    "array": json.dumps(ROWS),
    "indented array": json.dumps(ROWS, indent=2),
    "array after BOM": "\ufeff\n " + json.dumps(ROWS, ensure_ascii=False) + "\n ",
    "other keys": json.dumps([{"output": "hi", "x": 3, "instruction": "Say hi"}, ROWS[1]]),
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "lines, gaps": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n\n",
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
def test_array_and_lines_are_told_apart_by_content(tmp_path, text, name, monkeypatch):
    (tmp_path / name).write_bytes(text.encode())
    for path in (tmp_path / name, str(tmp_path / name)):
        assert read(path) == ROWS
    for block in (1, 7):  # at whatever place a block ends
        monkeypatch.setattr("llama.tuning.rows.BLOCK", block)
        assert read(tmp_path / name) == ROWS


GOOD = '{"instruction": "a", "output": "b"}'
CONVERSATIONS = {
    "null": ("null", '"messages" must be a list'),
    "no message": ("[]", "at least one message"),
    "a text": ('"Hi"', '"messages" must be a list'),
    "a number": ("[3]", "message 1: expected a role"),
    "no role": ('[{"content": "x"}]', "message 1: expected a role"),
    "another role": ('[{"from": "bing", "value": "x"}]', "message 1: expected a role"),
    "a role that is a list": ('[{"from": [], "value": "x"}]', "message 1: expected a role"),
    "content is null": ('[{"role": "user", "content": null}]', "message 1: .* a text as content"),
    "value is absent": ('[{"from": "human"}]', "message 1: .* a text as content"),
    "no answer": ('[{"role": "user", "content": "x"}]', "no message of an assistant"),
    "the assistant first": (
        '[{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}]',
        "message 2: roles out of order: assistant, where user belongs",
    ),
    "two users": (json.dumps([*CHAT, CHAT[1], CHAT[1]]), "message 5: roles out of order: user"),
    "a tool": (json.dumps([*CHAT, {"role": "tool", "content": "x"}]), "message 4: roles out of"),
    "a weight of 2": (
        json.dumps([*CHAT[:-1], CHAT[-1] | {"weight": 2}]),
        f"message {len(CHAT)}: a weight is 0 or 1, not 2",
    ),
    "nothing of weight": (
        json.dumps([message | {"weight": 0} for message in CHAT]),
        "none but of weight 0, so nothing is to be learned",
    ),
    "system later": (json.dumps([*CHAT, CHAT[0]]), "message 4: the system message comes first"),
}
BAD_ROWS = {
    "no instruction": (f"{GOOD}\n" + '{"output": "b"}', 'no text "instruction"'),
    "no output": (f"{GOOD}\n" + '{"instruction": "a"}', 'no text "output"'),
    "a number": (f"{GOOD}\n" + '{"instruction": 1, "output": "b"}', 'no text "instruction"'),
    "output is null": (f"{GOOD}\n" + '{"instruction": "a", "output": null}', 'no text "output"'),
    "input is a list": (f"{GOOD}\n{GOOD[:-1]}" + ', "input": []}', 'no text "input"'),
    "half a surrogate pair": (
        f"{GOOD}\n" + r'{"instruction": "a", "output": "\ud83e"}',
        "cut in half",
    ),
    "a list": (f"{GOOD}\n[1]", "not an object but list"),
    "a string": (f'{GOOD}\n"a"', "not an object but str"),
    "text is null": ('{"text": "a"}\n{"text": null}', 'no text "text"'),
    **{
        name: (f'{{"messages": {json.dumps(CHAT)}}}\n{{"messages": {value}}}', message)
        for name, (value, message) in CONVERSATIONS.items()
    },
}


def assert_refused(path: Path, content: bytes, where: str, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}{where}")) as error:
        read(path)
    assert re.search(message, str(error.value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_told_with_path_and_number(tmp_path, rows, message):
    good, bad = rows.split("\n")
    array, lines = f"[{good},\n\n{good}, {bad}, {good}]", f"{good}\n\n{good}\n{bad}\n{good}\n"
    assert_refused(tmp_path / "array.json", array.encode(), ", row 3", message)
    assert_refused(tmp_path / "lines.json", lines.encode(), ", line 4", message)


BAD_FILES = {
    "empty": (b"", "no row in it"),
    "blank": (b" \n\t\n", "no row in it"),
    "no rows": (b"[]", "no row in it"),
    "prose": (b"instruction,output\na,b\n", "line 1: not JSON"),
    "array cut": (f"[{GOOD},\n{GOOD}".encode(), r"not JSON .Expecting ',' delimiter: line 2\b"),
    "row cut short": (f"[{GOOD},\n\n{GOOD[:-3]}".encode(), r"not JSON .Unterminated.*: line 3\b"),
    "a comma": (f"[{GOOD},\n{GOOD},]".encode(), r"not JSON .Expecting value: line 2\b"),
    "no comma": (f"[{GOOD}\n{GOOD}]".encode(), r"not JSON .Expecting ',' delimiter: line 2\b"),
    "more behind": (f"[{GOOD}]\n{GOOD}".encode(), "not JSON .there is more behind"),
    "line cut short": (f"{GOOD}\n\n{GOOD[:-1]}".encode(), "line 3: not JSON .Expecting ',' "),
    "one object": (b'{\n"data": [\n' + GOOD.encode() + b"]}", "line 1: not JSON"),
    "a number": (b"3", "line 1: not an object but int"),
    "not UTF-8": (GOOD.replace("a", "é").encode("latin-1"), "not UTF-8"),
    "array not UTF-8": (f"[{GOOD}]".replace("a", "é").encode("latin-1"), "not UTF-8"),
    "nested too deep": (b"[" * 200_000, "not JSON"),
    "number too long": (b"[" + b"9" * 10_000 + b"]", "not JSON"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_missing_or_no_dataset_is_told_with_its_path(tmp_path, content, message):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.json"))):
        read(tmp_path / "none.json")
    assert_refused(tmp_path / "bad.json", content, "", message)


# Other formats


def parquet_bytes(path: Path) -> bytes:
    parquet(path, ROWS * 500)
    return path.read_bytes()


OTHERS = {
    "empty.csv": (b"", "no row in it"),
    "names_alone.csv": (b"instruction,output\n", "no row in it"),
    "short.csv": (b"instruction,output\na,b\n\nc\n", 'line 4: no text "output"'),
    "long.csv": (b"instruction,output\na,b\nc,d,e\n", "line 3: more fields than the 2 "),
    "quotes.csv": (b'instruction,output\na,"b" c\n', "unreadable"),
    "latin.csv": ("instruction,output\na,é\n".encode("latin-1"), "not UTF-8"),
    "json.csv": (f"[{GOOD}]".encode(), "is JSON, though its ending says CSV"),
    "lines.parquet": (GOOD.encode(), "is JSON, though its ending says Parquet"),
    "csv.parquet": (b"instruction,output\na,b\n", "is none, though its ending says Parquet"),
    "empty.parquet": (b"", "is none, though its ending says Parquet"),
    "cut.parquet": (None, "unreadable"),
    "parquet.json": (None, "is Parquet, though its ending says JSON"),
}


@pytest.mark.parametrize(("name", "content"), [(name, x[0]) for name, x in OTHERS.items()])
def test_a_file_that_is_not_what_its_ending_says_is_told(tmp_path, name, content):
    if content is None:
        content = parquet_bytes(tmp_path / "whole")[: -9 if name == "cut.parquet" else None]
    assert_refused(tmp_path / name, content, "", OTHERS[name][1])


def test_a_folder_that_is_no_dataset_is_told(tmp_path):
    message = "no folder of datasets.save_to_disk, or damaged"
    with pytest.raises(ValueError, match=f"{tmp_path}: {message}"):
        read(tmp_path)
    folder(tmp_path / "saved", ROWS)
    for damaged, content in (("state.json", "{"), ("dataset_info.json", '{"features": 3}')):
        before = (tmp_path / "saved" / damaged).read_text()
        (tmp_path / "saved" / damaged).write_text(content)
        with pytest.raises(ValueError, match=f"saved: {message}") as error:
            read(tmp_path / "saved")
        assert "\n" not in str(error.value)
        (tmp_path / "saved" / damaged).write_text(before)
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    places = [array("i", x).tobytes() for x in ((0, 6, 9), (0, -6, 9))]  # of the instructions
    assert arrow.read_bytes().count(places[0]) == 1
    arrow.write_bytes(arrow.read_bytes().replace(*places))
    with pytest.raises(ValueError, match="saved: unreadable: "):
        read(tmp_path / "saved")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(ValueError, match="two: holds the datasets train, test: give the folder of"):
        read(tmp_path / "two")
    assert read(tmp_path / "two" / "test") == ROWS


def test_a_pipe_which_cannot_be_read_twice_is_refused(tmp_path):
    os.mkfifo(tmp_path / "rows.json")
    with pytest.raises(FileNotFoundError, match="in a file or folder"):
        read_rows(tmp_path / "rows.json")
