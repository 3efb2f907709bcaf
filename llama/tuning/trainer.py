"""Training of a soft prompt: the Trainer on every rank, checkpoints, what a resumed run checks."""

import dataclasses
import functools
import math
from collections.abc import Sized
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerState

from llama import cli, parallel
from llama.files import (
    hash_of,
    naming_refusals,
    new_folder,
    read_json,
    remove,
    write_json,
    write_whole,
)
from llama.tokenizer import TEMPLATE
from llama.tuning.adapter import BASE, base_model_facts, differing, save_adapter
from llama.tuning.data import Dataset, LengthGrouped, TokenizedDataset, collate, column, own_rows
from llama.tuning.model import encoder_of, soft_prompt_of
from llama.tuning.options import TuningOptions

# The last file written into a checkpoint's folder: its step, what a resumed run must keep, and the
# SHA-256 of every other file, by which a whole checkpoint is known before it is read.
RUN = "run.json"
PICTURE = "loss.png"
STATE = "trainer_state.json"  # the Trainer's own name
OPTIMIZER = "optimizer.safetensors"
TRAINED = "trained.safetensors"


def training_arguments(
    options: TuningOptions, n_rows: int, evaluate: bool, device: torch.device
) -> TrainingArguments:
    """Make the Trainer's arguments from our options."""
    batches = math.ceil(n_rows / options.batch_size)
    steps_an_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    # Counted here, for the bar and the schedule need it: num_train_epochs rounds otherwise.
    steps = max(1, math.ceil(options.num_epochs * steps_an_epoch))
    return TrainingArguments(
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
    """Run the Trainer on every rank, on the same batches; rank 0 alone writes.

    A batch is of all replicas: each computes the loss of its rows, and their gradients are summed.
    """

    def __init__(
        self,
        model: peft.PeftModel,
        options: TuningOptions,
        data: TokenizedDataset,
        train_rows: Dataset,
        eval_rows: Dataset | None,
        pad_id: int,
    ) -> None:
        rows = options.batch_size * parallel.n_replicas()
        options, prompt = dataclasses.replace(options, batch_size=rows), soft_prompt_of(model)
        super().__init__(
            model=model,
            args=training_arguments(options, len(train_rows), eval_rows is not None, prompt.device),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=functools.partial(collate, pad_id=pad_id),
        )
        self.chat_template = data.chat_template
        self.order = LengthGrouped(column(train_rows, "length"), options.batch_size, options.seed)
        cli.say(f"{options.dataset_path}: {self.order.padding()}")
        self.remove_callback(PrinterCallback)  # which prints on stdout, on every rank
        if self.args.n_gpu > 1 or self.args.device.type != prompt.device.type:
            raise RuntimeError(
                f"the Trainer took {self.args.device} of {self.args.n_gpu} cards, not "
                f"{prompt.device}: CUDA was in use before llama.parallel.setup()"
            )
        self.run_facts = {
            **base_model_facts(model.get_base_model().transformer),
            **options.must_stay(),
            **data.hashes,
        }
        if any(facts != self.run_facts for facts in parallel.gather_objects(self.run_facts)):
            raise ValueError(
                "the ranks read different models or datasets; give all machines the same files"
            )

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthGrouped:
        """The order of the rows. The Trainer calls this."""
        return self.order

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | float | None = None,
    ) -> Any:
        """The loss of a batch, the rows of all replicas together. The Trainer calls this.

        It has counted the learned tokens of all rows. The backward pass is that of the own rows.
        """
        assert num_items_in_batch is not None
        own, has_any = own_rows(inputs)
        count = num_items_in_batch if has_any else math.inf  # which makes a loss and gradient of 0
        loss, outputs = super().compute_loss(model, own, True, count)
        parallel.sum_over_replicas(loss.detach())  # the same numbers, without the way back
        return (loss, outputs) if return_outputs else loss

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if one is given, and evaluate what came out.

        Raises ValueError for a checkpoint of another model, dataset or other options.
        """
        resumed = checkpoint and (checkpoint.name, hash_of(checkpoint / RUN))
        if len(set(parallel.gather_objects(resumed))) > 1:
            raise ValueError(
                f"{self.args.output_dir}: the ranks found different checkpoints to go on from; "
                "copy the folder of the first machine to all others"
            )
        if checkpoint is not None:
            if changed := differing(read_json(checkpoint / RUN), self.run_facts):
                of_all = " (batch_size: of all replicas together)" * ("batch_size" in changed)
                raise ValueError(
                    f"{checkpoint}: begun with another model, dataset or options ({changed}); give "
                    f"those in its {RUN}{of_all}, or begin anew in another folder"
                )
            self.state = read_state(checkpoint)
        done, steps = self.state.global_step, self.args.max_steps
        with cli.progress_bar("tuning", steps, "step", done) as bar:
            self.add_callback(Progress(self.model, bar))
            if done < steps:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:
                self._load_from_checkpoint(str(checkpoint))
            evaluated = {row["step"] for row in self.state.log_history if "eval_loss" in row}
            if self.eval_dataset is not None and self.state.global_step not in evaluated:
                self.evaluate()

    def save(self, folder: Path) -> None:
        """Write, by rank 0, the adapter, the state of the run and the picture of its losses."""
        if parallel.rank() == 0:
            with naming_refusals(folder):
                save_adapter(self.model, folder, self.chat_template)
                with write_whole(folder / STATE) as partial:
                    self.state.save_to_json(str(partial))
                plot_losses(self.state.log_history, folder / PICTURE)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Write a checkpoint, by rank 0: the whole folder or nothing. The Trainer calls this."""
        if parallel.rank() == 0:
            step = self.state.global_step
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            remove(folder)  # not whole: a resumed run starts from the newest whole one
            with naming_refusals(folder), new_folder(folder) as partial:
                save_adapter(self.model, partial, self.chat_template)
                save_file(encoder_of(self.model).state_dict(), partial / TRAINED)
                self._save_optimizer(partial / OPTIMIZER)
                self.state.save_to_json(str(partial / STATE))
                files = {"step": step, "files": _hashes_of(partial)}
                write_json(partial / RUN, self.run_facts | files)
        dist.barrier()  # or the others could be steps ahead of a rank 0 that then cannot write

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Take from a checkpoint what is trained. The Trainer calls this."""
        encoder, path = encoder_of(self.model), Path(resume_from_checkpoint) / TRAINED
        found, state = _load_tensors(path), encoder.state_dict()
        check_shapes(path, found, {name: x.shape for name, x in state.items()})
        encoder.load_state_dict(found)

    def _save_optimizer(self, path: Path) -> None:
        """Write what the optimizer remembers, and the random numbers that order the rows.

        As plain tensors, which cannot run code. The schedule follows from the step.
        """
        of_parameters = self.optimizer.state_dict()["state"]
        tensors = {f"{i}.{key}": x for i, of in of_parameters.items() for key, x in of.items()}
        save_file(tensors | {"rng": torch.get_rng_state()}, path)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take from a checkpoint what _save_optimizer wrote. The Trainer calls this."""
        if checkpoint is None:
            return
        step, path = self.state.global_step, Path(checkpoint) / OPTIMIZER
        found, state = _load_optimizer(path), self.optimizer.state_dict()
        trained = [x for group in self.optimizer.param_groups for x in group["params"]]
        keys = {"step": (), "exp_avg": None, "exp_avg_sq": None}
        shapes = {
            f"{i}.{key}": x.shape if shape is None else shape
            for i, x in enumerate(trained)
            for key, shape in keys.items()
        }
        check_shapes(path, {name: x for name, x in found.items() if name != "rng"}, shapes)
        if any(found[f"{i}.step"] != step for i in range(len(trained))):
            raise ValueError(f"{path}: not of step {step}")
        of = {i: {key: found[f"{i}.{key}"] for key in keys} for i in range(len(trained))}
        self.optimizer.load_state_dict(state | {"state": of})
        # The schedule is not stored: from the step before, one step of it sets this step's rate.
        before = {"last_epoch": step - 1, "_step_count": step}
        self.lr_scheduler.load_state_dict(self.lr_scheduler.state_dict() | before)
        self.lr_scheduler.step()

    def _load_rng_state(self, checkpoint: str) -> None:
        """Take the random numbers of a checkpoint. The Trainer calls this."""
        torch.set_rng_state(_load_optimizer(Path(checkpoint) / OPTIMIZER)["rng"])


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of a checkpoint."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: damaged ({cli.shown(str(error))})") from None


