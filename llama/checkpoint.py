"""What a checkpoint folder is: the shard table; open, check, read any part of it, verify."""

import dataclasses
import functools
import pickletools
import re
import reprlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from llama import manifest, parallel
from llama.manifest import Manifest, content_hash, read_json_object, sha256_of_tiles
from llama.model import ModelArgs

# Dimension of the PyTorch weight (out_features, in_features) that is cut; None: every shard holds
# the whole. A name whose role is not here is an error, never a copy.
SHARD_DIMS = {
    "tok_embeddings": 1,
    "attention.wq": 0,
    "attention.wk": 0,
    "attention.wv": 0,
    "attention.wo": 1,
    "feed_forward.w1": 0,
    "feed_forward.w2": 1,
    "feed_forward.w3": 0,
    "attention_norm": None,
    "ffn_norm": None,
    "norm": None,
    "output": 0,
}
# What the pickle of a dict of tensors refers to, besides the classes of their storages.
PLAIN = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
)
LONGEST_PICKLE = 1 << 26
SURPLUS = "rope.freqs"  # in Meta's files, in Llama 1's once a layer; recomputed, so not read
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Source:
    """A checkpoint of any format, read one full weight at a time."""

    params: dict  # as in Meta's params.json
    shapes: dict[str, tuple[int, ...]]  # full shape of each weight, by Meta's names
    dtype: torch.dtype
    read: Callable[[str], torch.Tensor]
    files: dict[str, bytes | Path] = field(default_factory=dict)  # beside the shards: tokenizer
    read_part: Callable[[str, int, int, int], torch.Tensor] | None = None  # see Checkpoint.read
    check: Callable[[str, list[bytes]], None] | None = None  # see Checkpoint.check_weight

    def rows_of(self, name: str) -> Callable[[int, int], torch.Tensor]:
        """What reads rows of the weight, from the first to before the second."""
        if self.read_part is not None:
            return lambda start, stop: self.read_part(name, 0, start, stop)
        weight = self.read(name)
        return lambda start, stop: weight[start:stop]


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of a --dtype argument; None stays None (what the checkpoint holds)."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {name!r}")
    return DTYPES.get(name)


def weight_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Full shape of every weight of a model, by Meta's names."""
    kv_dim = args.n_kv_heads * args.head_dim
    layer = {
        "attention.wq": (args.dim, args.dim),
        "attention.wk": (kv_dim, args.dim),
        "attention.wv": (kv_dim, args.dim),
        "attention.wo": (args.dim, args.dim),
        "feed_forward.w1": (args.hidden_dim, args.dim),
        "feed_forward.w2": (args.dim, args.hidden_dim),
        "feed_forward.w3": (args.hidden_dim, args.dim),
        "attention_norm": (args.dim,),
        "ffn_norm": (args.dim,),
    }
    shapes = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for i in range(args.n_layers):
        shapes |= {f"layers.{i}.{role}.weight": shape for role, shape in layer.items()}
    return shapes | {"norm.weight": (args.dim,), "output.weight": (args.vocab_size, args.dim)}


