"""Tiny random models, tokenizers for them, and torchrun, for all tests.

Start reading at make_ckpt(), a checkpoint to test with, and run_script(), a script as users run it.
"""

import hashlib
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import transformers
from random_model import random_source
from tqdm import tqdm

from llama.checkpoint.folder import Checkpoint, shard_name
from llama.checkpoint.hf import hf_config
from llama.checkpoint.weights import Source, kind_of
from llama.checkpoint.write import write_checkpoint

REPO = Path(__file__).parent.parent
# One thread a rank: the ranks of a test share few cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A child that is killed while it draws a bar would hold its parent's bars for ever.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))


# The files that take longest: begun first, the two processes of `make test` end at the same time.
LONGEST = ["anywhere", "trainer", "replicas", "ranks", "readme", "parallel", "smollm2", "attacks"]
LONGEST += ["generation", "terminal", "chat", "scripts", "write", "vocabulary"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the tests of the longest files come first, and all else as it was."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def package_file(package: str, name: str) -> Path:
    """A data file of a package that is installed for its data alone."""
    return Path(importlib.util.find_spec(package).origin).parent / name


TOKENIZERS = {  # name -> path of a real tokenizer and its vocabulary size
    "sentencepiece": (package_file("mistral_common", "data/tokenizer.model.v1"), 32000),
    "tiktoken": (package_file("llama_models", "llama3/tokenizer.model"), 128256),
}


def make_params(**changes) -> dict:
    """params.json of a tiny model: 2 layers, 8 heads."""
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "vocab_size": 32000, "multiple_of": 16}
    return params | {"norm_eps": 1e-5} | changes


def make_ckpt(path: Path, n: int = 1, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A checkpoint folder of a tiny random model (std 0.5) in n shards."""
    write_checkpoint(random_source(make_params(**changes), dtype), path, n)
    return path


def small_params(choose: random.Random) -> dict:
    """params.json of a small model that cuts into 4; KV heads = heads, fewer, or fewer than 4."""
    n_heads = choose.choice([4, 8, 12])
    return make_params(
        dim=n_heads * choose.choice([2, 4, 6]),
        n_layers=choose.choice([1, 2]),
        n_heads=n_heads,
        n_kv_heads=choose.choice([k for k in (1, 2, 4, 8, 12) if n_heads % k == 0]),
        vocab_size=12 * choose.choice(range(1, 10)),
        multiple_of=choose.choice([8, 12, 24]),
    )


def shard_of(folder: Path, i: int) -> Path:
    """The file of shard i, as we write it."""
    return folder / shard_name(i)


def edit_shard(path: Path, **changes: object) -> None:
    """Put other tensors into a shard, or add some; None takes one away."""
    weights = torch.load(path, weights_only=True) | changes
    torch.save({name: weight for name, weight in weights.items() if weight is not None}, path)


def edit_json(path: Path, **changes: object) -> None:
    """Change entries of the JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def cut_by_vocabulary(folder: Path) -> None:
    """Lay the embedding out as Meta's Llama 3 does; such folders have no manifest."""
    ckpt = Checkpoint(folder)
    embedding = ckpt.read("tok_embeddings.weight").clone()
    for path, part in zip(ckpt.paths, embedding.chunk(ckpt.n)):
        edit_shard(path, **{"tok_embeddings.weight": part.clone()})
    (folder / "manifest.json").unlink()


class RunsCode:
    """In a pickle: code that says on stdout that it ran."""

    def __reduce__(self) -> tuple:
        return (print, ("this code ran",))


def saved(value: object) -> bytes:
    """The bytes of a file that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CODE = saved(RunsCode())  # a file of torch.save that would run code


def hf_model(source: Source) -> transformers.LlamaForCausalLM:
    """The same weights in Hugging Face's own class, as an independent reference."""
    args = source.args
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = hf_config(args, max_position_embeddings=131072, **none)
    state = {}
    for name in source.shapes:
        kind, layer, weight = kind_of(name), re.search(r"\d+", name), source.read(name)
        if kind.rotary:
            # rows of a head: neighbours (2i, 2i+1) here, halves (i, i + head_dim/2) there
            heads = weight.unflatten(0, (-1, args.head_dim))
            weight = torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1).flatten(0, 1)
        state[kind.pattern("hf").replace("N", layer[0] if layer else "")] = weight
    model = transformers.LlamaForCausalLM(config).to(source.dtype)
    model.load_state_dict(state)
    return model.eval()


def hf_reference(**changes) -> transformers.LlamaForCausalLM:
    """The model of make_ckpt in Hugging Face's own class."""
    return hf_model(random_source(make_params(**changes)))


def command_of(script: str | Path, *flags: object, n: int | None = None) -> list[str]:
    """The command that starts a script or a module: plain, or with torchrun over n ranks."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", n]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    program = ["-m", script] if str(script).startswith("llama.") else [REPO / script]
    command = [sys.executable, *(torchrun if n else []), *program, *flags]
    return list(map(str, command))


def run_script(
    script: str | Path, *flags: object, n: int | None = None, timeout: float = 120, **options
) -> CompletedProcess:
    """Run one of the repository's scripts as a user does."""
    command = command_of(script, *flags, n=n)
    options = {"cwd": REPO, "env": os.environ | {"PYTHONPATH": str(REPO)}} | options
    result = subprocess.run(command, capture_output=True, timeout=timeout, **options)
    # Not text=True, which turns a carriage return that the model wrote into a line end.
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    assert "%|" not in result.stderr  # no bar where there is no terminal, whatever is run
    return result


def flags_of(**options: object) -> list[str]:
    """Options as flags of a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def run_program(folder: Path, n: int | None, program: Callable, **values) -> CompletedProcess:
    """Run a function of programs.py on n torchrun ranks, with values that JSON can hold."""
    given = folder / f"{program.__name__}.json"
    given.write_text(json.dumps(values))
    return run_script("tests/programs.py", *flags_of(name=program.__name__, values=given), n=n)


@pytest.fixture
def on_ranks(tmp_path):
    """Run a function of programs.py on n torchrun ranks; what it returns on rank 0."""

    def run(n: int | None, program: Callable, **values) -> object:
        result = run_program(tmp_path, n, program, **values)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout)

    return run
