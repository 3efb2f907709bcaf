"""Prompt tuning over the sharded model: what PEFT and the Trainer see; adapters in and out."""

import hashlib
import json
import os
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
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llama import parallel
from llama.data import IGNORE
from llama.model import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's own names
BASE = "base_model.json"  # beside an adapter: which model it was trained on
PROMPT_KEYS = ("prompt_embeddings", "embedding.weight")  # PEFT's, and that of its module's state


class LlamaForPromptTuning(transformers.PreTrainedModel, transformers.GenerationMixin):
    """A thin face over our Transformer: a loss, and the config that PEFT asks for. No weights.

    PEFT wants a GenerationMixin; what generates is LLaMA.generate.
    """

    config_class = transformers.LlamaConfig

    def __init__(self, transformer: Transformer, name_or_path: str = "") -> None:
        args = transformer.args
        super().__init__(
            transformers.LlamaConfig(
                vocab_size=args.vocab_size,
                hidden_size=args.dim,
                intermediate_size=args.hidden_dim,
                num_hidden_layers=args.n_layers,
                num_attention_heads=args.n_heads,
                num_key_value_heads=args.n_kv_heads,
                rms_norm_eps=args.norm_eps,
                name_or_path=name_or_path,
            )
        )
        self.transformer = transformer

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
        return CausalLMOutput(loss=losses.sum() / torch.as_tensor(count).clamp(min=1))


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
        kind = _read_json(config).get("peft_type")
        if kind not in ("PROMPT_TUNING", "P_TUNING"):
            raise ValueError(f"{config}: an adapter of type {kind}; only prompt tuning fits here")
    if path.is_dir():
        names = (WEIGHTS, "adapter_model.bin")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no {' or '.join(names)} in this folder")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise whatever the bytes provoke
        reason = "it holds more than tensors" if "weights_only" in str(error) else str(error)
        raise ValueError(f"{path}: not an adapter, or damaged: {reason.splitlines()[0]}") from None
    keys = [key for key in PROMPT_KEYS if isinstance(state, dict) and key in state]
    if not keys or not isinstance(state[keys[0]], torch.Tensor):
        raise ValueError(f"{path}: no tensor {' or '.join(PROMPT_KEYS)} in it, so no tuned prompt")
    prompt = state[keys[0]]
    if prompt.dim() != 2 or prompt.shape[1] != dim or not len(prompt):
        raise ValueError(
            f"{path}: a prompt of shape {tuple(prompt.shape)}, but the model's dim is {dim}: it "
            "was trained on another model"
        )
    return prompt.float()


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
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(folder / path.name)
    partial.rmdir()


def base_model_facts(transformer: Transformer) -> dict:
    """What tells one model from another, however many ranks hold it."""
    norms = [block.ffn_norm.weight for block in transformer.layers] + [transformer.norm.weight]
    content = torch.stack([norm.float().cpu() for norm in norms]).numpy().tobytes()
    facts = vars(transformer.args) | {"norms_sha256": hashlib.sha256(content).hexdigest()}
    return {key: value for key, value in facts.items() if value is not None}


def find_resumable(output_dir: str | Path, model: peft.PeftModel) -> str:
    """The newest whole checkpoint of an interrupted run of this model and this prompt length.

    Raises ValueError if there is none, or if it is of another model or length.
    """
    checkpoints = sorted(
        Path(output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
    )
    if not checkpoints:
        raise ValueError(f"{output_dir}: no checkpoint to resume; leave --resume away to begin")
    newest = checkpoints[-1]
    expected = soft_prompt_of(model)
    found = load_soft_prompt(newest, expected.shape[1])
    if len(found) != len(expected):
        raise ValueError(
            f"{newest}: {len(found)} virtual tokens, but --num_virtual_tokens is {len(expected)}"
        )
    base = base_model_facts(model.get_base_model().transformer)
    before = _read_json(newest / BASE)
    changed = [key for key in base if before.get(key) != base[key]]
    if changed:
        raise ValueError(f"{newest}: trained on another model (it differs in {', '.join(changed)})")
    return str(newest)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: unreadable ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


class Reporter(transformers.TrainerCallback):
    """Tells what is logged on stderr, where there is no progress bar to do it."""

    def on_log(self, args, state, control, logs: dict[str, float], **_: object) -> None:
        facts = ", ".join(f"{key} {value:.4g}" for key, value in logs.items() if key != "epoch")
        parallel.say(f"step {state.global_step} of {state.max_steps}: {facts}")


class PromptTrainer(transformers.Trainer):
    """The Trainer, of which every rank runs one on the same batches, and rank 0 alone writes."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._partial = Path(self.args.output_dir) / ".checkpoint.partial"
        self.remove_callback(PrinterCallback)
        if not parallel.show_bars():
            self.remove_callback(ProgressCallback)
            self.add_callback(Reporter)

    def _save_checkpoint(self, model: torch.nn.Module, trial: None) -> None:
        """Save under a temporary name, then rename: a checkpoint is whole or not there."""
        if parallel.rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            super()._save_checkpoint(model, trial)
            (folder,) = self._partial.iterdir()
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            target = Path(self.args.output_dir) / folder.name
            shutil.rmtree(target, ignore_errors=True)  # a run that is trained beyond it again
            folder.rename(target)
            self._partial.rmdir()
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
    axes.legend()
    partial = Path(path).with_name(f".{Path(path).name}")
    figure.savefig(partial, format="png", dpi=120)
    pyplot.close(figure)
    partial.replace(path)
