"""LLaMA models split across several accelerators: the public names."""

from llama.generation import LLaMA, Output
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

__all__ = ["LLaMA", "ModelArgs", "Output", "Tokenizer", "Transformer"]
