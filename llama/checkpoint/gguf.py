"""Read and write GGUF files of a Llama model.

The header is read here and not by the gguf library's GGUFReader: that one takes 6.2 s and 158 MB
for SmolLM2's file (49,152 tokens), this one 0.24 s and 9 MB; and it trusts the counts in the file.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize

from llama.checkpoint.gguf_blocks import HALF_TYPES, KEPT, blocks_of, keep, size_as
from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.laid_out import (
    LaidOutFile,
    check_space,
    checked_blocks,
    write_weights,
)
from llama.checkpoint.params import check_values, read_rope, read_sizes, rope_of, sizes_of
from llama.checkpoint.weights import (
    EMBEDDING,
    OUTPUT,
    Source,
    check_layers,
    check_shapes,
    meta_names,
    name_in,
    weight_shapes,
)
from llama.files import naming, naming_refusals
from llama.model import ModelArgs, rope_frequencies
from llama.quantize import KEPT_GROUP

# GGUF's types of a value; those of numbers with struct's letter for them.
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
FLOAT32, STRING, ARRAY = 6, 8, 9
# An empty string takes 8 bytes, which a sparse file has for nothing, but costs us an object. The
# largest vocabularies have 300,000.
MAX_STRINGS = 1 << 22

ALIGNMENT = 32  # of the tensors in a file, where it does not say otherwise
ROPE_FACTORS = "rope_freqs.weight"
# What weights can be written as: matrices so, norms as float32; and the name of all that.
WRITTEN = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# Written beside ROPE_FACTORS to be read back; llama.cpp computes with the factors alone.
LLAMA3_ROPE = {
    "original_max_position_embeddings": "llama.rope.scaling.original_context_length",
    "low_freq_factor": "llama.rope.scaling.low_freq_factor",
    "high_freq_factor": "llama.rope.scaling.high_freq_factor",
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file; shape is (out, in), the reverse of what GGUF writes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """What it is read as."""
        return HALF_TYPES.get(self.kind, torch.float32)


class GGUFFile(Source):
    """A GGUF file of architecture llama, its tokenizer rebuilt into files.

    Opening it reads the header only. wq and wk have their rows in Meta's order already, a tied
    embedding is the output too. Quantised weights are read as float32, others as they are.

    Raises ValueError, naming path and values, for damaged files (every size in them is checked
    against the file's length) and for models that Meta's format cannot express.
    """

    form = "a GGUF file"

    def __init__(self, path: str | Path) -> None:
        with naming(Path(path)):
            self._data = np.asarray(np.memmap(path, mode="r"))  # ValueError for an empty file
            meta, tensors = read_header(self._data.data)
            factors = tensors.pop(ROPE_FACTORS, None)
            names = meta_names("gguf", tensors)
            self._tensors = {name: tensors[there] for name, there in names.items()}
            if EMBEDDING not in self._tensors:
                raise ValueError("token_embd.weight is missing")
            self._tensors.setdefault(OUTPUT, self._tensors[EMBEDDING])
            params = _params(meta, vocab_size=self._tensors[EMBEDDING].shape[0])
            if factors is not None:
                params = _with_scaled_rope(params, meta, self._rows(factors).flatten())
            args = ModelArgs.from_params(params)
            check_layers(args, len(self._tensors))
            shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
            check_shapes(shapes, weight_shapes(args))
            # Norms are float32 in every file.
            dtypes = [x.dtype for x in self._tensors.values() if len(x.shape) > 1]
            dtype = functools.reduce(torch.promote_types, dtypes)
            super().__init__(path, params, dtype, tokenizer_files(meta, args.vocab_size))
            if {x.kind for x in tensors.values()} - {GGMLQuantizationType.F32, *HALF_TYPES}:
                self.quantised_bytes = sum(x.stop - x.start for x in tensors.values())

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of a weight; by default all of it."""
        tensor, span = self._tensors[name], slice(start, stop)
        if len(tensor.shape) == 1:  # one row in the file
            return self._rows(tensor)[0, span]
        return self._rows(tensor, columns=span) if dim else self._rows(tensor, span)

    def block(self, name: str, start: int, stop: int, columns: slice) -> torch.Tensor:
        """Rows start to stop of a matrix, of which only these columns are dequantised."""
        return self._rows(self._tensors[name], slice(start, stop), columns)

    def as_stored(self, name: str, block: torch.Tensor) -> torch.Tensor:
        """What reading gives for rows of a weight that were written here."""
        tensor = self._tensors[name]
        packed = blocks_of(block, tensor.kind, name)
        return torch.tensor(dequantize(packed, tensor.kind)).to(tensor.dtype).view(block.shape)

    def kept_bits(self, name: str) -> int:
        """The bits of a weight's numbers that kept() gives; 0 where it cannot."""
        return KEPT.get(self._tensors[name].kind, 0)

    def kept(self, name: str, start: int, stop: int, columns: slice) -> torch.Tensor:
        """Some columns of rows start to stop of a matrix, its bits as they are: see keep()."""
        raw, inside = self._blocks(self._tensors[name], slice(start, stop), columns)
        kept = keep(raw, self._tensors[name].kind)  # (rows, groups, bytes)
        return kept[:, inside.start // KEPT_GROUP : inside.stop // KEPT_GROUP].flatten(1)

    def _rows(
        self, tensor: Tensor, rows: slice = slice(None), columns: slice = slice(None)
    ) -> torch.Tensor:
        """Some of a tensor's numbers; only the blocks that hold them are read and dequantised."""
        raw, inside = self._blocks(tensor, rows, columns)
        return torch.tensor(dequantize(raw, tensor.kind)[:, inside]).to(tensor.dtype)

    def _blocks(self, tensor: Tensor, rows: slice, columns: slice) -> tuple[np.ndarray, slice]:
        """The blocks that hold some of a tensor's numbers, and where the columns are in them."""
        per_block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        start, stop, _ = columns.indices(tensor.shape[-1])
        first, last = start // per_block, -(-stop // per_block)
        raw = self._data[tensor.start : tensor.stop].reshape(math.prod(tensor.shape[:-1]), -1)
        raw = raw[rows, first * block_bytes : last * block_bytes]
        return raw, slice(start - first * per_block, stop - first * per_block)


class _Cursor:
    """Reads values one after the other, never past the end.

    Whatever is counted takes bytes, so a count that the file cannot hold ends as soon as it does.
    """

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0

    def take(self, n_bytes: int) -> memoryview:
        left = len(self._data) - self.at
        if n_bytes > left:
            raise ValueError(f"damaged: {n_bytes:,} bytes announced, {left:,} left; download again")
        self.at += n_bytes
        return self._data[self.at - n_bytes : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self) -> object:
        """A value after its type; arrays of numbers as numpy arrays, without copying."""
        kind = self.number("I")
        if kind == FLOAT32:
            # The shortest decimal: 1e-05 is to be 1e-05 in params.json, not 9.999999747378752e-06.
            return float(str(np.float32(self.number("f"))))
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"damaged: type {kind} before byte {self.at:,} is unknown")
        item, n_items = self.number("I"), self.number("Q")
        if item in NUMBERS:
            dtype = np.dtype("<" + NUMBERS[item])
            return np.frombuffer(self.take(n_items * dtype.itemsize), dtype)
        if item != STRING:
            raise ValueError(f"damaged: array of type {item} before byte {self.at:,}")
        if n_items > MAX_STRINGS:
            raise ValueError(f"damaged: it announces {n_items:,} strings; download it again")
        return [self.string() for _ in range(n_items)]

    def tensor_info(self) -> tuple[list[int], int, int]:
        """A tensor's dimensions, the number of its type, and where it begins among the data."""
        n_dims = self.number("I")
        if not 1 <= n_dims <= 4:
            raise ValueError(f"damaged: a tensor of {n_dims} dimensions before byte {self.at:,}")
        return [self.number("Q") for _ in range(n_dims)], self.number("I"), self.number("Q")


def read_header(data: memoryview) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and the tensors' places, every size checked against the file's length."""
    cursor = _Cursor(data)
    if bytes(cursor.take(4)) != b"GGUF":
        raise ValueError("not a GGUF file; of a checkpoint of another format, give the folder")
    version = cursor.number("I")
    if version not in (2, 3):  # the same layout, little-endian
        raise ValueError(f"GGUF version {version} (big-endian?); versions 2 and 3 can be read")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    meta: dict = {}
    infos: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(n_fields):
        _add_once(meta, cursor.string(), cursor.value())
    for _ in range(n_tensors):
        _add_once(infos, cursor.string(), cursor.tensor_info())
    alignment = meta.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _place(name, info, start, len(data)) for name, info in infos.items()}
    extents = sorted((tensor.start, tensor.stop) for tensor in tensors.values())
    if any(after < before for (_, before), (after, _) in pairwise(extents)):
        raise ValueError("damaged: two tensors lie in the same bytes; download it again")
    return meta, tensors


def _add_once(values: dict, name: str, value: object) -> None:
    if name in values:
        raise ValueError(f"damaged: {name!r} is there twice")
    values[name] = value


def _place(name: str, info: tuple[list[int], int, int], data_start: int, file_size: int) -> Tensor:
    """A tensor's extent in the file; its numbers are Python's, so they do not overflow."""
    dims, raw_kind, offset = info
    kind = GGMLQuantizationType(raw_kind)  # ValueError for an unknown one
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    start = data_start + offset
    stop = start + math.prod(dims) // per_block * block_bytes
    if 0 in dims or dims[0] % per_block or stop > file_size:
        extent = f"{dims} of type {kind.name}, to byte {stop:,} of {file_size:,}"
        raise ValueError(f"damaged: {name!r} is {extent}; download it again")
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(f"weights of type {kind.name} cannot be converted") from error
    return Tensor(tuple(reversed(dims)), kind, start, stop)


def _params(meta: dict, vocab_size: int) -> dict:
    """What params.json says, from the metadata; rotary scaling is a tensor of its own."""
    check_values(meta, {"general.architecture": ("llama",)})
    defaults = {
        "llama.vocab_size": vocab_size,
        "llama.attention.head_count_kv": meta.get("llama.attention.head_count"),
        "llama.rope.freq_base": ModelArgs.rope_theta,
    }
    params = read_sizes("gguf", defaults | meta)
    head_dim = params.get("head_dim", params["dim"] // params["n_heads"])
    factor = meta.get("llama.rope.scaling.factor") or meta.get("llama.rope.scale_linear") or 1
    if meta.get("llama.rope.scaling.type") == "none":
        factor = 1
    accepted = {
        "split.count": (None, 0, 1),
        "llama.expert_count": (None, 0),
        "llama.attention.value_length": (None, head_dim),
        "llama.rope.dimension_count": (None, head_dim),
        "llama.rope.scaling.type": (None, "none", "linear"),
    }
    check_values(meta, accepted)
    return params | read_rope("linear", {"factor": factor})


def _with_scaled_rope(params: dict, meta: dict, factors: torch.Tensor) -> dict:
    """Add the entries that give these divisors of the rotary frequencies (Llama 3.1+).

    The largest of them is the scaling factor: it divides the slowest frequencies in full. The
    other numbers are not in most files; then they are taken to be those of Llama 3.1.
    """
    if bool((factors == 1).all()):  # as some files have them for plain rope
        return params
    numbers = {name: meta[there] for name, there in LLAMA3_ROPE.items() if there in meta}
    numbers["factor"] = round(float(factors.max()), 3)
    usual = rope_of(ModelArgs(use_scaled_rope=True))
    scaled = params | read_rope("llama3", usual | numbers)
    before, after = ModelArgs.from_params(params), ModelArgs.from_params(scaled)
    if len(factors) == before.head_dim // 2:
        expected = rope_frequencies(before) / rope_frequencies(after)
        if torch.allclose(factors.float(), expected, rtol=1e-3):
            return scaled
    raise ValueError(f"{ROPE_FACTORS}: only Llama 3's scaling can be converted, not this one")


def write_gguf(source: Source, path: Path, dtype: str, vocabulary: dict) -> None:
    """Write a model as a GGUF file, in a dtype of WRITTEN, norms always as float32.

    vocabulary: the metadata of the tokenizer and whatever else is to go in. With a tuned prompt in
    it the embeddings are float16 where the rest is quantised: rounded they would be another prompt.
    Weights are streamed, a few rows at a time.
    Raises ValueError for what GGUF or the dtype cannot express.
    """
    kind, file_type = WRITTEN[dtype]
    names = source.different_names
    kinds = {
        name: GGMLQuantizationType.F32 if len(source.shapes[name]) == 1 else kind for name in names
    }
    if dtype == "q8_0" and "llama.soft_prompt.prefix" in vocabulary:
        kinds[EMBEDDING] = GGMLQuantizationType.F16
    size = {name: size_as(name, source.shapes[name], kinds[name]) for name in names}
    check_space(path.parent, sum(size.values()))
    factors = _rope_factors(source.args)

    writer = GGUFWriter(path, "llama")
    meta = {"general.file_type": int(file_type), "general.quantization_version": 2}
    for key, value in (meta | _meta_of(source.args) | vocabulary).items():
        _add_field(writer, key, value)
    for name in names:
        shape, raw = source.shapes[name], np.dtype(np.float32)
        writer.add_tensor_info(name_in("gguf", name), shape, raw, size[name], kinds[name])
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    with naming_refusals(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        end = writer.fout[0].tell()
        writer.close()

    offsets, extra = {}, {} if factors is None else {ROPE_FACTORS: factors.nbytes}
    for name, nbytes in (size | extra).items():
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + nbytes
    file = LaidOutFile(path, offsets, -(-end // ALIGNMENT) * ALIGNMENT)

    def write(name: str) -> None:
        done = 0
        for block in checked_blocks(source, name):
            data = blocks_of(block, kinds[name], name).data.cast("B")
            file.write(name, done, data)
            done += len(data)

    write_weights(source, [file], names, write)
    if factors is not None:
        with file:
            file.write(ROPE_FACTORS, 0, factors.data.cast("B"))


def _meta_of(args: ModelArgs) -> dict:
    """What llama.cpp reads of a model's shape."""
    meta = sizes_of("gguf", args) | {"llama.attention.value_length": args.head_dim}
    meta |= {"llama.rope.dimension_count": args.head_dim}
    rope = rope_of(args)
    if rope["rope_type"] == "linear":
        linear = {"type": "linear", "factor": rope["factor"]}
        meta |= {f"llama.rope.scaling.{key}": value for key, value in linear.items()}
    if rope["rope_type"] == "llama3":
        meta |= {there: rope[name] for name, there in LLAMA3_ROPE.items()}
    return meta


def _rope_factors(args: ModelArgs) -> np.ndarray | None:
    """The divisors of the rotary frequencies by which GGUF says Llama 3.1's scaling."""
    if not args.use_scaled_rope:
        return None
    plain = dataclasses.replace(args, use_scaled_rope=False)
    return (rope_frequencies(plain) / rope_frequencies(args)).numpy()


def _add_field(writer: GGUFWriter, key: str, value: object) -> None:
    """Add metadata; whole numbers as uint32, as llama.cpp wants them."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    whole = type(value) is int
    writer.add_key_value(
        key, value, GGUFValueType.UINT32 if whole else GGUFValueType.get_type(value)
    )
