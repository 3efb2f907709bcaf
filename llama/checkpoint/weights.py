"""The table of weights: names in every format, shapes, cuts; and what every format is read as."""

import functools
import hashlib
import itertools
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.cli import first_few, say
from llama.files import bytes_of, default_out_dir
from llama.model import ModelArgs
from llama.options import check_dtype, dtype_flag, dtype_name
from llama.quantize import group_of

BLOCK_ROWS, BLOCK_NUMBERS = 128, 1 << 20  # a few MB, on each of several threads; on one thread


@dataclass(frozen=True)
class Kind:
    """One kind of weight: its name in each format, without the layer's prefix and .weight."""

    meta: str
    hf: str
    gguf: str
    shape: tuple[str, ...]  # (out_features, in_features), by the names of sizes in ModelArgs
    cut: int | None  # the dimension that shards cut; None: every shard holds the whole
    once: bool = False  # in the model, not in each layer
    rotary: bool = False  # rows are rotary pairs, which Hugging Face orders otherwise
    bits: int = 0  # that --quantize int4 leaves; int8 leaves 8 of all that have any; 0: never less

    def pattern(self, form: str) -> str:
        """The full name in a format ("meta", "hf" or "gguf"), N for the number of the layer."""
        return f"{'' if self.once else LAYER[form]}{getattr(self, form)}.weight"


LAYER = {"meta": "layers.N.", "hf": "model.layers.N.", "gguf": "blk.N."}
KINDS = (  # in the order in which shards hold them, those of each layer together
    Kind("tok_embeddings", "model.embed_tokens", "token_embd", ("vocab_size", "dim"), 1, once=True),
    Kind("attention.wq", "self_attn.q_proj", "attn_q", ("q_dim", "dim"), 0, rotary=True, bits=4),
    Kind("attention.wk", "self_attn.k_proj", "attn_k", ("kv_dim", "dim"), 0, rotary=True, bits=4),
    Kind("attention.wv", "self_attn.v_proj", "attn_v", ("kv_dim", "dim"), 0, bits=4),
    Kind("attention.wo", "self_attn.o_proj", "attn_output", ("dim", "q_dim"), 1, bits=4),
    Kind("feed_forward.w1", "mlp.gate_proj", "ffn_gate", ("hidden_dim", "dim"), 0, bits=4),
    Kind("feed_forward.w2", "mlp.down_proj", "ffn_down", ("dim", "hidden_dim"), 1, bits=4),
    Kind("feed_forward.w3", "mlp.up_proj", "ffn_up", ("hidden_dim", "dim"), 0, bits=4),
    Kind("attention_norm", "input_layernorm", "attn_norm", ("dim",), None),
    Kind("ffn_norm", "post_attention_layernorm", "ffn_norm", ("dim",), None),
    Kind("norm", "model.norm", "output_norm", ("dim",), None, once=True),
    Kind("output", "lm_head", "output", ("vocab_size", "dim"), 0, once=True, bits=8),
)
EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
_LAYER_NUMBER = re.compile(r"(?<=\.)(0|[1-9][0-9]{0,5})(?=\.)")
_BY_META = {kind.pattern("meta"): kind for kind in KINDS}


def kind_of(name: str) -> Kind:
    """The kind of a weight, by Meta's name: layers.3.attention.wq.weight."""
    return _BY_META[_LAYER_NUMBER.sub("N", name, count=1)]


def meta_names(form: str, found: Iterable[str]) -> dict[str, str]:
    """The name found in a format ("hf" or "gguf") of each weight, by Meta's name.

    Raises ValueError for names of weights that no Llama model in Meta's format has.
    """
    meta_patterns = {kind.pattern(form): kind.pattern("meta") for kind in KINDS}
    names, unknown = {}, []
    for name in found:
        layer = _LAYER_NUMBER.search(name)
        pattern = meta_patterns.get(_LAYER_NUMBER.sub("N", name, count=1))
        if pattern:
            names[pattern.replace("N", layer[0]) if layer else pattern] = name
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"weights that no Llama model in Meta's format has: {first_few(unknown)}")
    return names