def role(name: str) -> str:
    """What a weight does in its layer: layers.3.attention.wq.weight -> attention.wq."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[2:] if parts[0] == "layers" else parts)


@dataclass(frozen=True)
class Cut:
    """How one weight lies in n shards: cut on dim into pieces; shard r holds r * pieces // n."""

    dim: int  # 0 where the one piece is the whole
    pieces: int
    n: int

    def piece_of(self, shard: int) -> int:
        return shard * self.pieces // self.n

    def first_shard_with(self, piece: int) -> int:
        return piece * self.n // self.pieces

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a piece."""
        return tuple(size // self.pieces if i == self.dim else size for i, size in enumerate(full))


def cut_of(name: str, args: ModelArgs, n: int) -> Cut:
    """How our shards cut the weight. Below one KV head a shard, neighbours hold the same one."""
    dim = SHARD_DIMS[role(name)]
    if dim is None:
        return Cut(0, 1, n)
    if role(name) in ("attention.wk", "attention.wv"):
        return Cut(dim, min(n, args.n_kv_heads), n)
    return Cut(dim, n, n)


def tiling(name: str, args: ModelArgs) -> tuple[int, int]:
    """Dimension and number of the finest parts into which any valid n may cut the weight."""
    dim = SHARD_DIMS[role(name)]
    if dim is None:
        return 0, 1
    kv = role(name) in ("attention.wk", "attention.wv")
    return dim, args.n_kv_heads if kv else args.common_divisor


def describe_weights(args: ModelArgs, n: int, dtypes: Mapping[str, torch.dtype]) -> dict[str, dict]:
    """What a manifest says of every weight in n shards, but for its hash."""
    described = {}
    for name, full in weight_shapes(args).items():
        cut = cut_of(name, args, n)
        described[name] = {
            "shape": list(full),
            "dtype": str(dtypes[name]).removeprefix("torch."),
            "cut": {"dim": cut.dim, "pieces": cut.pieces},
        }
    return described


def check_shard_count(args: ModelArgs, n: int, what: str) -> None:
    """Raise ValueError, with the counts that would do, when the model cannot be cut into n."""
    valid = args.valid_shard_counts()
    if n not in valid:
        raise ValueError(
            f"{what} does not cut into {n} shards: n must divide n_heads {args.n_heads}, "
            f"vocab_size {args.vocab_size}, FFN size {args.hidden_dim} and dim {args.dim}, and "
            f"divide n_kv_heads {args.n_kv_heads} or be a multiple of it. "
            f"Valid n: {', '.join(map(str, valid))}"
        )


class Checkpoint:
    """A folder in Meta's format: params.json and one file a shard, opened without reading them.

    Shards are mapped into memory when first touched, and checked against params.json.
    Raises FileNotFoundError and ValueError, naming the path, for whatever is not such a folder.
    """

    def __init__(self, ckpt_dir: str | Path) -> None:
        self.dir = Path(ckpt_dir)
        self.params = _read_params(self.dir)
        self.paths = _find_shards(self.dir)
        self.n = len(self.paths)
        self.manifest = Manifest.read(self.dir)
        self._shards: dict[int, dict[str, torch.Tensor]] = {}
        self._check_files()
        first = self._open(0)
        self.args = self._model_args(first)
        self.shapes = weight_shapes(self.args)
        self.dtypes = {name: weight.dtype for name, weight in first.items()}
        # Meta cut Llama 3's embedding on the vocabulary, and everyone else's on dim.
        by_vocab = (self.args.vocab_size // self.n, self.args.dim)
        self._embedding_dim = int(tuple(first["tok_embeddings.weight"].shape) != by_vocab)
        self._check_names_and_shapes(0, first)
        # The one to which all can be widened without loss, where they differ.
        self.dtype = functools.reduce(torch.promote_types, self.dtypes.values())
        if self.n not in self.args.valid_shard_counts():
            raise ValueError(
                f"{self.dir}: {counted(self.n, 'shard')}, but the model in params.json cuts into "
                f"{', '.join(map(str, self.args.valid_shard_counts()))} alone; is a shard missing?"
            )
        self._check_manifest()
        if self.n == 1:
            self._shards[0] = first

    def _check_files(self) -> None:
        """The shards must be those of the manifest, by name and size."""
        if self.manifest is None:
            return
        here, there = {path.name for path in self.paths}, self.manifest.shards.keys()
        if here != there:
            raise ValueError(
                f"{self.dir}: holds {counted(len(here), 'shard')}, but {manifest.NAME} lists "
                f"{len(there)} ({first_few(sorted(here ^ there))} in only one of the two); was the "
                "folder copied in part, or are two mixed?"
            )
        for path in self.paths:
            size, wanted = path.stat().st_size, self.manifest.shards[path.name]["size"]
            if size != wanted:
                raise ValueError(
                    f"{path}: {size:,} bytes long, but {manifest.NAME} says {wanted:,}; "
                    "copy it again"
                )

    def _check_manifest(self) -> None:
        """The manifest must be of this model and complete."""
        if self.manifest is None:
            return
        where = self.dir / manifest.NAME
        try:
            said = dataclasses.asdict(ModelArgs.from_params(self.manifest.params))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{where}: params: {error}") from None
        found = dataclasses.asdict(self.args)
        changed = [
            f"{key} {found[key]}, not {said[key]}" for key in said if said[key] != found[key]
        ]
        if changed:
            raise ValueError(
                f"{self.dir / 'params.json'}: says {first_few(changed)} as {where} does; put the "
                f"old values back, or, if they are meant to change, remove {manifest.NAME}"
            )
        wanted = describe_weights(self.args, self.n, self.dtypes)
        said = {
            name: {key: value for key, value in weight.items() if key != "sha256"}
            for name, weight in self.manifest.weights.items()
        }
        tables = [shard["tensors"].keys() for shard in self.manifest.shards.values()]
        if self.manifest.n != self.n or said != wanted or any(t != wanted.keys() for t in tables):
            raise ValueError(
                f"{where}: does not describe the weights of the model in params.json as they lie "
                "in these shards; is it another folder's?"
            )

    def _model_args(self, shard: dict[str, torch.Tensor]) -> ModelArgs:
        where = self.dir / "params.json"
        try:
            args = ModelArgs.from_params(self.params)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        # Before anything is laid out by these numbers, the file must be of their order.
        if args.n_layers > len(shard):
            raise ValueError(
                f"{where}: n_layers is {args.n_layers}, but {self.paths[0]} holds only "
                f"{len(shard)} weights"
            )
        for name in ("tok_embeddings.weight", "output.weight"):
            if name not in shard or shard[name].dim() != 2 or not shard[name].numel():
                raise ValueError(f"{self.paths[0]}: no matrix {name} in it")
        if args.vocab_size == -1:
            args.vocab_size = shard["output.weight"].shape[0] * self.n
        return args

    def cut(self, name: str) -> Cut:
        """How the weight lies in this folder's shards."""
        cut = cut_of(name, self.args, self.n)
        if name == "tok_embeddings.weight":
            return Cut(self._embedding_dim, cut.pieces, cut.n)
        return cut

    def shard(self, i: int) -> dict[str, torch.Tensor]:
        """The mapped weights of shard i, names, shapes and dtypes checked."""
        if i not in self._shards:
            shard = self._open(i)
            self._check_names_and_shapes(i, shard)
            self._shards[i] = shard
        return self._shards[i]

    def _open(self, i: int) -> dict[str, torch.Tensor]:
        path = self.paths[i]
        if self.manifest is not None:
            try:
                found = manifest.frame_sha256(path)
            except Exception as error:  # whatever the bytes provoke
                found = f"unreadable: {error}"
            frames = {name: shard["frame_sha256"] for name, shard in self.manifest.shards.items()}
            if found != frames[path.name]:
                raise ValueError(
                    f"{path}: damaged outside its tensors: its headers or directory are not those "
                    f"that {manifest.NAME} was written for{_whose(found, frames)}; copy it again"
                )
        return open_shard(path)

    def _check_names_and_shapes(self, i: int, shard: dict[str, torch.Tensor]) -> None:
        """The shard must hold what params.json says."""
        path = self.paths[i]
        missing, unknown = self.shapes.keys() - shard.keys(), shard.keys() - self.shapes.keys()
        if missing or unknown:
            raise ValueError(
                f"{path}: "
                + "; ".join(
                    f"{what} {first_few(sorted(names))}"
                    for what, names in (("missing weights", missing), ("unknown", unknown))
                    if names
                )
                + f" (params.json says {self.args.n_layers} layers)"
            )
        for name, full in self.shapes.items():
            weight, cut = shard[name], self.cut(name)
            divisible = full[cut.dim] % cut.pieces == 0
            if not divisible or tuple(weight.shape) != cut.shape(full):
                raise ValueError(
                    f"{path}: {name} has shape {tuple(weight.shape)}, but params.json wants "
                    f"{full} in all, {cut.shape(full)} in each of {self.n} shards; is params.json "
                    "another model's, or a shard missing?"
                )
            if weight.dtype not in DTYPES.values():
                raise ValueError(
                    f"{path}: {name} is {weight.dtype}, not one of {', '.join(DTYPES)}"
                )
            if weight.dtype != self.dtypes[name]:
                raise ValueError(
                    f"{path}: {name} is {weight.dtype}, but {self.dtypes[name]} in "
                    f"{self.paths[0].name}; are they shards of different checkpoints?"
                )

    def check_part(self, i: int, name: str) -> None:
        """Raise ValueError if shard i does not hold of the weight what the manifest says.

        Reads the part once. Without a manifest there is nothing to compare with.
        """
        if self.manifest is not None:
            self._compare_part(i, name, content_hash(self._hash_part(i, name)))

    def _hash_part(self, i: int, name: str) -> list[bytes]:
        """Hashes of the tiles of what shard i holds of the weight."""
        dim, count = tiling(name, self.args)
        return sha256_of_tiles(self.shard(i)[name], dim, count // self.cut(name).pieces)

    def _compare_part(self, i: int, name: str, found: str) -> None:
        parts = {file: shard["tensors"][name] for file, shard in self.manifest.shards.items()}
        expected = parts[self.paths[i].name]
        if found != expected:
            raise ValueError(
                f"{self.paths[i]}: {name} is damaged: its SHA-256 is {found[:12]}…, but "
                f"{manifest.NAME} says {expected[:12]}…{_whose(found, parts)}; copy the file again"
            )

    def check_weight(self, name: str, hashes: list[bytes]) -> None:
        """Raise ValueError, naming the file, if these are not the tiles of the whole weight."""
        if self.manifest is None or content_hash(hashes) == self.manifest.weights[name]["sha256"]:
            return
        for i in range(self.n):
            self.check_part(i, name)
        raise ValueError(
            f"{self.dir / manifest.NAME}: contradicts itself: the shards' parts of {name} are as "
            "it says, and the whole is not"
        )

    def verify(self) -> dict[str, str]:
        """Read every byte; return the content hash of each weight, which does not depend on n.

        Raises ValueError for damage, naming file and weight: what differs from the manifest, or,
        in any folder, copies of one weight that differ from shard to shard.
        """
        faults: list[str] = []
        for i in range(self.n):
            try:
                self.shard(i)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError(first_few(faults, "; "))
        hashes: dict[str, str] = {}
        with parallel.byte_bar(sum(path.stat().st_size for path in self.paths)) as bar:
            for name in self.shapes:
                known = len(faults)
                tiles = self._hash_parts(name, faults)
                hashes[name] = content_hash(tiles)
                try:
                    if len(faults) == known:
                        self.check_weight(name, tiles)
                except ValueError as error:
                    faults.append(str(error))
                bar.update(sum(shard[name].nbytes for shard in self._shards.values()))
        if faults:
            raise ValueError(first_few(faults, "; "))
        return hashes

    def what_was_verified(self) -> str:
        """What a verify() that raised nothing has shown."""
        held = f"{counted(self.n, 'shard')} and {len(self.shapes)} weights"
        if self.manifest is None:
            return (
                f"{held} that fit together; without a {manifest.NAME} nothing tells whether the "
                "numbers in them are the right ones"
            )
        return f"whole: {held} as in {manifest.NAME}"

    def _hash_parts(self, name: str, faults: list[str]) -> list[bytes]:
        """Hashes of the weight's tiles, from every shard; differing copies go to faults."""
        (dim, count), cut = tiling(name, self.args), self.cut(name)
        if cut.dim != dim and cut.pieces > 1:  # by vocabulary: no shard holds a whole tile
            width = self.shapes[name][dim] // count
            parts = (self.read(name, dim, i * width, (i + 1) * width) for i in range(count))
            return [content for part in parts for content in sha256_of_tiles(part, dim, 1)]
        pieces: dict[int, list[bytes]] = {}
        for i in range(self.n):
            found = self._hash_part(i, name)
            piece = cut.piece_of(i)
            if self.manifest is not None:
                try:
                    self._compare_part(i, name, content_hash(found))
                except ValueError as error:
                    faults.append(str(error))
            elif pieces.get(piece, found) != found:
                first = self.paths[cut.first_shard_with(piece)].name
                faults.append(f"{self.paths[i]}: {name} differs from the copy in {first}")
            pieces.setdefault(piece, found)
        return [tile for piece in pieces.values() for tile in piece]

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of the full weight.

        A view of the mapped file where one shard holds them all, else a copy of just that range.
        """
        stop = self.shapes[name][dim] if stop is None else stop
        cut = self.cut(name)
        size = self.shapes[name][cut.dim] // cut.pieces
        parts = []
        for piece in range(cut.pieces):
            low, high = (start, stop) if cut.dim != dim else (
                max(start - piece * size, 0), min(stop - piece * size, size)
            )  # fmt: skip
            if low < high:
                weight = self.shard(cut.first_shard_with(piece))[name]
                parts.append(weight.narrow(dim, low, high - low))
        return parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim)

    def slice(self, name: str, rank: int, n: int) -> torch.Tensor:
        """What rank of n ranks holds of the weight, contiguous."""
        cut = cut_of(name, self.args, n)
        size = self.shapes[name][cut.dim] // cut.pieces
        start = cut.piece_of(rank) * size
        return self.read(name, cut.dim, start, start + size).contiguous()

    def source(self) -> Source:
        """This checkpoint as something to write anew, its tokenizer files along with it."""
        files = {path.name: path for path in self.dir.glob("tokenizer*") if path.is_file()}
        params = self.params | {"vocab_size": self.args.vocab_size}
        return Source(
            params, self.shapes, self.dtype, self.read, files, self.read, self.check_weight
        )


def _whose(found: str, hashes: dict[str, str]) -> str:
    """The file, among all with their hashes, that should hold what was found elsewhere."""
    others = [file for file, content in hashes.items() if content == found]
    return f"; it is what {others[0]} should hold" if others else ""


def compare(a: Checkpoint, b: Checkpoint) -> None:
    """Raise ValueError, naming what differs, unless two folders hold the same model, whole.

    Where their dtypes differ, b must hold what a's weights become in b's.
    """
    first, second = (dataclasses.asdict(ckpt.args) for ckpt in (a, b))
    differing = [key for key in first if first[key] != second[key]]
    if differing:
        raise ValueError(f"{a.dir} and {b.dir}: different models ({', '.join(differing)})")
    first, second = a.verify(), b.verify()
    if a.dtypes != b.dtypes:  # b must then be what a becomes in b's dtypes
        for name in first:
            weight = a.read(name).to(b.dtypes[name])
            first[name] = content_hash(sha256_of_tiles(weight, *tiling(name, a.args)))
    differing = [name for name in first if first[name] != second[name]]
    if differing:
        hint = f" ({a.dtype} and {b.dtype}: which was made from which?)" * (a.dtypes != b.dtypes)
        raise ValueError(f"{a.dir} and {b.dir}: different contents of {first_few(differing)}{hint}")


def counted(n: int, noun: str) -> str:
    """A number of things: 1 shard, 2 shards."""
    return f"{n} {noun}{'s' * (n != 1)}"


def first_few(items: Sequence[str], sep: str = ", ") -> str:
    """The first few of many items, with the number of the others, for one line of a message."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    # Names out of a file may hold anything: line ends, codes for the terminal.
    plain = (x if x.isprintable() and len(x) < 1000 else reprlib.repr(x) for x in items[:4])
    return sep.join(plain) + more


def _read_params(ckpt_dir: Path) -> dict:
    path = ckpt_dir / "params.json"
    if not ckpt_dir.is_dir():
        raise FileNotFoundError(f"{ckpt_dir}: no such checkpoint folder; see ckpts/README.md")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not there, so {ckpt_dir} is no checkpoint in Meta's format. A Hugging Face "
            f"folder or GGUF file becomes one by: python convert_model.py --from PATH --out_dir DIR"
        )
    return read_json_object(path, 1 << 20)


