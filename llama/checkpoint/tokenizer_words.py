"""Read the vocabulary in a tokenizer file: tokens, types, scores or merges, in GGUF's words."""

import itertools
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tokenizers

from llama.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    LONGEST_MERGED,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    USER_DEFINED,
)
from llama.checkpoint.params import check_values
from llama.tokenizer import kind_of, llama3_special_tokens, tiktoken_ranks

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


@dataclass
class Vocabulary:
    """What a tokenizer file holds; words: further metadata, named without tokenizer.ggml."""

    tokens: dict[int, tuple[str, int, float]]  # by id: text, type, score
    words: dict[str, object]
    unknown: str | None = None
    # False: a Metaspace, which puts no space before a text that begins with one. llama.cpp does,
    # as SentencePiece did, and GGUF has no word to say otherwise.
    prefix_before_spaces: bool = True


def read_vocabulary(data: bytes) -> Vocabulary:
    """What a tokenizer file of any kind holds; ValueError for what GGUF has no words for."""
    readers = {"json": _json, "tiktoken": _tiktoken, "sentencepiece": _sentencepiece}
    return readers[kind_of(data)](data)


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
    words: dict[str, object] = {"model": "llama", "pre": "default"}
    words["add_space_prefix"] = bool(normalizer.get(3, 1))
    unknown = texts[types.index(UNKNOWN)]
    return Vocabulary(dict(enumerate(zip(texts, types, scores))), words, unknown)


def _tiktoken(data: bytes) -> Vocabulary:
    """Llama 3's file: byte-level tokens by rank; the special ones behind have no place in it."""
    ranks = tiktoken_ranks(data)
    if (longest := max(map(len, ranks))) > LONGEST_MERGED:
        raise ValueError(f"a token has {longest:,} bytes")
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = map(chr, itertools.count(256))
    letters = [chr(byte) if byte in printed else next(others) for byte in range(256)]  # GPT-2's

    def shown(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    tokens = {rank: (shown(token), NORMAL, 0.0) for token, rank in ranks.items()}
    for i, name in enumerate(llama3_special_tokens(), len(ranks)):
        tokens[i] = (name, CONTROL, 0.0)
    merged = (_parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__))
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
    scores: dict[str, int] = {}
    unknown, prefix = None, False
    words: dict[str, object]
    if not normal and name:
        words = {"model": "gpt2", "pre": name, "merges": [" ".join(pair) for pair in merges]}
    elif model["byte_fallback"]:
        check_values(model, {"ignore_merges": (None, False)})
        scores = _scores(merges)
        prefix = _adds_prefix(normal, pre)
        words = {"model": "llama", "pre": "default", "add_space_prefix": prefix}
        unknown = model["unk_token"]
        if unknown not in model["vocab"]:
            raise ValueError(f"unk_token is {unknown!r}, which is no token")
    else:
        wanted = " or ".join(PRE_TOKENIZERS)
        raise ValueError(f"normalizer {normal} and pre_tokenizer {pre} are no {wanted} of GGUF's")
    tokens: dict[int, tuple[str, int, float]] = {}
    for token, i in model["vocab"].items():
        is_byte = unknown is not None and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i] = (token, BYTE if is_byte else NORMAL, scores.get(token, -len(merges)))
    for token in content["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]] = (token["content"], kind, 0.0)
    if unknown is not None:
        tokens[model["vocab"][unknown]] = (unknown, UNKNOWN, 0.0)
    return Vocabulary(tokens, words, unknown, prefix_before_spaces=not (prefix and pre))


def _scores(merges: list[list[str]]) -> dict[str, int]:
    """Scores that bring merges into this order; the same for tokens whose merges are mixed."""
    last = {"".join(pair): rank for rank, pair in enumerate(merges)}
    scores: dict[str, int] = {}
    first, end = 0, -1
    for rank, token in enumerate(map("".join, merges)):
        if rank > end:  # no token so far has merges from here on
            first = rank
        end = max(end, last[token])
        scores.setdefault(token, -first)
    return scores


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


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
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
