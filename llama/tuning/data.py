"""Instruction data: Alpaca's prompts, rows from JSON, tokens with labels, batches."""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from llama import cli
from llama.tokenizer import Tokenizer
from llama.tuning.options import ALPACA_PREAMBLE

# The two templates of Stanford Alpaca, to the letter: tuned models expect them so.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = ALPACA_PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:"

IGNORE = -100  # the label that torch's and fairscale's losses leave out

EXPECTED = (
    "a dataset is a JSON array or JSON lines, each row an object with the texts "
    '"instruction", "output" and, if need be, "input"'
)

Row = dict[str, torch.Tensor]  # input_ids and labels, equally long, int32


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Put an instruction, with its input if there is one, into Alpaca's template."""
    template = PROMPT_WITH_INPUT if input else PROMPT_NO_INPUT
    # format reads braces in the template alone: those in a user's text stay as they are.
    return template.format(instruction=instruction, input=input)


def load_instructions(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a JSON array or JSON-lines file (told apart by content, not by name).

    Each row has the texts instruction, input ("" where the file has none) and output.
    Raises FileNotFoundError, or ValueError with the number of the row (array) or line (JSON
    lines) that is wrong, both counted from 1.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such dataset file; {EXPECTED} (--dataset_path)")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    rows = [_check_row(where, value) for where, value in _values_in(path, text)]
    if not rows:
        raise ValueError(f"{path}: empty: there is no row in it; {EXPECTED}")
    return rows


def _values_in(path: str | Path, text: str) -> Iterator[tuple[str, object]]:
    """The JSON values of an array or of lines, each with where it stands, for messages."""
    if text.lstrip().startswith("["):
        for number, value in enumerate(_parse_json(path, text), 1):
            yield f"{path}, row {number}", value
        return
    if "\n" in text.strip() and _is_json(text):
        raise ValueError(f"{path}: one JSON value over several lines, not a list; {EXPECTED}")
    # Not splitlines(): that also cuts at U+2028, which JSON allows inside a text.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parse_json(path, line, number)


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


def tokenize_dataset(
    path: str | Path, tokenizer: Tokenizer, max_seq_len: int, *, train_on_inputs: bool = False
) -> list[Row]:
    """Make tokens of the rows of a file: prompt, response, end of sequence.

    labels are -100 on the prompt unless train_on_inputs. Rows beyond max_seq_len are cut; those
    whose prompt leaves no room for a response are left out; one message says how many.
    Raises what load_instructions does, and ValueError if no row is left.
    """
    instructions = load_instructions(path)
    rows: list[Row] = []
    cut, too_long = 0, []
    for row in instructions:
        prompt = alpaca_prompt(row["instruction"], row["input"])
        prompt_ids = tokenizer.encode(prompt, bos=True, eos=False)
        if len(prompt_ids) >= max_seq_len:
            too_long.append(len(prompt_ids))
            continue
        response_ids = _response_ids(tokenizer, prompt, prompt_ids, row["output"])
        ids = [*prompt_ids, *response_ids, tokenizer.eos_id]
        cut += len(ids) > max_seq_len
        ids = torch.tensor(ids[:max_seq_len], dtype=torch.int32)
        labels = ids.clone()
        if not train_on_inputs:
            labels[: len(prompt_ids)] = IGNORE
        rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise ValueError(
            f"{path}: no row leaves room for a response within --max_seq_len {max_seq_len}: the "
            f"shortest prompt has {min(too_long)} tokens; give a larger --max_seq_len"
        )
    n = len(instructions)
    notes = []
    if cut:
        notes.append(f"cut {cut} of {n} rows to max_seq_len {max_seq_len}")
    if too_long:
        notes.append(
            f"left out {len(too_long)} of {n} rows whose prompt alone fills "
            f"max_seq_len {max_seq_len}"
        )
    if notes:
        cli.say(f"{path}: {'; '.join(notes)}")
    return rows


def _response_ids(
    tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], output: str
) -> list[int]:
    """Tokens of a response as the model would write them after the prompt's own tokens.

    Generation is fed encode(prompt), so no token may span the two. SentencePiece puts a space in
    front of every text that it is given: so the two are encoded together and the prompt's tokens
    taken off. Only where its last character merges with the response's first (":" with another
    ":", or in a byte-level vocabulary with a line end) is the response encoded alone.
    """
    both = tokenizer.encode(prompt + output, bos=True, eos=False)
    if both[: len(prompt_ids)] == prompt_ids:
        return both[len(prompt_ids) :]
    return tokenizer.encode(output, bos=False, eos=False)


def split_dataset(
    rows: list[Row], val_set_size: int, seed: int
) -> tuple[list[Row], list[Row] | None]:
    """Draw val_set_size rows for evaluation by seed; return those to train on, and those (or None).

    Raises ValueError if that leaves nothing to train on.
    """
    if val_set_size == 0:
        return rows, None
    if not 0 < val_set_size < len(rows):
        raise ValueError(
            f"--val_set_size {val_set_size} cannot be taken out of {len(rows)} rows: give "
            f"0 (no evaluation) to {len(rows) - 1}"
        )
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[val_set_size:], shuffled[:val_set_size]


@dataclass
class Collator:
    """Make a batch of rows, padded on the right to the longest of them."""

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Return input_ids, attention_mask (0 on padding), labels: (bsz, seqlen) int64."""
        ids = [row["input_ids"].long() for row in rows]
        labels = [row["labels"].long() for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
        }
