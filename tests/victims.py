"""What is attacked: how small files are made, which of them are damaged how, how they are read.

Start reading at KINDS.
"""

import base64
import hashlib
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from conftest import flags_of, make_params, random_source, run_script
from damage import (
    NUMBERS,
    any_way,
    flip,
    flip_end,
    flip_front,
    hostile,
    odd_header,
    odd_json,
    odd_line,
    odd_metadata,
    odd_proto,
    odd_tokenizer,
    other_dtype,
    poke_zip,
    rezip,
)
from formats import byte_level_vocabulary, save_hf, write_gguf
from safetensors.torch import load_file

import datasets
import ft_main
from llama import LLaMA, cli, parallel
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.formats import open_any
from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.modelfile import modelfile
from llama.checkpoint.quantized import quantized
from llama.checkpoint.vocabulary import vocabulary_of
from llama.checkpoint.weights import Source
from llama.checkpoint.write import write_checkpoint
from llama.files import sha256_of
from llama.generation import load_model
from llama.options import GenerationOptions
from llama.prompts import SEPARATOR, read_prompts
from llama.tokenizer import Tokenizer
from llama.tuning.adapter import load_soft_prompt, save_adapter, warn_of_another_model
from llama.tuning.data import tokenize_dataset
from llama.tuning.model import add_soft_prompt
from llama.tuning.options import TuningOptions
from llama.tuning.run_folder import newest_checkpoint
from llama.tuning.trainer import training_arguments

Files = dict[str, bytes]  # content by name
HANG = 60  # seconds

DIM, VOCAB_SIZE = 16, 512
PARAMS = {"dim": DIM, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCAB_SIZE}
TEXTS = ["", "Hello,  world! It's\n12345", "a" * 3000 + "!", "żółć \U0001f600 \0\u202e", "\ud800"]
TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
CHATS = [
    {"messages": [{"role": role, "content": role * n} for role in ("user", "assistant")] * n}
    for n in range(1, 6)
]
ROWS = [{"instruction": f"Say {word}", "output": word * 3} for word in ("a", "bb", "c", "dd", "e")]


# How the small files that are attacked are made, each in an empty folder.


def make_whole(folder: Path) -> None:
    source = random_source(make_params(**PARAMS))
    source.files["tokenizer.model"] = TIKTOKEN
    write_checkpoint(source, folder, 2)


def make_plain(folder: Path) -> None:
    make_whole(folder)
    (folder / "manifest.json").unlink()


def make_quantised(folder: Path) -> None:
    source = random_source(make_params(**PARAMS | {"dim": 64, "multiple_of": 32}))
    write_checkpoint(quantized(source, "int4"), folder, 2)
    (folder / "manifest.json").unlink()


def make_listed(folder: Path) -> None:
    make_plain(folder)
    lines = [f"{hashlib.md5(x.read_bytes()).hexdigest()}  {x.name}\n" for x in folder.iterdir()]
    (folder / "checklist.chk").write_text("".join(lines))


def make_gguf(folder: Path) -> None:
    meta = byte_level_vocabulary(300)
    write_gguf(folder / "model.gguf", dim=32, n_layers=1, vocab_size=320, meta=meta)


def make_hf(folder: Path) -> None:
    save_hf(folder, hidden_size=32, intermediate_size=48, num_hidden_layers=1)


def make_json_tokenizer(folder: Path) -> None:
    meta = byte_level_vocabulary(300) | {"tokenizer.ggml.add_bos_token": True}
    for name, content in tokenizer_files(meta, VOCAB_SIZE).items():
        (folder / name).write_bytes(content)


def make_sentencepiece(folder: Path) -> None:
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(map(str, range(10**4, 11**4))),
            **{"model_writer": file, "vocab_size": 300, "model_type": "bpe", "num_threads": 1},
            **{
                "byte_fallback": True,
                "remove_extra_whitespaces": False,
                "normalization_rule_name": "identity",
                "minloglevel": 2,
            },
        )


def make_adapter(folder: Path) -> None:
    make_plain(folder)
    model = load_model(Checkpoint(folder), parallel.setup())
    save_adapter(add_soft_prompt(model, 4, [1, 2], "ckpt"), folder)


def make_old_adapter(folder: Path) -> None:
    make_adapter(folder)
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


