"""Tiny random models as Hugging Face folders and as GGUF files, and what is true of both."""

import base64
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TOKENIZERS, make_params, random_source
from gguf import GGMLQuantizationType as Kind
from random_model import RandomSource
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama import parallel
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.formats import open_any
from llama.checkpoint.params import context_len, sizes_of
from llama.checkpoint.weights import EMBEDDING, OUTPUT, Source
from llama.checkpoint.write import write_checkpoint
from llama.generation import load_model

VOCABULARY = 96


def save_hf(folder: Path, dtype=torch.float32, max_shard_size="1GB", **changes) -> None:
    """Save a model with weights large enough that every mistake shows to a Hugging Face folder."""
    torch.manual_seed(0)
    config = {"hidden_size": 64, "intermediate_size": 200, "vocab_size": VOCABULARY}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"initializer_range": 0.3, "max_position_embeddings": 131072}
    config |= changes
    if config.pop("model_type", "llama") == "mistral":
        model = AutoModelForCausalLM.from_config(MistralConfig(sliding_window=None, **config))
    else:
        model = LlamaForCausalLM(LlamaConfig(**config))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)


def gguf_source(**changes) -> Source:
    """The model that write_gguf writes."""
    small = {"vocab_size": VOCABULARY, "multiple_of": 192, "n_kv_heads": 2}
    return random_source(make_params(**(small | changes)))


def write_gguf(path: Path, kind=Kind.F32, tied=False, meta=(), tensors=(), **changes) -> Source:
    """Write a GGUF file with the gguf library; return what it holds.

    meta and tensors change what is written; None leaves a field or a tensor out.
    """
    source = gguf_source(**changes)
    args = source.args
    fields = sizes_of("gguf", args) | {"llama.rope.dimension_count": args.head_dim}
    fields |= dict(meta)
    # gguf knows what the weights are called in Meta's files.
    gguf_names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.n_layers)
    weights = {
        gguf_names.get_name(name, try_suffixes=(".weight",)): source.read(name).numpy()
        for name in source.shapes
        if not (tied and name == "output.weight")
    } | dict(tensors)

    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        value = value.tolist() if isinstance(value, np.ndarray) else value
        if value is not None:
            # llama.cpp takes whole numbers without a sign only.
            count = type(value) is int and value >= 0
            kind_of_value = (
                gguf.GGUFValueType.UINT32 if count else gguf.GGUFValueType.get_type(value)
            )
            writer.add_key_value(key, value, kind_of_value)
    for name, weight in weights.items():
        if weight is not None and weight.ndim > 1:
            writer.add_tensor(name, quantised(weight, kind), raw_dtype=kind)
        elif weight is not None:
            writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return source


def quantised(weight: np.ndarray, kind: Kind) -> np.ndarray:
    """A matrix as blocks of a type; of Q4_K, which the library cannot write, any that are valid."""
    if kind != Kind.Q4_K:
        return gguf.quants.quantize(weight, kind)
    blocks = np.random.default_rng(0).integers(0, 256, (len(weight), weight.shape[1] // 256, 144))
    blocks = blocks.astype(np.uint8)
    factors = np.array([2.0**-8, 2.0**-6], np.float16)  # of scales and of what is subtracted
    blocks[..., :4] = factors.view(np.uint8)
    blocks[..., 4:8] |= 0xA0  # scales of 32 at least: what is subtracted is less than 8 steps
    return blocks.reshape(len(weight), -1)


def byte_level_vocabulary(n: int) -> dict:
    """GGUF metadata, as it is read, of Llama 3's first n tokens and 20 special ones behind."""
    printable = bytes_to_unicode()
    lines = TOKENIZERS["tiktoken"][0].read_bytes().splitlines()[:n]
    ranks = {base64.b64decode(line.split()[0]): rank for rank, line in enumerate(lines)}

    def shown(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    merges = [  # as Hugging Face makes them: every two tokens that together are one
        f"{shown(token[:i])} {shown(token[i:])}"
        for token in ranks
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    specials = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|special_{i}|>" for i in range(18))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [shown(token) for token in ranks] + specials,
        "tokenizer.ggml.token_type": np.array([1] * n + [3] * 20),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
    }


@torch.inference_mode()
def assert_same_logits(path: Path, reference: LlamaForCausalLM) -> None:
    """Convert what is at path into a folder beside it; it must compute as the reference does."""
    write_checkpoint(open_any(path), path.with_name("ckpt"))
    model = load_model(Checkpoint(path.with_name("ckpt")), parallel.setup(), torch.float32)
    ids = torch.randint(VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = reference.eval()(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(model(ids), expected, atol=1e-3, rtol=0)


def assert_fails(path: Path, message: str) -> None:
    """Opening what is at path is an error of one line that begins with the path."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        open_any(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def assert_ranges_are_slices(source: Source) -> None:
    """Any rows or columns of any weight are those of the whole weight."""
    chance = random.Random(0)
    for name, shape in source.shapes.items():
        whole = source.read(name)
        assert whole.shape == shape
        for dim, size in enumerate(shape):
            ranges = [(0, None), (0, 1), (size - 1, size), (size // 2, None)]
            ranges += [sorted(chance.sample(range(size + 1), 2)) for _ in range(4)]
            for start, stop in ranges:
                found = source.read(name, dim, start, stop)
                expected = whole[:, start:stop] if dim else whole[start:stop]
                assert found.equal(expected), (name, dim, start, stop)


def tiny(files: dict, tied: bool = False, dtype=torch.float32, **changes) -> RandomSource:
    """A tiny random model with a tokenizer beside it."""
    source = random_source(make_params(**changes), dtype)
    source.files = files
    if tied:
        source.seeds[OUTPUT] = source.seeds[EMBEDDING]
    return source


def assert_equal(found: Source, expected: Source) -> None:
    """The same model, bit by bit."""

    def shape_of(args):
        sizes = vars(args) | {"context_len": context_len(args), "hidden_dim": args.hidden_dim}
        return {k: v for k, v in sizes.items() if k not in ("multiple_of", "ffn_dim_multiplier")}

    assert shape_of(found.args) == shape_of(expected.args)
    assert found.dtype == expected.dtype
    for name in expected.shapes:
        assert torch.equal(found.read(name), expected.read(name)), name
