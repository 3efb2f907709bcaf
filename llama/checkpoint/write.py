"""Write a checkpoint as any number of shards, whole or not at all."""

import functools
import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from llama.checkpoint.folder import shard_name
from llama.checkpoint.laid_out import LaidOutFile, check_space, in_dtype, write_weights
from llama.checkpoint.manifest import Manifest, describe_file, describe_weights
from llama.checkpoint.weights import Cut, Source, cut_of
from llama.files import bytes_of, content_of, naming_refusals, new_folder, write_json


def write_checkpoint(
    source: Source,
    out_dir: str | Path,
    n: int = 1,
    dtype: torch.dtype | None = None,
    prefix: str = "fs_consolidated",
) -> None:
    """Write source as a folder of n shards with its manifest, which appears whole or not at all.

    Shards are laid out on disk and filled in place, some rows at a time. Raises ValueError for an
    n that does not divide, a damaged source or a folder in use, OSError for a disk that cannot
    take it.
    """
    out_dir, dtype = Path(os.path.abspath(out_dir)), dtype or source.dtype
    source.check_cut(n, f"the model to be written to {out_dir}")
    with new_folder(out_dir) as folder:
        paths = [folder / shard_name(i, prefix) for i in range(n)]
        hashes = _write_shards(source, paths, dtype)
        write_files(folder, source.files)
        write_json(folder / "params.json", source.params)
        dtypes = {name: source.dtype_of(name, dtype) for name in source.shapes}
        described = describe_weights(source.shapes, dtypes)
        weights = {name: described[name] | hashes[name] for name in described}
        shards = {path.name: path.stat().st_size for path in paths}
        files = {name: describe_file(folder / name) for name in source.files}
        source.check_unchanged()
        Manifest(source.params, weights, shards, files).write(folder)


def write_files(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write or copy the files that go along with a model into a folder."""
    for name, content in files.items():
        data = content_of(content)
        with naming_refusals(folder / name):
            (folder / name).write_bytes(data)


def _write_shards(
    source: Source, paths: list[Path], dtype: torch.dtype
) -> dict[str, dict[str, str | list[str]]]:
    """Write all weights into shards; what the manifest then says of the hashes of each."""
    shards = _lay_out(source, paths, dtype)
    write = functools.partial(_write_weight, source, shards=shards, dtype=dtype)
    return write_weights(source, shards, list(source.shapes), write)


def _write_weight(
    source: Source, name: str, shards: list[LaidOutFile], dtype: torch.dtype
) -> dict[str, str | list[str]]:
    """Write one weight into all shards; the SHA-256 of the whole, and of each of its parts.

    The source is asked whether what was read is what it should hold.
    """
    cut = cut_of(name, source.args, len(shards))
    part_shape = cut.shape(source.shapes[name])
    dtype = source.dtype_of(name, dtype)
    row_bytes = math.prod(part_shape[1:]) * dtype.itemsize
    as_read, whole = hashlib.sha256(), hashlib.sha256()
    # One part is the whole, and not hashed twice.
    parts = [hashlib.sha256() for _ in range(cut.parts)] if cut.parts > 1 else []
    for start, block in source.blocks(name):
        converted = in_dtype(block, dtype, name)
        whole.update(bytes_of(converted))
        if dtype != block.dtype and source.has_hashes:
            as_read.update(bytes_of(block))
        for part, first_row, rows in _by_part(converted, start, cut, part_shape):
            data = bytes_of(rows)
            if parts:
                parts[part].update(data)
            for i, shard in enumerate(shards):  # KV heads and norms: into several
                if cut.part_in(i) == part:
                    shard.write(name, first_row * row_bytes, data)
    if source.has_hashes:
        source.check_sha256(name, (whole if dtype == block.dtype else as_read).hexdigest())
    of_parts = [part.hexdigest() for part in parts] or [whole.hexdigest()]
    return {"sha256": whole.hexdigest(), "parts": of_parts}


def _by_part(
    block: torch.Tensor, start: int, cut: Cut, part_shape: tuple[int, ...]
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Cut a block of rows, from row start on: each part in it, its first row there, its rows."""
    if cut.dim == 1:
        for part, columns in enumerate(block.chunk(cut.parts, 1)):
            yield part, start, columns
        return
    height, stop = part_shape[0], start + len(block)
    for part in range(start // height, (stop - 1) // height + 1):
        first, last = max(part * height, start), min((part + 1) * height, stop)
        yield part, first - part * height, block[first - start : last - start]


def tensor_ranges(path: Path) -> list[tuple[int, int]]:
    """Where each tensor's bytes begin and end in a shard file, in the order of their numbers.

    The file is a zip archive with one stored record a tensor (its data/N), as torch.save writes.
    """
    ranges = {}
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            folder, _, number = record.filename.rpartition("/")
            if folder.endswith("/data") and number.isdecimal():
                # The local header repeats the name, and may have an extra field of its own.
                file.seek(record.header_offset + 26)
                start = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                ranges[int(number)] = (start, start + record.file_size)
    return [ranges[number] for number in sorted(ranges)]


def _lay_out(source: Source, paths: list[Path], dtype: torch.dtype) -> list[LaidOutFile]:
    """Make the shards' files, to be filled."""
    n = len(paths)
    shapes = {
        name: cut_of(name, source.args, n).shape(shape) for name, shape in source.shapes.items()
    }
    dtypes = {name: source.dtype_of(name, dtype) for name in shapes}
    size = sum(math.prod(shapes[name]) * dtypes[name].itemsize for name in shapes)
    check_space(paths[0].parent, n * size)
    shards = []
    for path in paths:
        # Never touched, so these take address space but no memory.
        empty = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
        with naming_refusals(path), torch.serialization.skip_data():
            torch.save(empty, str(path))
        offsets = {name: start for name, (start, _) in zip(shapes, tensor_ranges(path))}
        shards.append(LaidOutFile(path, offsets, path.stat().st_size))
    return shards
