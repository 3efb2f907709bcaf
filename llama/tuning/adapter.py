"""A soft prompt in and out of files: PEFT's adapter folders, and older single files."""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from llama import cli
from llama.files import load_plain, read_json, write_json, write_whole
from llama.model import Transformer

if TYPE_CHECKING:  # to read an adapter needs neither PEFT nor transformers, which load slowly
    from peft import PeftModel

CONFIG = "adapter_config.json"  # this and the next two are PEFT's own names
WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
BASE = "base_model.json"  # which model the adapter was trained on
FILES = (CONFIG, WEIGHTS, BASE)
PROMPT_KEYS = ("prompt_embeddings", "embedding.weight")  # PEFT's, and that of its module's state


def load_soft_prompt(path: str | Path, dim: int) -> torch.Tensor:
    """Load a tuned prompt, (num_virtual_tokens, dim) float32, from whatever it was saved as.

    A PEFT folder, its adapter_model.safetensors, or an old .bin or .pth file; no code in it can
    run. Raises FileNotFoundError, and ValueError for another kind of adapter or another dim.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter; train one with ft_main.py")
    config = _folder_of(path) / CONFIG
    if config.is_file():
        kind = read_json(config).get("peft_type")
        if kind not in ("PROMPT_TUNING", "P_TUNING"):
            raise ValueError(f"{config}: an adapter of type {kind}; only prompt tuning fits here")
    if path.is_dir():
        found = [path / name for name in (WEIGHTS, OLD_WEIGHTS) if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path}: no {WEIGHTS} or {OLD_WEIGHTS} in this folder")
        path = found[0]
    prompt = _prompt_in(path)
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


def _prompt_in(path: Path) -> torch.Tensor:
    """The tensor with the prompt in one file."""
    state = _load_safetensors(path) if path.suffix == ".safetensors" else load_plain(path)
    for key in PROMPT_KEYS:
        if isinstance(state, dict) and isinstance(state.get(key), torch.Tensor):
            return state[key]
    raise ValueError(f"{path}: no tensor {' or '.join(PROMPT_KEYS)} in it, so no tuned prompt")


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # the library raises whatever the bytes provoke
        raise ValueError(f"{path}: not an adapter, or damaged: {error}") from None


def save_adapter(model: "PeftModel", folder: Path) -> None:
    """Write a standard PEFT adapter into a folder, each file whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as made:
        # False: there are no embedding layers to save, and PEFT need not ask a hub about them.
        model.save_pretrained(made, save_embedding_layers=False)
        write_json(Path(made) / BASE, base_model_facts(model.get_base_model().transformer))
        for file in Path(made).iterdir():
            with write_whole(folder / file.name) as partial:
                file.rename(partial)


def base_model_facts(transformer: Transformer) -> dict:
    """What tells one model from another, however many ranks hold it."""
    norms = [block.ffn_norm.weight for block in transformer.layers] + [transformer.norm.weight]
    content = torch.stack([norm.float().cpu() for norm in norms]).numpy().tobytes()
    facts = vars(transformer.args) | {"dtype": str(norms[0].dtype)}
    facts["norms_sha256"] = hashlib.sha256(content).hexdigest()
    return {key: value for key, value in facts.items() if value is not None}


def warn_of_another_model(path: str | Path, transformer: Transformer) -> None:
    """Say so if the file beside an adapter tells that it was trained on another model."""
    if changed := changed_facts(Path(path), transformer):
        cli.say(f"{path}: was trained on another model (it differs in {changed})")


def changed_facts(path: Path, transformer: Transformer) -> str:
    """Name the facts in which a model differs from the one an adapter was trained on, if known."""
    base = _folder_of(path) / BASE
    if not base.is_file():
        return ""
    before, now = read_json(base), base_model_facts(transformer)
    if before.get("dtype") != now["dtype"]:  # a model in another dtype is still the same model
        del now["dtype"], now["norms_sha256"]
    return differing(before, now)


def differing(before: dict, now: dict) -> str:
    """Name the keys whose values are not what they were."""
    return ", ".join(key for key in now if before.get(key) != now[key])


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent
