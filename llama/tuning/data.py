"""Instruction data: Alpaca's prompts, rows from JSON, tokens with labels, batches."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from llama import cli
from llama.files import check_text, parse_json, read_lines
from llama.tokenizer import Tokenizer
from llama.tuning.options import ALPACA_PREAMBLE

# The two templates of Stanford Alpaca, to the letter: tuned models expect them so.
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
PROMPT_NO_INPUT = ALPACA_PREAMBLE + "\n\n### Instruction:\n{instruction}\n\n### Response:"

# The second as a chat template, with bos for what the tokenizer puts in front of a text. Of several
# turns Alpaca says nothing: here each follows like the first, without the preamble.
CHAT_TEMPLATE = (
    "{%% if messages[0].role == 'system' %%}"
    "{{ raise_exception('the tuned prompt takes no system message') }}{%% endif %%}"
    "{{ %(bos)s + %(preamble)s }}{%% for message in messages %%}{%% if message.role == 'user' %%}"
    r"{{ '\n\n### Instruction:\n' + message.content + '\n\n### Response:' }}"
    "{%% else %%}{{ message.content }}{%% endif %%}{%% endfor %%}"
)

IGNORE = -100  # the label that torch's and fairscale's losses leave out

EXPECTED = (
    "a dataset is a JSON array or JSON lines, each row an object with the texts "
    '"instruction", "output" and, if need be, "input"'
)
DEFAULTS = {"instruction": None, "input": "", "output": None}  # None: a row must give it

Row = dict[str, torch.Tensor]  # input_ids and labels, equally long, int32


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Put an instruction, with its input if there is one, into Alpaca's template."""
    template = PROMPT_WITH_INPUT if input else PROMPT_NO_INPUT
    # format reads braces in the template alone: those in a user's text stay as they are.
    return template.format(instruction=instruction, input=input)


def alpaca_chat_template(tokenizer: Tokenizer) -> str:
    """The chat template that makes of one user message what alpaca_prompt() and encode() make."""
    bos = "" if tokenizer.bos_id is None else tokenizer.words["bos_token"]
    return CHAT_TEMPLATE % {"bos": json.dumps(bos), "preamble": json.dumps(ALPACA_PREAMBLE)}


def load_instructions(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a JSON array or JSON-lines file (told apart by content, not by name).

    Each row has the texts instruction, input ("" where the file has none) and output.
    Raises FileNotFoundError, or ValueError with the number of the row (array) or line (JSON
    lines) that is wrong, both counted from 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such dataset file (--dataset_path)")
    lines = read_lines(path)
    try:
        if lines and lines[0][1].lstrip().startswith("["):
            values = parse_json(str(path), path.read_text(encoding="utf-8-sig"))
            rows = [(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]
        else:
            rows = [(where, parse_json(where, line)) for where, line in lines]
    except ValueError as error:
        raise ValueError(f"{error}; {EXPECTED}") from None
    if not rows:
        raise ValueError(f"{path}: no row in it; {EXPECTED}")
    return [_check_row(where, value) for where, value in rows]


def _check_row(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not an object but {type(value).__name__}; {EXPECTED}")
    return {key: check_text(where, key, value.get(key, DEFAULTS[key])) for key in DEFAULTS}


def tokenize_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    num_virtual_tokens: int = 0,
    *,
    train_on_inputs: bool = False,
) -> list[Row]:
    """Make tokens of the rows of a file: prompt, response, end of sequence.

    labels are -100 on the prompt unless train_on_inputs. Rows that with the tuned prompt's tokens
    are longer than max_seq_len are cut; those whose prompt leaves no room for a response are left
    out; one message says how many.
    Raises what load_instructions does, and ValueError if no row is left.
    """
    longest = max_seq_len - num_virtual_tokens
    less = f"--max_seq_len {max_seq_len}"
    less += f" less the tuned prompt's {num_virtual_tokens}" if num_virtual_tokens else ""
    instructions = load_instructions(path)
    rows: list[Row] = []
    cut, too_long = 0, []
    if len(instructions) > 10_000:
        cli.say(f"{path}: making tokens of {len(instructions):,} rows")
    for row in cli.progress_bar("making tokens", unit="row", items=instructions):
        prompt = alpaca_prompt(row["instruction"], row["input"])
        prompt_ids = tokenizer.encode(prompt, bos=True, eos=False)
        if len(prompt_ids) >= longest:
            too_long.append(len(prompt_ids))
            continue
        response_ids = _response_ids(tokenizer, prompt, prompt_ids, row["output"])
        row_ids = [*prompt_ids, *response_ids, tokenizer.eos_id]
        cut += len(row_ids) > longest
        ids = torch.tensor(row_ids[:longest], dtype=torch.int32)
        labels = ids.clone()
        if not train_on_inputs:
            labels[: len(prompt_ids)] = IGNORE
        rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise ValueError(
            f"{path}: no row leaves room for a response: the shortest prompt, with Alpaca's words "
            f"around it, has {cli.counted(min(too_long), 'token')}, and {less} leaves {longest}; "
            f"give --max_seq_len {num_virtual_tokens + min(too_long) + 1} at least, and better more"
        )
    if cut or too_long:
        cli.say(
            f"{path}: of {len(instructions)} rows {cut} were cut to the {longest} tokens that "
            f"{less} leaves, and {len(too_long)} left out, whose prompt alone fills that"
        )
    return rows


def _response_ids(
    tokenizer: Tokenizer, prompt: str, prompt_ids: list[int], output: str
) -> list[int]:
    """Tokens of a response as the model would write them after the prompt's own tokens.

    Generation is fed encode(prompt), so no token may span the two. They are encoded together,
    since SentencePiece puts a space in front of every text, and the prompt's tokens taken off.
    Only where the two merge (":" with another ":", or with a line end) the response goes alone.
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
        raise ValueError(f"--val_set_size {val_set_size} cannot be taken out of {len(rows)} rows")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[val_set_size:], shuffled[:val_set_size]


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Make a batch of rows, padded on the right to the longest of them.

    Returns input_ids, attention_mask (0 on padding), labels: (bsz, seqlen) int64.
    """
    ids = [row["input_ids"].long() for row in rows]
    labels = [row["labels"].long() for row in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    }
