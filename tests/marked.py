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


def noting(phase: str, function: Callable) -> Callable:
    """The function, which now notes that the phase begins."""

    @functools.wraps(function)
    def noted(*args: object, **kwargs: object) -> object:
        NOTES.write(f"{phase}\n")
        return function(*args, **kwargs)

    return noted


def mark() -> None:
    """Put notes into the functions in which phases begin."""
    from llama import generation
    from llama.checkpoint import write

    points = [("loading", generation, "load_model"), ("writing", write, "_write_weight")]
    points += [("prefill", generation.LLaMA, "generate"), ("decoding", generation, "sample")]
    if Path(SCRIPT).name == "ft_main.py":
        from llama.tuning.trainer import PromptTrainer

        points += [("training", PromptTrainer, "training_step"), ("final", PromptTrainer, "save")]
        points += [("saving", PromptTrainer, "_save_checkpoint")]
    for phase, owner, name in points:
        setattr(owner, name, noting(phase, getattr(owner, name)))


def run(main: Callable, *options: type) -> None:
    """Run a script as cli.run does, with notes."""

    @functools.wraps(main)  # for its signature, which is the command line
    def marked(*args: object, **kwargs: object) -> None:
        mark()
        main(*args, **kwargs)

    run_unmarked(marked, *options)


run_unmarked, cli.run = cli.run, run
NOTES.write(f"{os.getpid()}\nstarting\n")
sys.argv = [SCRIPT, *FLAGS]
runpy.run_path(SCRIPT, run_name="__main__")
