"""Say in GGUF's words what a tokenizer is: the way back from gguf_tokenizer.py."""

import json
import reprlib

import numpy as np

from llama.checkpoint.gguf_tokenizer import (
    ADDED,
    CONTROL,
    SOFT_PROMPT,
    UNUSED,
    USER_DEFINED,
    tokenizer_files,
)
from llama.checkpoint.tokenizer_words import Vocabulary, read_vocabulary
from llama.cli import say
from llama.tokenizer import CONFIG, NAMES, Tokenizer

# Tokens that end a turn where the file calls another one the end of a sequence.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>")
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
RUNS = [letter * n for letter in " \n\t-=#*_.0a" for n in range(2, 70)]
TOKENS_A_PROBE = 50


def vocabulary_of(files: dict[str, bytes], vocab_size: int) -> dict:
    """GGUF's metadata for the tokenizer in these files; tokenizer_files() is the way back.

    files: by name, tokenizer.model or else tokenizer.json; tokenizer_config.json and
    chat_template.jinja are read where they are there. Ids without a token become [PADn].

    Raises ValueError, saying what was found, for a tokenizer that GGUF cannot express: also where
    the tokenizer rebuilt from the metadata gives one of many texts other ids than the files do.
    One difference passes, and is told on stderr: that of a Metaspace pre-tokenizer.
    """
    name = next((name for name in NAMES if name in files), None)
    if name is None:
        raise ValueError("no tokenizer.model or tokenizer.json; give those that the model has")
    try:
        original, config = Tokenizer(name, files), json.loads(files.get(CONFIG, b"{}"))
        found = read_vocabulary(files[name])
        _fill(found, config, vocab_size)
        meta = _metadata(found, config, original)
        if original.chat_template is not None:
            meta["tokenizer.chat_template"] = original.chat_template
        rebuilt = Tokenizer(f"rebuilt {name}", tokenizer_files(meta, vocab_size))
        _check_same(original, rebuilt, found)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(f"the tokenizer cannot be said in GGUF's words: {error}") from error
    if not found.prefix_before_spaces:
        say("programs that read GGUF put one more space before texts that begin with a space")
    return meta


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
    soft_prompt = {name: config[name] for name in SOFT_PROMPT if name in config}
    return {f"tokenizer.ggml.{name}": value for name, value in words.items()} | soft_prompt


def _check_same(original: Tokenizer, rebuilt: Tokenizer, found: Vocabulary) -> None:
    """Raise ValueError unless both give the same ids: for PROBES, and for every token's text."""
    for name in ("bos_id", "eos_id"):
        there, here = getattr(original, name), getattr(rebuilt, name)
        if there != here:
            raise ValueError(f"its {name} {there} would become {here}")
    probes = [*PROBES, *RUNS]
    probes += [f"x {text}y {text} z" for text, kind, _ in found.tokens.values() if kind in ADDED]
    newline = original.encode("\n", bos=False)[-1]
    for start in range(0, original.n_words, TOKENS_A_PROBE):
        ids = range(start, min(start + TOKENS_A_PROBE, original.n_words))
        probes.append(original.decode([x for i in ids for x in (i, newline)]))
    for text in probes:
        if text.startswith((" ", "▁")) and not found.prefix_before_spaces:
            continue
        there, here = (tokenizer.encode(text, bos=False) for tokenizer in (original, rebuilt))
        if there != here:
            raise ValueError(f"its ids for {reprlib.repr(text)} would become others")
