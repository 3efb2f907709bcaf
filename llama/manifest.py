"""manifest.json: what each weight and each shard of a folder holds, so that damage is noticed.

A weight is hashed in tiles: the finest parts into which any number of shards may cut it, each in
blocks of 512 rows. Its content hash is the SHA-256 of its tiles' SHA-256, part after part, and that
of what one shard holds of it likewise. So the hash of a weight does not depend on n, and one
reading of the shards gives both. (A shard is a zip archive, whose own checksums nobody fills in.)
"""

import hashlib
import json
import os
import reprlib
import struct
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

NAME = "manifest.json"
FORMAT = 1
BLOCK_ROWS = 512
LONGEST = 1 << 24  # bytes; a model of 80 layers in 16 shards takes 2 MB


@dataclass
class Manifest:
    """What manifest.json says."""

    params: dict  # as in params.json
    n: int
    weights: dict[str, dict]  # by name: shape, dtype, cut (dim, pieces) and sha256 of the whole
    shards: dict[str, dict]  # by file: size, frame_sha256, and tensors, the sha256 of each part
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of a folder, None if it has none; ValueError if it cannot be one."""
        path = folder / NAME
        if not os.path.lexists(path):
            return None
        try:
            if not path.is_file():
                raise ValueError("a link that leads nowhere, or no file")
            value = json_object(path, LONGEST)
            if value.get("format") != FORMAT:
                found = reprlib.repr(value.get("format"))
                raise ValueError(f"format {found}, but this program knows {FORMAT}")
            manifest = cls(**value)
            manifest._check_types()
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path}: unreadable ({error}); without it the folder can be used unverified"
            ) from None
        return manifest

    def _check_types(self) -> None:
        def check(table: object, kinds: dict[str, type]) -> None:
            if not isinstance(table, dict):
                raise ValueError("not an object where one is wanted")
            for key, kind in kinds.items():
                if type(table[key]) is not kind:
                    raise ValueError(f"{key} is not of type {kind.__name__}")

        check(vars(self), {"params": dict, "n": int, "weights": dict, "shards": dict})
        for weight in self.weights.values():
            check(weight, {"shape": list, "dtype": str, "cut": dict, "sha256": str})
        for shard in self.shards.values():
            check(shard, {"size": int, "frame_sha256": str, "tensors": dict})
            check(shard["tensors"], dict.fromkeys(shard["tensors"], str))

    def text(self) -> str:
        """The content of manifest.json."""
        return json.dumps({"format": self.format} | asdict(self), indent=1) + "\n"


def json_object(path: Path, longest: int) -> dict:
    """The JSON object in a file of at most so many bytes; ValueError, saying why, without one."""
    if path.stat().st_size > longest:
        raise ValueError(f"longer than {longest:,} bytes")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    return value


def read_json_object(path: Path, longest: int = 1 << 28) -> dict:
    """The JSON object in a file; ValueError, with the path, if it holds anything else."""
    try:
        return json_object(path, longest)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from None


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, row by row, as they lie in a file."""
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def sha256_of(tile: torch.Tensor) -> bytes:
    """Hash of a tensor's bytes."""
    return hashlib.sha256(bytes_of(tile)).digest()


def hash_pool() -> ThreadPoolExecutor:
    """As many threads as torch uses, up to where they would wait for memory and disk alone."""
    return ThreadPoolExecutor(min(torch.get_num_threads(), 8))


def sha256_of_tiles(weight: torch.Tensor, dim: int, count: int) -> list[bytes]:
    """Hashes of the tiles of a weight in count parts along dim, on as many threads as torch has."""
    tiles = [tile for part in weight.chunk(count, dim) for tile in part.split(BLOCK_ROWS)]
    with hash_pool() as pool:
        return list(pool.map(sha256_of, tiles))


def content_hash(tiles: Iterable[bytes]) -> str:
    """One hash for several tiles."""
    return hashlib.sha256(b"".join(tiles)).hexdigest()


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


def frame_sha256(path: Path) -> str:
    """Hash of a shard file's bytes outside its tensors: headers, names, padding, directory."""
    total, at = hashlib.sha256(), 0
    ranges = sorted(tensor_ranges(path))
    with path.open("rb") as file:
        for start, stop in [*ranges, (path.stat().st_size, 0)]:
            file.seek(at)
            while block := file.read(min(max(start - at, 0), 1 << 20)):
                total.update(block)
                at += len(block)
            at = max(at, stop)
    return total.hexdigest()
