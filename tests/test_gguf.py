"""GGUF files against what was written, against transformers, and damaged in every way."""

import random
import struct
import time
import tracemalloc
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from conftest import hf_model
from formats import (
    assert_fails,
    assert_ranges_are_slices,
    assert_same_logits,
    byte_level_vocabulary,
    gguf_source,
    write_gguf,
)
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaForCausalLM

from llama.checkpoint import gguf as ours
from llama.checkpoint.gguf import GGUFFile

DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("kind", [*DTYPES, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_weights_are_those_that_were_written(path, kind):
    written = write_gguf(path, kind)
    source = GGUFFile(path)
    assert source.dtype == DTYPES.get(kind, torch.float32)
    assert source.shapes == written.shapes
    for name in written.shapes:
        expected = written.read(name)
        if expected.dim() > 1:
            packed = gguf.quants.quantize(expected.numpy(), kind)
            expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        assert source.read(name).float().equal(expected), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q4_1], ids=lambda k: k.name)
def test_any_rows_or_columns_are_those_of_the_whole_weight(path, kind, tied):
    write_gguf(path, kind, tied)
    source = GGUFFile(path)
    assert source.read("output.weight").equal(source.read("tok_embeddings.weight")) is tied
    assert_ranges_are_slices(source)


def test_no_more_rows_are_dequantised_than_asked_for(path, monkeypatch):
    write_gguf(path, Kind.Q8_0)
    source = GGUFFile(path)
    spy = Mock(wraps=ours.dequantize)
    monkeypatch.setattr(ours, "dequantize", spy)
    source.read("output.weight", 0, 10, 13)
    assert [len(call.args[0]) for call in spy.mock_calls] == [3]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda k: k.name)
def test_converted_model_gives_the_logits_of_transformers_on_the_same_file(path, kind, tied):
    write_gguf(path, kind, tied)
    options = {"gguf_file": path.name, "dtype": torch.float32}
    assert_same_logits(path, LlamaForCausalLM.from_pretrained(path.parent, **options))


ROPE = {"rope_theta": 5e5, "n_heads": 1, "n_kv_heads": 1}


def scaled_model(factor, **changes):
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": factor}
    return hf_model(gguf_source(**ROPE, **scaled, **changes))


def rope_factors(factor, **changes):
    """The divisors that Llama 3.1's scaling puts into a GGUF file, by transformers' own rule."""
    models = (hf_model(gguf_source(**ROPE)), scaled_model(factor, **changes))
    plain, scaled = (model.model.rotary_emb.inv_freq for model in models)
    return (plain / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_scaled_rope(path, factor):
    write_gguf(path, tensors={"rope_freqs.weight": rope_factors(factor)}, **ROPE)
    params = GGUFFile(path).params
    assert params["use_scaled_rope"] is True
    assert params.get("rope_scaling_factor", 8.0) == factor
    assert_same_logits(path, scaled_model(factor))


@pytest.mark.parametrize(
    "factors",
    [
        rope_factors(8.0, rope_high_freq_factor=2.0),
        rope_factors(8.0)[:-1],
        np.full(32, np.nan, np.float32),
        np.zeros(32, np.float32),
        np.full(32, 8, np.float32),
    ],
    ids=["other formula", "other length", "nan", "zero", "all alike"],
)
def test_rope_factors_of_another_kind_are_refused(path, factors):
    write_gguf(path, tensors={"rope_freqs.weight": factors}, **ROPE)
    assert_fails(path, "rope")


def test_defaults_of_absent_fields(path):
    absent = ("llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size")
    absent += ("llama.attention.head_count_kv",)
    write_gguf(path, meta=dict.fromkeys(absent), n_kv_heads=8)
    source = GGUFFile(path)
    assert source.params["rope_theta"] == 10000.0
    assert source.params["n_kv_heads"] == 8
    assert source.params["norm_eps"] == 1e-5  # not the float32 nearest to it
    assert source.files == {}


ONES = np.ones((64, 64), np.float32)
OTHER_MODELS = {
    "architecture": ({"general.architecture": "qwen2"}, {}, "general.architecture is 'qwen2'"),
    "experts": ({"llama.expert_count": 8}, {}, "llama.expert_count is 8"),
    "heads by layer": ({"llama.attention.head_count": [8, 8]}, {}, "head_count is array"),
    "head size": ({"llama.attention.key_length": 16}, {}, "dimension_count is 8; only"),
    "value size": ({"llama.attention.value_length": 16}, {}, "value_length is 16"),
    "rotated part": ({"llama.rope.dimension_count": 4}, {}, "dimension_count is 4"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, {}, "scaling.type is 'yarn'"),
    "rope factor": ({"llama.rope.scaling.factor": -2.0}, {}, "factor is -2.0"),
    "split file": ({"split.count": 3}, {}, "split.count is 3"),
    "no eps": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "epsilon is None"),
    "endless layers": ({"llama.block_count": 2**31 - 1}, {}, "too few for 2147483647 layers"),
    "other vocabulary": ({"llama.vocab_size": 95}, {}, "shape (96, 64), expected (95, 64)"),
    "other FFN": ({"llama.feed_forward_length": 128}, {}, "w1.weight has shape (192, 64)"),
    "bias": ({}, {"blk.0.attn_q.bias": ONES[0]}, "blk.0.attn_q.bias"),
    "missing weight": ({}, {"blk.1.ffn_up.weight": None}, "w3.weight is missing"),
    "no embedding": ({}, {"token_embd.weight": None}, "token_embd.weight"),
    "flat embedding": ({}, {"token_embd.weight": ONES[0]}, "has shape (64,), expected (96, 64)"),
}


