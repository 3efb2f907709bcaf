"""Rebuild the tokenizer inside a GGUF file as a tokenizer.json."""

import json
import reprlib

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from llama.tokenizer import LLAMA3_SPLIT

# GGUF's types of a token.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

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
    **dict.fromkeys(("gpt-2", "gpt2", "default"), GPT2),
    "smollm": DIGITS,
}

# Finding a token's merges takes its length squared. Llama 2's longest has 16 characters.
LONGEST_MERGED = 256


def tokenizer_files(meta: dict, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer in GGUF metadata as tokenizer.json and tokenizer_config.json; {} without one.

    Raises ValueError for kinds other than 'llama' and 'gpt2' and for damaged vocabularies.
    """
    kind = _get(meta, "model", str, "no_vocab")
    if kind == "no_vocab":
        return {}
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; only llama and gpt2 can be converted")
    tokens = _get(meta, "tokens", list, [])
    vocab = {token: i for i, token in enumerate(tokens)}
    if not 0 < len(tokens) <= vocab_size or len(vocab) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens: expected up to {vocab_size} different tokens")
    types = _numbers(meta, "token_type", len(tokens), NORMAL)
    is_llama = kind == "llama"
    ids = {  # where the file names none, those that llama.cpp takes
        "bos_token": _token_id(meta, "bos", len(tokens), 1 if is_llama else None),
        "eos_token": _token_id(meta, "eos", len(tokens), 2 if is_llama else None),
        "pad_token": _token_id(meta, "padding", len(tokens), None),
    }
    # An id that is meant for the model alone must not arise from a text, whatever its type.
    for i in ids.values():
        if i is not None and types[i] != UNKNOWN:
            types[i] = CONTROL
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: None if i is None else tokens[i] for name, i in ids.items()},
    }
    if isinstance(meta.get("tokenizer.chat_template"), str):
        config["chat_template"] = meta["tokenizer.chat_template"]
    try:
        rust = _like_llama2(meta, vocab, types) if is_llama else _byte_level(meta, vocab)
        rust.add_tokens(_added_tokens(tokens, types))
        adds_bos = is_llama or meta["tokenizer.ggml.pre"] in LLAMA3_PRE
        config["add_bos_token"] = _get(meta, "add_bos_token", bool, adds_bos)
        if config["add_bos_token"]:
            rust.post_processor = _bos_in_front(config["bos_token"], ids["bos_token"])
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"the tokenizer is unusable: {error}") from error
    return {
        "tokenizer.json": rust.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }


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
    pre, merges = meta.get("tokenizer.ggml.pre"), meta.get("tokenizer.ggml.merges")
    if str(pre) not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {pre!r}; only {', '.join(PRE_TOKENIZERS)} can be converted. "
            "(Files from before May 2024 have none: take a newer one)"
        )
    if not isinstance(merges, list) or not all(merge.count(" ") == 1 for merge in merges):
        raise ValueError("tokenizer.ggml.merges: expected a list of pairs of tokens")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    rust = Tokenizer(BPE(vocab=vocab, merges=pairs, ignore_merges=pre in LLAMA3_PRE))
    rust.pre_tokenizer = PRE_TOKENIZERS[pre]
    rust.decoder = decoders.ByteLevel()
    return rust


def _added_tokens(tokens: list[str], types: list[int]) -> list[AddedToken]:
    """The tokens that byte-pair merging does not make."""
    return [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]


def _bos_in_front(bos: str | None, bos_id: int | None) -> TemplateProcessing:
    if bos is None:
        raise ValueError("add_bos_token is set, but there is no bos_token_id")
    return TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
    )


def _get(meta: dict, name: str, kind: type, default: object) -> object:
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


def _token_id(meta: dict, name: str, n_tokens: int, default: int | None) -> int | None:
    i = _get(meta, f"{name}_token_id", int, default)
    if i is not None and not 0 <= i < n_tokens:
        raise ValueError(f"tokenizer.ggml.{name}_token_id is {i}, but the ids end at {n_tokens}")
    return i
