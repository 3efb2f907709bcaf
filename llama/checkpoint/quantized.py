"""Any checkpoint, its matrices quantised as they are read, or kept as a file has quantised them."""

import shlex
from collections.abc import Iterator

import torch

from llama.checkpoint.laid_out import checked_blocks
from llama.checkpoint.weights import (
    Source,
    bits_of,
    kind_of,
    valid_shard_counts,
    weight_shapes,
)
from llama.files import naming
from llama.model import ModelArgs
from llama.options import check_quantize, dtype_flag
from llama.quantize import GROUPS, KEPT_GROUP, group_bytes, pack

MOST_CARDS = 8  # of a machine: groups are as long as cuts for so many leave them


def quantized(source: Source, quantize: str | None) -> Source:
    """A checkpoint quantised to int8 or int4; None leaves it as it is.

    Raises ValueError for one that is quantised otherwise already, or does not divide into groups.
    """
    check_quantize(quantize)
    if quantize in (None, source.quantize):
        return source
    return QuantizedSource(source, str(quantize))


class QuantizedSource(Source):
    """A checkpoint of which matrices are read as pack() makes them.

    The groups do not depend on the number of ranks, so that these all read the same numbers.
    """

    def __init__(self, source: Source, quantize: str) -> None:
        if source.quantize:
            raise ValueError(
                f"{source.path}: quantised to {source.quantize}: leave --quantize away, or "
                f"quantise the checkpoint that it was made from to {quantize}"
            )
        params = source.params | {"quantize": quantize}
        super().__init__(source.path, params, source.dtype, source.files)
        self.source, self.quantize = source, quantize
        self.form, self.n, self.stop_ids = source.form, source.n, source.stop_ids
        self.groups: dict[str, int] = {}
        with naming(source.path):
            for name, shape in source.shapes.items():
                if bits := bits_of(name, quantize):
                    kept = source.kept_bits(name) == bits
                    group = KEPT_GROUP if kept else group_for(name, source.args, bits)
                    self.groups[name] = group
                    self.shapes[name] = (shape[0], shape[1] // group * group_bytes(bits, group))

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of a weight; by default all of it."""
        if name not in self.groups:
            return self.source.read(name, dim, start, stop)
        stop = self.shapes[name][dim] if stop is None else stop
        if dim == 0:
            return self.block(name, start, stop, slice(None))
        return self.block(name, 0, self.shapes[name][0], slice(start, stop))

    def block(self, name: str, start: int, stop: int, columns: slice) -> torch.Tensor:
        """Some columns of rows start to stop of a matrix; of a quantised one whole groups."""
        if name not in self.groups:
            return self.source.block(name, start, stop, columns)
        bits, group = self.bits_of(name), self.groups[name]
        first, last, _ = columns.indices(self.shapes[name][1])
        n_bytes = group_bytes(bits, group)
        inputs = slice(first // n_bytes * group, last // n_bytes * group)
        if self.source.kept_bits(name) == bits:
            return self.source.kept(name, start, stop, inputs)
        return pack(self.source.block(name, start, stop, inputs), bits, group)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """Read a weight some rows at a time, each with the number of its first row.

        In the end the source is asked whether what was read is what it should hold.
        """
        start = 0
        for block in checked_blocks(self.source, name, multiple):
            stop = start + len(block)
            yield start, self.read(name, 0, start, stop) if name in self.groups else block
            start = stop

    def check_share(self, rank: int, n: int) -> None:
        """Raise ValueError where what rank of n ranks reads is damaged."""
        self.source.check_share(rank, n)

    def check_unchanged(self) -> None:
        """Raise ValueError if the checkpoint's files were written into since they were opened."""
        self.source.check_unchanged()

    def work_to_save(self, n: int, dtype: torch.dtype | None) -> str:
        """What is done while loading, and the command that saves it next time."""
        command = ["python", "split_model.py", "--ckpt_dir", str(self.path), "--n", str(n)]
        command += ["--quantize", str(self.quantize), *dtype_flag(dtype)]
        return (
            f"quantised to {self.quantize} while loading; to save that work next time: "
            f"{shlex.join(command)}"
        )


def group_for(name: str, args: ModelArgs, bits: int) -> int:
    """The inputs of a matrix's groups: the most that every cut for MOST_CARDS leaves whole."""
    n_in, groups = weight_shapes(args)[name][1], GROUPS[bits]
    counts = valid_shard_counts(args) if kind_of(name).cut == 1 else [1]
    parts = [n_in // n for n in counts if n <= MOST_CARDS]
    for fitting in (parts, [n_in]):  # or at least the uncut
        for group in groups:
            if all(part % group == 0 for part in fitting):
                return group
    raise ValueError(
        f"{name} has {n_in} inputs, which do not divide into groups of {groups[-1]}: it cannot be "
        "quantised; leave --quantize away"
    )