@pytest.mark.parametrize(("meta", "tensors", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_model_that_cannot_be_converted_is_named(path, meta, tensors, message):
    write_gguf(path, meta=meta, tensors=tensors)
    assert_fails(path, message)


# Damaged files, byte by byte


def text(value: bytes, length=None):
    return struct.pack("<Q", len(value) if length is None else length) + value


def field(key: bytes, kind: int, value: bytes):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name=b"output_norm.weight", dims=(32,), kind=0, offset=0, n_dims=None):
    n_dims = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)


def damaged(*fields: bytes, tensors=(), n_fields=None, n_tensors=None, version=3, magic=b"GGUF"):
    n_fields = len(fields) if n_fields is None else n_fields
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    head = magic + struct.pack("<IQQ", version, n_tensors, n_fields)
    return head + b"".join(fields) + b"".join(tensors) + bytes(512)


UINT8, UINT32, STRING, ARRAY = 0, 4, 8, 9
HUGE = 2**63
ALIGNMENT = b"general.alignment"
DAMAGED = {
    "empty": b"",
    "magic alone": b"GGUF",
    "other magic": damaged(magic=b"GGML"),
    "version 1": damaged(version=1),
    "big-endian": damaged(version=3 << 24),
    "huge number of tensors": damaged(n_tensors=HUGE),
    "huge number of fields": damaged(n_fields=HUGE),
    "more fields than there are": damaged(n_fields=60_000),
    "more tensors than there are": damaged(n_tensors=60_000),
    "huge key": damaged(text(b"k", 2**64 - 1)),
    "huge string": damaged(field(b"k", STRING, text(b"v", HUGE))),
    "huge array of numbers": damaged(field(b"k", ARRAY, struct.pack("<IQ", UINT8, HUGE))),
    "array size that overflows": damaged(field(b"k", ARRAY, struct.pack("<IQ", 10, 2**61 + 1))),
    "huge array of strings": damaged(field(b"k", ARRAY, struct.pack("<IQ", STRING, HUGE))),
    "many strings": damaged(field(b"k", ARRAY, struct.pack("<IQ", STRING, 16_000_000))),
    "array of arrays": damaged(field(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1))),
    "array of an unknown type": damaged(field(b"k", ARRAY, struct.pack("<IQ", 77, 1))),
    "unknown type": damaged(field(b"k", 13, b"\0")),
    "no UTF-8": damaged(field(b"\xff", UINT8, b"\0")),
    "key twice": damaged(field(b"k", UINT8, b"\0"), field(b"k", UINT8, b"\1")),
    "alignment 0": damaged(field(ALIGNMENT, UINT32, struct.pack("<I", 0))),
    "alignment 3": damaged(field(ALIGNMENT, UINT32, struct.pack("<I", 3))),
    "alignment as text": damaged(field(ALIGNMENT, STRING, text(b"32"))),
    "huge alignment": damaged(field(ALIGNMENT, 10, struct.pack("<Q", HUGE)), tensors=[tensor()]),
    "tensor twice": damaged(tensors=[tensor(), tensor(offset=128)]),
    "tensors in the same bytes": damaged(tensors=[tensor(), tensor(b"x", offset=64)]),
    "unknown tensor type": damaged(tensors=[tensor(kind=4)]),
    "no dimensions": damaged(tensors=[tensor(dims=())]),
    "five dimensions": damaged(tensors=[tensor(dims=(1, 1, 1, 1, 1))]),
    "huge number of dimensions": damaged(tensors=[tensor(n_dims=2**32 - 1)]),
    "zero dimension": damaged(tensors=[tensor(dims=(32, 0))]),
    "size that overflows to 0": damaged(tensors=[tensor(dims=(2**32, 2**32))]),
    "size that overflows": damaged(tensors=[tensor(dims=(2**62 + 8, 4))]),
    "huge offset": damaged(tensors=[tensor(offset=2**64 - 32)]),
    "part of a block": damaged(tensors=[tensor(dims=(33,), kind=Kind.Q4_0)]),
    "past the end": damaged(tensors=[tensor(dims=(1000,))]),
}


