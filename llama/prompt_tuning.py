"""Prompt tuning over the sharded model: what PEFT and the Trainer see; adapters in and out."""

import hashlib
import json
import math
import re
import shutil
import warnings
from pathlib import Path

import peft
import torch
import torch.distributed as dist
import transformers
from fairscale.nn.model_parallel.cross_entropy import vocab_parallel_cross_entropy
from safetensors.torch import load_file
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_pt_utils import safe_globals

from llama import parallel
from llama.checkpoint import load_plain
from llama.data import IGNORE
from llama.hf import hf_config
from llama.manifest import read_json_object
from llama.model import Transformer
from llama.reshard import fsync

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names
BASE = "base_model.json"  # beside an adapter: which model it was trained on
RUN = "run.json"  # beside a checkpoint: the options that a resumed run must keep
MUST_STAY = (  # or a resumed run would not go on with what it began
    *("batch_size", "gradient_accumulation_steps", "lr", "warmup_steps", "lr_scheduler"),
    *("max_seq_len", "val_set_size", "train_on_inputs", "seed"),
)
CHECKPOINT_FILES = (  # what a run needs to go on as if it had not stopped
    *(CONFIG, WEIGHTS, BASE, RUN),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
)
SCHEDULES = (  # those of transformers that need no settings of their own
    *("cosine", "linear", "polynomial", "inverse_sqrt", "cosine_with_restarts"),
    *("constant", "constant_with_warmup"),
)
FLOAT16_GRADIENT_SCALE = 1024.0
PROMPT_KEYS = ("prompt_embeddings", "embedding.weight")  # PEFT's, and that of its module's state


