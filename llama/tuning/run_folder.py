"""The folder of a run: its checkpoints, what is read of them, where a run begins in it."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerState

from llama import cli
from llama.files import hash_of, read_json, write_json, write_whole
from llama.tokenizer import TEMPLATE
from llama.tuning.adapter import BASE, CARD

# The last file written into a checkpoint's folder: its step, what a resumed run must keep, and the
# SHA-256 of every other file, by which a whole checkpoint is known before it is read.
RUN = "run.json"
PICTURE = "loss.png"
STATE = "trainer_state.json"  # the Trainer's own name
SAMPLES = "samples.jsonl"
OPTIMIZER = "optimizer.safetensors"
TRAINED = "trained.safetensors"
BEST = "best.safetensors"  # of a checkpoint: the prompt with the lowest evaluation loss so far

IN_WORDS = {  # facts of a run that are no options, as a user knows them
    "dataset_sha256": "the dataset",
    "tokens_sha256": "the tokens of its rows (--template, --columns or the tokenizer)",
    "norms_sha256": "the model's weights",
}


def where_to_begin(output_dir: Path, resume: bool) -> Path | None:
    """The checkpoint that a run goes on from; None if it begins anew.

    Raises ValueError where it would write over what another run has left.
    """
    if not resume:
        _check_unused(output_dir, "checkpoint-*", SAMPLES)
        return None
    found = newest_checkpoint(output_dir)
    if found is None:
        _check_unused(output_dir)  # a finished prompt is never written over
        cli.say(f"{output_dir}: no whole checkpoint to go on from: begins anew")
    return found


def _check_unused(output_dir: Path, *more: str) -> None:
    """Raise ValueError if a folder holds what a run would write; other files may lie there."""
    if output_dir.is_file():
        raise ValueError(f"{output_dir}: is a file; choose a folder for --output_dir")
    ours = (BASE, STATE, PICTURE, TEMPLATE, CARD, "adapter_*", *more)
    names = {path.name for name in ours for path in output_dir.glob(name)}
    found = sorted(names, key=str.lower)
    if found:
        way = ", or --resume a run in it" if more else "; it has no whole checkpoint to go on from"
        raise ValueError(
            f"{output_dir}: in use: holds {cli.first_few(found)}; choose another folder{way}"
        )


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; says which newer ones are passed over."""
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        folder = output_dir / f"checkpoint-{step}"
        try:
            run = read_json(folder / RUN)
            if run.get("step") == step and run.get("files") == _hashes_of(folder):
                return folder
            reason = f"its step or files are not those that {RUN} lists"
        except (ValueError, OSError) as error:
            reason = str(error)
        cli.say(f"{folder}: passed over, as it is not whole: {reason}")
    return None


def write_run(folder: Path, step: int, facts: dict) -> None:
    """Write the last file of a checkpoint, which says what it belongs to and that it is whole."""
    write_json(folder / RUN, facts | {"step": step, "files": _hashes_of(folder)})


def _hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint's folder but RUN itself."""
    return {path.name: hash_of(path) for path in sorted(folder.iterdir()) if path.name != RUN}


def check_same_run(checkpoint: Path, facts: dict, options: dict) -> None:
    """Raise ValueError, naming what differs, for a checkpoint of a run with other facts.

    facts: of this run, the options that must stay as they were among them.
    """
    before = read_json(checkpoint / RUN)
    changed = [key for key in facts if before.get(key) != facts[key]]
    # What follows from another difference is none of its own.
    for cause, effect in (("dataset_sha256", "tokens_sha256"), ("dtype", "norms_sha256")):
        if {cause, effect} <= {*changed}:
            changed.remove(effect)
    if changed:
        named = [
            IN_WORDS.get(key)
            or f"{'--' * (key in options)}{key} {cli.shown(str(before.get(key)))}, not {facts[key]}"
            for key in changed
        ]
        of_all = " (--batch_size times the replicas)" * ("batch_size" in changed)
        raise ValueError(
            f"{checkpoint}: begun with other settings: {'; '.join(named)}{of_all}. Give those it "
            "was begun with, or begin anew in another folder"
        )


def read_state(checkpoint: Path) -> TrainerState:
    """Read the Trainer's state of a checkpoint; ValueError if the Trainer did not write it so."""
    path = checkpoint / STATE
    found = read_json(path)
    if not _is_state(found, read_json(checkpoint / RUN)["step"]):
        raise ValueError(f"{path}: not the state of a run at the step that {RUN} says")
    return TrainerState(**found)


def _is_state(found: dict, step: int) -> bool:
    kinds: dict[str, tuple] = {key: (type(value),) for key, value in vars(TrainerState()).items()}
    kinds |= dict.fromkeys(("epoch", "total_flos"), (int, float)) | {"train_batch_size": (int,)}
    typed = found.keys() == kinds.keys() and all(type(found[x]) in kinds[x] for x in kinds)
    return (
        typed
        and found["global_step"] == step
        and all(
            isinstance(row, dict)
            and "step" in row
            and all(type(x) in (int, float) and abs(x) < 2**53 for x in row.values())
            for row in found["log_history"]
        )
    )


def evaluations(log_history: list[dict]) -> list[dict]:
    """What was logged of evaluations, in their order."""
    return [row for row in log_history if "eval_loss" in row]


def best_of(log_history: list[dict]) -> dict | None:
    """The evaluation with the lowest loss, of equal ones the first; None if no loss is a number."""
    rows = [row for row in evaluations(log_history) if math.isfinite(row["eval_loss"])]
    return min(rows, key=lambda row: row["eval_loss"], default=None)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of a checkpoint."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({cli.shown(str(error))})") from None


def load_optimizer(checkpoint: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the optimizer, and the random numbers as "rng"."""
    path = Path(checkpoint) / OPTIMIZER
    found = load_tensors(path)
    try:
        torch.Generator().set_state(found["rng"])  # raises for what is no generator's state
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({cli.shown(str(error))})") from None
    return found


def check_shapes(path: Path, found: dict[str, torch.Tensor], shapes: dict) -> None:
    """Raise ValueError if tensors have other names or shapes, or are not finite float32 ones."""
    if {name: x.shape for name, x in found.items()} != shapes:
        raise ValueError(f"{path}: of another prompt, method or optimizer")
    if not all(x.dtype == torch.float32 and x.isfinite().all() for x in found.values()):
        raise ValueError(f"{path}: holds NaN or infinite values, or numbers that are not float32")


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and evaluation loss over steps."""
    from matplotlib.figure import Figure  # here: one rank needs it, and once

    figure = Figure()
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        rows = [row for row in log_history if key in row]
        if rows:
            axes.plot([row["step"] for row in rows], [row[key] for row in rows], label=label)
            axes.legend()
    axes.set(xlabel="step", ylabel="loss per token")
    with write_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
