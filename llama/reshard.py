"""Write a checkpoint as any number of shards, whole or not at all; say beforehand what it takes."""

import contextlib
import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from llama import manifest, parallel
from llama.checkpoint import Checkpoint, Cut, Source, check_shard_count, cut_of, role, tiling
from llama.manifest import Manifest, content_hash, frame_sha256, sha256_of
from llama.model import ModelArgs


def write_checkpoint(
    source: Source, out_dir: str | Path, n: int = 1, dtype: torch.dtype | None = None
) -> None:
    """Write source as a folder of n shards with its manifest, which appears whole or not at all.

    At no time is more than one weight in memory: shards are laid out on disk and filled through
    memory maps. Raises ValueError for an n that does not divide, a damaged source or a folder in
    use, OSError for a disk that cannot take it.
    """
    out_dir, dtype = Path(out_dir), dtype or source.dtype
    args = ModelArgs.from_params(source.params)
    check_shard_count(args, n, str(out_dir))
    cuts = {name: cut_of(name, args, n) for name in source.shapes}
    with _new_folder(out_dir) as folder:
        shards = _lay_out(folder, source.shapes, cuts, n, dtype)
        hashes = {}
        with (
            parallel.byte_bar(_bytes_of(source.shapes, cuts, n, dtype)) as bar,
            ThreadPoolExecutor(torch.get_num_threads()) as pool,
        ):
            for name, cut in cuts.items():
                dim, count = tiling(name, args)
                targets = _tile_targets([shard[name] for shard in shards], cut, dim, count)
                read = source.tiles(name, dim, count)
                hashes[name] = list(pool.map(_write_tile, read, targets))
                if source.check is not None:
                    converted = dtype != source.dtype
                    as_read = list(pool.map(sha256_of, read)) if converted else hashes[name]
                    source.check(name, as_read)
                bar.update(sum(shard[name].nbytes for shard in shards))
        del shards, targets
        for name, content in source.files.items():
            (folder / name).write_bytes(content)
        (folder / "params.json").write_text(json.dumps(source.params, indent=2) + "\n")
        text = _describe(folder, source, cuts, hashes, dtype).text()
        (folder / manifest.NAME).write_text(text, encoding="utf-8")


def _tile_targets(
    parts: list[torch.Tensor], cut: Cut, dim: int, count: int
) -> list[list[torch.Tensor]]:
    """For each tile of a weight, its places in the shards that hold it."""
    targets: list[list[torch.Tensor]] = [[] for _ in range(count)]
    per_piece = count // cut.pieces
    for shard, part in enumerate(parts):
        first = cut.piece_of(shard) * per_piece
        for tile, place in enumerate(part.chunk(per_piece, dim), first):
            targets[tile].append(place)
    return targets


def _write_tile(tile: torch.Tensor, places: list[torch.Tensor]) -> bytes:
    """Put a tile, in the places' dtype, where it belongs, and return its hash."""
    tile = tile.to(places[0].dtype)
    for place in places:
        place.copy_(tile)
    return sha256_of(tile)


def _describe(
    folder: Path,
    source: Source,
    cuts: dict[str, Cut],
    hashes: dict[str, list[bytes]],
    dtype: torch.dtype,
) -> Manifest:
    """The manifest of a folder just written, from the hashes of its weights' tiles."""
    paths = sorted(folder.glob("*.pth"))
    weights = {
        name: {
            "shape": list(source.shapes[name]),
            "dtype": str(dtype).removeprefix("torch."),
            "cut": {"dim": cut.dim, "pieces": cut.pieces},
            "sha256": content_hash(hashes[name]),
        }
        for name, cut in cuts.items()
    }
    shards = {}
    for i, path in enumerate(paths):
        tensors = {}
        for name, cut in cuts.items():
            per_piece = len(hashes[name]) // cut.pieces
            first = cut.piece_of(i) * per_piece
            tensors[name] = content_hash(hashes[name][first : first + per_piece])
        shards[path.name] = {
            "size": path.stat().st_size,
            "frame_sha256": frame_sha256(path),
            "tensors": tensors,
        }
    return Manifest(source.params, len(paths), weights, shards)


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
            f"{n} shards of {weights:,} bytes, {n * weights:,} in all, in {dtype}",
            f"to run, each of {n} ranks needs {(weights + cache) / 1e9:.2f} GB: weights "
            f"{weights / 1e9:.2f} GB, cache {cache / 1e9:.2f} GB ({max_batch_size} rows of "
            f"{max_seq_len} tokens); activations come on top",
        ]
    )


@contextlib.contextmanager
def _new_folder(out_dir: Path) -> Iterator[Path]:
    """A folder to fill under a temporary name, renamed to out_dir when all in it is on disk."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(f"{out_dir}: already there and not empty; remove it or choose another")
    folder = out_dir.parent / f".{out_dir.name}.partial"
    new_parents = [parent for parent in out_dir.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"{out_dir}: another run is writing it; wait for that one") from None
    try:
        for path in folder.iterdir():  # of a run that was killed
            path.unlink()
        yield folder
        for path in [*folder.iterdir(), folder]:
            _fsync(path)
        folder.rename(out_dir)
        _fsync(out_dir.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
    finally:
        os.close(lock)


def _fsync(path: Path) -> None:
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


def _lay_out(
    folder: Path,
    full: dict[str, tuple[int, ...]],
    cuts: dict[str, Cut],
    n: int,
    dtype: torch.dtype,
) -> list[dict[str, torch.Tensor]]:
    """n shard files with their disk space taken, as tensors: writing to one writes its file."""
    needed = _bytes_of(full, cuts, n, dtype)
    shapes = {name: cut.shape(full[name]) for name, cut in cuts.items()}
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder.parent}: {needed:,} bytes needed, but only {free:,} are free")
    shards = []
    for i in range(n):
        path = str(folder / f"fs_consolidated.{i:02d}.pth")
        # Never touched, so these take address space but no memory.
        empty = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        try:
            with torch.serialization.skip_data():
                torch.save(empty, path)
        except RuntimeError:  # how torch says that the system refused a write, and not why
            raise OSError(f"{path}: cannot be written; is the disk full, or a limit set?") from None
        # A disk that fills up under a shared mapping would kill the process: take the space now.
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            shards.append(torch.load(path, mmap=True, weights_only=True))
    return shards
