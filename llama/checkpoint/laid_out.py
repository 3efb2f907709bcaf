"""Files that are laid out on disk and then filled in place, several weights at a time."""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from llama.checkpoint.weights import Source, hash_threads
from llama.cli import progress_bar
from llama.files import bytes_of, naming_refusals

T = TypeVar("T")


@dataclass
class LaidOutFile:
    """A file whose header is written; opened, it has room for its weights behind."""

    path: Path
    offsets: dict[str, int]  # where the bytes of each weight begin
    size: int  # of the whole file, in bytes
    descriptor: int = field(init=False)

    def __enter__(self) -> "LaidOutFile":
        with naming_refusals(self.path):
            self.descriptor = os.open(self.path, os.O_RDWR)
            os.posix_fallocate(self.descriptor, 0, self.size)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def write(self, name: str, at: int, data: memoryview) -> None:
        """Put bytes at a place within the bytes of a weight."""
        place = self.offsets[name] + at
        while data:
            with naming_refusals(self.path):
                written = os.pwrite(self.descriptor, data, place)
            data, place = data[written:], place + written

    def flush(self) -> None:
        """Return when what was written is on the disk."""
        with naming_refusals(self.path):
            os.fdatasync(self.descriptor)


def check_space(folder: Path, needed: int) -> None:
    """Raise ValueError if so many bytes are not free where a folder is to be written."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder.parent}: {needed:,} bytes needed, but only {free:,} are free")


def write_weights(
    source: Source, files: Sequence[LaidOutFile], names: Sequence[str], write: Callable[[str], T]
) -> dict[str, T]:
    """Call write with the name of every weight, while the files are open; what it returns, by name.

    As many weights at a time as torch has threads, the largest first.
    """
    size = {name: math.prod(source.shapes[name]) for name in names}
    names, found = sorted(size, key=size.__getitem__, reverse=True), {}
    with contextlib.ExitStack() as stack:
        for file in files:
            stack.enter_context(file)
        total = sum(size.values()) * source.dtype.itemsize
        bar = stack.enter_context(progress_bar("writing", total))
        pool = stack.enter_context(hash_threads())
        # What map gives is not kept: when one weight fails, those not yet begun are left out.
        for name, result in zip(names, pool.map(write, names)):
            found[name] = result
            for file in files:  # meanwhile the disk writes: little is left for the end
                file.flush()
            bar.update(size[name] * source.dtype.itemsize)
    return found


def checked_blocks(source: Source, name: str, multiple: int = 1) -> Iterator[torch.Tensor]:
    """Read a weight in blocks of a multiple of so many rows.

    In the end the source is asked whether what was read is what it should hold: ValueError if not.
    """
    total = hashlib.sha256()
    for _, block in source.blocks(name, multiple):
        if source.has_hashes:
            total.update(bytes_of(block))
        yield block
    if source.has_hashes:
        source.check_sha256(name, total.hexdigest())


def in_dtype(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Convert a block of a weight; ValueError for numbers that only a wider dtype can hold."""
    if block.dtype == torch.uint8:  # quantised
        return block
    converted = block.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(block.dtype).max
    if narrower and bool((converted.isinf() & block.isfinite()).any()):
        raise ValueError(f"{name}: holds numbers too large for {dtype}; take --dtype bfloat16")
    return converted
