"""Training of a soft prompt: the Trainer on every rank, checkpoints, what a resumed run checks."""

import functools
import math
import sys
from pathlib import Path
from pickle import UnpicklingError

import peft
import torch
import torch.distributed as dist
import transformers
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback, TrainerState

from llama import cli, parallel
from llama.files import hash_of, new_folder, read_json, remove, write_json, write_whole
from llama.tuning.adapter import base_model_facts, differing, load_soft_prompt, save_adapter
from llama.tuning.data import Row, collate
from llama.tuning.model import soft_prompt_of
from llama.tuning.options import TuningOptions

try:  # the Trainer asks for it, and would take our folder of that name for it
    from datasets import Dataset  # noqa: F401
except ImportError as error:
    message = "Hugging Face's package `datasets` is not installed: pip install datasets"
    raise ImportError(message) from error

# The last file written into a checkpoint's folder: what a resumed run must keep, and the SHA-256
# of every other file, by which a whole checkpoint is known before anything in it is unpickled.
RUN = "run.json"
STATE = "trainer_state.json"  # the Trainer's own name


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
            data_collator=functools.partial(collate, pad_id=pad_id),
        )
        self.remove_callback(PrinterCallback)  # which prints on stdout, on every rank
        if self.args.n_gpu > 1 or self.args.device.type != prompt.device.type:
            raise RuntimeError(
                f"the Trainer took {self.args.device} of {self.args.n_gpu} cards, not "
                f"{prompt.device}: CUDA was in use before llama.parallel.setup()"
            )
        self.must_stay = {
            **base_model_facts(model.get_base_model().transformer),
            **options.must_stay(),
            "dataset_sha256": hash_of(Path(options.dataset_path)),
        }
        if any(facts != self.must_stay for facts in parallel.gather_objects(self.must_stay)):
            raise ValueError(
                "the ranks read different models or datasets; give all machines the same files"
            )

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if one is given, and evaluate what came out.

        Raises ValueError for a checkpoint of another model, dataset or other options.
        """
        if checkpoint is not None:
            if changed := differing(read_json(checkpoint / RUN), self.must_stay):
                raise ValueError(
                    f"{checkpoint}: begun with another model, dataset or options ({changed}); give "
                    f"those in its {RUN}, or begin anew in another folder"
                )
            self.state = TrainerState.load_from_json(str(checkpoint / STATE))
        done, steps = self.state.global_step, self.args.max_steps
        with tqdm(total=steps, initial=done, unit="step", disable=not cli.show_bars()) as bar:
            self.add_callback(Watch(soft_prompt_of(self.model), bar))
            if done < steps:
                try:
                    self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
                except UnpicklingError as error:
                    reason = cli.shown(str(error))
                    raise ValueError(f"{checkpoint}: holds more than tensors: {reason}") from None
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

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Write a checkpoint, by rank 0: the whole folder or nothing. The Trainer calls this."""
        if parallel.rank() == 0:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            remove(folder)  # not whole: a resumed run starts from the newest whole one
            with new_folder(folder) as partial:
                save_adapter(self.model, partial)
                self._save_optimizer_and_scheduler(str(partial))
                self._save_rng_state(str(partial))
                self.state.save_to_json(str(partial / STATE))
                write_json(partial / RUN, self.must_stay | {"files": _hashes_of(partial)})
        dist.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Take the prompt of a checkpoint; the Trainer, which calls this, loads the rest."""
        prompt = soft_prompt_of(self.model)
        prompt.data.copy_(load_soft_prompt(resume_from_checkpoint, prompt.shape[1]))


class Watch(transformers.TrainerCallback):
    """Show on stderr how far a run is; end it if its prompt holds no numbers any more."""

    def __init__(self, prompt: torch.nn.Parameter, bar: tqdm) -> None:
        self.prompt, self.bar = prompt, bar

    def on_train_begin(self, args, state, control, **_: object) -> None:
        # A resumed state holds how often the run before it was to log, evaluate and save.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args, state, control, **_: object) -> None:
        self.bar.update()
        if not self.prompt.isfinite().all():
            raise ValueError(
                f"step {state.global_step}: the prompt holds no numbers any more; lower --lr, or "
                "take --dtype bfloat16 or float32"
            )

    def on_log(self, args, state, control, logs: dict[str, float], **_: object) -> None:
        facts = ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if key != "epoch")
        with tqdm.external_write_mode(sys.stderr):  # above the bar, where there is one
            cli.say(f"step {state.global_step} of {state.max_steps}: {facts}")


def check_unused(output_dir: Path) -> None:
    """Raise ValueError if a folder holds anything but what an interrupted write left behind."""
    if output_dir.is_file() or any(output_dir.glob("[!.]*")):
        raise ValueError(f"{output_dir}: in use; choose another folder, or --resume a run in it")


def newest_checkpoint(output_dir: Path) -> Path:
    """Find the newest whole checkpoint of a run; say which newer ones are passed over.

    Raises ValueError if there is none.
    """
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        folder = output_dir / f"checkpoint-{step}"
        try:
            if read_json(folder / RUN).get("files") == _hashes_of(folder):
                return folder
            reason = f"its files are not those that {RUN} lists"
        except (ValueError, OSError) as error:
            reason = str(error)
        cli.say(f"{folder}: passed over, as it is not whole: {reason}")
    raise ValueError(f"{output_dir}: no whole checkpoint to resume; leave --resume away to begin")


def _hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint's folder but RUN itself."""
    return {path.name: hash_of(path) for path in sorted(folder.iterdir()) if path.name != RUN}


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw training and evaluation loss over steps."""
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
