"""Read a GGUF file of a Llama model as a checkpoint in Meta's layout."""

import reprlib
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama.checkpoint import Source, first_few, weight_shapes
from llama.formats import (
    check_shapes,
    ffn_params,
    meta_names,
    naming,
    positive_int,
    positive_number,
)
from llama.gguf_tokenizer import tokenizer_files
from llama.model import ModelArgs, rope_frequencies

# The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
GGUF_MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the same layout, little-endian
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
FLOAT32, STRING, ARRAY = 6, 8, 9
# Empty strings cost a sparse file nothing but us memory. The largest vocabularies have 300,000.
MAX_STRINGS = 1 << 22
MAX_DIMS = 4

NAMES = {
    "token_embd.weight": "tok_embeddings.weight",
    "blk.N.attn_q.weight": "layers.N.attention.wq.weight",
    "blk.N.attn_k.weight": "layers.N.attention.wk.weight",
    "blk.N.attn_v.weight": "layers.N.attention.wv.weight",
    "blk.N.attn_output.weight": "layers.N.attention.wo.weight",
    "blk.N.ffn_gate.weight": "layers.N.feed_forward.w1.weight",
    "blk.N.ffn_down.weight": "layers.N.feed_forward.w2.weight",
    "blk.N.ffn_up.weight": "layers.N.feed_forward.w3.weight",
    "blk.N.attn_norm.weight": "layers.N.attention_norm.weight",
    "blk.N.ffn_norm.weight": "layers.N.ffn_norm.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"

PLAIN_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Elements that are dequantised at a time, so that only the result takes a weight's memory.
DEQUANTIZE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies in the file; shape is (out, in), the reverse of what GGUF writes."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    stop: int


def open_gguf(path: str | Path) -> Source:
    """Open a GGUF file of architecture llama; its tokenizer is rebuilt into Source.files.

    Nothing but the header is read; Source.read dequantises one weight. Query and key rows are in
    Meta's order already. Tied embeddings come out twice. dtype is float32 for quantised files.

    Raises ValueError, naming path and values, for damaged files (every size in them is checked
    against the file's length) and for models that Meta's format cannot express.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .gguf file")
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: not a GGUF file, or cut short")
    data = np.memmap(path, mode="r")
    with naming(path):
        meta, tensors = _read_header(memoryview(data))
        source = _source(data, meta, tensors)
        source.files = tokenizer_files(meta, source.params["vocab_size"])
    return source


class _Cursor:
    """Reads values one after the other, never past the end.

    Whatever is counted takes bytes, so a count that the file cannot hold ends as soon as it does.
    """

    def __init__(self, data: memoryview):
        self._data = data
        self.at = 0

    def take(self, n_bytes: int) -> memoryview:
        left = len(self._data) - self.at
        if n_bytes > left:
            raise ValueError(
                f"damaged: {n_bytes:,} bytes are announced at {self.at:,}, {left:,} are left; "
                "download it again"
            )
        self.at += n_bytes
        return self._data[self.at - n_bytes : self.at]

    def number(self, code: str):
        code = "<" + code
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as err:
            raise ValueError(f"damaged: a string before byte {self.at:,} is no UTF-8") from err

    def value(self, kind: int) -> object:
        """A value of a GGUF type; arrays of numbers as numpy arrays, without copying."""
        if kind == FLOAT32:
            # The shortest decimal: 1e-05 is to be 1e-05 in params.json, not 9.999999747378752e-06.
            return float(str(np.float32(self.number(SCALARS[kind]))))
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"damaged: type {kind} before byte {self.at:,} is unknown")
        item = self.number("I")
        if item == STRING:
            n_strings = self.number("Q")
            if n_strings > MAX_STRINGS:
                raise ValueError(f"damaged: it announces {n_strings:,} strings; download it again")
            return [self.string() for _ in range(n_strings)]
        if item not in SCALARS:
            raise ValueError(f"damaged: array of type {item} before byte {self.at:,}")
        dtype = np.dtype(SCALARS[item]).newbyteorder("<")
        return np.frombuffer(self.take(self.number("Q") * dtype.itemsize), dtype)


def _read_header(data: memoryview) -> tuple[dict, dict[str, _Tensor]]:
    """The metadata and the tensors' places, every size checked against the file's length."""
    cursor = _Cursor(data)
    if cursor.take(4) != GGUF_MAGIC:
        raise ValueError("not a GGUF file")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} (big-endian?); versions 2 and 3 can be read")
    n_tensors, n_fields = cursor.number("Q"), cursor.number("Q")
    meta = {}
    for _ in range(n_fields):
        key = cursor.string()
        if key in meta:
            raise ValueError(f"damaged: {key!r} is there twice")
        meta[key] = cursor.value(cursor.number("I"))

    infos = {}
    for _ in range(n_tensors):
        name = cursor.string()
        if name in infos:
            raise ValueError(f"damaged: tensor {name!r} is there twice")
        n_dims = cursor.number("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f"damaged: tensor {name!r} has {n_dims} dimensions")
        dims = [cursor.number("Q") for _ in range(n_dims)]
        infos[name] = dims, cursor.number("I"), cursor.number("Q")

    alignment = meta.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors = {name: _place(name, *info, start, len(data)) for name, info in infos.items()}
    extents = sorted((tensor.start, tensor.stop) for tensor in tensors.values())
    if any(after < before for (_, before), (after, _) in pairwise(extents)):
        raise ValueError("damaged: two tensors lie in the same bytes; download it again")
    return meta, tensors


def _place(
    name: str, dims: list[int], raw_kind: int, offset: int, data_start: int, file_size: int
) -> _Tensor:
    """A tensor's extent in the file; its numbers are Python's, so they do not overflow."""
    try:
        kind = GGMLQuantizationType(raw_kind)
    except ValueError as err:
        raise ValueError(f"tensor {name!r} is of the unknown type {raw_kind}") from err
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % per_block:
        raise ValueError(f"damaged: rows of {name!r} ({dims[0]}) are not whole {kind.name} blocks")
    first = data_start + offset
    stop = first + prod(dims) // per_block * block_bytes
    if 0 in dims or stop > file_size:
        raise ValueError(
            f"damaged: tensor {name!r} {dims} reaches to byte {stop:,} of {file_size:,}; "
            "download it again"
        )
    return _Tensor(tuple(reversed(dims)), kind, first, stop)


def _source(data: np.memmap, meta: dict, tensors: dict[str, _Tensor]) -> Source:
    """Metadata and tensors as a Source, without the tokenizer."""
    dtype = _dtype(tensors)
    names, unknown = meta_names([name for name in tensors if name != ROPE_FACTORS], NAMES)
    if unknown:
        raise ValueError(f"weights that no Llama model in Meta's format has: {first_few(unknown)}")
    named = {name: tensors[gguf_name] for name, gguf_name in names.items()}
    embedding = named.get("tok_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("no matrix token_embd.weight in it; is it a part of a split model?")
    named.setdefault("output.weight", embedding)
    params = _params(meta, *embedding.shape)
    if ROPE_FACTORS in tensors:
        params |= _scaled_rope(_read(data, tensors[ROPE_FACTORS]).flatten(), params)
    args = ModelArgs.from_params(params)
    check_shapes({name: tensor.shape for name, tensor in named.items()}, args)
    return Source(params, weight_shapes(args), dtype, lambda name: _read(data, named[name]))


def _params(meta: dict, vocab_size: int, dim: int) -> dict:
    """What params.json says, from the metadata; rotary scaling is a tensor of its own."""
    for key, wanted in (
        ("general.architecture", ["llama"]),
        ("split.count", [None, 0, 1]),
        ("llama.expert_count", [None, 0]),
        ("llama.embedding_length", [dim]),
        ("llama.vocab_size", [None, vocab_size]),
        ("llama.rope.scaling.type", [None, "none"]),
        ("llama.rope.scaling.factor", [None, 0, 1]),
        ("llama.rope.scale_linear", [None, 1]),
    ):
        found = meta.get(key)
        if isinstance(found, (list, np.ndarray)) or found not in wanted:
            raise ValueError(
                f"{key} is {reprlib.repr(found)}; only {wanted[-1]!r} can be converted"
            )
    n_heads = positive_int(meta, "llama.attention.head_count")
    n_kv_heads = positive_int(meta, "llama.attention.head_count_kv", n_heads)
    if dim % n_heads:
        raise ValueError(f"llama.embedding_length {dim} is not a multiple of {n_heads} heads")
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        found = positive_int(meta, f"llama.{key}", dim // n_heads)
        if found != dim // n_heads:
            raise ValueError(
                f"llama.{key} is {found}; only embedding_length / head_count = {dim // n_heads} "
                "can be converted"
            )
    return {
        "dim": dim,
        "n_layers": positive_int(meta, "llama.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": vocab_size,
        **ffn_params(dim, positive_int(meta, "llama.feed_forward_length")),
        "norm_eps": positive_number(meta, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": positive_number(meta, "llama.rope.freq_base", 10000.0),
        "use_scaled_rope": False,
    }


def _scaled_rope(factors: torch.Tensor, params: dict) -> dict:
    """The params.json entries that give these divisors of the rotary frequencies (Llama 3.1+).

    The largest of them is the scaling factor: it divides the slowest frequencies in full.
    """
    if bool((factors == 1).all()):
        return {}
    factor = round(float(factors.max()), 3)
    scaled = {"use_scaled_rope": True}
    if factor != 8:
        scaled["rope_scaling_factor"] = factor
    plain = rope_frequencies(ModelArgs.from_params(params))
    expected = plain / rope_frequencies(ModelArgs.from_params(params | scaled))
    if factors.shape != expected.shape or not torch.allclose(factors.float(), expected, rtol=1e-3):
        raise ValueError(
            f"{ROPE_FACTORS} is not Llama 3's scaling of the rotary frequencies by {factor}; "
            "no other can be converted"
        )
    return scaled


def _dtype(tensors: dict[str, _Tensor]) -> torch.dtype:
    """The float type that all matrices have in common, else float32. (Norms are always float32.)"""
    for kind in {tensor.kind for tensor in tensors.values()}:
        block_bytes = GGML_QUANT_SIZES[kind][1]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError as err:
            raise ValueError(f"weights of type {kind.name} cannot be converted") from err
    kinds = {tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1}
    return PLAIN_TYPES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def _read(data: np.memmap, tensor: _Tensor) -> torch.Tensor:
    """A whole weight: plain types as they are, quantised ones as float32."""
    raw = np.asarray(data[tensor.start : tensor.stop])
    if tensor.kind in PLAIN_TYPES:
        return torch.from_numpy(raw.copy()).view(PLAIN_TYPES[tensor.kind]).view(tensor.shape)
    weight = torch.empty(tensor.shape, dtype=torch.float32)
    rows = weight.view(-1, tensor.shape[-1]).numpy()
    raw = raw.reshape(len(rows), -1)
    step = max(1, DEQUANTIZE_ELEMENTS // rows.shape[1])
    for i in range(0, len(rows), step):
        rows[i : i + step] = dequantize(raw[i : i + step], tensor.kind)
    return weight
