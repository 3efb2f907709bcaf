"""Tiny random models, tokenizers for them, and torchrun, for all tests.

Start reading at make_ckpt(), a checkpoint to test with, and run_script(), a script as users run it.
"""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import transformers
from random_model import random_source

from llama.checkpoint.hf import hf_config
from llama.checkpoint.weights import Source
from llama.checkpoint.write import write_checkpoint

REPO = Path(__file__).parent.parent
# One thread a rank: the ranks of a test share few cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


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


class RunsCode:
    """In a pickle: code that says on stdout that it ran."""

    def __reduce__(self) -> tuple:
        return (print, ("this code ran",))


def saved(value: object) -> bytes:
    """The bytes of a file that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def hf_model(source: Source) -> transformers.LlamaForCausalLM:
    """The same weights in Hugging Face's own class, as an independent reference."""
    args = source.args
    scaling = {"rope_type": "default"}
    if args.use_scaled_rope:
        scaling = {
            "rope_type": "llama3",
            "factor": args.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": args.rope_high_freq_factor,
            "original_max_position_embeddings": 8192,
        }
    config = hf_config(
        args,
        rope_parameters={"rope_theta": args.rope_theta} | scaling,
        max_position_embeddings=131072,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    names = {
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
    }
    state = {}
    for name in source.shapes:
        weight = source.read(name)
        layer, role = re.fullmatch(r"(layers\.\d+\.)?(.*)\.weight", name).groups()
        if role in ("attention.wq", "attention.wk"):
            # rows of a head: neighbours (2i, 2i+1) here, halves (i, i + head_dim/2) there
            heads = weight.unflatten(0, (-1, args.head_dim))
            weight = torch.cat((heads[:, 0::2], heads[:, 1::2]), dim=1).flatten(0, 1)
        state[f"{f'model.{layer}' if layer else ''}{names[role]}.weight"] = weight
    model = transformers.LlamaForCausalLM(config).to(source.dtype)
    model.load_state_dict(state)
    return model.eval()


def run_script(
    script: str | Path, *flags: object, n: int | None = None, timeout: float = 120, **options
) -> CompletedProcess:
    """Run one of the repository's scripts as a user does: plain, or with torchrun over n ranks."""
    command = [sys.executable]
    if n is not None:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(n)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command += [str(REPO / script), *map(str, flags)]
    options = {"cwd": REPO, "env": os.environ | {"PYTHONPATH": str(REPO)}} | options
    result = subprocess.run(command, capture_output=True, timeout=timeout, **options)
    # Not text=True, which turns a carriage return that the model wrote into a line end.
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


def run_program(folder: Path, n: int | None, program: Callable, **values) -> CompletedProcess:
    """Run a function of programs.py on n torchrun ranks, with values that JSON can hold."""
    given = folder / f"{program.__name__}.json"
    given.write_text(json.dumps(values))
    return run_script("tests/programs.py", "--name", program.__name__, "--values", given, n=n)


@pytest.fixture
def on_ranks(tmp_path):
    """Run a function of programs.py on n torchrun ranks; what it returns on rank 0."""

    def run(n: int | None, program: Callable, **values) -> object:
        result = run_program(tmp_path, n, program, **values)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout)

    return run
