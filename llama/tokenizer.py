"""One Tokenizer over the three kinds of tokenizer file that Llama models come with."""

import base64
import contextlib
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path

import tiktoken
import tokenizers
from sentencepiece import SentencePieceProcessor

from llama.cli import mended, shown, time_limit
from llama.files import content_of, read_json

# Rust's backtraces tell a user nothing, and one thread is what one text takes.
os.environ["RUST_BACKTRACE"] = "0"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How Llama 3 cuts a text into words before byte-pair merging: a fact of the model, as published
# with it. (tiktoken files hold the vocabulary alone, without this expression.)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3's special tokens, by their place behind the ranks; all others are reserved.
LLAMA3_NAMES = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"}
LLAMA3_NAMES |= {6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id"}
LLAMA3_NAMES |= {10: "python_tag"}

# tiktoken's regular expressions run out of stack on long texts and its merging takes quadratic
# time in a word's length, so texts are cut at the same places as by Meta's own tokenizer.
TIKTOKEN_MAX_CHARS = 400_000
TIKTOKEN_MAX_RUN = 25_000

# What a stranger's file may take: seconds for one text, and how much longer it may make that.
TIME_LIMIT = 30
MAX_GROWTH = 256
LONGEST_TEMPLATE = 1 << 20  # bytes

# Where a folder has its tokenizer: the first that is there. Tuned models add their tokens to the
# first alone.
NAMES = ("tokenizer.json", "tokenizer.model")
# Beside the file, for any of the three kinds: Hugging Face's configuration, and a chat template.
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"

# tokenizer.json: what a text goes through.
JSON_STEPS = ("normalizer", "pre_tokenizer", "decoder")

# tokenizer.json: names that are tried as end of sequence where no file names one, and special
# tokens that end an answer whichever of them is called eos.
JSON_EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>")
JSON_STOP_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")


class Tokenizer:
    """Text to token ids and back, over a SentencePiece, tiktoken or tokenizer.json file.

    n_words: vocabulary size with the special tokens (the largest id + 1).
    bos_id: None where the file says that the model takes no beginning-of-sequence token.
    stop_ids: every id that ends an answer, eos_id among them.
    special_tokens: the ids of tokens that no text becomes, by their names.
    pad_id: an id to fill with, eos_id where the file has none. Never recognise padding by it.
    chat_template: how the model wants conversations written, in jinja2's language, or None.
    words: names of special tokens as chat templates know them: bos_token, eos_token, …
    n_rows: how many ids its model has; those from n_words on have no token, and become no text.
    """

    n_words: int
    n_rows: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    stop_ids: frozenset[int]
    special_tokens: dict[str, int]
    chat_template: str | None
    words: dict[str, str]
    _encode: Callable[[str], list[int]]  # this and _decode know nothing of special tokens
    _encode_special: Callable[[str], list[int]] | None = None  # where a library can do it
    _decode: Callable[[list[int]], str]
    _special_ids: Container[int | None]  # those left out of a decoded text

    def __init__(self, model_path: str | Path, files: Mapping[str, bytes | Path] | None = None):
        """Load a tokenizer file, or the one inside a folder (tokenizer.model, tokenizer.json).

        files: what such a folder holds, by name, each as a path or as its content; model_path is
        then only what messages name. A file's kind is told by its content alone. Raises
        FileNotFoundError if there is none, ValueError if the file is no tokenizer.
        """
        self.files = _files_at(Path(model_path)) if files is None else files
        names = [*NAMES, Path(model_path).name]
        file = next((self.files[name] for name in names if name in self.files), None)
        if file is None:
            raise FileNotFoundError(
                f"{model_path}: no tokenizer here; give the {' or '.join(NAMES)} that came with "
                "the weights (--tokenizer_path)"
            )
        self.model_path = file if isinstance(file, Path) else Path(model_path)
        # the largest known one has 35 MB
        if isinstance(file, Path) and file.stat().st_size > 256 << 20:
            raise ValueError(f"{file}: is no tokenizer file: it is too long for one")
        data = content_of(file)
        with self._guarded():
            load = {"json": self._load_json, "tiktoken": self._load_tiktoken}
            load.get(kind_of(data), self._load_sentencepiece)(data)
            self._load_words()
        self.n_rows = self.n_words

    def encode(
        self,
        s: str,
        *,
        bos: bool = True,
        eos: bool = False,
        special_tokens: bool = False,
        mark: str = "",
    ) -> list[int]:
        """Token ids of a text; the name of a special token inside s is plain text.

        bos puts bos_id in front (nothing where it is None), eos puts eos_id at the end. With
        special_tokens, names in .special_tokens become their ids, but for those with mark in them:
        a string that is then taken out of the text.
        """
        s = mended(s)  # two of the three libraries would fail
        with self._guarded():
            if not special_tokens:
                ids = self._encode(s)
            elif self._encode_special and not (mark and mark in s):
                ids = self._encode_special(s)
            else:
                ids = self._encode_parts(s, mark)
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos:
            ids.append(self.eos_id)
        return ids

    def _encode_parts(self, s: str, mark: str) -> list[int]:
        """Ids of the special tokens named in a text, and of what is between, by itself."""
        ids = []
        for part in filter(None, any_of(tuple(self.special_tokens)).split(s)):
            special = self.special_tokens.get(part)
            plain = part.replace(mark, "") if mark else part
            ids += self._encode(plain) if special is None else [special]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special ones left out; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary: then the model has another tokenizer.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.n_rows:
                raise ValueError(
                    f"{self.model_path}: token id {i} is outside this vocabulary of "
                    f"{self.n_words}; give the tokenizer that belongs to the model"
                )
        with self._guarded():
            return self._decode([i for i in ids if i < self.n_words and i not in self._special_ids])

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Make a ValueError of what the libraries raise; end the program if they hang."""
        slow = f"{self.model_path}: after {TIME_LIMIT} s its tokenizer is still at one text"
        try:
            with time_limit(TIME_LIMIT, slow):
                yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of theirs is no Exception
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = kind + shown(str(error), 500)
            raise ValueError(f"{self.model_path}: not a tokenizer that works: {reason}") from None

    def _load_sentencepiece(self, data: bytes) -> None:
        """Llama 1 and 2: a SentencePiece model, which names bos, eos and pad itself (-1: none)."""
        sp = SentencePieceProcessor()
        try:
            loaded = bool(data) and sp.LoadFromSerializedProto(data)
        except RuntimeError:
            loaded = False
        if not loaded or sp.eos_id() < 0:
            raise ValueError(
                "neither a SentencePiece file with an end-of-sequence token, nor tiktoken's, nor a "
                "tokenizer.json; give the one that came with the weights"
            )
        self._encode, self._decode, self.n_words = sp.encode, sp.decode, sp.vocab_size()
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else None
        self.eos_id = sp.eos_id()
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else sp.eos_id()
        self.stop_ids = frozenset({sp.eos_id()})
        special = {i for i in range(sp.vocab_size()) if sp.is_control(i)}
        self._special_ids, self.special_tokens = special, {sp.id_to_piece(i): i for i in special}

    def _load_tiktoken(self, data: bytes) -> None:
        """Llama 3: lines of a base64 token and its rank; 256 special tokens follow the ranks."""
        ranks = tiktoken_ranks(data)
        # The special tokens stay outside the library, which would look for them in texts.
        encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={}
        )

        def encode(s: str) -> list[int]:
            return [i for part in _tiktoken_parts(s) for i in encoding.encode_ordinary(part)]

        self._encode, self._decode = encode, encoding.decode
        first = len(ranks)
        self.n_words = first + 256
        self.bos_id = first  # <|begin_of_text|>
        self.eos_id = first + 1  # <|end_of_text|>
        self.pad_id = first + 4  # <|finetune_right_pad_id|>
        self.stop_ids = frozenset({self.eos_id, first + 8, first + 9})  # <|eom_id|>, <|eot_id|>
        self._special_ids = range(first, first + 256)
        self.special_tokens = dict(zip(llama3_special_tokens(), self._special_ids))

    def _load_json(self, data: bytes) -> None:
        """Hugging Face's tokenizer.json, with the tokenizer_config.json beside it if any."""
        _check_json(json.loads(data))
        rust = tokenizers.Tokenizer.from_buffer(data)
        # Files are often saved with the cutting and padding of somebody's training run.
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = True
        config = self._config()

        def named_id(key: str) -> int | None:
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            found = None if token is None else rust.token_to_id(str(token))
            if token is not None and found is None:
                raise ValueError(f"{CONFIG} has a {key} that is not in it: {token!r}")
            return found

        usual = [rust.token_to_id(name) for name in JSON_EOS_NAMES]
        ends = [i for i in (named_id("eos_token"), *usual) if i is not None]
        if not ends:
            raise ValueError(f"no end-of-sequence token; name one as eos_token in {CONFIG}")
        added = rust.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        special = set(self.special_tokens.values())
        pad_id = named_id("pad_token")
        # The call for many texts is the one that lets other threads run; without the places of
        # tokens in the text, it takes two thirds of the time.
        self._encode = lambda s: rust.encode_batch_fast([s], add_special_tokens=False)[0].ids

        def encode_special(s: str) -> list[int]:
            rust.encode_special_tokens = False
            try:
                return self._encode(s)
            finally:
                rust.encode_special_tokens = True

        self._encode_special = encode_special
        self._decode = rust.decode
        self.n_words = max(rust.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = _json_bos(rust, named_id("bos_token"), config.get("add_bos_token"))
        self.eos_id = ends[0]
        self.pad_id = self.eos_id if pad_id is None else pad_id
        stop_ids = special & {rust.token_to_id(name) for name in JSON_STOP_NAMES}
        self.stop_ids = frozenset(stop_ids | {self.eos_id})
        self._special_ids = special | {self.bos_id, self.eos_id}

    def _config(self) -> dict:
        """The tokenizer_config.json beside the file, {} if there is none."""
        file = self.files.get(CONFIG, b"{}")
        return read_json(file) if isinstance(file, Path) else json.loads(file)

    def _load_words(self) -> None:
        """What chat templates need: the template itself, and the names of special tokens."""
        config, template = self._config(), self.files.get(TEMPLATE)
        found = config.get("chat_template")
        if isinstance(found, list):  # several by name
            found = next((x.get("template") for x in found if x.get("name") == "default"), None)
        if template is not None:
            found = read_template(template) if isinstance(template, Path) else template.decode()
        self.chat_template = found if isinstance(found, str) else None
        names: dict[int | None, str] = {i: name for name, i in self.special_tokens.items()}
        self.words = {
            "bos_token": names.get(self.bos_id, ""),
            "eos_token": names.get(self.eos_id, ""),
        }
        for key, token in config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(token, str):
                self.words[key] = token


@functools.lru_cache(maxsize=8)  # it takes longer than most texts
def any_of(names: tuple[str, ...]) -> re.Pattern:
    """The expression that finds names in a text, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def read_template(path: Path) -> str:
    """The chat template in a file. Raises ValueError for one that cannot be any."""
    if path.stat().st_size > LONGEST_TEMPLATE:
        raise ValueError(f"{path}: too long for a chat template")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is no chat template, but not text at all") from None


def kind_of(data: bytes) -> str:
    """What a tokenizer file is by its content: "json", "tiktoken", or else "sentencepiece"."""
    if re.match(rb"\s*\{", data):
        return "json"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", data):
        return "tiktoken"
    return "sentencepiece"


def llama3_special_tokens() -> list[str]:
    """The names of the special tokens behind Llama 3's ranks, as its model card has them."""
    reserved = itertools.count()
    names = (LLAMA3_NAMES.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(256))
    return [f"<|{name}|>" for name in names]


def tiktoken_ranks(data: bytes) -> dict[bytes, int]:
    """The tokens of a tiktoken file with their ranks, 0 and up; ValueError if any is missing."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {number}: not a base64 token and its rank") from None
    single_bytes = {bytes([b]) for b in range(256)}
    if single_bytes - ranks.keys() or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("tokens or ranks are missing: is it cut short?")
    return ranks


def _check_json(content: dict) -> None:
    """Raise ValueError for a tokenizer.json that no Llama has, as it makes texts too long.

    On its way a text may become MAX_GROWTH times as long, and no more.
    """
    if content["model"].get("type", "BPE") != "BPE":
        raise ValueError("its model is no byte-pair encoding, which all Llama models have")
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if len(content["model"].get(key) or "") > MAX_GROWTH:
            raise ValueError(f"its model's {key} is too long")
    growth, parts = 1, [content.get(name) for name in JSON_STEPS]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts += part.values()
            kind = part.get("type")
            growth *= 2 if kind in ("ByteLevel", "Metaspace") else 1
            if kind == "Precompiled":
                raise ValueError("it has a Precompiled normalizer, which no Llama model has")
            if kind in ("Prepend", "Replace"):
                growth *= 1 + len(part.get("content") or part.get("prepend") or "")
        elif isinstance(part, list):
            parts += part
        if growth > MAX_GROWTH:
            raise ValueError("its normalizers make texts too long")


def _files_at(path: Path) -> dict[str, Path]:
    """The files of the tokenizer that a path given by the user means, by name."""
    folder, names = (path, NAMES) if path.is_dir() else (path.parent, (path.name,))
    found = {name: folder / name for name in (*names, CONFIG, TEMPLATE)}
    return {name: file for name, file in found.items() if file.is_file()}


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


def _json_bos(rust: tokenizers.Tokenizer, named: int | None, add_bos: bool | None) -> int | None:
    """The id that belongs in front of a text, or None where the model takes none.

    add_bos_token decides. Where the configuration is silent the file's own post-processor does:
    a bos_token that it never adds (SmolLM2's <|im_start|>) is a name and no more.
    """
    if add_bos is False:
        return None
    if add_bos and named is not None:
        return named
    plain = rust.encode("a", add_special_tokens=False).ids
    processed = rust.encode("a", add_special_tokens=True).ids
    return processed[0] if processed[:1] != plain[:1] else None
