"""What GGUF says of a tokenizer gives the ids of the tokenizer's files, here and in llama.cpp."""

import base64
import functools
import json
import random
import re
import urllib.request

import pytest
import xllamacpp
from conftest import TOKENIZERS
from formats import byte_level_vocabulary, write_gguf
from sentencepiece import SentencePieceTrainer
from test_gguf_tokenizer import SMOLLM2, TEXTS, meta_of, mixed_text, tokenizer_in

from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.vocabulary import vocabulary_of
from llama.tokenizer import Tokenizer

SIZES = {"sentencepiece": 32000, "tiktoken": 128256, "json": 49152}
SPECIAL = ["<s>", "</s>", "<unk>", "<|eot_id|>", "<|im_end|>", "<|begin_of_text|>", "[PAD7]"]
# SmolLM2's vocabulary lacks these six bytes. Hugging Face's library leaves them out of a word
# before merging, llama.cpp after it.
WITHOUT_TOKEN = re.compile("[\x04\x06\x13\x14\x16\x1d]")


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


@functools.cache
def real_meta(name: str) -> dict:
    """The metadata of a real tokenizer for a model with 64 more rows."""
    return vocabulary_of(files_of(name), SIZES[name] + 64)


def tokenizer_of(folder, files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer in these files."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return Tokenizer(folder)


@pytest.mark.parametrize("name", SIZES)
def test_ids_and_special_tokens_survive_the_round_trip(tmp_path, name):
    original = tokenizer_of(tmp_path, files_of(name))
    rebuilt = tokenizer_in(tmp_path / "rebuilt", real_meta(name))
    for field in ("bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(rebuilt, field) == getattr(original, field)
    for s in texts(1000):
        ids = original.encode(s)
        assert rebuilt.encode(s) == ids, s
        assert rebuilt.decode(ids) == original.decode(ids), s


@pytest.mark.parametrize("name", SIZES)
def test_llama_cpp_gives_the_same_ids(tmp_path, name):
    original, n = tokenizer_of(tmp_path, files_of(name)), SIZES[name] + 64
    small = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "vocab_size": n}
    write_gguf(tmp_path / "m.gguf", tied=True, meta=real_meta(name), **small)
    params = xllamacpp.CommonParams()  # those of llama.cpp's own server
    params.model.path = str(tmp_path / "m.gguf")
    params.n_ctx, params.n_parallel, params.warmup, params.port = 64, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    for s in texts(1000):
        body = json.dumps({"content": s, "add_special": True, "parse_special": False}).encode()
        with urllib.request.urlopen(f"{server.listening_address}/tokenize", body) as answer:
            ids = json.load(answer)["tokens"]
        if not (name == "json" and WITHOUT_TOKEN.search(s)):
            assert ids == original.encode(s), s


def test_the_words_of_the_smollm2_file_come_back():
    meta, found = meta_of(SMOLLM2), real_meta("json")
    for name in ("model", "pre", "merges", "bos_token_id", "eos_token_id", "padding_token_id"):
        assert found[f"tokenizer.ggml.{name}"] == meta[f"tokenizer.ggml.{name}"]
    padding = [f"[PAD{i}]" for i in range(49152, 49216)]
    assert found["tokenizer.ggml.tokens"] == meta["tokenizer.ggml.tokens"] + padding
    types = [*meta["tokenizer.ggml.token_type"], *[5] * 64]
    assert found["tokenizer.ggml.token_type"].tolist() == types
    assert found["tokenizer.chat_template"] == meta["tokenizer.chat_template"]


def test_llama_3_has_its_special_tokens_by_name():
    meta = real_meta("tiktoken")
    tokens = meta["tokenizer.ggml.tokens"][:128256]
    assert tokens[128002] == "<|reserved_special_token_0|>"
    assert tokens[128009:128012] == ["<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>"]
    assert tokens[-1] == "<|reserved_special_token_247|>"
    assert meta["tokenizer.ggml.eot_token_id"] == 128009
    assert meta["tokenizer.ggml.padding_token_id"] == 128004


def trained(folder, **options) -> dict[str, bytes]:
    """A SentencePiece file of at most 400 tokens."""
    (folder / "text").write_text("\n".join(TEXTS * 20))
    options = {"model_type": "bpe", "byte_fallback": True} | options
    plain = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "m"),
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **plain | options,
    )
    return {"tokenizer.model": (folder / "m.model").read_bytes()}


def test_a_tokenizer_json_like_llama_2s_keeps_its_merges():
    files = tokenizer_files(real_meta("sentencepiece"), 32064)
    again = vocabulary_of(files, 32064)
    assert tokenizer_files(again, 32064)["tokenizer.json"] == files["tokenizer.json"]