def _load_optimizer(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that _save_optimizer wrote."""
    found = _load_tensors(path)
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


class Progress(transformers.TrainerCallback):
    """Show on stderr how far a run is; end it if its prompt becomes NaN or infinite."""

    def __init__(self, model: peft.PeftModel, bar: tqdm) -> None:
        self.tuned, self.bar = model, bar
        self.evaluating: tqdm | None = None  # a bar below the other

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, **_: object
    ) -> None:
        # The state of a resumed run holds how often it logged, evaluated and saved: not this one's.
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.bar.update()
        if not soft_prompt_of(self.tuned).isfinite().all():
            raise ValueError(
                f"step {state.global_step}: the prompt has become NaN or infinite; lower --lr, "
                "take --dtype bfloat16 or float32, or check the model: split_model.py --verify"
            )

    def on_prediction_step(
        self, args: object, state: object, control: object, eval_dataloader: Sized, **_: object
    ) -> None:
        if self.evaluating is None:
            self.evaluating = cli.progress_bar("evaluating", len(eval_dataloader), "batch")
        self.evaluating.update()

    def on_evaluate(self, args: object, state: object, control: object, **_: object) -> None:
        if self.evaluating is not None:
            self.evaluating.close()
            self.evaluating = None
        self.bar.unpause()  # the time of an evaluation is no step's

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: object,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        facts = ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if key != "epoch")
        cli.say(f"step {state.global_step} of {state.max_steps}: {facts}")


def check_unused(output_dir: Path) -> None:
    """Raise ValueError if a folder holds what a run would write; other files may lie there."""
    if output_dir.is_file():
        raise ValueError(f"{output_dir}: is a file; choose a folder for --output_dir")
    ours = (BASE, STATE, PICTURE, TEMPLATE, "adapter_*", "checkpoint-*")
    found = sorted({path.name for name in ours for path in output_dir.glob(name)})
    if found:
        raise ValueError(
            f"{output_dir}: in use: holds {cli.first_few(found)}; choose another folder, or "
            "--resume a run in it"
        )


def newest_checkpoint(output_dir: Path) -> Path:
    """Find the newest whole checkpoint of a run; say which newer ones are passed over.

    Raises ValueError if there is none.
    """
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
    raise ValueError(f"{output_dir}: no whole checkpoint to resume; leave --resume away to begin")


def _hashes_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint's folder but RUN itself."""
    return {path.name: hash_of(path) for path in sorted(folder.iterdir()) if path.name != RUN}


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
