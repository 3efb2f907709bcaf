"""LLaMA models split across several accelerators: the public names, found when asked for."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.chat import Chat
    from llama.generation import LLaMA
    from llama.model import ModelArgs, Transformer
    from llama.options import SamplingParams
    from llama.output import Output, Tuned
    from llama.template import ChatTemplate
    from llama.tokenizer import Tokenizer

# Importing torch takes seconds: what only shows help or mends a flag does not wait for it.
_HOMES = {
    "Chat": "llama.chat",
    "ChatTemplate": "llama.template",
    "LLaMA": "llama.generation",
    "Output": "llama.output",
    "ModelArgs": "llama.model",
    "SamplingParams": "llama.options",
    "Transformer": "llama.model",
    "Tokenizer": "llama.tokenizer",
    "Tuned": "llama.output",
}
__all__ = ["Chat", "ChatTemplate", "LLaMA", "ModelArgs", "Output", "SamplingParams"]
__all__ += ["Tokenizer", "Transformer", "Tuned"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
