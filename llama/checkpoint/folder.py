"""A checkpoint folder in Meta's format: open and check it, read any part of it, verify it all."""

import dataclasses
import functools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from llama import parallel
from llama.checkpoint import manifest
from llama.checkpoint.manifest import Manifest
from llama.checkpoint.weights import (
    EMBEDDING,
    OUTPUT,
    Cut,
    Source,
    check_layers,
    check_shapes,
    cut_of,
    hash_threads,
    tokenizer_in,
    valid_shard_counts,
    weight_shapes,
    whole_sha256,
)
from llama.cli import counted, first_few, progress_bar, shown
from llama.files import hash_of, load_plain, naming, read_json, sha256_of
from llama.model import ModelArgs
from llama.options import DTYPES, check_quantize, dtype_name
from llama.quantize import group_of

SURPLUS = "rope.freqs"  # in Meta's files, in Llama 1's once a layer; recomputed, so not read
CHECKLIST = "checklist.chk"  # Meta's own: lines of an MD5 and a file's name


class Checkpoint(Source):
    """A folder with params.json and one file a shard, opened without reading the weights.

    Shards are mapped into memory when first touched, and checked against params.json and, where
    there is one, manifest.json. Raises FileNotFoundError and ValueError, naming the path, for
    whatever is not such a folder.
    """

    def __init__(self, ckpt_dir: str | Path) -> None:
        # What the folder says of itself: params.json, the shards' names, the manifest.
        self.path = Path(ckpt_dir)
        params = _read_params(self.path)
        with naming(self.path / "params.json"):
            args = ModelArgs.from_params(params)
        self.manifest = Manifest.read(self.path)
        self.paths = _find_shards(self.path, self.manifest)
        self.n = len(self.paths)
        self._stats = {path: path.stat() for path in self.paths if path.exists()}
        if self.manifest is not None:
            self.manifest.check_files(self.path, self.paths)
            self.manifest.check_params(self.path, args)

        # What the first shard says. The others are opened when they are read.
        i = self.paths.index(next(iter(self._stats)))
        first = load_shard(self.paths[i])
        with naming(self.paths[i]):
            check_layers(args, len(first))
            for name in (EMBEDDING, OUTPUT):
                if name not in first or first[name].dim() != 2 or not first[name].numel():
                    raise ValueError(f"no matrix {name} in it")
        if args.vocab_size == -1:
            params["vocab_size"] = first[OUTPUT].shape[0] * self.n
        self.dtypes = {name: weight.dtype for name, weight in first.items()}
        # The one to which all can be widened without loss, where they differ.
        floats = [dtype for dtype in self.dtypes.values() if dtype != torch.uint8]
        dtype = functools.reduce(torch.promote_types, floats or [torch.float32])
        super().__init__(self.path, params, dtype, tokenizer_in(self.path))
        self._take_packed_shapes(first)
        self.has_hashes = self.manifest is not None

        # Whether the two agree.
        if self.n not in valid_shard_counts(self.args):
            raise ValueError(
                f"{self.path}: {counted(self.n, 'shard')}, but the model in params.json cuts into "
                f"{', '.join(map(str, valid_shard_counts(self.args)))} alone; is a shard missing?"
            )
        # Meta cut Llama 3's embedding on the vocabulary, and everyone else's on dim.
        by_vocabulary = (self.args.vocab_size // self.n, self.args.dim)
        self._embedding_dim = 0 if tuple(first[EMBEDDING].shape) == by_vocabulary else 1
        self._check_shard(i, first)
        self._shards = {i: first}
        if self.manifest is not None:
            self.manifest.check_model(self.path, self.args, self.shapes, self.dtypes)

    def _take_packed_shapes(self, first: dict[str, torch.Tensor]) -> None:
        """Take the shapes that quantised weights have in the shards, and check them."""
        self.quantize = self.params.get("quantize")
        with naming(self.path / "params.json"):
            check_quantize(self.quantize)
        with naming(self.path):
            for name, shape in weight_shapes(self.args).items():
                bits = self.bits_of(name)
                if bits and name in first and first[name].dim() == 2:
                    cut = self.cut_here(name)
                    n_bytes = first[name].shape[1] * (cut.parts if cut.dim else 1)
                    group_of(bits, shape[1], n_bytes)
                    self.shapes[name] = (shape[0], n_bytes)

    def cut_here(self, name: str) -> Cut:
        """How this folder's shards cut the weight, which for an embedding may be Meta's way."""
        cut = super().cut_here(name)
        return dataclasses.replace(cut, dim=self._embedding_dim) if name == EMBEDDING else cut

    def shard(self, i: int) -> dict[str, torch.Tensor]:
        """The mapped weights of shard i, names, shapes and dtypes checked."""
        if i not in self._shards:
            shard = load_shard(self.paths[i])
            self._check_shard(i, shard)
            self._shards[i] = shard
        return self._shards[i]

    def _check_shard(self, i: int, shard: dict[str, torch.Tensor]) -> None:
        """Raise ValueError unless the shard holds what params.json says."""
        wanted = {name: self.cut_here(name).shape(whole) for name, whole in self.shapes.items()}
        with naming(self.paths[i]):
            check_shapes({name: tuple(weight.shape) for name, weight in shard.items()}, wanted)
            for name, weight in shard.items():
                wanted_dtypes = ("uint8",) if self.bits_of(name) else DTYPES
                if dtype_name(weight.dtype) not in wanted_dtypes:
                    raise ValueError(
                        f"{name} is {weight.dtype}, not one of {', '.join(wanted_dtypes)}"
                    )
                if weight.dtype != self.dtypes[name]:
                    raise ValueError(
                        f"{name} is {weight.dtype}, but {self.dtypes[name]} in "
                        f"{self.paths[0].name}; are they shards of different checkpoints?"
                    )

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of the whole weight.

        A view of the mapped file where one shard holds them all, else a copy of just that range.
        """
        stop = self.shapes[name][dim] if stop is None else stop
        cut = self.cut_here(name)
        size = self.shapes[name][cut.dim] // cut.parts
        found = []  # of each part what lies in the range
        for part in range(cut.parts):
            low, high = start, stop
            if cut.dim == dim:  # counted from where the part begins, and at most all of it
                low, high = max(start - part * size, 0), min(stop - part * size, size)
            if low < high:
                weight = self.shard(cut.first_shard_with(part))[name]
                found.append(weight.narrow(dim, low, high - low))
        return found[0] if len(found) == 1 else torch.cat(found, cut.dim)

    def part(self, name: str, rank: int, n: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What rank of n ranks holds of the weight, contiguous.

        A view of the mapped file where one shard holds it so, and in the same dtype.
        """
        own = n == self.n and self.cut_here(name) == cut_of(name, self.args, n)
        found = self.shard(rank)[name] if own else self.read(name, *self.range_of(name, rank, n))
        return found.contiguous().to(self.dtype_of(name, dtype))

    def stays_mapped(self, name: str, n: int, dtype: torch.dtype) -> bool:
        """Whether one shard holds each rank's part so: in this dtype, and in whole rows."""
        here, there = self.cut_here(name), cut_of(name, self.args, n)
        one_shard = there.parts % here.parts == 0 and (here.dim == there.dim or here.parts == 1)
        as_it_lies = there.dim == 0 or there.parts == here.parts
        return dtype == self.dtypes[name] and one_shard and as_it_lies

    def check_share(self, rank: int, n: int) -> None:
        """Raise ValueError where the parts that rank of n ranks reads are damaged by the manifest.

        Where shards are cut, or several replicas read them, other ranks of the machine check some.
        """
        # A manifest means that we wrote the folder, so that rank r of n reads shard r of n alone.
        shards = [rank] * parallel.is_first_with_its_part() if self.n == n else range(self.n)
        to_check = [(i, name) for i in shards for name in self.shapes]
        if self.n != n:
            # Each rank reads of every shard: the ranks of a machine share the checking.
            to_check = to_check[parallel.local_share()]
        self._check_parts(to_check)

    def work_to_save(self, n: int, dtype: torch.dtype | None) -> str:
        """What is done while loading that a folder cut beforehand saves; "" for nothing."""
        if self.n == n:
            return ""
        return (
            f"{counted(self.n, 'shard')}, cut for {counted(n, 'rank')} while loading; to save that "
            f"work: python split_model.py --ckpt_dir {shlex.quote(str(self.path))} --n {n}"
        )

    def _check_parts(self, parts: Sequence[tuple[int, str]]) -> None:
        """Raise ValueError if a shard's part of a weight is not what the manifest says."""
        if self.manifest is not None:
            sizes = [self.shard(i)[name].nbytes for i, name in parts]
            with hash_threads() as pool, progress_bar("checking", sum(sizes)) as bar:
                for size, fault in zip(sizes, pool.map(lambda part: self._fault(*part), parts)):
                    if fault:
                        raise ValueError(fault)
                    bar.update(size)

    def _fault(self, i: int, name: str) -> str | None:
        """What is wrong with shard i's part of a weight: by the manifest, or beside its copies."""
        path, weight = self.paths[i], self.shard(i)[name]
        if self.manifest is None:
            first = self.cut_here(name).first_shard_with(self.cut_here(name).part_in(i))
            if i == first or torch.equal(weight, self.shard(first)[name]):
                return None
            return f"{path}: {name} differs from the copy in {self.paths[first].name}"
        found, expected = sha256_of(weight), self.manifest.weights[name]["parts"]
        part = self.cut_here(name).part_in(i)
        if found == expected[part]:
            return None
        hint = ""
        if found in expected:
            other = self.cut_here(name).first_shard_with(expected.index(found))
            hint = f"; it is what {self.paths[other].name} should hold"
        return (
            f"{path}: {name} is damaged: its SHA-256 is {found[:12]}…, but {manifest.NAME} says "
            f"{shown(str(expected[part]), 12)}{hint}; copy the file again"
        )

    def check_sha256(self, name: str, sha256: str) -> None:
        """Raise ValueError if this is not the SHA-256 of the whole weight by the manifest.

        The message names the damaged file.
        """
        if self.manifest is None or sha256 == self.manifest.weights[name]["sha256"]:
            return
        self._check_parts([(i, name) for i in range(self.n)])
        raise ValueError(
            f"{self.path / manifest.NAME}: contradicts itself: the shards' parts of {name} are as "
            "it says, and the whole is not"
        )

    def check_unchanged(self) -> None:
        """Raise ValueError if a shard, which may be mapped, was written into since it was opened.

        One that was removed, or replaced under its name, is still mapped as it was.
        """
        for path, before in self._stats.items():
            if not path.exists():
                continue
            now = path.stat()
            touched = (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns)
            if os.path.samestat(before, now) and touched:
                raise ValueError(
                    f"{path}: written into while it was in use, so what came out is not to be "
                    "trusted; copy it again, and run again"
                )

    def verify(self) -> dict[str, str]:
        """Read every byte; return the SHA-256 of each whole weight, which does not depend on n.

        Raises ValueError for damage, naming file and weight: what differs from the manifest or
        from Meta's checklist.chk, or, in any folder, copies of one part that differ.
        """
        faults, hashes = self._checklist_faults(), {}
        total = sum(path.stat().st_size for path in self.paths)
        with hash_threads() as pool, progress_bar("verifying", total) as bar:
            for name, (sha256, found) in zip(self.shapes, pool.map(self._verify, self.shapes)):
                hashes[name] = sha256
                faults += found
                bar.update(total // len(self.shapes))
        if faults:
            raise ValueError(first_few(faults, "; ", longest=1000))
        for name, sha256 in hashes.items():
            self.check_sha256(name, sha256)
        return hashes

    def _verify(self, name: str) -> tuple[str, list[str]]:
        """The SHA-256 of a whole weight, and what is wrong with its parts."""
        faults = [fault for i in range(self.n) if (fault := self._fault(i, name))]
        if self.manifest is not None and not faults and self.cut_here(name).parts == 1:
            return self.manifest.weights[name]["parts"][0], []  # the one part, just hashed, is it
        return whole_sha256(self, name), faults

    def _checklist_faults(self) -> list[str]:
        """What Meta's checklist.chk finds wrong with the files, where it lies in the folder."""
        if not (self.path / CHECKLIST).is_file():
            return []
        text = (self.path / CHECKLIST).read_text(encoding="utf-8", errors="replace")
        listed = {}
        for line in filter(str.strip, text.splitlines()):
            md5, _, name = line.partition(" ")
            listed[self.path / Path(name.strip().removeprefix("*")).name] = md5.lower()
        unlisted = [path for path in self.paths if path not in listed]
        faults = [f"{path}: not listed in {CHECKLIST}" for path in unlisted]
        for path, md5 in progress_bar("checking", unit="file", items=listed.items()):
            if not path.is_file():
                faults.append(f"{path}: missing, though {CHECKLIST} lists it")
            elif hash_of(path, "md5") != md5:
                faults.append(f"{path}: its MD5 is not the one in {CHECKLIST}; copy it again")
        return faults

    def what_was_verified(self) -> str:
        """Tell what a verify() that raised nothing has shown."""
        held = f"{counted(self.n, 'shard')} and {len(self.shapes)} weights"
        by = [file for file in (manifest.NAME, CHECKLIST) if (self.path / file).is_file()]
        if by:
            return f"whole: {held} as in {' and '.join(by)}"
        return (
            f"{held} that fit together; without a {manifest.NAME} nothing tells whether the "
            "numbers in them are the right ones"
        )


def compare(a: Source, b: Checkpoint) -> None:
    """Raise ValueError, naming what differs, unless two checkpoints hold the same model, whole.

    Where their dtypes differ, b must hold what a's weights become in b's.
    """
    if a.quantize != b.quantize:
        raise ValueError(
            f"{a.path} and {b.path}: one is quantised, or both otherwise; give --quantize "
            f"{b.quantize or a.quantize} with the checkpoint that the quantised one was made from"
        )
    facts_a, facts_b = facts_of(a.args), facts_of(b.args)
    differing = [key for key in facts_a if facts_a[key] != facts_b[key]]
    if differing:
        raise ValueError(f"{a.path} and {b.path}: different models ({', '.join(differing)})")
    hashes_a, hashes_b = a.verify(), b.verify()
    hint = ""
    if a.dtypes != b.dtypes:
        names = progress_bar(f"as {b.dtype}", unit="weight", items=hashes_a)
        hashes_a = {name: whole_sha256(a, name, b.dtypes[name]) for name in names}
        hint = f" ({a.dtype} and {b.dtype}: which was made from which?)"
    differing = [name for name in hashes_a if hashes_a[name] != hashes_b[name]]
    if differing:
        raise ValueError(
            f"{a.path} and {b.path}: different contents of {first_few(differing)}{hint}"
        )


def facts_of(args: ModelArgs) -> dict:
    """What makes a model; several values of params.json give one size of the FFN."""
    facts = dataclasses.asdict(args) | {"hidden_dim": args.hidden_dim}
    del facts["multiple_of"], facts["ffn_dim_multiplier"], facts["context_len"]
    return facts


def _read_params(ckpt_dir: Path) -> dict:
    path = ckpt_dir / "params.json"
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"{ckpt_dir}: no such checkpoint folder; see ckpts/README.md")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there, so {ckpt_dir} is no checkpoint in Meta's format; if it holds "
            "shards (.pth), copy the params.json here that came with them"
        )
    return read_json(path, 1 << 20)


