"""What is shown while a prompt is trained, where it is logged, and how signals are noted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import REPO

from llama import cli, parallel
from llama.tuning import options
from llama.tuning.options import TuningOptions
from llama.tuning.progress import Progress
from llama.tuning.trainer import training_arguments

OPTIONS = ("ckpt", "rows.json", "out")


def test_tokens_a_second_are_those_of_steps_without_padding_and_evaluations(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr("llama.tuning.progress.soft_prompt_of", lambda _: torch.zeros(2))
    progress = Progress(None, cli.progress_bar("tuning", 3, "step"))
    step = type("state", (), {"global_step": 1, "max_steps": 3})

    def train(seconds, mask):
        progress.add(torch.tensor(mask))
        clock[0] += seconds
        progress.on_step_end(None, step, None)

    train(2.0, [[1, 1, 0], [1, 0, 0]])
    assert progress.tokens_per_second() == 2  # 3 in 2 s, rounded
    clock[0] += 100
    progress.on_evaluate(None, step, None)
    train(1.0, [[1] * 50])
    assert progress.tokens_per_second() == 50
    clock[0] += 100
    progress.on_save(None, step, None)
    train(1.0, [[1] * 27])
    assert progress.summary() == "trained 3 steps on 80 tokens, 20 a second"


def test_losses_are_reported_by_rank_0_alone_and_a_missing_package_is_named(monkeypatch):
    flags = TuningOptions(*OPTIONS, report_to="wandb")
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    message = r"--report_to wandb: .* not installed: pip install wandb$"
    with pytest.raises(ValueError, match=message):
        flags.check_packages()
    TuningOptions(*OPTIONS).check_packages()
    for rank, expected in ((0, ["wandb"]), (1, [])):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        made = training_arguments(flags, 4, False, torch.device("cpu"))
        assert made.report_to == expected


def signalled(*numbers, pause=0.0):
    """A program that notes signals, gets these, and ends as a run does that was stopped."""
    program = "\n".join(
        [
            "import os, time",
            "from llama import cli",
            "def main() -> None:",
            "    with cli.noting_signals('stopping') as number:",
            f"        for sent in {[int(number) for number in numbers]}:",
            "            os.kill(os.getpid(), sent)",
            f"            time.sleep({pause})",
            "    raise cli.Stopped(number(), 'saved')",
            "cli.run(main)",
        ]
    )
    env = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_the_first_signal_lets_a_run_end_in_order_and_one_after_it_ends_it_at_once():
    once = signalled(signal.SIGTERM, signal.SIGTERM, signal.SIGINT)  # as torchrun passes them on
    assert (once.returncode, once.stderr) == (143, "\nstopping\nsaved\n")
    twice = signalled(signal.SIGINT, signal.SIGINT, pause=1.1)
    assert (twice.returncode, twice.stderr) == (130, "\nstopping\ninterrupted\n")
