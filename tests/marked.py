"""Run a script of the repository, and note in a file each phase that this rank begins.

python tests/marked.py FOLDER SCRIPT FLAGS: FOLDER/RANK begins with the process id. For faults.py.
"""

import functools
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from llama import cli

FOLDER, SCRIPT, *FLAGS = sys.argv[1:]
NOTES = (Path(FOLDER) / os.environ.get("RANK", "0")).open("a", buffering=1)


def before(function: Callable, first: Callable, *arguments: object) -> Callable:
    """The function, with something else done first at each call."""

    @functools.wraps(function)  # for main's signature, which is the command line
    def both(*args: object, **kwargs: object) -> object:
        first(*arguments)
        return function(*args, **kwargs)

    return both


def mark() -> None:
    """Put notes into the functions in which phases begin."""
    from llama import batch, generation, sampling
    from llama.checkpoint import write

    points = [("loading", generation, "load_model"), ("writing", write, "_write_weight")]
    points += [("prefill", batch.Batch, "add")]
    points += [("decoding", sampling.Sampler, "next_ids")]
    if Path(SCRIPT).name == "ft_main.py":
        from llama.tuning.trainer import PromptTrainer

        points += [("training", PromptTrainer, "training_step"), ("final", PromptTrainer, "save")]
        points += [("saving", PromptTrainer, "_save_checkpoint")]
    for phase, owner, name in points:
        setattr(owner, name, before(getattr(owner, name), NOTES.write, f"{phase}\n"))


run = cli.run
cli.run = lambda main, *options: run(before(main, mark), *options)
NOTES.write(f"{os.getpid()}\nstarting\n")
sys.argv = [SCRIPT, *FLAGS]
runpy.run_path(SCRIPT, run_name="__main__")