def make_run(folder: Path) -> None:
    make_plain(folder)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    ft_main.main(tuning_options(folder, max_steps=2))
    for path in (folder / "out").iterdir():
        if path.name != "checkpoint-2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("Hello\nHow are you\n" * 3)
    (folder / "prompts.jsonl").write_text('{"prompt": "Hello"}\n"How"\n' * 3)


def make_rows(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "rows_of_chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    (folder / "rows.csv").write_text(
        "instruction,output\n" + "\n".join(",".join(row.values()) for row in ROWS)
    )


def make_arrow(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)
    rows = datasets.Dataset.from_list(CHATS * 5)
    rows.to_parquet(folder / "rows.parquet")
    rows.save_to_disk(str(folder / "rows"))


def make_flags(folder: Path) -> None:
    make_whole(folder)
    (folder / "flags.txt").write_text("")


def tuning_options(folder: Path, **changes: object) -> TuningOptions:
    return TuningOptions(
        **dict.fromkeys(("ckpt_dir", "tokenizer_path"), str(folder)),
        dataset_path=str(folder / "rows.json"),
        output_dir=str(folder / "out"),
        **{
            "num_virtual_tokens": 4,
            "batch_size": 2,
            "save_steps": 1,
            "warmup_steps": 1,
            "lr": 1e-3,
        },
        **changes,
    )


# How they are read. What is returned must be the same as before where something vouches for it;
# what is asserted must hold in any case.


def use(source: Source) -> dict[str, str]:
    """Read every weight; their hashes."""
    weights = {name: source.read(name) for name in source.shapes}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == source.shapes
    return {name: sha256_of(weight) for name, weight in weights.items()}


def read_folder(folder: Path) -> object:
    ckpt = Checkpoint(folder)
    found = use(ckpt)
    with torch.inference_mode():
        logits = load_model(ckpt, parallel.setup())(torch.tensor([[0, 1]]))
    assert logits.shape == (1, 2, ckpt.args.vocab_size)
    return found


def read_verified(folder: Path) -> object:
    ckpt = Checkpoint(folder)
    assert ckpt.verify().keys() == ckpt.shapes.keys()
    tokenizer = all((folder / name).read_bytes() == TIKTOKEN for name in ckpt.files)
    return use(ckpt), tokenizer  # which may be absent, but not another


def read_foreign(folder: Path) -> object:
    source = open_any(folder)
    use(source)
    for name, content in source.files.items():
        (folder / name).write_bytes(content)
    if source.files:
        read_tokenizer(folder)


def read_tokenizer(folder: Path) -> object:
    tokenizer = Tokenizer(folder)
    stops = {tokenizer.eos_id, tokenizer.pad_id, *tokenizer.stop_ids, tokenizer.bos_id or 0}
    for text in TEXTS:
        ids = tokenizer.encode(text, eos=True)
        assert all(0 <= i < tokenizer.n_words for i in (*ids, *stops)), "an id out of range"
        tokenizer.decode(ids).encode()
    tokenizer.decode(range(min(tokenizer.n_words, 400))).encode()


