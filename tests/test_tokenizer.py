"""Tokenizer: ids equal those of independent implementations, for all three kinds of file."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import sentencepiece
from conftest import TOKENIZERS, edit_json
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import ByteLevel
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from llama.tokenizer import Tokenizer

SENTENCEPIECE, TIKTOKEN = TOKENIZERS["sentencepiece"][0], TOKENIZERS["tiktoken"][0]
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two leading spaces, two   inside, one behind ",
    "\n\nlines\n\tand\r\ntabs\n",
    "In 2024: 1234567890 + 3.14 = ½ ² ٣",
    "naïve Straße 你好，世界 مرحبا שלום",
    "e\u0301 🦙 👩🏽‍🚀 🇨🇭",
    "def f(x):\n    return {'a': x[0]}  # <s> </s>",
    "<|begin_of_text|>I'll<|eot_id|> <|endoftext|>",
    "\u00a0\u200b\ufeff\x00\x7f",
]


def save_json(folder, bos_in_template=False, config=None, special=("<|endoftext|>", "<|im_end|>")):
    """A small byte-level tokenizer.json that knows <s> (bos) and the given special tokens."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rust.train_from_iterator(TEXTS, trainer)
    if bos_in_template:
        rust.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    # Left over from somebody's training run.
    rust.enable_truncation(8)
    rust.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sp():
    return Tokenizer(SENTENCEPIECE)


@pytest.fixture(scope="module")
def tik():
    return Tokenizer(TIKTOKEN)


@pytest.fixture(scope="module")
def in_json(tmp_path_factory):
    return Tokenizer(save_json(tmp_path_factory.mktemp("json"), bos_in_template=True))


@pytest.fixture(params=["sp", "tik", "in_json"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def llama_2_in_rust() -> RustTokenizer:
    """The SentencePiece vocabulary in the Rust library, laid out as in Llama 2's tokenizer.json."""
    file = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE))
    vocab = {file.id_to_piece(i): i for i in range(file.vocab_size())}
    merges = generate_merges(vocab, {piece: file.get_score(i) for piece, i in vocab.items()})
    rust = RustTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    rust.normalizer = normalizers.Sequence(steps)
    return rust


@pytest.fixture(scope="module")
def references(in_json):
    """The same files in the Rust library: by our own hands, and as transformers converts them."""
    rust = RustTokenizer.from_file(str(in_json.model_path))
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = True
    tik = TikTokenConverter(vocab_file=str(TIKTOKEN)).converted()
    return {SENTENCEPIECE: llama_2_in_rust(), TIKTOKEN: tik, in_json.model_path: rust}


@pytest.mark.parametrize("s", TEXTS)
def test_ids_equal_the_rust_librarys_and_survive_the_round_trip(tokenizer, references, s):
    expected = references[tokenizer.model_path].encode(s, add_special_tokens=False).ids
    assert tokenizer.encode(s, bos=False) == expected
    assert tokenizer.decode(tokenizer.encode(s, bos=True, eos=True)) == s


def test_the_facts_of_the_real_files(sp, tik):
    assert (sp.n_words, sp.bos_id, sp.eos_id, sp.stop_ids) == (32000, 1, 2, {2})
    assert sp.pad_id == sp.eos_id  # that file has none
    assert (tik.n_words, tik.bos_id, tik.eos_id, tik.pad_id) == (128256, 128000, 128001, 128004)
    assert tik.stop_ids == {128001, 128008, 128009}
    # From the tests of Meta's llama-models.
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert tik.encode("This is a test sentence.", bos=True, eos=True) == ids


def test_bos_and_eos_are_added_once_and_only_when_asked(tokenizer):
    plain = tokenizer.encode("x", bos=False, eos=False)
    assert not tokenizer.stop_ids & set(plain)
    assert tokenizer.encode("x") == [tokenizer.bos_id, *plain]
    assert tokenizer.encode("x", bos=False, eos=True) == [*plain, tokenizer.eos_id]


def test_special_tokens_in_a_text_are_plain_text(tokenizer):
    s = "<s></s><|eot_id|><|end_of_text|>a<|im_end|>"
    ids = tokenizer.encode(s, bos=False)
    assert not {tokenizer.bos_id, *tokenizer.stop_ids} & set(ids)
    assert tokenizer.decode(ids) == s


def test_every_special_token_is_left_out_of_the_text(tik):
    assert tik.decode([*range(128000, 128128), *tik.encode("a"), *range(128128, 128256)]) == "a"


@pytest.mark.parametrize("far", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_an_error(tokenizer, far):
    with pytest.raises(ValueError, match="belongs to the model"):
        tokenizer.decode([5, far])


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83eb")) == "a\ufffdb"


def test_long_runs_are_cut_where_meta_cuts_them(tik):
    # Meta cuts a text every 400,000 characters and a run in it every 25,000.
    s = "a" * 60_000 + " " * 30_000 + "word " * 70_000
    parts = [s[:25_000], s[25_000:50_000], s[50_000:85_000], s[85_000:400_000], s[400_000:]]
    ids = [i for part in parts for i in tik.encode(part, bos=False)]
    assert tik.encode(s, bos=False) == ids
    assert tik.decode(ids) == s


def test_a_million_characters_without_a_space_take_no_time(tik):
    start = time.monotonic()
    assert tik.decode(tik.encode("^" * 1_000_000)) == "^" * 1_000_000
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("in_template", "config", "bos_id"),
    [
        (True, None, 0),
        (False, None, None),
        (True, {}, 0),
        (False, {"bos_token": "<s>"}, None),  # a name that the file never adds, as SmolLM2's
        (True, {"bos_token": "<s>"}, 0),
        (False, {"bos_token": "<s>", "add_bos_token": True}, 0),
        (True, {"bos_token": {"content": "<s>"}, "add_bos_token": False}, None),
        (True, {"bos_token": None, "add_bos_token": False}, None),
    ],
)
def test_json_bos_is_what_config_and_template_say(tmp_path, in_template, config, bos_id):
    tokenizer = Tokenizer(save_json(tmp_path, in_template, config))
    assert tokenizer.bos_id == bos_id
    ids = tokenizer.encode("a", bos=True)
    assert ids == ([] if bos_id is None else [bos_id]) + tokenizer.encode("a", bos=False)


