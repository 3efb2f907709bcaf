"""Instruction data: Alpaca's prompts, rows from JSON, tokens with labels, batches."""

import contextlib
import errno
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from llama import parallel

if TYPE_CHECKING:
    from datasets import Dataset

# The two templates of Stanford Alpaca, to the letter: tuned models expect them so.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
# The text that a soft prompt starts from.
ALPACA_PREAMBLE = PROMPT_NO_INPUT.partition("\n")[0]

IGNORE = -100  # the label that torch's and fairscale's losses leave out

# Part of the cache's key: raise it when the tokens or labels made from the same rows change.
CACHE_VERSION = 1
CACHE_MANIFEST = "manifest.json"
# Tells tokenizers apart by what they make of it: words, digits, spaces, lines, scripts, an emoji.
PROBE = "Don't  count 12345 tokens:\n\n\tnaïve café, 北京, привет, 🦙</s> if (x != 0) { return; }"

EXPECTED = (
    "a dataset is a JSON array or JSON lines, each row an object with the texts "
    '"instruction", "output" and, if need be, "input"'
)


class Encoder(Protocol):
    """What is asked of a tokenizer here; llama.Tokenizer has it."""

    n_words: int
    eos_id: int

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]: ...


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """An instruction, with its input if there is one, in Alpaca's template."""
    template = PROMPT_WITH_INPUT if input else PROMPT_NO_INPUT
    # format reads braces in the template alone: those in a user's text stay as they are.
    return template.format(instruction=instruction, input=input)


def load_instructions(path: str | Path) -> list[dict]:
    """The rows of a JSON array or JSON-lines file (told apart by content, not by name).

    Each row has the texts instruction, input ("" where the file has none) and output.
    Raises FileNotFoundError, or ValueError with the number of the row (array) or line (JSON
    lines) that is wrong, both counted from 1.
    """
    return _parse_rows(path, _read_file(path))


def tokenize_dataset(
    path: str | Path,
    tokenizer: Encoder,
    max_seq_len: int,
    *,
    train_on_inputs: bool = False,
    cache_dir: str | Path | None = None,
    say: Callable[[str], None] = parallel.say,
) -> "Dataset":
    """Rows of input_ids and labels, equally long: prompt, response, end of sequence.

    labels are -100 on the prompt unless train_on_inputs. Rows beyond max_seq_len are cut; those
    whose prompt leaves no room for a response are left out; say tells how many, in one message.
    With cache_dir the work is done once: a sub-folder keeps it for the same file content,
    tokenizer, max_seq_len and train_on_inputs. Any number of processes may share cache_dir.
    Raises what load_instructions does, ValueError if no row is left, and ImportError if the
    package datasets is absent.
    """
    _require_datasets()
    data = _read_file(path)
    folder = None
    if cache_dir is not None:
        key = _cache_key(data, tokenizer, max_seq_len, train_on_inputs)
        folder = Path(cache_dir) / key
    cached = _load_cached(folder) if folder else None
    if cached is None:
        rows = _parse_rows(path, data)
        dataset, notice = _tokenize_rows(path, rows, tokenizer, max_seq_len, train_on_inputs)
        if folder:
            _save_cached(dataset, notice, folder)
            # The saved form is mapped from the disk instead of held in memory.
            cached = _load_cached(folder)
        cached = cached or (dataset, notice)
    dataset, notice = cached
    if notice:
        say(f"{path}: {notice}")
    return dataset


def split_dataset(
    dataset: "Dataset", val_set_size: int, seed: int
) -> tuple["Dataset", "Dataset | None"]:
    """Training rows and val_set_size rows for evaluation, drawn by seed; None for 0 rows.

    Raises ValueError if that leaves nothing to train on.
    """
    if val_set_size == 0:
        return dataset, None
    if not 0 < val_set_size < len(dataset):
        raise ValueError(
            f"--val_set_size {val_set_size} cannot be taken out of {len(dataset)} rows: give "
            f"0 (no evaluation) to {len(dataset) - 1}"
        )
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    # Not the library's own shuffle or split: on a cached dataset those write files beside it, and
    # every rank does this.
    return dataset.select(order[val_set_size:]), dataset.select(order[:val_set_size])


@dataclass
class Collator:
    """Makes a batch of rows, padded on the right to the longest of them."""

    pad_id: int

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask (1 on tokens, 0 on padding), labels: (bsz, seqlen) int64."""
        ids = [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
        labels = [torch.as_tensor(row["labels"], dtype=torch.long) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }


def _require_datasets() -> None:
    """Raise ImportError, with the command to install it, where Hugging Face's package is absent.

    `import datasets` alone would succeed without the package: it finds our folder of that name.
    """
    try:
        from datasets import Dataset  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Hugging Face's package `datasets` is not installed (a folder of that name is not "
            f"it; {error}): pip install datasets"
        ) from error


def _read_file(path: str | Path) -> bytes:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such dataset file; {EXPECTED} (--dataset_path)")
    return Path(path).read_bytes()


def _parse_rows(path: str | Path, data: bytes) -> list[dict]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; {EXPECTED}")
    if text.lstrip().startswith("["):
        unit, values = "row", enumerate(_parse_json(path, text), 1)
    elif "\n" in text.strip() and _is_json(text):
        raise ValueError(f"{path}: one JSON value over several lines, not a list; {EXPECTED}")
    else:
        # Not splitlines(): that also cuts at U+2028, which JSON allows inside a text.
        lines = enumerate(text.split("\n"), 1)
        unit, values = "line", ((n, _parse_json(path, t, n)) for n, t in lines if t.strip())
    rows = [_check_row(f"{path}, {unit} {number}", value) for number, value in values]
    if not rows:
        raise ValueError(f"{path}: no row in it; {EXPECTED}")
    return rows


def _parse_json(path: str | Path, text: str, line: int = 1) -> object:
    """The value that a text holds, which begins on this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{where}: not JSON ({error.msg}); {EXPECTED}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, nesting too deep
        raise ValueError(f"{path}, line {line}: not JSON ({error}); {EXPECTED}") from None


