"""Rebuild the tokenizer inside a GGUF file as the file that its model came with."""

import json
import struct
from collections.abc import Sequence

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, pre_tokenizers

from llama.tokenizer import LLAMA3_SPLIT

# GGUF's types of a token; SentencePiece gives the same numbers to the same types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# tokenizer.ggml.pre: how a text is cut into words before byte-pair merging. These are names that
# llama.cpp treats alike (its src/llama-vocab.cpp).
LLAMA3_PRE = ("llama-bpe", "llama3", "llama-v3")
GPT2_PRE = ("gpt-2", "gpt2", "default")
DIGITS_PRE = ("smollm",)

# Numbers of the fields in SentencePiece's sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, VOCAB_SIZE, BYTE_FALLBACK = 3, 4, 35
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 40, 41, 42, 43
UNK_PIECE, BOS_PIECE, EOS_PIECE, PAD_PIECE = 45, 46, 47, 48
NORMALIZER_NAME, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES = 1, 3, 4
BPE = 2
NO_TOKEN = "<no such token>"


def tokenizer_files(meta: dict, vocab_size: int) -> dict[str, bytes]:
    """The tokenizer files, by name, that GGUF metadata describes; none if it has no tokenizer.

    'llama' vocabularies become a SentencePiece tokenizer.model, 'gpt2' ones a tokenizer.json with
    a tokenizer_config.json. Raises ValueError for other kinds and for damaged vocabularies.
    """
    kind = meta.get("tokenizer.ggml.model", "no_vocab")
    if kind == "no_vocab":
        return {}
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; only llama and gpt2 can be converted")
    tokens = meta.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= vocab_size:
        raise ValueError(f"tokenizer.ggml.tokens: expected a list of up to {vocab_size} tokens")
    types = _numbers(meta, "tokenizer.ggml.token_type", len(tokens), NORMAL)
    if kind == "llama":
        return {"tokenizer.model": _sentencepiece_model(meta, tokens, types)}
    return _json_files(meta, tokens, types)


