"""Write a checkpoint as any number of shards, whole or not at all; say beforehand what it takes."""

import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from llama import manifest, parallel
from llama.checkpoint import (
    Checkpoint,
    Cut,
    Source,
    check_shard_count,
    counted,
    cut_of,
    describe_weights,
    role,
    shard_name,
    tiling,
)
from llama.manifest import (
    BLOCK_ROWS,
    Manifest,
    bytes_of,
    content_hash,
    frame_sha256,
    hash_pool,
    sha256_of,
    tensor_ranges,
)
from llama.model import ModelArgs


def write_checkpoint(
    source: Source, out_dir: str | Path, n: int = 1, dtype: torch.dtype | None = None
) -> None:
    """Write source as a folder of n shards with its manifest, which appears whole or not at all.

    Shards are laid out on disk and filled in place, some rows at a time. Raises ValueError for an
    n that does not divide, a damaged source or a folder in use, OSError for a disk that cannot
    take it.
    """
    out_dir, dtype = Path(os.path.abspath(out_dir)), dtype or source.dtype
    args = ModelArgs.from_params(source.params)
    check_shard_count(args, n, f"the model to be written to {out_dir}")
    cuts = {name: cut_of(name, args, n) for name in source.shapes}
    total = _bytes_of(source.shapes, cuts, n, dtype)
    with _new_folder(out_dir) as folder:
        hashes: dict[str, list[bytes]] = {}
        with (
            _lay_out(folder, source.shapes, cuts, n, dtype) as shards,
            _flushing(shards) as check_flushed,
            parallel.byte_bar(total) as bar,
            hash_pool() as pool,
        ):
            for name, cut in cuts.items():
                writer = _WeightWriter(source, name, cut, *tiling(name, args), dtype, shards)
                hashes[name] = writer.run(pool)
                check_flushed()
                bar.update(n * writer.part_bytes)
        for name, content in source.files.items():
            with _naming(folder / name):
                if isinstance(content, Path):
                    shutil.copyfile(content, folder / name)
                else:
                    (folder / name).write_bytes(content)
        texts = {
            "params.json": json.dumps(source.params, indent=2) + "\n",
            manifest.NAME: _describe(folder, source.params, args, n, hashes, dtype).text(),
        }
        for name, text in texts.items():
            with _naming(folder / name):
                (folder / name).write_text(text, encoding="utf-8")


class _ShardFile:
    """A shard that is laid out on disk, to be filled in place."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR)
        self.offsets = {name: start for name, (start, _) in zip(names, tensor_ranges(path))}

    def write(self, name: str, at: int, block: torch.Tensor) -> None:
        """Put a block's bytes at a place within the bytes of a weight."""
        data, place = bytes_of(block), self.offsets[name] + at
        while data:
            with _naming(self.path):
                written = os.pwrite(self.descriptor, data, place)
            data, place = data[written:], place + written

    def flush(self) -> None:
        """Return when what was written is on the disk."""
        with _naming(self.path):
            os.fdatasync(self.descriptor)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file the system refused to write."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None


@dataclass
class _WeightWriter:
    """Writes one weight into all shards, block of rows by block of rows, and hashes its tiles."""

    source: Source
    name: str
    cut: Cut
    dim: int  # that of the tiles, see tiling()
    count: int
    dtype: torch.dtype
    shards: list[_ShardFile]

    def __post_init__(self) -> None:
        self.full = self.source.shapes[self.name]
        self.part = self.cut.shape(self.full)
        self.part_bytes = torch.Size(self.part).numel() * self.dtype.itemsize
        self.read_rows = self.source.rows_of(self.name)

    def run(self, pool: ThreadPoolExecutor) -> list[bytes]:
        """Write it all; the hashes of its tiles, part after part. The source is checked by them."""
        rows, in_rows = self.full[0], self.count if self.dim == 0 else 1
        height = rows // in_rows
        starts = [
            (first, min(first + BLOCK_ROWS, top + height))
            for top in range(0, rows, height)
            for first in range(top, top + height, BLOCK_ROWS)
        ]
        blocks = list(pool.map(self._write_rows, *zip(*starts)))
        written, read = ([x for column in zip(*side) for x in column] for side in zip(*blocks))
        if self.source.check is not None:
            self.source.check(self.name, read)
        return written

    def _write_rows(self, start: int, stop: int) -> tuple[list[bytes], list[bytes]]:
        """Write some rows; hashes of their tiles, from left to right, as written and as read."""
        read = self.read_rows(start, stop)
        rows = read.to(self.dtype)
        row_bytes = self.part_bytes // self.part[0]
        for i, shard in enumerate(self.shards):
            first = self.cut.piece_of(i) * self.part[self.cut.dim]
            if self.cut.dim == 1:
                shard.write(self.name, start * row_bytes, rows.narrow(1, first, self.part[1]))
            elif first <= start < first + self.part[0]:
                shard.write(self.name, (start - first) * row_bytes, rows)
        in_columns = self.count if self.dim == 1 else 1
        written = [sha256_of(tile) for tile in rows.chunk(in_columns, -1)]
        if read is rows or self.source.check is None:
            return written, written
        return written, [sha256_of(tile) for tile in read.chunk(in_columns, -1)]


def _describe(
    folder: Path,
    params: dict,
    args: ModelArgs,
    n: int,
    hashes: dict[str, list[bytes]],
    dtype: torch.dtype,
) -> Manifest:
    """The manifest of a folder just written, from the hashes of its weights' tiles."""
    weights = describe_weights(args, n, dict.fromkeys(hashes, dtype))
    for name, tiles in hashes.items():
        weights[name]["sha256"] = content_hash(tiles)
    shards = {}
    for i in range(n):
        tensors = {}
        for name, tiles in hashes.items():
            cut = cut_of(name, args, n)
            per_piece = len(tiles) // cut.pieces
            first = cut.piece_of(i) * per_piece
            tensors[name] = content_hash(tiles[first : first + per_piece])
        path = folder / shard_name(i)
        shards[path.name] = {
            "size": path.stat().st_size,
            "frame_sha256": frame_sha256(path),
            "tensors": tensors,
        }
    return Manifest(params, n, weights, shards)


