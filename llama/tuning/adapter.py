"""A soft prompt in and out of files: PEFT's adapter folders, and older single files."""

import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from llama import cli
from llama.checkpoint.folder import facts_of
from llama.checkpoint.weights import Source
from llama.files import (
    load_plain,
    partial_name,
    read_json,
    remove,
    sha256_of,
    write_json,
    write_whole,
)
from llama.model import Transformer
from llama.tokenizer import TEMPLATE, read_template

if TYPE_CHECKING:  # to read an adapter needs neither PEFT nor transformers, which load slowly
    from peft import PeftModel

BASE = "base_model.json"  # which model the adapter was trained on
CARD = "README.md"  # the model card


def load_soft_prompt(path: str | Path, dim: int) -> torch.Tensor:
    """Load a tuned prompt, (num_virtual_tokens, dim) float32, from whatever it was saved as.

    A PEFT folder, its adapter_model.safetensors, or an old .bin or .pth file; no code in it can
    run. Raises FileNotFoundError, and ValueError for another kind of adapter or another dim.
    """
    path = Path(path)
    config = _beside(path, "adapter_config.json")
    if config.is_file():
        kind = read_json(config).get("peft_type")
        if kind not in ("PROMPT_TUNING", "P_TUNING"):
            kind = reprlib.repr(kind)
            raise ValueError(f"{config}: an adapter of type {kind}; only prompt tuning fits here")
    names = ("adapter_model.safetensors", "adapter_model.bin")
    files = [path / name for name in names] if path.is_dir() else [path]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path}: no such adapter ({' or '.join(names)})")
    prompt = _prompt_in(found)
    if prompt.dim() != 2 or prompt.shape[1] != dim or not len(prompt):
        raise ValueError(f"{found}: shape {tuple(prompt.shape)}, but the model's dim is {dim}")
    if prompt.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{found}: its numbers are {prompt.dtype}, which no tuning writes")
    prompt = prompt.float()
    if not prompt.isfinite().all():
        raise ValueError(f"{found}: holds NaN or infinite values; its training failed")
    return prompt


def _prompt_in(path: Path) -> torch.Tensor:
    """The tensor with the prompt in one file: under PEFT's name, or that of its module's state."""
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except Exception as error:  # the library raises whatever the bytes provoke
            reason = cli.shown(str(error))
            raise ValueError(f"{path}: not an adapter, or damaged: {reason}") from None
    else:
        state = load_plain(path)
    for key in ("prompt_embeddings", "embedding.weight"):
        if isinstance(state, dict) and isinstance(state.get(key), torch.Tensor):
            return state[key]
    raise ValueError(f"{path}: no tuned prompt in it")


def save_adapter(
    model: "PeftModel",
    folder: Path,
    chat_template: str | None = None,
    prompt: torch.Tensor | None = None,
    card: str | None = None,
) -> None:
    """Write a standard PEFT adapter into a folder, each file whole or not at all.

    chat_template: how conversations look that the prompt was trained on, in jinja2's language.
    prompt: another than the model's present one. card: the text of its model card.
    """
    made = partial_name(folder / "adapter")
    remove(made)  # of a run that was killed
    made.mkdir()
    try:
        # False: there are no embedding layers to save, and PEFT need not ask a hub about them.
        model.save_pretrained(str(made), save_embedding_layers=False)
        if prompt is not None:
            save_file({"prompt_embeddings": prompt}, made / "adapter_model.safetensors")
        (made / CARD).unlink()  # PEFT's, a form to fill in
        if card is not None:
            (made / CARD).write_text(card, encoding="utf-8")
        write_json(made / BASE, base_model_facts(model.get_base_model().transformer))
        if chat_template is not None:
            (made / TEMPLATE).write_text(chat_template, encoding="utf-8")
        for file in made.iterdir():
            with write_whole(folder / file.name) as partial:
                file.rename(partial)
    finally:
        remove(made)


def base_model_facts(model: Transformer | Source) -> dict:
    """Facts that mostly tell one model from another: its sizes, and a hash of its norms."""
    names = [f"layers.{i}.ffn_norm.weight" for i in range(model.args.n_layers)] + ["norm.weight"]
    norms: list[torch.Tensor]
    if isinstance(model, Source):
        norms = [model.read(name).to(model.dtype) for name in names]
    else:
        norms = [model.get_parameter(name) for name in names]
    content = torch.stack([norm.float().cpu() for norm in norms])
    facts = {"dtype": str(norms[0].dtype), "norms_sha256": sha256_of(content)}
    return facts_of(model.args) | facts


def warn_of_another_model(path: str | Path, model: Transformer | Source) -> None:
    """Say so if the file beside an adapter tells that it was trained on another model."""
    base = _beside(Path(path), BASE)
    if not base.is_file():
        return
    before, now = read_json(base), base_model_facts(model)
    if before.get("dtype") != now["dtype"]:  # a model in another dtype is still the same model
        del now["dtype"], now["norms_sha256"]
    if changed := differing(before, now):
        cli.say(f"{path}: was trained on another model (it differs in {changed})")


def chat_template_beside(path: str | Path) -> str | None:
    """The template of conversations that a tuned prompt was trained on; None if no file says."""
    found = _beside(Path(path), TEMPLATE)
    return read_template(found) if found.is_file() else None


def differing(before: dict, now: dict) -> str:
    """Name the keys whose values are not what they were; files of before may have fewer."""
    return ", ".join(key for key in now if key in before and before[key] != now[key])


def _beside(path: Path, name: str) -> Path:
    """A file of an adapter's folder, which may be given by one of the files in it."""
    return (path if path.is_dir() else path.parent) / name
