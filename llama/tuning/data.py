"""Datasets of tokens in a mapped file; some rows held out; batches of rows of like length."""

import hashlib
import itertools
import os
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import torch
from torch.nn.utils.rnn import pad_sequence

from llama import cli, parallel
from llama.files import hash_of, naming, naming_refusals
from llama.tokenizer import Tokenizer
from llama.tuning.options import ALPACA_PREAMBLE, TuningOptions
from llama.tuning.rows import MANY, Dataset, Row, read_rows
from llama.tuning.templates import IGNORE, ChatEncoder, PromptEncoder, Tokens, encoder_for

INTS = pyarrow.list_(pyarrow.int32())
COUNTS = {"length": pyarrow.int32(), "n_learned": pyarrow.int32()}  # of a row
SCHEMA = pyarrow.schema({"input_ids": INTS, "labels": INTS} | COUNTS)

POOL = 16  # batches that are sorted by length together


@dataclass
class TokenizedDataset:
    """Rows of token ids with labels, in a mapped file, and what a run says of them.

    chat_template: of conversations that look like the rows; None if they are in no template.
    hashes: SHA-256 of the dataset and of all ids and labels, by name.
    """

    rows: Dataset
    chat_template: str | None
    hashes: dict[str, str]


def tokenize_dataset(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    num_virtual_tokens: int = 0,
    *,
    template: str | None = None,
    columns: str | None = None,
    train_on_inputs: bool = False,
) -> TokenizedDataset:
    """Make tokens of the rows of a dataset, once on each machine, for all ranks there.

    labels are -100 on what is not to be learned, unless train_on_inputs. Rows that with the tuned
    prompt's tokens are longer than max_seq_len are cut, or left out where that does not help; a
    message says how many. Raises what read_rows does, and ValueError if no row is left.
    """
    room = Room(max_seq_len, num_virtual_tokens)
    local_rank = parallel.local_share().start
    # Without a name on the disk: it goes with the last process that has it open or mapped, however
    # that ends. The other ranks of the machine open it by way of the one that made it.
    with tempfile.TemporaryFile() as file:
        name, made = f"/proc/{os.getpid()}/fd/{file.fileno()}", None
        if local_rank == 0:
            form, found = read_rows(path, columns)
            encoder = encoder_for(form, tokenizer, template)
            cli.say(f"{path}: rows of {form}, {encoder.name}")
            counts: Counter[str] = Counter()
            encoded = _encoded(found, encoder, room, counts, train_on_inputs)
            hashes = {
                "dataset_sha256": _hash_of(Path(path)),
                "tokens_sha256": _write(name, encoded),
            }
            made = encoder.chat_template, hashes
            room.tell(path, counts, encoder)
        if parallel.world_size() > 1:
            parallel.meet("to tokenise the dataset")
            name, made = parallel.gather_objects((name, made))[parallel.rank() - local_rank]
        rows = Dataset.from_file(name).with_format("torch", columns=["input_ids", "labels"])
        parallel.meet("to map the tokens")
    return TokenizedDataset(rows, *made)  # type: ignore[misc]  # local rank 0 has made it


@dataclass
class Room:
    """How many tokens a row may have: those that the tuned prompt leaves."""

    max_seq_len: int
    num_virtual_tokens: int

    @property
    def longest(self) -> int:
        return self.max_seq_len - self.num_virtual_tokens

    def __str__(self) -> str:
        n = self.num_virtual_tokens
        less = f" less the tuned prompt's {n}" if n else ""
        return f"the {self.longest} tokens that --max_seq_len {self.max_seq_len}{less} leaves"

    def tell(
        self, path: str | Path, counts: Counter[str], encoder: PromptEncoder | ChatEncoder
    ) -> None:
        """Say what became of all rows; ValueError if none is left."""
        n, cut, left_out = counts["rows"], counts["cut"], counts["left out"]
        if n == left_out:
            least = self.num_virtual_tokens + counts["shortest"]
            raise ValueError(
                f"{path}: no row fits into {self}: the shortest needs {counts['shortest']}; give "
                f"--max_seq_len {least} at least, and better more"
            )
        fits = "which all fit"
        if cut or left_out:
            fits = f"of which {cut} {encoder.cutting}, and {left_out} left out, to fit into {self}"
        asks = f"; {counts['asks']} end with a question, which is left out" * bool(counts["asks"])
        cli.say(
            f"{path}: {cli.counted(n, 'row')}, {fits}{asks}; {counts['learned']:,} of "
            f"{counts['tokens']:,} tokens are learned"
        )


def _encoded(
    rows: Iterator[tuple[str, Row]],
    encoder: PromptEncoder | ChatEncoder,
    room: Room,
    counts: Counter[str],
    train_on_inputs: bool,
) -> Iterator[Tokens]:
    """The tokens of rows, but for those that are too long; counts what becomes of all."""
    for where, row in cli.progress_bar("making tokens", unit="row", items=rows):
        with naming(where):
            tokens = encoder.encode(row, room.longest)
        n = len(tokens.ids)
        counts["rows"] += 1
        if n > room.longest:
            counts["left out"] += 1
            counts["shortest"] = min(n, counts["shortest"] or n)
            continue
        if train_on_inputs:
            tokens = tokens.with_inputs()
        counts.update(cut=tokens.cut, asks=tokens.asks, tokens=n, learned=tokens.n_learned)
        yield tokens