def read_vocabulary(folder: Path) -> object:
    """Put a tokenizer into GGUF's words, and Ollama's template beside it."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    vocabulary = vocabulary_of(files, VOCAB_SIZE)
    assert len(vocabulary["tokenizer.ggml.tokens"]) == VOCAB_SIZE
    modelfile("m.gguf", vocabulary).encode()


def read_adapter(folder: Path) -> object:
    prompt = load_soft_prompt(folder, DIM)
    assert prompt.dtype == torch.float32
    assert prompt.shape[1:] == (DIM,)
    assert prompt.isfinite().all()
    warn_of_another_model(folder, load_model(Checkpoint(folder), parallel.setup()))


def read_run(folder: Path) -> object:
    if newest_checkpoint(folder / "out") is None:
        raise ValueError(f"{folder}/out: no whole checkpoint, so the run would begin anew")
    ft_main.main(tuning_options(folder, max_steps=3, resume=True))
    prompt = load_soft_prompt(folder / "out", DIM)
    return sha256_of(prompt)


def read_text(folder: Path) -> object:
    for name in ("prompts.txt", "prompts.jsonl"):
        prompts = read_prompts(folder / name)
        assert prompts
        "".join(prompts).encode()  # raises for half a character


def read_rows(folder: Path) -> object:
    paths = [path for path in folder.iterdir() if path.name.startswith("rows")]
    assert paths
    for path in paths:
        rows = tokenize_dataset(path, Tokenizer(folder), 300).rows
        assert len(rows)
        for row in rows:
            assert 0 < len(row["input_ids"]) == len(row["labels"]) <= 300
            assert ((row["labels"] == row["input_ids"]) | (row["labels"] == -100)).all()


def read_flags(folder: Path) -> object:
    """Generate with odd options, as a command line has them; make the Trainer's of others."""
    paths = {"ckpt_dir": folder, "tokenizer_path": folder}
    sys.argv = ["x", *flags_of(**paths), *(folder / "flags.txt").read_text().splitlines()]
    if not any(name in sys.argv[-1] for name in TUNING):
        flags = GenerationOptions(**cli.parse_flags(GenerationOptions))
        model = LLaMA.build(folder, folder, 24, flags.max_batch_size, flags.dtype)
        wanted = flags.sampling() | {"n": 1, "echo": False, "logprobs": None}
        greedy = wanted | {"max_gen_len": 24, "temperature": 0}
        found, likeliest = (model.generate(["Hi", "You"], **x) for x in (wanted, greedy))
        tokens = [i for output in found for i in output.token]
        assert all(0 <= i < VOCAB_SIZE for i in tokens)
        if flags.temperature < 1e-6:
            assert [
                output.token == other.token[: len(output.token)]
                for output, other in zip(found, likeliest)
            ]
    else:
        sys.argv += flags_of(dataset_path=folder, output_dir=folder)
        flags = TuningOptions(**cli.parse_flags(TuningOptions))
        assert training_arguments(flags, 7, True, torch.device("cpu")).max_steps > 0


def read_on_one(folder: Path) -> object:
    """What read_on_ranks() is to return."""
    output = LLaMA.build(folder, folder).generate(["Hello"], 4, temperature=0)[0]
    return f"Hello{output.text}{SEPARATOR}"


def read_on_ranks(folder: Path) -> object:
    """Generate as a user does on two ranks: text, or one rank's message and nothing else."""
    flags = {"ckpt_dir": folder, "tokenizer_path": folder, "temperature": 0, "max_gen_len": 4}
    (folder / "prompts").write_text("Hello\n")
    flags["prompts_file"] = folder / "prompts"
    result = run_script("example.py", *flags_of(**flags), n=2, timeout=HANG - 5)
    if result.returncode == 0:
        return result.stdout
    errors = re.findall(r"(?m)^error: (.*)$", result.stderr)
    seen = (result.returncode, result.stdout, len(errors))
    assert seen == (1, "", 1), f"{seen}: {result.stderr}"
    raise ValueError(errors[0])


# What is attacked.


SAMPLING = ("max_gen_len", "temperature", "top_p", "seed", "max_batch_size", "dtype", "top_k")
SAMPLING += ("min_p", "repetition_penalty", "stop")
TUNING = ("num_epochs", "max_steps", "batch_size", "lr", "warmup_steps", "max_seq_len")
TUNING += ("gradient_accumulation_steps", "max_grad_norm", "val_set_size", "eval_steps", "--seed")
FLAGS = ["nan", "inf", "-inf", "-0.0", "1e-45", "1e-39", "5e-324", "1e-7", "1e308", "1e400", "0.5"]
FLAGS += ["9" * 30, "9" * 5000, "1_000", "٣", "", " 1 ", "True", "None", "0x10", "1.0000001"]


def odd_flags(content: bytes, choose: random.Random) -> bytes:
    """Draw flags for one of the two command lines."""
    names = choose.choice((SAMPLING, TUNING))
    values = [*FLAGS, *map(str, NUMBERS), "1", "2", "3", "4", "bfloat16", "float16"]
    flags = {name: choose.choice(values) for name in choose.sample(names, choose.randint(1, 2))}
    return "\n".join(flags_of(**flags)).encode()


def hash_anew(files: Files) -> None:
    """Put the right hashes into run.json, as a stranger would who made all of the checkpoint."""
    name = RUN
    try:
        run = json.loads(files[name])
        run["files"] = {
            other.split("/")[-1]: hashlib.sha256(content).hexdigest()
            for other, content in sorted(files.items())
            if other.startswith("out/") and other != name
        }
        files[name] = json.dumps(run).encode()
    except (KeyError, ValueError, TypeError, RecursionError):
        pass  # what is no longer an object has no hashes