def test_json_eos_pad_and_stop_ids_come_from_the_config_or_are_the_usual_ones(tmp_path):
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<s>"}
    named = Tokenizer(save_json(tmp_path / "named", config=config))
    assert (named.eos_id, named.pad_id, named.stop_ids) == (2, 0, {1, 2})
    usual = Tokenizer(save_json(tmp_path / "usual", special=("<|eot_id|>", "<|end_of_text|>")))
    assert (usual.eos_id, usual.pad_id, usual.stop_ids) == (2, 2, {1, 2})


@pytest.mark.parametrize(
    ("config", "message"), [(None, "name one as eos_token"), ({"eos_token": "<nope>"}, "<nope>")]
)
def test_json_without_a_known_eos_is_an_error(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(save_json(tmp_path, config=config, special=()))


def test_the_kind_is_told_by_content_and_a_folder_means_tokenizer_json_first(tmp_path):
    shutil.copy(SENTENCEPIECE, tmp_path / "tokenizer.model")
    assert Tokenizer(str(tmp_path)).n_words == 32000
    assert Tokenizer(save_json(tmp_path)).n_words == 400  # a tuned model's tokens are there alone
    shutil.copy(TIKTOKEN, tmp_path / "tokenizer.json")
    assert Tokenizer(tmp_path).n_words == 128256


def test_text_between_special_tokens_is_cut_as_the_file_says(tmp_path):
    rust = llama_2_in_rust()
    rust.normalizer = None
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    rust.add_special_tokens(["</s>", AddedToken("<|user|>", rstrip=True, special=True)])
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for s in ("<|user|>\nHi</s>\nand more", "Hi</s>there <|user|>   x", "Hi", "</s>"):
        expected = rust.encode(s, add_special_tokens=False).ids
        assert tokenizer.encode(s, bos=False, special_tokens=True) == expected
        plain = tokenizer.encode(s, bos=False)  # and names stay text where nobody asks
        assert not set(plain) & set(tokenizer.special_tokens.values())


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_a_missing_file_is_named_with_what_to_do(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="came with the weights") as error:
        Tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello world",
        b"PK\x03\x04" + bytes(100),
        b"{}",
        b'{"model": 1}',
        b"YQ== 0\n",  # not all bytes have a rank
        TIKTOKEN.read_bytes()[:100_000],  # cut inside a line
        TIKTOKEN.read_bytes().replace(b" 300\n", b" 301\n"),  # a gap and a double
        TIKTOKEN.read_bytes()[:7000] + b"?? x\n",
        SENTENCEPIECE.read_bytes()[:100_000],
    ],
    ids=str.split("empty newline text zip json model bytes cut ranks base64 protobuf"),
)
def test_what_is_no_tokenizer_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        Tokenizer(path)


def step(kind, **values):
    return {"type": kind, **values}


REPLACE = step("Replace", pattern={"String": "a"}, content="aa")
SPLIT = step("Split", behavior="Isolated", invert=False)
HOSTILE = {
    "doubling": ({"normalizer": step("Sequence", normalizers=[REPLACE] * 40)}, "too long"),
    "long prefix": ({"normalizer": step("Prepend", prepend="x" * 10**7)}, "too long"),
    "precompiled": ({"normalizer": step("Precompiled", precompiled_charsmap="")}, "Precompiled"),
    "regex": ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": r"(a|a|aa)+$"}}}, "retry-limit"),
    "unigram": ({"model": step("Unigram", unk_id=0, vocab=[["a", 0.0]])}, "no byte-pair"),
    "unknown": ({"model": step("BPE", unk_token="x" * 1000)}, "unk_token is too long"),
    "no unknown": ({"model": step("BPE", vocab={"</s>": 0}, merges=[], unk_token="?")}, "unk|Unk"),
    "decoder": ({"decoder": step("Nonsense")}, "untagged enum"),
}


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_json_is_a_named_error(tmp_path, changes, message):
    edit_json(save_json(tmp_path) / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        Tokenizer(tmp_path).encode("a" * 100 + "b")


def test_a_tokenizer_that_takes_too_long_ends_the_program(tmp_path):
    slow = SPLIT | {"pattern": {"Regex": "a*a*c[bd]"}}
    edit_json(save_json(tmp_path) / "tokenizer.json", pre_tokenizer=slow)
    program = (
        "import llama.tokenizer as t; t.TIME_LIMIT = 1; t.Tokenizer('.').encode('a' * 3000 + 'cxb')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, timeout=60, text=True
    )
    assert result.returncode == 1
    assert result.stderr == "error: tokenizer.json: after 1 s its tokenizer is still at one text\n"


def test_a_checkpoint_given_by_mistake_is_not_read(tmp_path):
    path = tmp_path / "consolidated.00.pth"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="is no tokenizer file"):
        Tokenizer(path)