def _is_json(text: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def _check_row(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not an object but {type(value).__name__}; {EXPECTED}")
    row = {}
    for key in ("instruction", "input", "output"):
        if key not in value and key != "input":
            raise ValueError(f'{where}: no "{key}" among {list(value)[:8]}; {EXPECTED}')
        text = value.get(key, "")
        if not isinstance(text, str):
            raise ValueError(f'{where}: "{key}" is not a text but {type(text).__name__}')
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON can write half a surrogate pair, no tokenizer reads it
            raise ValueError(f'{where}: "{key}" holds a character cut in half') from None
        row[key] = text
    return row


def _tokenize_rows(
    path: str | Path,
    rows: Sequence[dict],
    tokenizer: Encoder,
    max_seq_len: int,
    train_on_inputs: bool,
) -> tuple["Dataset", str]:
    """The dataset, and what is to be said about it ("" if nothing)."""
    import numpy as np

    from datasets import Dataset, Features, List, Value

    columns: dict[str, list] = {"input_ids": [], "labels": []}
    cut = shortest = 0
    for row in rows:
        prompt = alpaca_prompt(row["instruction"], row["input"])
        prompt_ids = tokenizer.encode(prompt, bos=True, eos=False)
        if len(prompt_ids) >= max_seq_len:
            shortest = min(shortest or len(prompt_ids), len(prompt_ids))
            continue
        response_ids = _response_ids(tokenizer, prompt, prompt_ids, row["output"])
        ids = [*prompt_ids, *response_ids, tokenizer.eos_id]
        cut += len(ids) > max_seq_len
        labels = ids if train_on_inputs else [IGNORE] * len(prompt_ids) + ids[len(prompt_ids) :]
        # As int32 arrays: lists of Python's integers take ten times the memory.
        columns["input_ids"].append(np.array(ids[:max_seq_len], dtype=np.int32))
        columns["labels"].append(np.array(labels[:max_seq_len], dtype=np.int32))
    kept = len(columns["labels"])
    if not kept:
        raise ValueError(
            f"{path}: no row leaves room for a response within --max_seq_len {max_seq_len}: the "
            f"shortest prompt has {shortest} tokens; give a larger --max_seq_len"
        )
    notes = []
    if cut:
        notes.append(f"cut {cut} of {len(rows)} rows to max_seq_len {max_seq_len}")
    if kept < len(rows):
        notes.append(
            f"left out {len(rows) - kept} of {len(rows)} rows whose prompt alone fills "
            f"max_seq_len {max_seq_len}"
        )
    features = Features({name: List(Value("int32")) for name in columns})
    return Dataset.from_dict(columns, features=features), "; ".join(notes)


def _response_ids(tokenizer: Encoder, prompt: str, prompt_ids: list[int], output: str) -> list[int]:
    """Tokens of a response as the model would write them after the prompt's own tokens.

    Generation is fed encode(prompt), so no token may span the two. Nor is a response by itself
    what follows a prompt: SentencePiece puts a space in front of every text that it is given. So
    the two are encoded together and the prompt's tokens taken off. Only where its last character
    merges with the response's first (":" with another ":", or in a byte-level vocabulary with a
    line end) is the response encoded alone, which may give it a space.
    """
    both = tokenizer.encode(prompt + output, bos=True, eos=False)
    if both[: len(prompt_ids)] == prompt_ids:
        return both[len(prompt_ids) :]
    return tokenizer.encode(output, bos=False, eos=False)


def _cache_key(data: bytes, tokenizer: Encoder, max_seq_len: int, train_on_inputs: bool) -> str:
    identity = {
        "version": CACHE_VERSION,
        "file": hashlib.sha256(data).hexdigest(),
        "probe": tokenizer.encode(PROBE, bos=True, eos=False),
        "n_words": tokenizer.n_words,
        "eos_id": tokenizer.eos_id,
        "max_seq_len": max_seq_len,
        "train_on_inputs": train_on_inputs,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _file_hashes(folder: Path) -> dict[str, str]:
    paths = [p for p in folder.iterdir() if p.name != CACHE_MANIFEST]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def _load_cached(folder: Path) -> tuple["Dataset", str] | None:
    """What _save_cached has put there, or None if it is absent or damaged in any way."""
    from datasets import load_from_disk

    try:
        manifest = json.loads((folder / CACHE_MANIFEST).read_bytes())
        # Files that the library has added since (map() does) are no damage.
        if not manifest["files"].items() <= _file_hashes(folder).items():
            return None
        return load_from_disk(str(folder)), manifest["notice"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _save_cached(dataset: "Dataset", notice: str, folder: Path) -> None:
    """Put the dataset at folder in one step, unless another process is first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No fsync: the hashes tell a folder that a crash has left half-written, and it is made again.
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=".partial") as partial:
        new = Path(partial) / "new"
        with _no_bars():
            dataset.save_to_disk(str(new))
        manifest = {"notice": notice, "files": _file_hashes(new)}
        (new / CACHE_MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists() and _load_cached(folder) is None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(folder, Path(partial) / "damaged")
        try:
            os.rename(new, folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the library's progress bars, which every rank would draw."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