@dataclass(frozen=True)
class Kind:
    """One kind of attack, on the small files that make() writes into an empty folder."""

    make: Callable[[Path], None]
    targets: str  # which of the files are damaged
    ways: tuple[Callable[[bytes, random.Random], bytes], ...]
    # What is returned must be the same as before where the voucher, a file, is still there; what
    # is asserted must hold in any case.
    read: Callable[[Path], object]
    voucher: str = ""
    right: Callable[[Path], object] | None = None  # how that is told, if not by reading
    finish: Callable[[Files], None] = lambda files: None
    named: str = ""  # what every refusal names; by default the folder
    in_process: bool = True  # so that memory and what code may do can be limited
    tries: int = 150  # in `make test`
    seconds: float = 5  # in `make fuzz`, before it is the next kind's turn


JSON, BYTES = (odd_json, flip), (any_way, flip)
METADATA = (flip_front, odd_metadata, odd_metadata)
TOKENIZER = (odd_json, odd_tokenizer, flip)
ADAPTER = (odd_header, other_dtype, any_way, any_way)
OLD_ADAPTER = (hostile, other_dtype, any_way)
MANIFEST, CHECKLIST, RUN = "manifest.json", "checklist.chk", "out/checkpoint-2/run.json"

KINDS = {
    "params.json": Kind(make_plain, "params.json", JSON, read_folder),
    "manifest.json": Kind(make_whole, MANIFEST, JSON, read_folder, voucher=MANIFEST),
    "shard": Kind(make_plain, "*.pth", (flip, flip_front), read_folder, tries=100),
    "directory": Kind(make_plain, "*.pth", (poke_zip, rezip), read_folder, tries=100),
    "pickle": Kind(make_plain, "*.pth", (hostile,), read_folder, tries=100),
    "quantised": Kind(make_quantised, "*.pth", (flip, flip_front, poke_zip), read_folder),
    "quantised params": Kind(make_quantised, "params.json", JSON, read_folder),
    "verified": Kind(make_whole, "*", BYTES, read_verified, voucher=MANIFEST),
    "checklist": Kind(make_listed, "*", BYTES, read_verified, voucher=CHECKLIST, tries=100),
    "gguf": Kind(make_gguf, "*", METADATA, read_foreign),
    "config.json": Kind(make_hf, "config.json", JSON, read_foreign),
    "safetensors": Kind(make_hf, "*.safetensors", (odd_header, flip_front), read_foreign),
    "tokenizer.json": Kind(make_json_tokenizer, "tokenizer.json", TOKENIZER, read_tokenizer),
    "tokenizer_config": Kind(make_json_tokenizer, "tokenizer_config.json", JSON, read_tokenizer),
    "sentencepiece": Kind(make_sentencepiece, "*", (flip, odd_proto), read_tokenizer),
    "tiktoken": Kind(make_rows, "*.model", (odd_line, flip), read_tokenizer),
    "vocabulary": Kind(
        *(make_json_tokenizer, "tokenizer*", TOKENIZER, read_vocabulary),
        **{"named": "tokenizer", "tries": 30},
    ),
    "pieces": Kind(
        *(make_sentencepiece, "*", (flip, odd_proto), read_vocabulary),
        **{"named": "tokenizer", "tries": 30},
    ),
    "adapter": Kind(make_adapter, "*a[sd][ea]*", ADAPTER, read_adapter, tries=100),
    "old adapter": Kind(make_old_adapter, "*.bin", OLD_ADAPTER, read_adapter, tries=100),
    "checkpoint": Kind(make_run, "out/*", (any_way,), read_run, voucher=RUN, tries=50),
    "stranger": Kind(make_run, "out/*", (any_way,), read_run, finish=hash_anew, tries=8),
    "prompts": Kind(make_prompts, "*", (odd_line, flip), read_text),
    "dataset": Kind(make_rows, "rows*", (odd_line, odd_json, flip), read_rows),
    "arrow": Kind(
        *(make_arrow, "rows*", (flip, flip_front, flip_end, odd_json), read_rows), tries=40
    ),
    "options": Kind(make_flags, "flags.txt", (odd_flags,), read_flags, named="--", tries=100),
    "ranks": Kind(
        *(make_whole, "*", BYTES, read_on_ranks, MANIFEST, read_on_one),
        **{"in_process": False, "tries": 1, "seconds": 20},
    ),
}