def _sentencepiece_model(meta: dict, tokens: list[str], types: list[int]) -> bytes:
    """A SentencePiece BPE model (serialised ModelProto) of the vocabulary."""
    scores = _numbers(meta, "tokenizer.ggml.scores", len(tokens), 0.0)
    # llama.cpp's ids where the file names none.
    bos_id = _token_id(meta, "bos", tokens, 1)
    eos_id = _token_id(meta, "eos", tokens, 2)
    pad_id = _token_id(meta, "padding", tokens, None)
    unk_id = types.index(UNKNOWN) if UNKNOWN in types else None
    if not _flag(meta, "add_bos_token", True):
        bos_id = None
    if unk_id is None or eos_id is None:
        raise ValueError("the tokenizer has no unknown or no end-of-sequence token")

    trainer = [
        _field(MODEL_TYPE, BPE),
        _field(VOCAB_SIZE, len(tokens)),
        _field(BYTE_FALLBACK, BYTE in types),
    ]
    types = list(types)
    for id_field, piece_field, token_id in (
        (UNK_ID, UNK_PIECE, unk_id),
        (BOS_ID, BOS_PIECE, bos_id),
        (EOS_ID, EOS_PIECE, eos_id),
        (PAD_ID, PAD_PIECE, pad_id),
    ):
        # SentencePiece finds these tokens by their text, and takes an empty one for its default.
        text = NO_TOKEN if token_id is None else tokens[token_id]
        trainer.append(_field(id_field, -1 if token_id is None else token_id))
        trainer.append(_field(piece_field, text.encode()))
        # It takes control tokens alone, which a text can never hold.
        if token_id not in (None, unk_id):
            types[token_id] = CONTROL
    normalizer = (
        _field(NORMALIZER_NAME, b"identity")
        + _field(ADD_DUMMY_PREFIX, _flag(meta, "add_space_prefix", True))
        + _field(REMOVE_EXTRA_WHITESPACES, False)
    )
    pieces = [
        _field(PIECES, _field(1, token.encode()) + _field(2, score) + _field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    ]
    model = b"".join([*pieces, _field(TRAINER, b"".join(trainer)), _field(NORMALIZER, normalizer)])
    try:
        SentencePieceProcessor().LoadFromSerializedProto(model)
    except RuntimeError as err:
        raise ValueError(f"the tokenizer's vocabulary is unusable: {err}") from err
    return model


def _field(number: int, value: bool | int | float | bytes) -> bytes:
    """A field in protobuf's encoding: varint, 32-bit float, or bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    return _varint(number << 3) + _varint(int(value))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as their 64-bit complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _json_files(meta: dict, tokens: list[str], types: list[int]) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json of a byte-level BPE vocabulary."""
    pre = meta.get("tokenizer.ggml.pre")
    bos_id = _token_id(meta, "bos", tokens, None)
    eos_id = _token_id(meta, "eos", tokens, None)
    pad_id = _token_id(meta, "padding", tokens, None)
    add_bos = _flag(meta, "add_bos_token", pre in LLAMA3_PRE)
    if add_bos and bos_id is None:
        raise ValueError("tokenizer.ggml.add_bos_token is set, but there is no bos_token_id")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("tokenizer.ggml.tokens: a token is there twice")
    merges = meta.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(merge.count(" ") == 1 for merge in merges):
        raise ValueError("tokenizer.ggml.merges: expected a list of pairs of tokens")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    # An id that is meant for the model alone must not arise from a text, whatever type it has.
    special_ids = {i for i, kind in enumerate(types) if kind == CONTROL}
    special_ids |= {bos_id, eos_id, pad_id} - {None}
    added = [
        tokenizers.AddedToken(token, special=i in special_ids, normalized=False)
        for i, token in enumerate(tokens)
        if i in special_ids or types[i] == USER_DEFINED
    ]
    try:
        model = tokenizers.models.BPE(vocab=vocab, merges=pairs, ignore_merges=pre in LLAMA3_PRE)
        rust = tokenizers.Tokenizer(model)
        rust.pre_tokenizer = _pre_tokenizer(pre)
        rust.decoder = tokenizers.decoders.ByteLevel()
        rust.add_tokens(added)
        if add_bos:
            bos = tokens[bos_id]
            rust.post_processor = tokenizers.processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, bos_id)]
            )
    except ValueError:
        raise
    except Exception as err:  # the library raises bare Exceptions
        raise ValueError(f"the tokenizer's vocabulary is unusable: {err}") from err

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "bos_token": None if bos_id is None else tokens[bos_id],
        "eos_token": None if eos_id is None else tokens[eos_id],
        "pad_token": None if pad_id is None else tokens[pad_id],
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(meta.get("tokenizer.chat_template"), str):
        config["chat_template"] = meta["tokenizer.chat_template"]
    return {
        "tokenizer.json": rust.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }


def _pre_tokenizer(pre: str | None) -> pre_tokenizers.PreTokenizer:
    """The cutting into words that tokenizer.ggml.pre names, in the words of tokenizers."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in GPT2_PRE:
        return gpt2
    if pre in DIGITS_PRE:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if pre in LLAMA3_PRE:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    known = ", ".join(LLAMA3_PRE + GPT2_PRE + DIGITS_PRE)
    raise ValueError(
        f"tokenizer.ggml.pre is {pre!r}; only {known} can be converted. "
        "(Files from before May 2024 have none: take a newer one)"
    )


def _numbers(meta: dict, key: str, n: int, default: float) -> Sequence:
    """One number for each of n tokens, as Python's, whole ones if the default is one."""
    values = meta.get(key)
    if values is None:
        return [default] * n
    wanted = np.floating if isinstance(default, float) else np.integer
    if not isinstance(values, np.ndarray) or len(values) != n:
        raise ValueError(f"{key}: expected an array of {n} numbers, one for each token")
    if not np.issubdtype(values.dtype, wanted) or not np.isfinite(values).all():
        raise ValueError(f"{key}: expected finite numbers of type {wanted.__name__}")
    return values.tolist()


def _token_id(meta: dict, name: str, tokens: list[str], default: int | None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = meta.get(key, default)
    if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
        raise ValueError(f"{key} is {value!r}; expected the id of one of {len(tokens)} tokens")
    return value


def _flag(meta: dict, name: str, default: bool) -> bool:
    value = meta.get(f"tokenizer.ggml.{name}", default)
    if type(value) is not bool:
        raise ValueError(f"tokenizer.ggml.{name} is {value!r}; expected true or false")
    return value
