"""Rows of training data, one at a time: files of the usual formats, and what columns mean."""

import csv
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from llama.cli import first_few, shown
from llama.files import LONGEST_TEXT, check_text, parse_json, read_lines
from llama.template import check_messages

try:
    import datasets
    from datasets import Dataset
except ImportError as error:  # our folder of that name, which Python takes for it
    message = "Hugging Face's package `datasets` is not installed: pip install datasets"
    raise ImportError(message) from error

BLOCK = 1 << 20  # characters that are read at a time
MANY = 200  # rows that are held at a time
JSON_SPACE = re.compile(r"[ \t\r\n]*")
ENDINGS = {".json": "JSON", ".jsonl": "JSON", ".csv": "CSV", ".parquet": "Parquet"}
FORMATS = "JSON, JSON lines, CSV, Parquet and folders of datasets.save_to_disk are read"

# Who speaks, as ShareGPT calls them.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Form:
    """What rows are: the columns that they have, and the templates that they go into.

    templates: names of --template, the first by default.
    """

    name: str
    needed: tuple[str, ...]
    templates: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        optional = [f"perhaps {name}" for name in self.optional]
        return f"{self.name} ({', '.join([*self.needed, *optional])})"


FORMS = (  # the first whose columns are there
    Form("conversations", ("messages",), ("chat",)),
    Form("conversations", ("conversations",), ("chat",)),
    Form("instructions", ("instruction", "output"), ("alpaca", "chat", "none"), ("input",)),
    Form("prompts", ("prompt", "completion"), ("none", "alpaca", "chat")),
    Form("texts", ("text",), ("none",)),
)
COLUMNS = tuple(dict.fromkeys(name for form in FORMS for name in form.needed + form.optional))

KEPT = ("role", "content", "weight")  # of a message
Row = dict[str, Any]  # by our columns: texts, or "messages"
Found = Iterator[tuple[str, object]]  # values as a file has them, each with its place for messages
Choose = Callable[[list[str]], list[str]]  # of the columns that a file has, those to be read


def read_rows(
    path: str | Path, columns: str | None = None
) -> tuple[Form, Iterator[tuple[str, Row]]]:
    """Tell what rows a dataset has, and give them one at a time, each with its place.

    columns: the file's names for ours, as in "question=instruction,answer=output". An absent input
    becomes "". Raises FileNotFoundError, and ValueError for columns that are not known, for a file
    that is not what its ending says, and for a row that is not as it should be, with its number.
    """
    path, named = Path(path), parse_columns(columns)
    if not (path.is_file() or path.is_dir()):  # a pipe cannot be read twice
        raise FileNotFoundError(f"{path}: no such dataset, in a file or folder (--dataset_path)")
    values = _values(path, functools.partial(_useful, named))
    first = next(values, None)
    if first is None:
        raise ValueError(f"{path}: no row in it; {expected()}")
    names = list(_as_object(*first))
    if missing := [theirs for theirs in named.values() if theirs not in names]:
        raise ValueError(
            f"{path}: no column {missing[0]!r}, which --columns names; there are "
            f"{first_few(names, longest=40)}"
        )
    form = _form_of(names, named)
    if form is None:
        raise ValueError(
            f"{path}: unknown columns: {first_few(names, longest=40)}; {expected()}; --columns "
            "maps others, as in --columns question=instruction,answer=output"
        )
    values = itertools.chain([first], values)
    return form, ((where, _row_of(form, named, where, value)) for where, value in values)


def expected() -> str:
    """What rows may be, for messages."""
    return f"a row is an object with one of these: {'; '.join(map(str, FORMS))}"


def parse_columns(text: str | None) -> dict[str, str]:
    """The columns' names of a file by ours, from "theirs=ours,…"; ValueError for anything else."""
    found: dict[str, str] = {}
    for pair in text.split(",") if text else ():
        theirs, _, ours = (part.strip() for part in pair.rpartition("="))
        if not theirs or ours not in COLUMNS or ours in found:
            raise ValueError(
                f"--columns: wants the file's name = one of {', '.join(COLUMNS)}, "
                f"each once, as in question=instruction,answer=output, not {shown(pair)!r}"
            )
        found[ours] = theirs
    return found


def _form_of(names: list[str], named: dict[str, str]) -> Form | None:
    """What rows with such columns are; None if that is not known."""
    ours = {*named, *(set(names) - set(named.values()))}
    return next((form for form in FORMS if ours >= set(form.needed)), None)


def _useful(named: dict[str, str], names: list[str]) -> list[str]:
    """The columns that are needed; all of them where they are not known, to be named."""
    form = _form_of(names, named)
    if form is None or not set(named.values()) <= set(names):
        return names
    wanted = [named.get(name, name) for name in form.needed + form.optional]
    return [name for name in wanted if name in names]


