"""Say in GGUF's words what a tokenizer file holds: the way back from gguf_tokenizer.py.

Start reading at vocabulary_of().
"""

import itertools
import json
import re
import reprlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers

from llama.checkpoint.gguf_tokenizer import (
    ADDED,
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    tokenizer_files,
)
from llama.checkpoint.params import check_values
from llama.tokenizer import Tokenizer, kind_of, tiktoken_ranks

FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
# Llama 3's special tokens, by their place behind the ranks; all others are reserved.
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"}
LLAMA3_NAMES |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id"}
LLAMA3_NAMES |= {10: "python_tag"}
# Tokens that end a turn where the file calls another one the end of a sequence.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
# How a tokenizer.json turns spaces into SentencePiece's mark.
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREFIX = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
# Fields of a SentencePiece file by their numbers in sentencepiece_model.proto: what each is for,
# what it is where it is absent, and the one value that GGUF can express.
TRAINER = {3: ("model_type (2: byte-pair encoding)", 1, 2), 24: ("whitespace_as_suffix", 0, 0)}
NORMALIZER = {
    2: ("precompiled_charsmap", b"", b""),
    4: ("remove_extra_whitespaces", 1, 0),
    5: ("escape_whitespaces", 1, 1),
}
# Texts by which two tokenizers are told apart.
# fmt: off
PROBES = (
    "", " ", "  ", "   x", " x ", "\n", "\n\n\n", " \n \t\r\n x", "\t\tx", "a\rb", "x  \n\n  y",
    "Hello world", "Hello, World! HELLO", "I'll say we've 'tis; isn't IT'S you'Re", "don’t “do”",
    "def f(x):\n    return x ** 2  # y\n\n\nclass A:\n\tpass", "for(int i=0;i<10;++i){a[i]+=1;}",
    "x = {'a': [1, 2.5e-3], \"b\": None}", "https://example.org/a?b=c&d=%20#e", "$x->{y}//=@z;",
    "<html><b>x</b>&nbsp;</html>", "SELECT * FROM t WHERE a <> 'b';", "a_b-c.d/e\\f|g~h`i^j",
    "0", "12", "123", "1234", "12345678901", "In 2024, 3.14159 of 1,000,000", "x1y22 v1.2.3",
    "½ ² ٣٤ Ⅷ ①", "１２３", "你好，世界", "我们在2024年学习。", "日本語のテキスト", "한국어 문장",
    "Привет, мир", "مرحبا بالعالم", "שלום", "ไทย", "हिन्दी में", "Ελληνικά", "Tiếng Việt",
    "ñandú naïve Straße Łódź", "e\u0301 a\u0308", "é ä", "ﬁ ﬀ Å \u212b", "İstanbul ıi", "ſ \u212a",
    "🙂", "🦙🏽 x", "👩🏽‍🚀👨‍👩‍👧", "🇨🇭🇫🇷", "a🙂b", "\U0001f9ff\U000e0020", "𝔘𝔫𝔦", "𠀀𪚥",
    "\x00", "a\x00\x01\x07b", "\x1b[0m\x7f", "\x80\x9f\xa0", "\u00a0\u3000\u2003x", "\u200b\ufeff",
    "\u2028\u2029\x85\x0b\x0c", "\ufffd\uffff", "▁", "▁▁x ▁", "Ġx Ċ", "<0x41>", "[UNK]", "aaaaaaa",
    "<s>", "</s>x", "<unk>", "<|eot_id|>", "x<|im_end|>\n", "<|endoftext|>", "[INST] x [/INST]",
)
# fmt: on
TOKENS_A_PROBE = 50


@dataclass
class Vocabulary:
    """What a tokenizer file holds; words: further entries of GGUF's, without their prefix."""

    tokens: dict[int, tuple[str, int, float]]  # by id: text, type, score
    words: dict[str, object]
    unknown: str | None = None
    prefix_before_spaces: bool = True  # False: none for a text that begins with one already


def vocabulary_of(files: dict[str, bytes], vocab_size: int) -> dict:
    """GGUF's metadata for the tokenizer in these files; tokenizer_files() is the way back.

    files: by name, tokenizer.model or else tokenizer.json; tokenizer_config.json and
    chat_template.jinja are read where they are there. Ids without a token become [PADn].

    A Metaspace pre-tokenizer puts no space in front of a text that begins with one. llama.cpp
    does, as SentencePiece did, and nothing in GGUF says otherwise: this difference is let pass.

    Raises ValueError, saying what was found, for a tokenizer that GGUF cannot express: also where
    the tokenizer rebuilt from the metadata gives one of many texts other ids than the files do.
    """
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    with TemporaryDirectory() as folder:
        try:
            original = _written(Path(folder, "a"), files)
            data = files[original.model_path.name]
            readers = {"json": _json, "tiktoken": _tiktoken, "sentencepiece": _sentencepiece}
            found = readers[kind_of(data)](data)
            _fill(found, config, vocab_size)
            meta = _metadata(found, config, original)
            if template := _chat_template(files, config):
                meta["tokenizer.chat_template"] = template
            rebuilt = _written(Path(folder, "b"), tokenizer_files(meta, vocab_size))
            _check_same(original, rebuilt, found)
        except (ValueError, FileNotFoundError) as error:  # nobody knows the temporary folder
            raise ValueError(str(error).replace(f"{folder}/", "")) from error
    return meta