def plan(
    ckpt: Checkpoint, n: int, dtype: torch.dtype | None, max_seq_len: int, max_batch_size: int
) -> str:
    """A table of what cutting into n would write, and of what each rank then needs to run."""
    args, dtype = ckpt.args, dtype or ckpt.dtype
    check_shard_count(args, n, str(ckpt.dir))
    kinds: dict[str, list[str]] = {}
    for name in ckpt.shapes:
        kinds.setdefault(role(name), []).append(name)
    rows = [("weight", "count", "whole", f"in each of {ckpt.n}", f"of {n}", "bytes in a shard")]
    weights = 0
    for kind, names in kinds.items():
        full = ckpt.shapes[names[0]]
        before, after = ckpt.cut(names[0]).shape(full), cut_of(names[0], args, n).shape(full)
        size = len(names) * torch.Size(after).numel() * dtype.itemsize
        weights += size
        shapes = (" x ".join(map(str, shape)) for shape in (full, before, after))
        rows.append((kind, str(len(names)), *shapes, f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {x:>{w}}" for x, w in zip(row[1:], widths[1:]))
        for row in rows
    ]
    positions = max_batch_size * max_seq_len
    local_kv_dim = max(1, args.n_kv_heads // n) * args.head_dim
    cache = 2 * args.n_layers * positions * local_kv_dim * dtype.itemsize
    return "\n".join(
        [
            *lines,
            f"{counted(n, 'shard')} of {weights:,} bytes, {n * weights:,} in all, in {dtype}",
            f"to run, each of {counted(n, 'rank')} needs {(weights + cache) / 1e9:.2f} GB: weights "
            f"{weights / 1e9:.2f} GB, cache {cache / 1e9:.2f} GB ({max_batch_size} rows of "
            f"{max_seq_len} tokens); activations come on top",
        ]
    )


@contextlib.contextmanager
def _new_folder(out_dir: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, renamed to out_dir when all in it is on disk."""
    _check_free(out_dir)
    folder = out_dir.parent / f".{out_dir.name}.partial"
    new_parents = [parent for parent in out_dir.parents if not parent.exists()]
    with contextlib.ExitStack() as stack:
        with _naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may just have renamed or removed the folder.
            mine = folder.exists() and os.path.samestat(os.fstat(lock), folder.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise ValueError(f"{out_dir}: another run is writing it; wait for that one")
        try:
            _check_free(out_dir)
            for path in folder.iterdir():  # of a run that was killed
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield folder
            for path in [*folder.iterdir(), folder]:
                fsync(path)
            with _naming(out_dir):
                folder.rename(out_dir)
            fsync(out_dir.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new_parents:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def _check_free(out_dir: Path) -> None:
    """The name must be free, or that of an empty folder, which a rename can replace."""
    if os.path.ismount(out_dir) or out_dir.is_symlink():
        raise ValueError(f"{out_dir}: a link or mount point; name a new folder inside it")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: already there and not empty; remove it or choose another")


def fsync(path: Path) -> None:
    """Return when a file, or a folder's list of files, is on the disk."""
    with _naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _bytes_of(
    shapes: dict[str, tuple[int, ...]], cuts: dict[str, Cut], n: int, dtype: torch.dtype
) -> int:
    """Bytes of all weights in n shards."""
    sizes = (torch.Size(cuts[name].shape(full)).numel() for name, full in shapes.items())
    return n * sum(sizes) * dtype.itemsize


@contextlib.contextmanager
def _lay_out(
    folder: Path,
    full: dict[str, tuple[int, ...]],
    cuts: dict[str, Cut],
    n: int,
    dtype: torch.dtype,
) -> Iterator[list[_ShardFile]]:
    """n shard files with their disk space taken, to be filled."""
    needed = _bytes_of(full, cuts, n, dtype)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder.parent}: {needed:,} bytes needed, but only {free:,} are free")
    shapes = {name: cut.shape(full[name]) for name, cut in cuts.items()}
    shards: list[_ShardFile] = []
    with contextlib.ExitStack() as stack:
        for i in range(n):
            path = folder / shard_name(i)
            # Never touched, so these take address space but no memory.
            empty = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
            try:
                with torch.serialization.skip_data():
                    torch.save(empty, str(path))
            except RuntimeError:  # how torch says that the system refused a write, and not why
                raise OSError(f"{path}: cannot be written; is the disk full?") from None
            shards.append(_ShardFile(path, cuts))
            stack.callback(os.close, shards[-1].descriptor)
            with _naming(path):
                os.posix_fallocate(shards[-1].descriptor, 0, path.stat().st_size)
        yield shards


@contextlib.contextmanager
def _flushing(shards: list[_ShardFile]) -> Iterator[Callable[[], None]]:
    """Let the disk write what is done while more is being done: little is left at the end.

    Gives what raises the OSError that this has met: the system tells it once, so that no later
    fsync would know.
    """
    ended = threading.Event()
    failures: list[OSError] = []

    def flush() -> None:
        while not ended.wait(0.01) and not failures:
            try:
                for shard in shards:
                    shard.flush()
            except OSError as error:
                failures.append(error)

    def check() -> None:
        if failures:
            raise failures[0]

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield check
    finally:
        ended.set()
        thread.join()
    check()
