"""One Tokenizer over the three kinds of tokenizer file that Llama models come with."""

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor

from llama.files import read_json

# Found in a folder in this order; the kind of a file is told by its content alone.
TOKENIZER_NAMES = ("tokenizer.model", "tokenizer.json")

# The largest known tokenizer file has about 35 MB. More is a checkpoint given by mistake.
MAX_FILE_BYTES = 256 << 20

# How Llama 3 cuts a text into words before byte-pair merging: a fact of the model, as published
# with it. (tiktoken files hold the vocabulary alone, without this expression.)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3 places 256 special tokens after the ranks; those without a name here are numbered
# reserved ones.
LLAMA3_SPECIALS = 256
LLAMA3_NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}

# tiktoken's regular expressions run out of stack on long texts and its merging takes quadratic
# time in a word's length, so texts are cut at the same places as by Meta's own tokenizer.
TIKTOKEN_MAX_CHARS = 400_000
TIKTOKEN_MAX_RUN = 25_000

# tokenizer.json: names that are tried as end of sequence where no file names one, and special
# tokens that end an answer whichever of them is called eos.
JSON_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")
JSON_STOP_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class _Model:
    """What differs between the kinds of file; encode and decode know nothing of special tokens."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    n_words: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]
    special_ids: frozenset[int]


class Tokenizer:
    """Text to token ids and back, over a SentencePiece, tiktoken or tokenizer.json file.

    n_words: vocabulary size with the special tokens (the largest id + 1).
    bos_id: None where the file says that the model takes no beginning-of-sequence token.
    stop_ids: every id that ends an answer, eos_id among them.
    pad_id: an id to fill with, eos_id where the file has none. Never recognise padding by it.
    """

    def __init__(self, model_path: str | Path):
        """Load a tokenizer file, or the one inside a folder (tokenizer.model, tokenizer.json).

        Raises FileNotFoundError if there is none, ValueError if the file is no tokenizer.
        """
        path = _find_file(Path(model_path))
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {path.stat().st_size:,} bytes is no tokenizer file")
        data = path.read_bytes()
        if re.match(rb"\s*\{", data):
            model = _load_json(path, data)
        elif re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", data):
            model = _load_tiktoken(path, data)
        else:
            model = _load_sentencepiece(path, data)
        self.model_path = path
        self.n_words = model.n_words
        self.bos_id = model.bos_id
        self.eos_id = model.eos_id
        self.pad_id = model.pad_id
        self.stop_ids = model.stop_ids
        self._model = model

    def encode(self, s: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of a text; the text of a special token inside s is plain text.

        bos puts bos_id in front (nothing where it is None), eos puts eos_id at the end.
        """
        # Half a surrogate pair (of a cut JSON escape, or a byte on the command line that is no
        # UTF-8) is no character: two of the three libraries would fail on it.
        s = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._model.encode(s)
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special ones left out; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary: then the model has another tokenizer.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_words:
                raise ValueError(
                    f"{self.model_path}: token id {i} is outside this vocabulary of "
                    f"{self.n_words}; give the tokenizer that belongs to the model"
                )
        return self._model.decode([i for i in ids if i not in self._model.special_ids])


def _find_file(path: Path) -> Path:
    """The tokenizer file that a path given by the user means."""
    if path.is_file():
        return path
    names = " or ".join(TOKENIZER_NAMES)
    if path.is_dir():
        for name in TOKENIZER_NAMES:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"{path}: no {names} in this folder; copy there the one that came with the weights"
        )
    raise FileNotFoundError(
        f"{path}: no such tokenizer file; give the {names} that came with the weights "
        "(--tokenizer_path)"
    )


def _load_sentencepiece(path: Path, data: bytes) -> _Model:
    """Llama 1 and 2: a SentencePiece model, which names bos, eos and pad itself (-1: none)."""
    sp = SentencePieceProcessor()
    try:
        loaded = bool(data) and sp.LoadFromSerializedProto(data)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise ValueError(
            f"{path}: not a tokenizer (neither SentencePiece nor tiktoken nor tokenizer.json); "
            "give the tokenizer.model that came with the weights"
        )
    if sp.eos_id() < 0:
        raise ValueError(f"{path}: this SentencePiece file names no end-of-sequence token")
    return _Model(
        encode=sp.encode,
        decode=sp.decode,
        n_words=sp.vocab_size(),
        bos_id=sp.bos_id() if sp.bos_id() >= 0 else None,
        eos_id=sp.eos_id(),
        pad_id=sp.pad_id() if sp.pad_id() >= 0 else sp.eos_id(),
        stop_ids=frozenset({sp.eos_id()}),
        special_ids=frozenset(i for i in range(sp.vocab_size()) if sp.is_control(i)),
    )