def _find_shards(ckpt_dir: Path, manifest: Manifest | None) -> list[Path]:
    """The shards of a folder in order; none may be missing, and none of another set be there.

    But of as many ranks on several machines, each needs only its own: all listed are given then.
    """
    names = {path.name for path in ckpt_dir.iterdir()}
    sets = {
        prefix: {name for name in names if re.fullmatch(prefix + r"\.\d+\.pth", name)}
        for prefix in ("consolidated", "fs_consolidated")
    }
    if all(sets.values()):
        raise ValueError(
            f"{ckpt_dir}: holds both consolidated.*.pth and fs_consolidated.*.pth; "
            "move one of the two sets into a folder of its own, with a copy of params.json"
        )
    prefix, found = max(sets.items(), key=lambda item: len(item[1]))
    if not found:
        raise FileNotFoundError(
            f"{ckpt_dir}: no shards in it (consolidated.*.pth or fs_consolidated.*.pth)"
        )
    listed = manifest.shards.keys() if manifest else set()
    paths = [ckpt_dir / shard_name(i, prefix) for i in range(len(listed))]
    if found < listed == {path.name for path in paths} and parallel.reads_own_part_of(len(paths)):
        if (own := paths[parallel.model_rank()]).is_file():
            return paths
        raise FileNotFoundError(f"{own}: rank {parallel.rank()} reads it; copy it here")
    paths = [ckpt_dir / shard_name(i, prefix) for i in range(len(found))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: missing, though {max(found)} is there; copy it here too")
    return paths


def shard_name(i: int, prefix: str = "fs_consolidated") -> str:
    """The file name of shard i."""
    return f"{prefix}.{i:02d}.pth"


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The weights of one .pth file, mapped into memory; no code in the file can run."""
    found = load_plain(path).items()
    # detach() makes a plain tensor of a Parameter.
    return {name: weight.detach() for name, weight in found if not name.endswith(SURPLUS)}
