"""Training of a soft prompt: the Trainer on every rank, checkpoints, what a resumed run checks."""

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from llama import cli, parallel
from llama.files import hash_of, naming_refusals, new_folder, remove, sha256_of, write_whole
from llama.tuning.adapter import base_model_facts, save_adapter
from llama.tuning.card import model_card
from llama.tuning.data import Dataset, LengthGrouped, TokenizedDataset, collate, column, own_rows
from llama.tuning.model import encoder_of, soft_prompt_of
from llama.tuning.options import TuningOptions
from llama.tuning.progress import Interrupted, Interruption, Progress
from llama.tuning.run_folder import (
    BEST,
    OPTIMIZER,
    PICTURE,
    RUN,
    STATE,
    TRAINED,
    best_of,
    check_same_run,
    check_shapes,
    evaluations,
    load_optimizer,
    load_tensors,
    plot_losses,
    read_state,
    write_run,
)
from llama.tuning.samples import Samples

LARGEST_LOGGED = 36.0  # loss whose perplexity is written: more are no numbers of a JSON file


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
        learning_rate=options.highest_lr,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type=options.lr_scheduler,
        max_grad_norm=options.max_grad_norm,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=options.report_to if parallel.rank() == 0 else "none",
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
        samples: Samples | None = None,
    ) -> None:
        rows = options.batch_size * parallel.n_replicas()
        options, prompt = dataclasses.replace(options, batch_size=rows), soft_prompt_of(model)
        if options.report_to == "wandb":  # which would write into the present folder
            os.environ.setdefault("WANDB_DIR", options.output_dir)
        super().__init__(
            model=model,
            args=training_arguments(options, len(train_rows), eval_rows is not None, prompt.device),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            data_collator=functools.partial(collate, pad_id=pad_id),
        )
        self.options, self.chat_template = options, data.chat_template
        self.best: torch.Tensor | None = None  # the prompt with the lowest evaluation loss so far
        self.order = LengthGrouped(column(train_rows, "length"), options.batch_size, options.seed)
        cli.say(f"{options.dataset_path}: {self.order.padding()}")
        self.remove_callback(PrinterCallback)  # which prints on stdout, on every rank
        if samples is not None:
            self.add_callback(samples)
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
        start = {name: sha256_of(x.cpu()) for name, x in encoder_of(model).state_dict().items()}
        parallel.check_same(
            [self.run_facts, start],
            "the ranks read different models or datasets, or start from different prompts; give "
            "all machines the same files and flags",
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
        """Train to the end, from a checkpoint if one is given; evaluate as often as is asked.

        Raises ValueError for a checkpoint of another model, dataset or other options, and
        cli.Stopped, when a checkpoint has been saved, if any rank is told to stop.
        """
        out = self.args.output_dir
        resumed = checkpoint and (checkpoint.name, hash_of(checkpoint / RUN))
        parallel.check_same(
            resumed,
            f"{out}: the ranks found different checkpoints to go on from; "
            "copy the folder of the first machine to all others",
        )
        if checkpoint is not None:
            check_same_run(checkpoint, self.run_facts, self.options.must_stay())
            self.state = read_state(checkpoint)
        done, steps = self.state.global_step, self.args.max_steps
        # At step 0 it is the loss before tuning. A run that was stopped may have left one out.
        due = (done % self.args.eval_steps == 0 or done >= steps) and self.eval_dataset is not None
        due = due and done not in {row["step"] for row in evaluations(self.state.log_history)}
        promise = "stopping after this step, with a checkpoint; once more ends at once"
        with (
            cli.noting_signals(promise) as signalled,
            cli.progress_bar("tuning", steps, "step", done) as bar,
        ):
            self.progress = Progress(self.model, bar)
            interruption = Interruption(signalled, self.args.device)
            self.add_callback(self.progress)
            self.add_callback(interruption)
            if done < steps and not self._out_of_patience():
                self.args.eval_on_start = due
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            else:
                self._load_from_checkpoint(str(checkpoint))
                if due:
                    self.evaluate()
        if interruption.number:
            raise cli.Stopped(
                interruption.number,
                f"{out}: stopped at step {self.state.global_step} of {steps}; the same command "
                "with --resume goes on",
            )

    def _run_epoch(self, **of_epoch: object) -> None:
        """Train for an epoch, unless what was evaluated before it ends the run."""
        if not self.control.should_training_stop:
            super()._run_epoch(**of_epoch)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *more: object
    ) -> torch.Tensor:
        """Run a batch forward and back. The Trainer calls this."""
        self.progress.add(inputs["attention_mask"])
        return super().training_step(model, inputs, *more)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what the Trainer found, and what follows from it. The Trainer calls this."""
        loss = logs.get("eval_loss", math.inf)
        if loss < LARGEST_LOGGED:
            logs = {"eval_loss": loss, "eval_perplexity": math.exp(loss)} | logs
        if "loss" in logs:
            logs["tokens_per_second"] = self.progress.tokens_per_second()
        super().log(logs, start_time)

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Evaluate; keep the prompt if it is the best so far, end the run if none is for long."""
        try:
            metrics = super().evaluate(*args, **kwargs)
        except Interrupted:
            self.control.should_training_stop = self.control.should_save = True
            self.control.should_evaluate = False  # nor at the end of the epoch
            return {}
        best = best_of(self.state.log_history)
        if best and best["step"] == self.state.global_step:
            self.best = soft_prompt_of(self.model).detach().cpu().clone()
        if self._out_of_patience() and not self.control.should_training_stop:
            cli.say(
                f"step {self.state.global_step}: no better evaluation in {self.options.patience}: "
                "ends here (--patience)"
            )
            self.control.should_training_stop = self.control.should_save = True
        return metrics

    def _out_of_patience(self) -> bool:
        """Whether the last --patience evaluations were no better than one before them."""
        rows, best = evaluations(self.state.log_history), best_of(self.state.log_history)
        since = len(rows) - (1 + rows.index(best) if best else 0)
        return 0 < self.options.patience <= since

    def save(self, folder: Path) -> None:
        """Write, by rank 0, the best prompt, the state of the run and the picture of its losses.

        Without evaluations it is the last one.
        """
        history = self.state.log_history
        if best := best_of(history):
            cli.say(f"best at step {best['step']}: eval_loss {best['eval_loss']:.4g}; saved")
        if parallel.rank() == 0:
            n_rows = len(self.train_dataset), len(self.eval_dataset or ())
            card = model_card(self.options, self.run_facts, n_rows, history)
            with naming_refusals(folder):
                save_adapter(self.model, folder, self.chat_template, self.best, card)
                with write_whole(folder / STATE) as partial:
                    self.state.save_to_json(str(partial))
                plot_losses(history, folder / PICTURE)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Write a checkpoint, by rank 0: the whole folder or nothing. The Trainer calls this."""
        if parallel.rank() == 0:
            step = self.state.global_step
            folder = Path(self.args.output_dir) / f"checkpoint-{step}"
            remove(folder)  # not whole: a resumed run starts from the newest whole one
            with naming_refusals(folder), new_folder(folder) as partial:
                save_adapter(self.model, partial, self.chat_template)
                save_file(encoder_of(self.model).state_dict(), partial / TRAINED)
                if self.best is not None:
                    save_file({"prompt_embeddings": self.best}, partial / BEST)
                self._save_optimizer(partial / OPTIMIZER)
                self.state.save_to_json(str(partial / STATE))
                write_run(partial, step, self.run_facts)
        dist.barrier()  # or the others could be steps ahead of a rank 0 that then cannot write

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Take from a checkpoint what is trained. The Trainer calls this."""
        encoder, folder = encoder_of(self.model), Path(resume_from_checkpoint)
        found, state = load_tensors(folder / TRAINED), encoder.state_dict()
        check_shapes(folder / TRAINED, found, {name: x.shape for name, x in state.items()})
        encoder.load_state_dict(found)
        if best_of(self.state.log_history):
            best = load_tensors(folder / BEST)
            shape = soft_prompt_of(self.model).shape
            check_shapes(folder / BEST, best, {"prompt_embeddings": shape})
            self.best = best["prompt_embeddings"]

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
        found, state = load_optimizer(checkpoint), self.optimizer.state_dict()
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
        torch.set_rng_state(load_optimizer(checkpoint)["rng"])
