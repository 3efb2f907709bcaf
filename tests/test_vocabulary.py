"""GGUF metadata made of tokenizer files: the ids it gives, here and in llama.cpp, are the files'."""

import json
import random
import urllib.request

import pytest
import tokenizers
import xllamacpp
from conftest import TOKENIZERS
from formats import write_gguf
from test_gguf_tokenizer import SMOLLM2, meta_of, mixed_text, tokenizer_in

from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.vocabulary import vocabulary_of
from llama.tokenizer import Tokenizer

SPECIAL = ["<s>", "</s>", "<unk>", "<|eot_id|>", "<|im_end|>", "<|begin_of_text|>", "[PAD7]"]
SIZES = {"sentencepiece": 32000, "tiktoken": 128256, "json": 49152}


def files_of(name: str) -> dict[str, bytes]:
    """The files of a real tokenizer: Mistral's, Llama 3's or SmolLM2's."""
    if name == "json":
        return tokenizer_files(meta_of(SMOLLM2), SIZES[name])
    return {"tokenizer.model": TOKENIZERS[name][0].read_bytes()}


def texts(n: int) -> list[str]:
    """Random mixtures of code, languages, emoji, digits, control characters, special tokens."""
    chance = random.Random(7)
    parts = [[mixed_text(chance), chance.choice(SPECIAL), mixed_text(chance)] for _ in range(n)]
    return [" " * (i % 3) + "".join(chance.sample(part, 1 + i % 3)) for i, part in enumerate(parts)]


@pytest.fixture(scope="module", params=SIZES)
def case(request, tmp_path_factory):
    """A real tokenizer, its metadata for a model with 64 more rows, and what is rebuilt of it."""
    folder, files = tmp_path_factory.mktemp("files"), files_of(request.param)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    meta = vocabulary_of(files, SIZES[request.param] + 64)
    return Tokenizer(folder), meta, tokenizer_in(folder / "rebuilt", meta)


def test_ids_and_special_tokens_survive_the_round_trip(case):
    original, _, rebuilt = case
    for name in ("bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(rebuilt, name) == getattr(original, name)
    for s in texts(2000):
        ids = original.encode(s)
        assert rebuilt.encode(s) == ids, s
        assert rebuilt.decode(ids) == original.decode(ids), s


def test_llama_cpp_gives_the_same_ids(case, tmp_path):
    original, meta, _ = case
    n = len(meta["tokenizer.ggml.tokens"])
    small = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": n}
    write_gguf(tmp_path / "m.gguf", tied=True, meta=meta, **small)
    params = xllamacpp.CommonParams()
    params.model.path = str(tmp_path / "m.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.port = 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    different = []
    for s in texts(2000):
        body = json.dumps({"content": s, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request) as answer:
            ids = json.load(answer)["tokens"]
        if ids != original.encode(s, bos=False):
            different.append((s, ids, original.encode(s, bos=False)))
    assert not different, (len(different), different[:5])