def _written(folder: Path, files: dict[str, bytes]) -> Tokenizer:
    """The tokenizer in these files, which it wants in a folder."""
    folder.mkdir()
    for name in set(FILES) & files.keys():
        (folder / name).write_bytes(files[name])
    return Tokenizer(folder)


def _sentencepiece(data: bytes) -> Vocabulary:
    """A SentencePiece model. GGUF has its scores, and its numbers for the types of a token."""
    fields = list(_fields(data))
    trainer, normalizer = (dict(_fields(dict(fields).get(i, b""))) for i in (2, 3))
    for part, accepted in ((trainer, TRAINER), (normalizer, NORMALIZER)):
        for i, (name, default, wanted) in accepted.items():
            check_values({name: part.get(i, default)}, {name: (wanted,)})
    pieces = [dict(_fields(value)) for number, value in fields if number == 1]
    texts = [piece[1].decode() for piece in pieces]
    types = [piece.get(3, NORMAL) for piece in pieces]
    if types.count(BYTE) != 256:
        raise ValueError(f"{types.count(BYTE)} of 256 byte tokens: byte_fallback is needed")
    # A token of the user's is looked for in the text itself.
    texts = [
        text.replace("▁", " ") if kind == USER_DEFINED else text for text, kind in zip(texts, types)
    ]
    scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
    words = {"model": "llama", "pre": "default", "add_space_prefix": bool(normalizer.get(3, 1))}
    unknown = texts[types.index(UNKNOWN)]
    return Vocabulary(dict(enumerate(zip(texts, types, scores))), words, unknown)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message (one that a library has read before)."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or number()
            yield key >> 3, message[at : at + size]
            at += size