class LlamaForPromptTuning(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A thin face over our Transformer: a loss, and the config that PEFT asks for. No weights.

    PEFT wants a GenerationMixin; what generates is LLaMA.generate.
    """

    config_class = transformers.LlamaConfig

    def __init__(self, transformer: Transformer, name_or_path: str = "") -> None:
        super().__init__(hf_config(transformer.args, name_or_path=name_or_path))
        self.transformer = transformer
        self.gradient_scale = 1.0

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **_: object,
    ) -> CausalLMOutput:
        """The mean loss of labelled tokens, or without labels the logits (bsz, seqlen, vocab_size).

        num_items_in_batch, which the Trainer gives under gradient accumulation, replaces the number
        of labelled tokens as what the sum is divided by. All ranks return the same loss.
        """
        h = self.transformer.hidden_states(input_ids, inputs_embeds, attention_mask)
        if labels is None:
            return CausalLMOutput(logits=self.transformer.gather_logits(h))
        targets = labels[:, 1:]
        learned = targets != IGNORE
        # Only learned positions get logits, and each rank makes those of its part of the
        # vocabulary: tokens × vocab_size numbers are never anywhere together.
        logits = self.transformer.local_logits(h[:, :-1][learned]).float()
        losses = vocab_parallel_cross_entropy(logits, targets[learned])
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
        return CausalLMOutput(loss=_ScaleGradient.apply(loss, self.gradient_scale))


class _ScaleGradient(torch.autograd.Function):
    """The value itself, but its gradient is multiplied on the way back."""

    @staticmethod
    def forward(ctx, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return value.clone()  # the Trainer changes the loss in place

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.scale, None


def add_soft_prompt(
    transformer: Transformer, num_virtual_tokens: int, init_ids: list[int] | None, ckpt_dir: str
) -> peft.PeftModel:
    """The model with a trainable prompt in front, in float32; all else is frozen.

    The prompt starts as the embeddings of init_ids, cut or repeated to its length; without them at
    random, the same on all ranks, as large as the model's own embeddings.
    """
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=num_virtual_tokens,
    )
    with warnings.catch_warnings():  # peft 0.21 uses a name that transformers 5.23 warns of
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(LlamaForPromptTuning(transformer, str(ckpt_dir)), config)
    device = transformer.norm.weight.device
    if init_ids is None:
        init_ids = torch.randint(transformer.args.vocab_size, (num_virtual_tokens,)).tolist()
    repeated = (init_ids * num_virtual_tokens)[:num_virtual_tokens]
    with torch.no_grad():
        prompt = transformer.tok_embeddings(torch.tensor([repeated], device=device))[0]
    set_soft_prompt(model, prompt)
    if transformer.norm.weight.dtype == torch.float16:
        # float16 has no room for small gradients: they pass through the model enlarged.
        model.get_base_model().gradient_scale = FLOAT16_GRADIENT_SCALE
        soft_prompt_of(model).register_hook(lambda gradient: gradient / FLOAT16_GRADIENT_SCALE)
    if dist.get_world_size() > 1:
        # All ranks have the same gradient; where their cards round apart, rank 0's holds.
        soft_prompt_of(model).register_post_accumulate_grad_hook(
            lambda prompt: dist.broadcast(prompt.grad, src=0)
        )
    return model


def set_soft_prompt(model: peft.PeftModel, prompt: torch.Tensor) -> None:
    """Put values (num_virtual_tokens, dim) into the trainable prompt."""
    with torch.no_grad():
        soft_prompt_of(model).copy_(prompt)


def soft_prompt_of(model: peft.PeftModel) -> torch.nn.Parameter:
    """The trainable prompt, (num_virtual_tokens, dim) float32."""
    return model.prompt_encoder["default"].embedding.weight


def load_soft_prompt(path: str | Path, dim: int) -> torch.Tensor:
    """A tuned prompt (num_virtual_tokens, dim) float32 from whatever it was saved as.

    A PEFT folder, its adapter_model.safetensors, or an old .bin or .pth file; no code in it can
    run. Raises FileNotFoundError, and ValueError for another kind of adapter or another dim.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter; train one with ft_main.py")
    config = (path if path.is_dir() else path.parent) / CONFIG
    if config.is_file():
        kind = read_json_object(config).get("peft_type")
        if kind not in ("PROMPT_TUNING", "P_TUNING"):
            raise ValueError(f"{config}: an adapter of type {kind}; only prompt tuning fits here")
    if path.is_dir():
        names = (WEIGHTS, "adapter_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no {' or '.join(names)} in this folder")
        path = found[0]
    try:
        state = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except Exception as error:  # the libraries raise whatever the bytes provoke
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not an adapter, or damaged: {reason}") from None
    keys = [key for key in PROMPT_KEYS if isinstance(state, dict) and key in state]
    if not keys or not isinstance(state[keys[0]], torch.Tensor):
        raise ValueError(f"{path}: no tensor {' or '.join(PROMPT_KEYS)} in it, so no tuned prompt")
    prompt = state[keys[0]]
    if prompt.dim() != 2 or prompt.shape[1] != dim or not len(prompt):
        raise ValueError(
            f"{path}: a prompt of shape {tuple(prompt.shape)}, but the model's dim is {dim}: it "
            "was trained on another model"
        )
    if not prompt.isfinite().all():
        raise ValueError(
            f"{path}: the prompt holds values that are no numbers; its training failed"
        )
    return prompt.float()


def warn_of_another_model(path: str | Path, transformer: Transformer) -> None:
    """Say so if the file beside an adapter tells that it was trained on another model."""
    path = Path(path)
    base = (path if path.is_dir() else path.parent) / BASE
    if base.is_file():
        changed = _differing(read_json_object(base), base_model_facts(transformer))
        if changed:
            parallel.say(f"{path}: was trained on another model (it differs in {changed})")


def save_adapter(model: peft.PeftModel, folder: str | Path) -> None:
    """Write a standard PEFT adapter into a folder, each file whole or not at all."""
    folder = Path(folder)
    partial = folder / ".adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    # False: there are no embedding layers to save, and PEFT need not ask a hub about them.
    model.save_pretrained(partial, save_embedding_layers=False)
    base = base_model_facts(model.get_base_model().transformer)
    (partial / BASE).write_text(json.dumps(base, indent=2) + "\n")
    for path in partial.iterdir():
        fsync(path)
        path.replace(folder / path.name)
    partial.rmdir()


def base_model_facts(transformer: Transformer) -> dict:
    """What tells one model from another, however many ranks hold it."""
    norms = [block.ffn_norm.weight for block in transformer.layers] + [transformer.norm.weight]
    content = torch.stack([norm.float().cpu() for norm in norms]).numpy().tobytes()
    facts = vars(transformer.args) | {"dtype": str(norms[0].dtype)}
    facts["norms_sha256"] = hashlib.sha256(content).hexdigest()
    return {key: value for key, value in facts.items() if value is not None}


def _differing(before: dict, now: dict) -> str:
    """The keys whose values have changed; a model in another dtype is still the same model."""
    apart = {"dtype", "norms_sha256"} if before.get("dtype") != now["dtype"] else set()
    return ", ".join(key for key in now if key not in apart and before.get(key) != now[key])


def check_options(options: dict) -> None:
    """Raise ValueError, naming the flag, for what a run cannot be trained with."""
    ones = ("num_virtual_tokens", "batch_size", "gradient_accumulation_steps")
    ones += ("eval_steps", "save_steps", "logging_steps")
    zeros = ("warmup_steps", "max_grad_norm", "seed")
    for smallest, names in ((1, ones), (0, zeros)):
        parallel.check_at_least(smallest, **{name: options[name] for name in names})
    for name in ("lr", "num_epochs"):
        if not 0 < options[name] < float("inf"):
            raise ValueError(f"--{name} must be above 0, not {options[name]}")
    if options["max_steps"] != -1 and options["max_steps"] < 1:
        raise ValueError(f"--max_steps must be at least 1, or -1 to leave it to --num_epochs, "
                         f"not {options['max_steps']}")  # fmt: skip
    if options["seed"] >= 2**32:
        raise ValueError(f"--seed must be below 2**32, not {options['seed']}")
    if options["num_virtual_tokens"] >= options["max_seq_len"]:
        raise ValueError(
            f"--num_virtual_tokens {options['num_virtual_tokens']} must leave room in "
            f"--max_seq_len {options['max_seq_len']}"
        )
    if options["lr_scheduler"] not in SCHEDULES:
        raise ValueError(
            f"--lr_scheduler must be one of {', '.join(SCHEDULES)}, not {options['lr_scheduler']!r}"
        )


def steps_of(n_rows: int, batch_size: int, accumulation: int, num_epochs: float) -> int:
    """Steps in so many passes over the data."""
    batches = math.ceil(n_rows / batch_size)
    return max(1, math.ceil(num_epochs * math.ceil(batches / accumulation)))


def check_unused(output_dir: Path) -> None:
    """Raise ValueError if a folder holds more than the data of a run that came to nothing."""
    if output_dir.exists() and (
        not output_dir.is_dir()
        or any(p.name != "tokenized" and p.name[0] != "." for p in output_dir.iterdir())
    ):
        raise ValueError(
            f"{output_dir}: holds another run; choose another folder, or --resume that run"
        )


def newest_checkpoint(output_dir: Path) -> Path:
    """The newest whole checkpoint of an interrupted run, its files read once.

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
            read_json_object(newest / name)
        elif name != WEIGHTS:
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


class Watch(transformers.TrainerCallback):
    """Ends a run that has gone astray, on every rank, and keeps to the steps asked for."""

    def __init__(self, prompt: torch.nn.Parameter) -> None:
        self.prompt = prompt

    def on_train_begin(self, args, state, control, **_: object) -> None:
        # A resumed state brings those of the run before.
        for name in ("eval_steps", "save_steps", "logging_steps"):
            setattr(state, name, getattr(args, name))

    def on_step_end(self, args, state, control, **_: object) -> None:
        if not self.prompt.isfinite().all():
            raise ValueError(
                f"step {state.global_step}: the prompt holds values that are no numbers any more; "
                "lower --lr, or take --dtype bfloat16 or float32"
            )


class Reporter(transformers.TrainerCallback):
    """Tells what is logged on stderr, where there is no progress bar to do it."""

    def on_log(self, args, state, control, logs: dict[str, float], **_: object) -> None:
        facts = ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if key != "epoch")
        parallel.say(f"step {state.global_step} of {state.max_steps}: {facts}")


class PromptTrainer(transformers.Trainer):
    """The Trainer, of which every rank runs one on the same batches, and rank 0 alone writes."""

    def __init__(self, *, must_stay: dict, **options: object) -> None:
        super().__init__(**options)
        prompt = soft_prompt_of(self.model)
        if self.args.n_gpu > 1 or self.args.device.type != prompt.device.type:
            raise RuntimeError(
                f"the Trainer took {self.args.device} of {self.args.n_gpu} cards, not "
                f"{prompt.device}: CUDA was in use before llama.parallel.setup()"
            )
        if len({json.dumps(facts) for facts in parallel.gather_objects(must_stay)}) > 1:
            raise ValueError("the ranks read different datasets; give all machines the same one")
        self.must_stay = must_stay
        self._partial = Path(self.args.output_dir) / ".checkpoint.partial"
        self.remove_callback(PrinterCallback)
        self.add_callback(Watch(prompt))
        if not parallel.show_bars():
            self.remove_callback(ProgressCallback)
            self.add_callback(Reporter)

    def run(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint if one is given, and evaluate what came out."""
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if self.state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))
        evaluated = {row["step"] for row in self.state.log_history if "eval_loss" in row}
        if self.eval_dataset is not None and self.state.global_step not in evaluated:
            self.evaluate()

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Raise ValueError for a checkpoint of another model, prompt length or other options."""
        expected = soft_prompt_of(self.model)
        found = load_soft_prompt(checkpoint, expected.shape[1])
        if len(found) != len(expected):
            raise ValueError(
                f"{checkpoint}: {len(found)} virtual tokens, but --num_virtual_tokens is "
                f"{len(expected)}"
            )
        base = base_model_facts(self.model.get_base_model().transformer)
        if changed := _differing(read_json_object(checkpoint / BASE), base):
            raise ValueError(f"{checkpoint}: trained on another model (it differs in {changed})")
        before = read_json_object(checkpoint / RUN)
        changed = ", ".join(k for k, v in self.must_stay.items() if before.get(k) != v)
        if changed:
            raise ValueError(
                f"{checkpoint}: was begun with another {changed}; give the same as in "
                f"{checkpoint / RUN}, or begin anew in another folder"
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Save under a temporary name, then rename: a checkpoint is whole or not there."""
        if parallel.rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            (folder,) = self._partial.iterdir()
            (folder / RUN).write_text(json.dumps(self.must_stay, indent=2) + "\n")
            for path in folder.iterdir():
                fsync(path)
            target = Path(self.args.output_dir) / folder.name
            if target.exists():  # of a run that is trained beyond it again
                target.rename(self._partial / "old")
            folder.rename(target)
            shutil.rmtree(self._partial)
        dist.barrier()

    def _get_output_dir(self, trial: None) -> str:
        return str(self._partial)

    def _save(self, output_dir: str, state_dict: dict | None = None) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        prompt = soft_prompt_of(self.model)
        set_soft_prompt(self.model, load_soft_prompt(resume_from_checkpoint, prompt.shape[1]))


def plot_losses(log_history: list[dict], path: str | Path) -> None:
    """Draw training and evaluation loss over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[key]) for row in log_history if key in row]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    if axes.lines:
        axes.legend()
    partial = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(path)
