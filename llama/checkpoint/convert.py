"""Write a checkpoint of any format in any other."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from llama.checkpoint.baked import BakedSource
from llama.checkpoint.folder import facts_of
from llama.checkpoint.formats import open_any
from llama.checkpoint.gguf import WRITTEN, write_gguf
from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.hf import write_hf
from llama.checkpoint.modelfile import modelfile
from llama.checkpoint.vocabulary import vocabulary_of
from llama.checkpoint.weights import Source, hash_threads, parse_dtype
from llama.checkpoint.write import write_checkpoint, write_files
from llama.cli import progress_bar, say
from llama.files import content_of, new_folder
from llama.options import DTYPES, dtype_name
from llama.tokenizer import Tokenizer

TARGETS = {"meta": DTYPES, "hf": DTYPES, "gguf": tuple(WRITTEN), "prompt_embeds": ()}


def bake(source: Source, prompt: torch.Tensor, chat_template: str | None = None) -> BakedSource:
    """Put a tuned prompt, (num_virtual_tokens, dim), into a model's vocabulary.

    chat_template: of the conversations that it was trained on, in place of the tokenizer's.
    """
    template = {} if chat_template is None else {"tokenizer.chat_template": chat_template}
    return BakedSource(source, prompt, vocabulary_in(source) | template)


def vocabulary_in(source: Source) -> dict:
    """The tokenizer of a model in GGUF's words. Raises ValueError if it has none."""
    if isinstance(source, BakedSource):
        return source.vocabulary
    if not source.has_tokenizer:
        raise ValueError(
            "the model has no tokenizer beside it: put its tokenizer.model or tokenizer.json into "
            "its folder"
        )
    files = {name: content_of(content) for name, content in source.files.items()}
    return vocabulary_of(files, source.args.vocab_size)


def check_target(
    to: str,
    n: int,
    dtype: str | None,
    quantize: str | None,
    consolidated: bool,
    prompts_file: str | None,
    verify: bool,
) -> None:
    """Raise ValueError, naming the flag, for what a target does not have."""
    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, not {to!r}")
    if dtype is not None and dtype not in TARGETS[to]:
        wanted = f"one of {', '.join(TARGETS[to])}" if TARGETS[to] else "left out"
        raise ValueError(f"--dtype must be {wanted} with --to {to}, not {dtype!r}")
    if verify and to == "prompt_embeds":
        raise ValueError("--verify compares weights, and prompt_embeds has none: leave it out")
    of_one_target = {
        "n": ("meta", n != 1),
        "quantize": ("meta", quantize is not None),
        "consolidated": ("meta", consolidated),
        "prompts_file": ("prompt_embeds", prompts_file is not None),
    }
    for name, (only, given) in of_one_target.items():
        if given and to != only:
            raise ValueError(f"--{name} goes with --to {only} alone, not with --to {to}")


def check_floats(source: Source) -> None:
    """Raise ValueError for a folder of quantised weights, which no other format holds."""
    if source.quantize:
        raise ValueError(
            f"{source.path}: quantised to {source.quantize}, which no other format holds: give the "
            "checkpoint that it was made from"
        )


def convert(
    source: Source,
    out_dir: str | Path,
    to: str,
    n: int = 1,
    dtype: str | None = None,
    consolidated: bool = False,
) -> None:
    """Write a model as a folder in Meta's format (meta), Hugging Face's (hf), or with a GGUF file.

    n: shards, in Meta's format; consolidated: under Meta's own names. The folder appears whole or
    not at all. Raises ValueError for what the format cannot express.
    """
    out_dir = Path(os.path.abspath(out_dir))
    if not source.has_tokenizer and to != "gguf":  # which cannot be without one
        say(f"{out_dir}: the model comes without a tokenizer: put its tokenizer there yourself")
    if dtype is None and source.quantised_bytes:
        names = source.shapes if to == "meta" else source.different_names
        say(f"{source.path}: {source.growth(names)}")
    if to == "meta":
        prefix = "consolidated" if consolidated else "fs_consolidated"
        write_checkpoint(source, out_dir, n, parse_dtype(dtype), prefix)
    elif to == "hf":
        with new_folder(out_dir) as folder:
            write_files(folder, _hf_files(source))
            tokenizer = Tokenizer(folder) if source.has_tokenizer else None
            write_hf(source, folder, parse_dtype(dtype) or source.dtype, tokenizer)
            source.check_unchanged()
    else:
        dtype = dtype or dtype_name(source.dtype)
        vocabulary = {"general.name": out_dir.name} | vocabulary_in(source)
        name = f"{out_dir.name}-{dtype}.gguf"
        for_ollama = {"Modelfile": modelfile(name, vocabulary).encode()}
        with new_folder(out_dir) as folder:
            write_gguf(source, folder / name, dtype, vocabulary)
            write_files(folder, for_ollama)
            source.check_unchanged()


def _hf_files(source: Source) -> Mapping[str, bytes | Path]:
    """The tokenizer of a model as tokenizer.json, which transformers reads."""
    if "tokenizer.json" in source.files or not source.has_tokenizer:
        return source.files
    return tokenizer_files(vocabulary_in(source), source.args.vocab_size)


def verify_written(source: Source, out_dir: str | Path) -> None:
    """Read again what was written from a source; ValueError for what differs."""
    written = open_any(out_dir)
    if facts_of(written.args) != facts_of(source.args):
        raise ValueError(f"{out_dir}: its configuration is not that of the model: tell its makers")

    def differs(name: str) -> bool:
        pairs = zip(source.blocks(name), written.blocks(name))
        return any(
            not torch.equal(written.as_stored(name, before), after)
            for (_, before), (_, after) in pairs
        )

    total = sum(math.prod(shape) for shape in source.shapes.values()) * source.dtype.itemsize
    with hash_threads() as pool, progress_bar("verifying", total) as bar:
        for name, wrong in zip(source.shapes, pool.map(differs, source.shapes)):
            if wrong:
                raise ValueError(f"{out_dir}: {name} is not what was written; write it again")
            bar.update(total // len(source.shapes))
