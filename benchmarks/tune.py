"""Steps per second and peak memory of prompt tuning, against PEFT over Hugging Face's Llama.

OMP_NUM_THREADS=2 python benchmarks/tune.py
"""

import collections
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from random_model import random_source

from llama import cli, parallel
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.hf import hf_config
from llama.checkpoint.write import write_checkpoint
from llama.generation import load_model
from llama.tuning.model import add_soft_prompt

# SmolLM2-135M's shape
PARAMS = {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 49152}
BSZ, SEQLEN, VIRTUAL, STEPS, ROUNDS = 8, 64, 32, 3, 5


def hugging_face_model(ckpt: Checkpoint) -> torch.nn.Module:
    """PEFT over LlamaForCausalLM of the same shape; its weights do not matter here."""
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    return peft.get_peft_model(transformers.LlamaForCausalLM(hf_config(ckpt.args)), prompt)


def steps(model: torch.nn.Module, answer_from: int) -> float:
    """Seconds of a step: forward, backward, AdamW; labels from token answer_from on."""
    ids = torch.randint(PARAMS["vocab_size"], (BSZ, SEQLEN))
    labels = ids.clone()
    labels[:, :answer_from] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    taken = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first one warms up


def main(side: str = "", ckpt_dir: str = "") -> None:
    """Measure both sides in turns, each in a process of its own, and print medians and ratios.

    Args:
        side: llama or peft: do that side's steps and print what they took. Not for users.
        ckpt_dir: the checkpoint for it.
    """
    if side:
        ckpt = Checkpoint(ckpt_dir)
        watch = cli.MemoryWatch()
        if side == "llama":
            model = add_soft_prompt(load_model(ckpt, parallel.setup()), VIRTUAL, None, ckpt_dir)
        else:
            model = hugging_face_model(ckpt)
        print(steps(model, answer_from=0), steps(model, answer_from=SEQLEN // 2), watch.peak)
        return
    folder = Path(tempfile.mkdtemp())
    write_checkpoint(random_source(PARAMS, std=0.02), folder / "ckpt")
    results = collections.defaultdict(list)
    for _ in range(ROUNDS):
        for name in ("llama", "peft"):
            flags = ["--side", name, "--ckpt_dir", str(folder / "ckpt")]
            output = subprocess.check_output(
                [sys.executable, __file__, *flags], text=True, stderr=subprocess.DEVNULL
            )
            results[name].append(tuple(map(float, output.split())))
    shutil.rmtree(folder)
    median = {name: [statistics.median(x) for x in zip(*rows)] for name, rows in results.items()}
    for name, (whole, half, peak) in median.items():
        print(
            f"{name:6} {whole:5.2f} s a step learning all tokens, {half:5.2f} s learning half, "
            f"peak {peak / 1e6:.0f} MB"
        )
    ratios = [theirs / ours for ours, theirs in zip(median["llama"], median["peft"])]
    print("llama: {:.2f} and {:.2f} times peft's steps per second".format(*ratios[:2]), end="")
    print(f", {1 / ratios[2]:.2f} of its memory")


if __name__ == "__main__":
    cli.run(main)