@pytest.fixture
def small_memory():
    """Fail where a test takes more than a few megabytes or seconds."""
    started = time.perf_counter()
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 << 20
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_an_error_that_costs_nothing(path, content, small_memory):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf: ") as caught:
        GGUFFile(path)
    # Found in the header, and not by chance later: these files hold no model.
    later = ("architecture", "token_embd", "no Llama model")
    assert not any(words in str(caught.value) for words in later)


SPARSE = {
    "100,000,000 strings": damaged(field(b"k", ARRAY, struct.pack("<IQ", STRING, 100_000_000))),
    "'' is there twice": damaged(n_fields=100_000_000),
}


@pytest.mark.parametrize(("message", "content"), SPARSE.items(), ids=["strings", "fields"])
def test_zeros_of_a_sparse_file_cost_nothing(path, message, content, small_memory):
    path.write_bytes(content)
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    assert_fails(path, message)


def test_types_that_cannot_be_dequantised_are_named(path):
    path.write_bytes(damaged(tensors=[tensor(kind=Kind.I32)]))
    assert_fails(path, "I32 cannot be converted")


def test_undamaged_header_gets_past_the_checks_above(path):
    tensors = [tensor(), tensor(b"x", offset=128)]
    path.write_bytes(damaged(field(b"k", UINT8, b"\0"), tensors=tensors))
    assert_fails(path, "weights that no Llama model in Meta's format has: x")


def test_file_cut_anywhere_is_an_error(path):
    write_gguf(path)
    content = path.read_bytes()
    for keep in [*range(0, 3000, 41), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"m\.gguf: "):
            GGUFFile(path)


def test_flipped_bytes_never_end_in_anything_but_a_value_error(path, small_memory):
    tokenizer = byte_level_vocabulary(300) | {"tokenizer.ggml.pre": "gpt-2"}
    write_gguf(path, meta=tokenizer, vocab_size=320)
    content = path.read_bytes()
    header = content.index(b"output.weight") + 64
    chance = random.Random(0)
    errors = 0
    for _ in range(200):
        flipped = bytearray(content)
        for _ in range(chance.choice((1, 2, 8))):
            flipped[chance.randrange(4, header)] = chance.choice((0, 1, 0x7F, 0xFF))
        path.write_bytes(flipped)
        try:
            source = GGUFFile(path)
            assert sum(map(np.prod, source.shapes.values())) * 4 <= len(content)
        except ValueError as err:
            errors += 1
            assert str(err).startswith(str(path))  # noqa: PT017 - not every flip is an error
    assert errors > 100


def test_rope_factors_of_one_change_nothing(tmp_path):
    write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": ONES[0, :4]})
    assert not GGUFFile(tmp_path / "m.gguf").args.use_scaled_rope