def _find_shards(ckpt_dir: Path) -> list[Path]:
    found: dict[str, set[str]] = {}
    for path in ckpt_dir.iterdir():
        if match := re.fullmatch(r"((?:fs_)?consolidated)\.\d+\.pth", path.name):
            found.setdefault(match[1], set()).add(path.name)
    if not found:
        raise FileNotFoundError(
            f"{ckpt_dir}: no shards in it (consolidated.*.pth or fs_consolidated.*.pth)"
        )
    if len(found) == 2:
        raise ValueError(
            f"{ckpt_dir}: holds both consolidated.*.pth and fs_consolidated.*.pth; "
            "move one of the two sets into a folder of its own, with a copy of params.json"
        )
    ((prefix, names),) = found.items()
    expected = [ckpt_dir / shard_name(i, prefix) for i in range(len(names))]
    for path in expected:
        if path.name not in names:
            raise ValueError(f"{path}: missing, though {max(names)} is there; copy it here too")
        if not path.is_file():
            raise ValueError(f"{path}: not a file")
    return expected


def shard_name(i: int, prefix: str = "fs_consolidated") -> str:
    """The file name of shard i."""
    return f"{prefix}.{i:02d}.pth"


def open_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one .pth file, mapped into memory; no code in the file can run.

    Files of torch's old, non-zip format cannot be mapped and are read whole.
    """
    try:
        shard = load_plain(path)
    except OSError as error:
        raise ValueError(f"{path}: unreadable ({error})") from None
    except Exception as error:  # torch raises whatever the bytes provoke
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint, or damaged: {reason}; copy it again") from None
    plain = isinstance(shard, dict) and all(
        isinstance(name, str) and type(weight) in (torch.Tensor, torch.nn.Parameter)
        for name, weight in shard.items()
    )
    if not plain:
        raise ValueError(f"{path}: not a checkpoint: it should be a dict of names and tensors")
    shard = {
        name: weight.detach()
        for name, weight in shard.items()
        if name != SURPLUS and not name.endswith(f".{SURPLUS}")
    }
    for name, weight in shard.items():
        # A tensor can claim more elements than it has bytes (stride 0): nothing may be sized by it.
        strided = weight.layout == torch.strided
        if not strided or weight.nbytes > weight.untyped_storage().nbytes():
            raise ValueError(f"{path}: damaged: {name} claims more bytes than it has")
    return shard


def load_plain(path: Path) -> object:
    """What torch.save wrote, mapped into memory, if it is made of nothing but plain tensors.

    Raises whatever the bytes provoke; no code in them can run, nor ask for memory.
    """
    with path.open("rb") as file:
        mappable = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        if not mappable:  # magic number, version and system, then the object
            for _ in range(4):
                _check_pickle(file)
    if mappable:
        _check_archive(path)
    else:
        parallel.say(f"{path}: an old format that cannot be mapped, so it takes its size in memory")
    return torch.load(str(path), map_location="cpu", mmap=mappable, weights_only=True)


def _check_archive(path: Path) -> None:
    """Mapping trusts the archive's directory: each record must lie in the file, stored plain."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"record {record.filename} is compressed")
            if record.header_offset + record.file_size > size:
                raise ValueError(f"record {record.filename} reaches past the end of the file")
            if record.filename.endswith("/data.pkl"):
                if record.file_size > LONGEST_PICKLE:
                    raise ValueError(f"record {record.filename} is {record.file_size:,} bytes long")
                _check_pickle(archive.open(record))


def _check_pickle(file: IO[bytes]) -> None:
    """A pickle may name nothing but what a dict of plain tensors is made of.

    weights_only=True keeps code from running; but what else it allows may ask for any amount of
    memory, or for tensors without content.
    """
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST") and (
            argument not in PLAIN and not re.fullmatch(r"torch \w+Storage", str(argument))
        ):
            raise ValueError(f"it holds more than tensors ({argument}), which could run code")