def _write(name: str, encoded: Iterator[Tokens]) -> str:
    """Write tokens as an Arrow file, a few rows at a time; their SHA-256."""
    hashed = hashlib.sha256()
    with (
        naming_refusals(Path(tempfile.gettempdir())),
        pyarrow.OSFile(name, "wb") as file,
        pyarrow.ipc.new_stream(file, SCHEMA) as writer,
    ):
        while some := list(itertools.islice(encoded, MANY)):
            rows = [(x.ids, x.labels, len(x.ids), x.n_learned) for x in some]
            for ids, labels, *_ in rows:
                hashed.update(array("i", ids + labels))
            writer.write_batch(pyarrow.record_batch(list(zip(*rows)), schema=SCHEMA))
    return hashed.hexdigest()


def _hash_of(path: Path) -> str:
    """The SHA-256 of a file, or of the names and hashes of all files in a folder."""
    if path.is_file():
        return hash_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path)} {hash_of(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def column(rows: Dataset, name: str) -> list[int]:
    """The length or n_learned of each row."""
    return rows.with_format("numpy", columns=[name])[name][:].tolist()


def split_dataset(rows: Dataset, val_set_size: int, seed: int) -> tuple[Dataset, Dataset | None]:
    """Draw val_set_size rows for evaluation by seed; return those to train on, and those (or None).

    Raises ValueError if that leaves nothing to train on.
    """
    if val_set_size == 0:
        return rows, None
    if not 0 < val_set_size < len(rows):
        raise ValueError(f"--val_set_size {val_set_size} cannot be taken out of {len(rows)} rows")
    shuffled = list(range(len(rows)))
    random.Random(seed).shuffle(shuffled)
    return rows.select(shuffled[val_set_size:]), rows.select(shuffled[:val_set_size])


def init_ids(options: TuningOptions, tokenizer: Tokenizer, rows: Dataset) -> list[int]:
    """The tokens whose embeddings a prompt starts from, if any: of rows, or of --init_prompt.

    Rows are drawn by seed, until there are enough; the first of them is cut at its beginning.
    """
    if options.init == "text":
        return tokenizer.encode(options.init_prompt or ALPACA_PREAMBLE, bos=False)
    n, ids = options.num_virtual_tokens, list[int]()
    if options.init == "rows":
        for row in random.Random(options.seed).sample(range(len(rows)), min(n, len(rows))):
            ids = rows[row]["input_ids"].tolist() + ids
            if len(ids) >= n:
                break
    return (ids * n)[-n:]  # again from the last one where rows do not suffice


class LengthGrouped(torch.utils.data.Sampler[int]):
    """An order of rows in which each batch has rows of like length, so that little is padded.

    Rows are shuffled; those of POOL batches at a time are sorted by length; then batches are
    shuffled. The seed and the number of the epoch alone decide, so all ranks and a resumed run have
    the same order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, from 0. The Trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        choose, size = random.Random(f"{self.seed} {self.epoch}"), self.batch_size
        rows = list(range(len(self.lengths)))
        choose.shuffle(rows)
        whole = len(rows) - len(rows) % size  # the last batch, which has fewer rows, stays last
        batches = []
        for start in range(0, whole, POOL * size):
            pool = sorted(
                rows[start : min(start + POOL * size, whole)], key=self.lengths.__getitem__
            )
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        choose.shuffle(batches)
        return itertools.chain(*batches, rows[whole:])

    def padding(self) -> str:
        """Tell how much of the batches is padding, and how much it would be in random order."""
        shuffled = list(range(len(self.lengths)))
        random.Random(self.seed).shuffle(shuffled)
        grouped, random_order = (
            f"{self._padding_in(order):.0%}" for order in (list(self), shuffled)
        )
        return (
            f"batches of rows of like length: {grouped} of their tokens are padding, and in random "
            f"order it would be {random_order}"
        )

    def _padding_in(self, order: list[int]) -> float:
        starts = range(0, len(order), self.batch_size)
        batches = [
            [self.lengths[i] for i in order[start : start + self.batch_size]] for start in starts
        ]
        return 1 - sum(self.lengths) / sum(len(batch) * max(batch) for batch in batches)


def own_rows(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], bool]:
    """Take from a batch of all replicas, as collate() makes it, the rows of this one.

    They are padded to the longest of them. Returns the first row and False where this replica has
    none, as may be in the last batch: all replicas must go through their models together.
    """
    share = parallel.own_share()
    if share.step == 1:
        return batch, True
    rows = list(range(len(batch["labels"])))[share]
    taken = rows or [0]
    longest = int(batch["attention_mask"][taken].sum(dim=1).max())
    return {name: tensor[taken, :longest] for name, tensor in batch.items()}, bool(rows)


def collate(rows: Sequence[dict[str, torch.Tensor]], pad_id: int) -> dict[str, torch.Tensor]:
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
