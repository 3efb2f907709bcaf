"""Training of a soft prompt: the Trainer on every rank, checkpoints, what a resumed run checks."""

import math
import re
from hashlib import sha256
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import transformers
from matplotlib.figure import Figure
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_pt_utils import safe_globals

from llama import cli, parallel
from llama.files import new_folder, read_json, remove, write_json, write_whole
from llama.tuning.adapter import FILES, changed_facts, differing, load_soft_prompt, save_adapter
from llama.tuning.data import Collator, Row
from llama.tuning.model import set_soft_prompt, soft_prompt_of
from llama.tuning.options import TuningOptions

try:  # the Trainer asks for it, and would take our folder of that name for it
    from datasets import Dataset  # noqa: F401
except ImportError as error:
    message = "Hugging Face's package `datasets` is not installed: pip install datasets"
    raise ImportError(message) from error

RUN = "run.json"  # beside a checkpoint: what a resumed run must keep
STATE = "trainer_state.json"  # this and the next three are the Trainer's own names
TENSOR_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
CHECKPOINT_FILES = (*FILES, RUN, STATE, *TENSOR_FILES)


def training_arguments(
    options: TuningOptions, n_rows: int, evaluate: bool, device: torch.device
) -> transformers.TrainingArguments:
    """Make the Trainer's arguments from our options."""
    batches = math.ceil(n_rows / options.batch_size)
    steps_an_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    steps = max(1, math.ceil(options.num_epochs * steps_an_epoch))
    return transformers.TrainingArguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps if options.max_steps > 0 else steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.lr,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=options.lr_scheduler,
        max_grad_norm=options.max_grad_norm,
        eval_strategy="steps" if evaluate else "no",
        eval_on_start=evaluate,  # the loss before tuning, to compare with
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to="none",
    )


class PromptTrainer(transformers.Trainer):
    """Run the Trainer on every rank, on the same batches; rank 0 alone writes."""

    def __init__(
        self,
        model: peft.PeftModel,
        options: TuningOptions,
        train_rows: list[Row],
        eval_rows: list[Row] | None,
        pad_id: int,
    ) -> None:
        prompt = soft_prompt_of(model)
        super().__init__(
            model=model,
            args=training_arguments(options, len(train_rows), eval_rows is not None, prompt.device),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=Collator(pad_id),
            callbacks=[Watch(prompt)],
        )
        self.remove_callback(PrinterCallback)  # which prints on stdout, on every rank
        if self.args.n_gpu > 1 or self.args.device.type != prompt.device.type:
            raise RuntimeError(
                f"the Trainer took {self.args.device} of {self.args.n_gpu} cards, not "
                f"{prompt.device}: CUDA was in use before llama.parallel.setup()"
            )
        self.transformer = model.get_base_model().transformer
        self.must_stay = options.must_stay() | {
            "dataset_sha256": sha256(Path(options.dataset_path).read_bytes()).hexdigest(),
            "dtype": str(self.transformer.norm.weight.dtype),
        }
        if any(facts != self.must_stay for facts in parallel.gather_objects(self.must_stay)):
            raise ValueError("the ranks read different datasets; give all machines the same one")

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if one is given, and evaluate what came out."""
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
            self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        if self.state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
        evaluated = {row["step"] for row in self.state.log_history if "eval_loss" in row}
        if self.eval_dataset is not None and self.state.global_step not in evaluated:
            self.evaluate()

    def save(self, folder: Path) -> None:
        """Write, by rank 0, the adapter, the state of the run and the picture of its losses."""
        if parallel.rank() == 0:
            save_adapter(self.model, folder)
            with write_whole(folder / STATE) as partial:
                self.state.save_to_json(str(partial))
            plot_losses(self.state.log_history, folder / "loss.png")

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Raise ValueError for a checkpoint of another model, prompt length or other options."""
        n_tokens, dim = soft_prompt_of(self.model).shape
        n_found = len(load_soft_prompt(checkpoint, dim))
        if n_found != n_tokens:
            raise ValueError(
                f"{checkpoint}: {n_found} virtual tokens, but --num_virtual_tokens is {n_tokens}"
            )
        if changed := changed_facts(checkpoint, self.transformer):
            raise ValueError(f"{checkpoint}: trained on another model (it differs in {changed})")
        if changed := differing(read_json(checkpoint / RUN), self.must_stay):
            raise ValueError(
                f"{checkpoint}: was begun with another {changed}; give the same as in "
                f"{checkpoint / RUN}, or begin anew in another folder"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Write a checkpoint, by rank 0: the whole folder or nothing. The Trainer calls this."""
        if parallel.rank() == 0:
            self.store_flos()
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            remove(folder)  # not whole, or this run would have gone on from it
            with new_folder(folder) as partial:
                save_adapter(self.model, partial)
                self._save_optimizer_and_scheduler(str(partial))
                self._save_rng_state(str(partial))
                self.state.save_to_json(str(partial / STATE))
                write_json(partial / RUN, self.must_stay)
        dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Take the prompt of a checkpoint; the Trainer, which calls this, loads the rest."""
        dim = soft_prompt_of(self.model).shape[1]
        set_soft_prompt(self.model, load_soft_prompt(resume_from_checkpoint, dim))


class Watch(transformers.TrainerCallback):
    """Say on stderr what is logged; end a run whose prompt holds no numbers any more."""

    def __init__(self, prompt: torch.nn.Parameter) -> None:
        self.prompt = prompt

    def on_train_begin(self, args, state, control, **_: object) -> None:
        # A resumed state holds how often the run before it was to log, evaluate and save.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **_: object) -> None:
        if not self.prompt.isfinite().all():
            raise ValueError(
                f"step {state.global_step}: the prompt holds values that are no numbers any more; "
                "lower --lr, or take --dtype bfloat16 or float32"
            )

    def on_log(self, args, state, control, logs: dict[str, float], **_: object) -> None:
        facts = ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if key != "epoch")
        cli.say(f"step {state.global_step} of {state.max_steps}: {facts}")


def check_unused(output_dir: Path) -> None:
    """Raise ValueError if a folder holds anything but what an interrupted write left behind."""
    if output_dir.exists() and (
        not output_dir.is_dir() or any(path.name[0] != "." for path in output_dir.iterdir())
    ):
        raise ValueError(
            f"{output_dir}: holds another run; choose another folder, or --resume that run"
        )


def newest_checkpoint(output_dir: Path) -> Path:
    """Find the newest whole checkpoint of an interrupted run, and read its files once.

    Raises ValueError if there is none, or if it is damaged.
    """
    numbered = {
        int(path.name.split("-")[1]): path
        for path in output_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", path.name)
        and all((path / name).is_file() for name in CHECKPOINT_FILES)
    }
    if not numbered:
        raise ValueError(
            f"{output_dir}: no whole checkpoint to resume; leave --resume away to begin"
        )
    newest = numbered[max(numbered)]
    for name in CHECKPOINT_FILES:
        if name.endswith(".json"):
            read_json(newest / name)
    for name in TENSOR_FILES:
        try:
            with safe_globals():  # as the Trainer reads them: no code in them can run
                torch.load(newest / name, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the bytes provoke
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{newest / name}: damaged ({reason}); remove {newest} to resume from the one "
                "before"
            ) from None
    return newest


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and evaluation loss over steps."""
    figure = Figure()
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[key]) for row in log_history if key in row]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    if axes.lines:
        axes.legend()
    with write_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
