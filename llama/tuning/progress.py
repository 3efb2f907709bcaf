"""How far a run is, on stderr; what it took; its end when a rank is told to stop."""

import time
from collections.abc import Callable, Sized

import peft
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from llama import cli
from llama.tuning.model import soft_prompt_of


class Progress(transformers.TrainerCallback):
    """Show on stderr how far a run is; end it if its prompt becomes NaN or infinite."""

    def __init__(self, model: peft.PeftModel, bar: tqdm) -> None:
        self.tuned, self.bar = model, bar
        self.evaluating: tqdm | None = None  # a bar below the other
        # Tokens of rows, without padding, and the seconds of their steps: all, and those before
        # the last log. Evaluations and checkpoints do not count.
        self.n_tokens: torch.Tensor | int = 0
        self.seconds, self.steps = 0.0, 0
        self.logged: tuple[int, float] = 0, 0.0
        self.since = time.perf_counter()  # when the present step began

    def add(self, attention_mask: torch.Tensor) -> None:
        """Count the tokens of a batch that is trained on, without waiting for its device."""
        self.n_tokens = self.n_tokens + attention_mask.sum()

    def tokens_per_second(self) -> int:
        """The rate since this was asked before."""
        (tokens, seconds), self.logged = self.logged, (int(self.n_tokens), self.seconds)
        return round((self.logged[0] - tokens) / max(self.seconds - seconds, 1e-9))

    def summary(self) -> str:
        """Tell what was trained since the run was started, and how fast."""
        tokens = int(self.n_tokens)
        rate = f", {tokens / self.seconds:,.0f} a second" if tokens else ""
        return f"trained {cli.counted(self.steps, 'step')} on {tokens:,} tokens{rate}"

    def _go_on(self) -> None:
        """Begin the time of a step anew: what went on before it was none."""
        self.since = time.perf_counter()
        self.bar.unpause()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: object, **_: object
    ) -> None:
        # The state of a resumed run holds how often it logged, evaluated and saved: not this one's.
        state.compute_steps(args, state.max_steps)
        self._go_on()

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        self.bar.update()
        self.steps += 1
        if not soft_prompt_of(self.tuned).isfinite().all():  # which waits for the step's end
            raise ValueError(
                f"step {state.global_step}: the prompt has become NaN or infinite; lower --lr, "
                "take --dtype bfloat16 or float32, or check the model: split_model.py --verify"
            )
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

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
        self._go_on()

    def on_save(self, args: object, state: object, control: object, **_: object) -> None:
        self._go_on()

    def on_log(
        self,
        args: object,
        state: TrainerState,
        control: object,
        logs: dict[str, float],
        **_: object,
    ) -> None:
        facts = ", ".join(
            f"{key} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}"
            for key, value in logs.items()
            if key != "epoch"
        )
        cli.say(f"step {state.global_step} of {state.max_steps}: {facts}")


class Interrupted(Exception):
    """An evaluation that is left, as the run is to stop."""


class Interruption(transformers.TrainerCallback):
    """End a run in order when any rank was told to stop: with a checkpoint, all at one step.

    signalled: gives the number of the signal that came to this rank, 0 for none.
    """

    def __init__(self, signalled: Callable[[], int], device: torch.device) -> None:
        self.signalled, self.device = signalled, device
        self.number = 0  # of the signal that the ranks agreed on

    def _agreed(self) -> bool:
        """Whether any rank was told to. Ranks are told at different steps, and ask together."""
        if not self.number:
            number = torch.tensor(self.signalled(), device=self.device)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            self.number = int(number)
        return self.number > 0

    def on_step_end(
        self, args: object, state: object, control: TrainerControl, **_: object
    ) -> None:
        if self._agreed():
            control.should_training_stop = control.should_save = control.should_log = True
            control.should_evaluate = False  # which may take longer than there is time

    def on_prediction_step(self, args: object, state: object, control: object, **_: object) -> None:
        if self._agreed():
            raise Interrupted