def _tiktoken(data: bytes) -> Vocabulary:
    """Llama 3's file: byte-level tokens by rank; the special ones behind have no place in it."""
    ranks = tiktoken_ranks(data)
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = map(chr, itertools.count(256))
    letters = [chr(byte) if byte in printed else next(others) for byte in range(256)]  # GPT-2's

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokens = {rank: (shown(token), NORMAL, 0.0) for token, rank in ranks.items()}
    reserved = itertools.count()
    for i in range(256):
        name = LLAMA3_NAMES.get(i) or f"reserved_special_token_{next(reserved)}"
        tokens[len(ranks) + i] = (f"<|{name}|>", CONTROL, 0.0)
    merged = (_parts(token, ranks) for token in sorted(ranks, key=ranks.get))
    merges = [f"{shown(parts[0])} {shown(parts[1])}" for parts in merged if len(parts) == 2]
    return Vocabulary(tokens, {"model": "gpt2", "pre": "llama-bpe", "merges": merges})


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two parts that merging, the lowest rank first, makes a token of last (more: it cannot).

    Inside a longer word it is made of these two as well: until then no merge reaches out of it.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(found)), key=found.__getitem__)
        if found[i] == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _json(data: bytes) -> Vocabulary:
    """A tokenizer.json, byte-level or like SentencePiece."""
    content = json.loads(tokenizers.Tokenizer.from_buffer(data).to_str())  # in today's spelling
    model, merges = content["model"], content["model"]["merges"]
    empty = dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), (None, ""))
    check_values(model, {"dropout": (None, 0)} | empty)
    normal, pre = _steps(content["normalizer"]), _steps(content["pre_tokenizer"])
    known = {name: _steps(json.loads(x.__getstate__())) for name, x in PRE_TOKENIZERS.items()}
    name = next((name for name, steps in known.items() if steps == pre), None)
    scores, unknown, prefix = {}, None, False
    if not normal and name:
        words = {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}
    elif model["byte_fallback"]:
        check_values(model, {"ignore_merges": (None, False)})
        for rank, pair in enumerate(merges):
            scores.setdefault("".join(pair), -rank)
        prefix = _adds_prefix(normal, pre)
        words = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
        unknown = model["unk_token"]
        if unknown not in model["vocab"]:
            raise ValueError(f"unk_token is {unknown!r}, which is no token")
    else:
        wanted = " or ".join(PRE_TOKENIZERS)
        raise ValueError(f"normalizer {normal} and pre_tokenizer {pre} are no {wanted} of GGUF's")
    tokens = {}
    for token, i in model["vocab"].items():
        is_byte = unknown is not None and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i] = (token, BYTE if is_byte else NORMAL, scores.get(token, -len(merges)))
    for token in content["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]] = (token["content"], kind, 0.0)
    if unknown is not None:
        tokens[model["vocab"][unknown]] = (unknown, UNKNOWN, 0.0)
    return Vocabulary(tokens, words, unknown, prefix_before_spaces=not (prefix and pre))


def _steps(part: dict | None) -> list[dict]:
    """The steps of a normalizer or pre-tokenizer, without the option that changes no ids."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    if inner is not None:
        return [step for x in inner for step in _steps(x)]
    return [{key: value for key, value in part.items() if key != "trim_offsets"}]


def _adds_prefix(normal: list[dict], pre: list[dict]) -> bool:
    """Whether a tokenizer.json that is like SentencePiece puts a space in front of a text."""
    if not pre and normal in ([SPACES], [PREFIX, SPACES]):
        return PREFIX in normal
    if not normal and len(pre) == 1 and pre[0].items() >= METASPACE.items():
        return pre[0]["prepend_scheme"] != "never"
    raise ValueError(f"normalizer {normal} and pre_tokenizer {pre} are not SentencePiece's")


def _fill(found: Vocabulary, config: dict, vocab_size: int) -> None:
    """Give every id of the model a token: one that tokenizer_config.json adds, or else [PADn]."""
    if max(found.tokens) >= vocab_size:
        n = max(found.tokens) + 1
        raise ValueError(f"the tokenizer has {n} tokens, the model {vocab_size} (vocab_size)")
    added = config.get("added_tokens_decoder") or {}
    for i in sorted(set(range(vocab_size)) - found.tokens.keys()):
        token = added.get(str(i))
        kind = UNUSED if token is None else CONTROL if token.get("special") else USER_DEFINED
        found.tokens[i] = (token["content"] if token else f"[PAD{i}]", kind, 0.0)


def _metadata(found: Vocabulary, config: dict, original: Tokenizer) -> dict:
    """GGUF's entries, but for the chat template; of special tokens those that the files name."""
    texts, types, scores = zip(*(found.tokens[i] for i in range(len(found.tokens))))
    ids = {text: i for i, text in enumerate(texts)}
    ends = [ids[name] for name in TURN_ENDS if name in ids and types[ids[name]] == CONTROL]

    def named(key: str) -> int | None:
        token = config.get(key)
        return ids.get(token.get("content") if isinstance(token, dict) else token)

    bos, eos, pad = original.bos_id, original.eos_id, original.pad_id
    numbers = {
        "bos_token_id": named("bos_token") if bos is None else bos,  # the name alone
        "eos_token_id": eos,
        "eot_token_id": next((i for i in ends if i != eos), None),
        "unknown_token_id": ids.get(found.unknown, named("unk_token")),
        "padding_token_id": named("pad_token") if pad == eos else pad,
        "add_bos_token": bos is not None,
        "add_eos_token": False,
    }
    words = found.words | {"tokens": list(texts), "token_type": np.array(types, np.int32)}
    if words["model"] == "llama":
        words["scores"] = np.array(scores, np.float32)
    words |= {name: i for name, i in numbers.items() if i is not None}
    return {f"tokenizer.ggml.{name}": value for name, value in words.items()}


def _chat_template(files: dict[str, bytes], config: dict) -> str | None:
    """The chat template: a file of its own, or else an entry, of which there may be several."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    found = config.get("chat_template")
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _check_same(original: Tokenizer, rebuilt: Tokenizer, found: Vocabulary) -> None:
    """Raise ValueError unless both give the same ids: for PROBES, and for every token's text."""
    for name in ("bos_id", "eos_id"):
        there, here = getattr(original, name), getattr(rebuilt, name)
        if there != here:
            raise ValueError(f"GGUF cannot express this tokenizer: {name} {there} became {here}")
    added = [f"x {text}y {text} z" for text, kind, _ in found.tokens.values() if kind in ADDED]
    newline = original.encode("\n", bos=False)[-1]
    for start in range(0, original.n_words, TOKENS_A_PROBE):
        ids = range(start, min(start + TOKENS_A_PROBE, original.n_words))
        added.append(original.decode([x for i in ids for x in (i, newline)]))
    for text in (*PROBES, *added):
        if text[:1] in (" ", "▁") and not found.prefix_before_spaces:
            continue
        there, here = (tokenizer.encode(text, bos=False) for tokenizer in (original, rebuilt))
        if there != here:
            raise ValueError(
                f"GGUF cannot express this tokenizer: {reprlib.repr(text)} would become "
                f"{reprlib.repr(here)}, not {reprlib.repr(there)}"
            )