def _load_tiktoken(path: Path, data: bytes) -> _Model:
    """Llama 3: lines of a base64 token and its rank; special tokens follow from their number."""
    ranks = _tiktoken_ranks(path, data)
    specials = _llama3_specials(len(ranks))
    encoding = tiktoken.Encoding(
        name=path.name, pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens=specials
    )

    def encode(s: str) -> list[int]:
        return [i for part in _tiktoken_parts(s) for i in encoding.encode_ordinary(part)]

    return _Model(
        encode=encode,
        decode=encoding.decode,
        n_words=len(ranks) + LLAMA3_SPECIALS,
        bos_id=specials["<|begin_of_text|>"],
        eos_id=specials["<|end_of_text|>"],
        pad_id=specials["<|finetune_right_pad_id|>"],
        stop_ids=frozenset(specials[n] for n in ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")),
        special_ids=frozenset(specials.values()),
    )


def _tiktoken_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """The ranks of a tiktoken file: every byte has one, and they count from 0 without a gap."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as err:
            raise ValueError(f"{path}, line {number}: not a base64 token and its rank") from err
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks are not 0 to {len(ranks) - 1}: is the file cut short?")
    if not all(bytes([b]) in ranks for b in range(256)):
        raise ValueError(f"{path}: a tiktoken vocabulary holds each of the 256 single bytes")
    return ranks


def _llama3_specials(first_id: int) -> dict[str, int]:
    """Llama 3's special tokens with their ids, which start at first_id."""
    specials = {}
    reserved = 0
    for i in range(LLAMA3_SPECIALS):
        name = LLAMA3_NAMED.get(i)
        if name is None:
            name = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
        specials[name] = first_id + i
    return specials


def _tiktoken_parts(s: str) -> Iterator[str]:
    """Cut a text so that no part and no run of spaces or of non-spaces in it is too long."""
    for start in range(0, len(s), TIKTOKEN_MAX_CHARS):
        chunk = s[start : start + TIKTOKEN_MAX_CHARS]
        done = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for cut in range(run.start() + TIKTOKEN_MAX_RUN, run.end(), TIKTOKEN_MAX_RUN):
                yield chunk[done:cut]
                done = cut
        yield chunk[done:]


def _load_json(path: Path, data: bytes) -> _Model:
    """Hugging Face's tokenizer.json, with the tokenizer_config.json beside it if there is one."""
    try:
        rust = tokenizers.Tokenizer.from_buffer(data)
    except Exception as err:  # the library raises bare Exceptions
        raise ValueError(f"{path}: not a tokenizer.json file: {err}") from err
    # Files are often saved with the cutting and padding of somebody's training run.
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = True

    config_path = path.with_name("tokenizer_config.json")
    config = read_json(config_path) if config_path.is_file() else {}

    def named_id(key: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        found = rust.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise ValueError(f"{config_path}: {key} {token!r} is not in the vocabulary of {path}")
        return found

    eos_id = named_id("eos_token")
    if eos_id is None:
        known = [rust.token_to_id(name) for name in JSON_EOS_NAMES]
        eos_id = next((i for i in known if i is not None), None)
    if eos_id is None:
        raise ValueError(
            f"{path}: no end-of-sequence token; name one as eos_token in {config_path.name}"
        )
    pad_id = named_id("pad_token")
    bos_id = _json_bos(rust, named_id("bos_token"), config.get("add_bos_token"))
    special = {i for i, token in rust.get_added_tokens_decoder().items() if token.special}
    stop_ids = {rust.token_to_id(name) for name in JSON_STOP_NAMES} & special | {eos_id}

    return _Model(
        encode=lambda s: rust.encode(s, add_special_tokens=False).ids,
        decode=rust.decode,
        n_words=max(rust.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        stop_ids=frozenset(stop_ids),
        special_ids=frozenset(special | stop_ids | ({bos_id} - {None})),
    )


def _json_bos(rust: tokenizers.Tokenizer, named: int | None, add_bos: bool | None) -> int | None:
    """The id that belongs in front of a text, or None where the model takes none.

    add_bos_token decides. Where the configuration is silent the file's own post-processor does:
    a bos_token that it never adds (SmolLM2's <|im_start|>) is a name and no more.
    """
    if add_bos is False:
        return None
    plain = rust.encode("a", add_special_tokens=False).ids
    processed = rust.encode("a", add_special_tokens=True).ids
    added = processed[0] if processed[:1] != plain[:1] else None
    if add_bos and named is not None:
        return named
    return added