def name_in(form: str, name: str) -> str:
    """The name of a weight in a format ("hf" or "gguf"), by Meta's."""
    layer = _LAYER_NUMBER.search(name)
    pattern = kind_of(name).pattern(form)
    return pattern.replace("N", layer[0]) if layer else pattern


def weight_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of a model, by Meta's names, in the order in which shards hold them."""
    shapes = {}
    for once, group in itertools.groupby(KINDS, key=lambda kind: kind.once):
        kinds = list(group)
        for i in range(1 if once else args.n_layers):
            for kind in kinds:
                name = kind.pattern("meta").replace("N", str(i))
                shapes[name] = tuple(getattr(args, size) for size in kind.shape)
    return shapes


def bits_of(name: str, quantize: str) -> int:
    """The bits that a weight's numbers have, quantised to int8 or int4; 0 if it stays as it is."""
    bits = kind_of(name).bits
    return bits and max(bits, 8 if quantize == "int8" else 4)


def check_layers(args: ModelArgs, n_found: int) -> None:
    """Raise ValueError for more layers than weights, before a list is made of them all."""
    if args.n_layers > n_found:
        raise ValueError(f"{n_found} weights are too few for {args.n_layers} layers (n_layers)")


def check_shapes(found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError, by Meta's names, for weights that are missing, unexpected or misshapen."""
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [f"{name} is unexpected" for name in found if name not in wanted]
    faults += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise ValueError(f"not the model described: {first_few(faults, '; ')}")


@dataclass(frozen=True)
class Cut:
    """How one weight lies in n shards: in parts along dim; shard r holds part r * parts // n."""

    dim: int  # the dimension that is cut; 0 for a weight of which every shard holds the whole
    parts: int
    n: int

    def part_in(self, shard: int) -> int:
        return shard * self.parts // self.n

    def first_shard_with(self, part: int) -> int:
        return part * self.n // self.parts

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a part."""
        return tuple(size // self.parts if i == self.dim else size for i, size in enumerate(whole))


def cut_of(name: str, args: ModelArgs, n: int) -> Cut:
    """How n shards cut the weight. Below one KV head a shard, neighbours hold the same one."""
    kind = kind_of(name)
    if kind.cut is None:
        return Cut(0, 1, n)
    parts = args.kv_parts(n) if kind.shape[kind.cut] == "kv_dim" else n
    return Cut(kind.cut, parts, n)


def common_divisor(args: ModelArgs) -> int:
    """The greatest number that divides every size that is cut, but for the KV heads."""
    return math.gcd(args.n_heads, args.vocab_size, args.hidden_dim, args.dim)


def valid_shard_counts(args: ModelArgs) -> list[int]:
    """Every n into which a model can be cut, ascending."""
    common = common_divisor(args)
    divisors = [n for n in range(1, common + 1) if common % n == 0]
    return [n for n in divisors if args.n_kv_heads % n == 0 or n % args.n_kv_heads == 0]


def check_shard_count(args: ModelArgs, n: int, what: str) -> None:
    """Raise ValueError, with the counts that would do, when the model cannot be cut into n."""
    valid = valid_shard_counts(args)
    if n not in valid:
        raise ValueError(
            f"{what} does not cut into {n} shards: n must divide n_heads {args.n_heads}, "
            f"vocab_size {args.vocab_size}, FFN size {args.hidden_dim} and dim {args.dim}, and "
            f"divide n_kv_heads {args.n_kv_heads} or be a multiple of it. "
            f"Valid n: {', '.join(map(str, valid))}"
        )


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The torch dtype of a --dtype argument; None stays None (what the checkpoint holds)."""
    check_dtype(name)
    return None if name is None else getattr(torch, name)


def tokenizer_in(folder: Path) -> dict[str, Path]:
    """The tokenizer files of a folder, by name: they go along with its weights."""
    found = [*folder.glob("tokenizer*"), folder / "chat_template.jinja"]
    return {path.name: path for path in found if path.is_file()}


class Source:
    """A checkpoint in any format, of which any rows or columns of any weight can be read.

    path: what the user gave, for messages. params: as in Meta's params.json. args: the same,
    checked. shapes: of each weight, by Meta's names. dtype: the one that holds every weight without
    loss. files: what goes along beside the weights, the tokenizer above all: content, or where it
    is to be copied from. n: how many shards it lies in. Quantised weights are read as uint8, and
    their shapes are of that.
    """

    form, n = "weights", 1
    quantize: str | None = None  # int8 or int4, where matrices are read as pack() makes them

    def __init__(
        self,
        path: str | Path,
        params: dict,
        dtype: torch.dtype,
        files: Mapping[str, bytes | Path] | None = None,
    ) -> None:
        self.path = Path(path)
        self.params = params
        self.args = ModelArgs.from_params(params)
        self.shapes = weight_shapes(self.args)
        self.stop_ids: frozenset[int] = frozenset()  # that a format's own configuration names
        self.has_hashes = False  # whether check_sha256() knows any
        self.quantised_bytes = 0  # of all weights, where some have less than 16 bits
        self.dtype = dtype
        self.files: Mapping[str, bytes | Path] = files or {}

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of a weight; by default all of it."""
        raise NotImplementedError

    def blocks(self, name: str, multiple: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """Read a weight some rows at a time: each block with the number of its first row.

        The rows of a block are a multiple of what is given, but for the last.
        """
        rows, size = self.shapes[name][0], -(-BLOCK_ROWS // multiple) * multiple
        for start in range(0, rows, size):
            yield start, self.read(name, 0, start, min(start + size, rows))

    def bits_of(self, name: str) -> int:
        """The bits of a quantised weight's numbers; 0 for one that is not quantised."""
        return 0 if self.quantize is None else bits_of(name, self.quantize)

    def dtype_of(self, name: str, dtype: torch.dtype | None) -> torch.dtype:
        """What a weight is in memory and in shards, where others are in a dtype."""
        return torch.uint8 if self.bits_of(name) else dtype or self.dtype

    def check_cut(self, n: int, what: str) -> None:
        """Raise ValueError unless the model cuts into n; where it is quantised, between groups."""
        check_shard_count(self.args, n, what)
        for name, shape in weight_shapes(self.args).items() if self.quantize else ():
            bits, cut = self.bits_of(name), cut_of(name, self.args, n)
            group = group_of(bits, shape[1], self.shapes[name][1]) if bits else 1
            if cut.dim == 1 and shape[1] // cut.parts % group:
                raise ValueError(
                    f"{what} does not cut into {n} shards: {name} is quantised in groups of "
                    f"{group} of its {shape[1]} inputs; take fewer shards, or no --quantize"
                )

    @functools.cached_property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        pairs = zip(self.blocks(EMBEDDING), self.blocks(OUTPUT))
        return all(torch.equal(rows, others) for (_, rows), (_, others) in pairs)

    @property
    def different_names(self) -> list[str]:
        """The names of the weights, without an output layer that is the embedding."""
        return [name for name in self.shapes if not (name == OUTPUT and self.tied)]

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer goes along."""
        return bool(self.files.keys() & {"tokenizer.model", "tokenizer.json"})

    def cut_here(self, name: str) -> Cut:
        """How the weight lies in the shards of this checkpoint."""
        return cut_of(name, self.args, self.n)

    def check_unchanged(self) -> None:
        """Raise ValueError if files were written into meanwhile. By default nobody looks."""

    def as_stored(self, name: str, block: torch.Tensor) -> torch.Tensor:
        """What reading gives for rows of a weight that were written here."""
        return block.to(self.read(name, 0, 0, 1).dtype)

    def load(
        self, rank: int, n: int, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Give what rank of n ranks holds of each weight, contiguous, by the weight's name.

        In a dtype, by default this one's own. Raises ValueError, before the first is given, for
        damage that hashes show, and for an n into which the model does not cut.
        """
        self.check_cut(n, f"{self.path}: with {n} ranks running, it")
        if work := self.work_to_save(n, dtype):
            say(f"{self.path}: {work}")
        self.check_share(rank, n)
        for name in self.shapes:
            yield name, self.part(name, rank, n, dtype)

    def part(self, name: str, rank: int, n: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What rank of n ranks holds of the weight, contiguous, put together from blocks of rows.

        So no more of the weight than a block is ever in memory as it is read.
        """
        dim, start, stop = self.range_of(name, rank, n)
        shape = cut_of(name, self.args, n).shape(self.shapes[name])
        if len(shape) == 1:  # a norm, whole
            return self.read(name).to(dtype or self.dtype)
        part = torch.empty(shape, dtype=self.dtype_of(name, dtype))
        columns = slice(start, stop) if dim else slice(None)
        first, size = 0 if dim else start, -(-BLOCK_NUMBERS // shape[1])
        for low in range(0, len(part), size):
            high = min(low + size, len(part))
            part[low:high] = self.block(name, first + low, first + high, columns)
        return part

    def range_of(self, name: str, rank: int, n: int) -> tuple[int, int, int]:
        """What rank of n ranks holds of the weight: rows (0) or columns (1), from and to which."""
        cut = cut_of(name, self.args, n)
        size = self.shapes[name][cut.dim] // cut.parts
        start = cut.part_in(rank) * size
        return cut.dim, start, start + size

    def block(self, name: str, start: int, stop: int, columns: slice) -> torch.Tensor:
        """Some columns of rows start to stop of a matrix."""
        return self.read(name, 0, start, stop)[:, columns]

    def kept_bits(self, name: str) -> int:
        """The bits of a weight's numbers that kept() gives, as pack() would; 0: of none."""
        return 0

    def kept(self, name: str, start: int, stop: int, columns: slice) -> torch.Tensor:
        """Some columns of rows start to stop of a matrix, as the file has them quantised."""
        raise NotImplementedError

    def stays_mapped(self, name: str, n: int, dtype: torch.dtype) -> bool:
        """Whether part() gives each of n ranks a view of a mapped file. By default a copy."""
        return False

    def check_share(self, rank: int, n: int) -> None:
        """Raise ValueError where what rank of n ranks reads is damaged. By default nobody knows."""

    def work_to_save(self, n: int, dtype: torch.dtype | None) -> str:
        """What is done while loading, and the command that saves it next time; "" for nothing."""
        cut = f" and cut for {n} ranks" * (n > 1)
        growth = self.growth(self.shapes, dtype)
        command = ["python", "convert_model.py", "--from", str(self.path)]
        command += ["--out_dir", str(default_out_dir(self.path, n)), "--n", str(n)]
        command += dtype_flag(dtype)
        return (
            f"{self.form}, converted{cut} while loading{f' ({growth})' if growth else ''}; to save "
            f"that work next time: {shlex.join(command)}"
        )

    def growth(self, names: Iterable[str], dtype: torch.dtype | None = None) -> str:
        """How large quantised weights become in a dtype; "" where they are not quantised."""
        if not self.quantised_bytes:
            return ""
        n_numbers, wide = sum(math.prod(self.shapes[name]) for name in names), dtype or self.dtype
        less = "" if dtype else "; --dtype bfloat16 takes half, --quantize int8 or int4 less"
        return (
            f"{self.quantised_bytes / 1e6:,.0f} MB of quantised weights become "
            f"{n_numbers * wide.itemsize / 1e6:,.0f} MB of {dtype_name(wide)}{less}"
        )

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype as which each weight is read."""
        return {name: self.read(name, 0, 0, 1).dtype for name in self.shapes}

    def verify(self) -> dict[str, str]:
        """Read every weight; return the SHA-256 of each."""
        with hash_threads() as pool:
            hashes = pool.map(functools.partial(whole_sha256, self), self.shapes)
            return dict(zip(self.shapes, hashes))

    def what_was_verified(self) -> str:
        """Tell what a verify() that raised nothing has shown."""
        return (
            f"{len(self.shapes)} weights that fit together; {self.form} has no hashes of them, so "
            "nothing tells whether the numbers are the right ones"
        )

    def check_sha256(self, name: str, sha256: str) -> None:
        """Raise ValueError if this is not the whole weight's SHA-256. By default none is known."""


def hash_threads() -> ThreadPoolExecutor:
    """As many threads as torch uses, up to where they would wait for memory and disk alone."""
    return ThreadPoolExecutor(min(torch.get_num_threads(), 8))


def whole_sha256(source: Source, name: str, dtype: torch.dtype | None = None) -> str:
    """The SHA-256 of a whole weight, its rows in order; or of what it becomes in another dtype."""
    total = hashlib.sha256()
    for _, block in source.blocks(name):
        total.update(bytes_of(block.to(dtype or block.dtype)))
    return total.hexdigest()