@pytest.mark.parametrize("prefix", [True, False])
def test_whether_a_space_is_put_in_front_comes_along(tmp_path, prefix):
    meta = vocabulary_of(trained(tmp_path, add_dummy_prefix=prefix), 400)
    assert meta["tokenizer.ggml.add_space_prefix"] == prefix
    again = vocabulary_of(tokenizer_files(meta, 400), 400)
    assert again["tokenizer.ggml.add_space_prefix"] == prefix


def test_a_metaspace_differs_before_a_space_alone(tmp_path, capsys):
    files = tokenizer_files(vocabulary_of(trained(tmp_path), 400), 400)
    content = json.loads(files["tokenizer.json"])
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    content |= {"normalizer": None, "pre_tokenizer": metaspace}
    files["tokenizer.json"] = json.dumps(content).encode()
    rebuilt = tokenizer_in(tmp_path / "rebuilt", vocabulary_of(files, 400))
    assert "one more space" in capsys.readouterr().err
    (tmp_path / "json").mkdir()
    original = tokenizer_of(tmp_path / "json", files)
    for s in TEXTS:
        assert (rebuilt.encode(s) == original.encode(s)) == (not s.startswith(" ")), s


def test_tokens_that_only_the_configuration_names_come_along(tmp_path):
    files = trained(tmp_path)
    n = tokenizer_of(tmp_path, files).n_words
    config = {"added_tokens_decoder": {str(n): {"content": "<|im_end|>", "special": True}}}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    meta = vocabulary_of(files, n + 2)
    assert meta["tokenizer.ggml.tokens"][n:] == ["<|im_end|>", f"[PAD{n + 1}]"]
    assert meta["tokenizer.ggml.token_type"].tolist()[n:] == [3, 5]
    assert meta["tokenizer.ggml.eot_token_id"] == n


def small_files() -> dict[str, bytes]:
    """The files of a small byte-level tokenizer of 320 tokens."""
    return tokenizer_files(byte_level_vocabulary(300), 320)


def test_the_chat_template_is_the_file_or_the_entry():
    files = small_files()
    config = json.loads(files["tokenizer_config.json"])
    config["chat_template"] = [{"name": "x", "template": "a"}, {"name": "default", "template": "b"}]
    files["tokenizer_config.json"] = json.dumps(config).encode()
    assert vocabulary_of(files, 320)["tokenizer.chat_template"] == "b"
    files["chat_template.jinja"] = b"c"
    assert vocabulary_of(files, 320)["tokenizer.chat_template"] == "c"


BAD_SENTENCEPIECE = {
    "model_type": {"model_type": "unigram"},
    "precompiled_charsmap": {"normalization_rule_name": "nmt_nfkc"},
    "remove_extra_whitespaces": {"remove_extra_whitespaces": True},
    "byte_fallback": {"byte_fallback": False},
}


@pytest.mark.parametrize("name", BAD_SENTENCEPIECE)
def test_a_sentencepiece_file_that_gguf_cannot_express_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        vocabulary_of(trained(tmp_path, **BAD_SENTENCEPIECE[name]), 400)


SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
BAD_JSON = {
    "pre-tokenizer": ({"pre_tokenizer": SPLIT}, "'Regex': 'x'"),
    "normalizer": ({"normalizer": {"type": "NFC"}}, "NFC"),
    "dropout": ({"dropout": 0.1}, "dropout is 0.1"),
    "merges": ({"ignore_merges": False, "merges": ["i n"]}, "ids for .* would become others"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_tokenizer_json_that_gguf_cannot_express_is_named(name):
    changes, message = BAD_JSON[name]
    files = small_files()
    content = json.loads(files["tokenizer.json"])
    (content if changes.keys() <= content.keys() else content["model"]).update(changes)
    files["tokenizer.json"] = json.dumps(content).encode()
    with pytest.raises(ValueError, match=message):
        vocabulary_of(files, 320)


def test_an_endless_tiktoken_token_is_an_error():
    lines = TOKENIZERS["tiktoken"][0].read_bytes().splitlines()[:256]
    lines.append(base64.b64encode(b"a" * 1000) + b" 256")
    with pytest.raises(ValueError, match="a token has 1,000 bytes"):
        vocabulary_of({"tokenizer.model": b"\n".join(lines)}, 513)


def test_too_few_rows_and_no_files_are_errors():
    with pytest.raises(ValueError, match="has 320 tokens, the model 300"):
        vocabulary_of(small_files(), 300)
    with pytest.raises(ValueError, match=r"no tokenizer\.model or tokenizer\.json"):
        vocabulary_of({"tokenizer_config.json": b"{}"}, 320)