def _as_object(where: str, value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not an object but {type(value).__name__}; {expected()}")
    return value


def _row_of(form: Form, named: dict[str, str], where: str, value: object) -> Row:
    """A row by our names, checked."""
    value = _as_object(where, value)
    if form.name == "conversations":
        (name,) = form.needed
        return {"messages": conversation(where, value.get(named.get(name, name)))}
    row: Row = {}
    for name in form.needed + form.optional:
        theirs = named.get(name, name)
        found = value.get(theirs)
        if found is None and name in form.optional:
            row[name] = ""
        else:
            row[name] = check_text(where, theirs, found)
    return row


def conversation(where: str, value: object) -> list[dict[str, Any]]:
    """The messages of a conversation with an answer in it; ValueError for anything else.

    As OpenAI has it, a message of the assistant with "weight": 0 is not to be learned.
    """
    if isinstance(value, list):
        value = [_from_sharegpt(message) for message in value]
    messages = check_messages(where, value, asks=False)
    turns = [x["role"] for x in messages if x["role"] != "system"]
    for i, role in enumerate(turns):
        if role != (wanted := ("user", "assistant")[i % 2]):
            number = i + 1 + len(messages) - len(turns)
            raise ValueError(
                f"{where}, message {number}: roles out of order: {role}, where {wanted} belongs: "
                "behind the system message, if there is one, user and assistant take turns"
            )
    for number, message in enumerate(messages, 1):
        if (weight := message.get("weight")) not in (None, 0, 1):
            raise ValueError(f"{where}, message {number}: a weight is 0 or 1, not {weight!r:.80}")
    # Nothing else: templates look at other keys, and Arrow's rows have all of them, as null.
    found = [{name: x[name] for name in KEPT if x.get(name) is not None} for x in messages]
    if not any(x["role"] == "assistant" and x.get("weight") != 0 for x in found):
        raise ValueError(
            f"{where}: no message of an assistant, or none but of weight 0, so nothing is to be "
            "learned"
        )
    return found


def _from_sharegpt(message: object) -> object:
    if not isinstance(message, dict) or "from" not in message:
        return message
    role = message["from"]
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message.get("value"), "weight": message.get("weight")}


def _values(path: Path, choose: Choose) -> Found:
    """The rows of a file or folder, with the path in front of what the libraries say of damage."""
    try:
        yield from _folder(path, choose) if path.is_dir() else _file(path, choose)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    except (csv.Error, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: unreadable: {shown(str(error))}; {FORMATS}") from None


def _file(path: Path, choose: Choose) -> Found:
    """The rows of a file by its content; ValueError where that is not what its ending says."""
    with path.open("rb") as file:
        beginning = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip()
    is_json = beginning[:1] in (b"[", b"{")
    kind = "Parquet" if beginning.startswith(b"PAR1") else "JSON" if is_json else None
    said = ENDINGS.get(path.suffix.lower(), kind or "JSON")
    if kind != said and (kind or said == "Parquet"):
        found = f"is {kind}" if kind else "is none"
        raise ValueError(f"{path}: {found}, though its ending says {said}; {FORMATS}")
    if said == "Parquet":
        return _parquet(path, choose)
    if said == "CSV":
        return _csv(path)
    return _json_array(path) if beginning.startswith(b"[") else _json_lines(path)


def _json_lines(path: Path) -> Found:
    for where, line in read_lines(path):
        try:
            yield where, parse_json(where, line)
        except ValueError as error:
            raise ValueError(f"{error}; {expected()}") from None


def _json_array(path: Path) -> Found:
    """The values of a JSON array, of which a block at a time is held."""
    decode, number, size = json.JSONDecoder().raw_decode, 0, BLOCK
    text, at, line = "", 0, 1  # a part of the file, the place behind the last value, its first line
    with path.open(encoding="utf-8-sig") as file:
        while True:
            try:
                sign = "," if number else "["
                begin = _skip(text, at)
                if number and text.startswith("]", begin):
                    break
                if not text.startswith(sign, begin):
                    raise json.JSONDecodeError(f"Expecting {sign!r} delimiter", text, begin)
                begin = _skip(text, begin + 1)
                if not number and text.startswith("]", begin):
                    break
                value, at = decode(text, begin)
            except json.JSONDecodeError as error:
                more = file.read(size)  # the end of the part may have cut the value
                if not more:
                    reason = f"{error.msg}: line {line + text.count(chr(10), 0, error.pos)}"
                    raise ValueError(f"{path}: not JSON ({reason}); {expected()}") from None
                line += text.count("\n", 0, at)
                text, at, size = text[at:] + more, 0, 2 * size
            except (ValueError, RecursionError) as error:  # digits without end; nested too deep
                where = f"{path}, row {number + 1}"
                raise ValueError(f"{where}: not JSON ({error}); {expected()}") from None
            else:
                number, size = number + 1, BLOCK
                yield f"{path}, row {number}", value
        if (text[begin + 1 :] + file.read(BLOCK)).strip():
            raise ValueError(f"{path}: not JSON (there is more behind the array); {expected()}")


def _skip(text: str, at: int) -> int:
    """The place behind JSON's white space."""
    return JSON_SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches anything


def _csv(path: Path) -> Found:
    """The rows of a CSV file, whose first line has the columns' names."""
    csv.field_size_limit(LONGEST_TEXT + 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if None in row:
                raise ValueError(f"{where}: more fields than the {len(row) - 1} of the first line")
            yield where, row


def _parquet(path: Path, choose: Choose) -> Found:
    with pyarrow.parquet.ParquetFile(path) as file:
        chosen = choose(file.schema_arrow.names)
        yield from _numbered(path, file.iter_batches(MANY, columns=chosen))


def _folder(path: Path, choose: Choose) -> Found:
    """The rows of a folder that datasets.save_to_disk wrote."""
    datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever its files provoke
        raise ValueError(
            f"{path}: no folder of datasets.save_to_disk, or damaged ({shown(str(error))}); "
            f"{FORMATS}"
        ) from None
    if not isinstance(found, Dataset):
        if len(found) != 1:
            raise ValueError(
                f"{path}: holds the datasets {first_few(list(found))}: give the folder of one"
            )
        (found,) = found.values()
    columns = found.select_columns(choose(found.column_names))
    yield from _numbered(path, columns.with_format("arrow").iter(MANY))


def _numbered(path: Path, tables: Iterable[pyarrow.RecordBatch | pyarrow.Table]) -> Found:
    number = 0
    for table in tables:
        table.validate(full=True)  # an Arrow file's own places are taken as they are
        for row in table.to_pylist():
            number += 1
            yield f"{path}, row {number}", row
