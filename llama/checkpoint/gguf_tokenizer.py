"""Rebuild the tokenizer inside a GGUF file as a tokenizer.json."""

import json
import reprlib
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from llama.checkpoint.params import check_values
from llama.tokenizer import LLAMA3_SPLIT

# GGUF's types of a token.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
ADDED = (UNKNOWN, CONTROL, USER_DEFINED)  # those that byte-pair merging does not make
# Where GGUF has the ids of the tokens that tokenizer_config.json names.
ID_FIELDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "pad_token": "padding_token_id",
}

# What is said of a tuned prompt among the tokens: the text to put in front, and how many they are.
SOFT_PROMPT = ("llama.soft_prompt.prefix", "llama.soft_prompt.length")

# How a text is cut into words before byte-pair merging, by tokenizer.ggml.pre. llama.cpp treats
# the names of one line alike (its src/llama-vocab.cpp).
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
LLAMA3 = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
PRE_TOKENIZERS = {
    **dict.fromkeys(LLAMA3_PRE, LLAMA3),
    "gpt-2": GPT2,
    "smollm": DIGITS,
}

# Finding a token's merges takes its length squared. Llama 2's longest has 16 characters.
LONGEST_MERGED = 256


def tokenizer_files(meta: dict, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer in GGUF metadata as tokenizer.json and tokenizer_config.json; {} without one.

    Raises ValueError for kinds other than 'llama' and 'gpt2' and for damaged vocabularies.
    """
    check_values(meta, {"tokenizer.ggml.model": (None, "no_vocab", "llama", "gpt2")})
    kind = meta.get("tokenizer.ggml.model", "no_vocab")
    if kind == "no_vocab":
        return {}
    tokens = _get(meta, "tokens", list, [])
    vocab = {token: i for i, token in enumerate(tokens)}
    if not 0 < len(tokens) <= vocab_size or len(vocab) < len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens: expected up to {vocab_size} different tokens")
    types = _numbers(meta, "token_type", len(tokens), NORMAL)
    ids = _special_ids(meta, kind, len(tokens))
    # An id that is meant for the model alone must not arise from a text, whatever its type.
    for i in ids.values():
        if types[i] != UNKNOWN:
            types[i] = CONTROL
    try:
        rust = _like_llama2(meta, vocab, types) if kind == "llama" else _byte_level(meta, vocab)
        added = {token: types[i] for token, i in vocab.items() if types[i] in ADDED}
        rust.add_tokens(
            [AddedToken(x, special=added[x] != USER_DEFINED, normalized=False) for x in added]
        )
        adds_bos = kind == "llama" or meta["tokenizer.ggml.pre"] in LLAMA3_PRE
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # transformers 4 would give its models a third, which they do not take
            "model_input_names": ["input_ids", "attention_mask"],
            "chat_template": meta.get("tokenizer.chat_template"),
            "add_bos_token": _get(meta, "add_bos_token", bool, adds_bos),
        }
        config |= {name: tokens[i] for name, i in ids.items()}
        config |= {name: meta[name] for name in SOFT_PROMPT if name in meta}
        if config["add_bos_token"]:
            if "bos_token" not in ids:
                raise ValueError("add_bos_token is set, but there is no bos_token_id")
            bos = config["bos_token"]
            rust.post_processor = TemplateProcessing(
                single=[bos, "$A"], special_tokens=[(bos, ids["bos_token"])]
            )
        files = {
            "tokenizer.json": rust.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        return {name: content.encode() for name, content in files.items()}
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the tokenizer is unusable: {error}") from error


def _like_llama2(meta: dict, vocab: dict[str, int], types: list[int]) -> Tokenizer:
    """SentencePiece's byte-pair merging, laid out as in Llama 2's own tokenizer.json."""
    scores = _numbers(meta, "scores", len(vocab), 0.0)
    if UNKNOWN not in types:
        raise ValueError("there is no unknown token")
    model = BPE(
        vocab=vocab,
        # Normal tokens only: a text never becomes <s> or <0x0A> because these are written in it.
        merges=_merges({token: scores[i] for token, i in vocab.items() if types[i] == NORMAL}),
        unk_token=list(vocab)[types.index(UNKNOWN)],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    rust = Tokenizer(model)
    rust.normalizer = normalizers.Replace(" ", "▁")
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if _get(meta, "add_space_prefix", bool, True):
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), rust.normalizer])
        to_text.append(decoders.Strip(" ", left=1, right=0))
    rust.decoder = decoders.Sequence(to_text)
    return rust


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every two tokens that together are a third, that with the highest score first."""
    longest = max(map(len, scores), default=0)
    if longest > LONGEST_MERGED:
        raise ValueError(f"a token has {longest:,} characters")
    merges = [
        (token[:i], token[i:])
        for token in scores
        for i in range(1, len(token))
        if token[:i] in scores and token[i:] in scores
    ]
    # Among equals, the pair with the longer parts first.
    return sorted(merges, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))


def _byte_level(meta: dict, vocab: dict[str, int]) -> Tokenizer:
    """GPT-2's byte-pair merging within words, as Llama 3 and SmolLM2 have it."""
    check_values(meta, {"tokenizer.ggml.pre": tuple(PRE_TOKENIZERS)})
    pre = meta["tokenizer.ggml.pre"]
    merges = [tuple(merge.split(" ")) for merge in _get(meta, "merges", list, [])]
    if not merges or any(len(pair) != 2 for pair in merges):
        raise ValueError("tokenizer.ggml.merges: expected a list of pairs of tokens")
    rust = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3_PRE))
    rust.pre_tokenizer = PRE_TOKENIZERS[pre]
    rust.decoder = decoders.ByteLevel()
    return rust


def _special_ids(meta: dict, kind: str, n_tokens: int) -> dict[str, int]:
    """The ids that a text cannot give; where the file names none, those that llama.cpp takes."""
    defaults = {"bos_token": 1, "eos_token": 2} if kind == "llama" else {}
    ids = {name: _get(meta, field, int, defaults.get(name)) for name, field in ID_FIELDS.items()}
    ids = {name: i for name, i in ids.items() if i is not None}
    for name, i in ids.items():
        if not 0 <= i < n_tokens:
            raise ValueError(f"tokenizer.ggml.{ID_FIELDS[name]} is {i}; the ids end at {n_tokens}")
    return ids


def _get(meta: dict, name: str, kind: type, default: object) -> Any:
    """A field of the tokenizer; ValueError if it is there and of another type."""
    value = meta.get(f"tokenizer.ggml.{name}", default)
    if value is not default and type(value) is not kind:
        shown = reprlib.repr(value)
        raise ValueError(f"tokenizer.ggml.{name} is {shown}; expected {kind.__name__}")
    return value


def _numbers(meta: dict, name: str, n: int, default: float) -> list:
    """One finite number for each of n tokens."""
    values = _get(meta, name, np.ndarray, np.full(n, default))
    if len(values) != n or not np.isfinite(values).all():
        raise ValueError(f"tokenizer.ggml.{name}: expected {n} finite numbers")
    return values.tolist()
