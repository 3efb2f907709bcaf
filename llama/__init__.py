"""LLaMA models split across several accelerators: the public names, found when asked for."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.generation import LLaMA, Output
    from llama.model import ModelArgs, Transformer
    from llama.tokenizer import Tokenizer

# Importing torch takes seconds: what only shows help or mends a flag does not wait for it.
_HOMES = {
    "LLaMA": "llama.generation",
    "Output": "llama.generation",
    "ModelArgs": "llama.model",
    "Transformer": "llama.model",
    "Tokenizer": "llama.tokenizer",
}
__all__ = ["LLaMA", "ModelArgs", "Output", "Tokenizer", "Transformer"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
