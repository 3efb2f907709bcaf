"""A model's sizes as each format calls them, and params.json's entries made from them."""

import reprlib
from dataclasses import dataclass

import numpy as np

from llama.model import ModelArgs


@dataclass(frozen=True)
class Size:
    """A number that a configuration must hold, by its names in ModelArgs and in each format."""

    meta: str
    hf: str
    gguf: str
    whole: bool = True


SIZES = (
    Size("dim", "hidden_size", "llama.embedding_length"),
    Size("n_layers", "num_hidden_layers", "llama.block_count"),
    Size("n_heads", "num_attention_heads", "llama.attention.head_count"),
    Size("n_kv_heads", "num_key_value_heads", "llama.attention.head_count_kv"),
    Size("vocab_size", "vocab_size", "llama.vocab_size"),
    Size("hidden_dim", "intermediate_size", "llama.feed_forward_length"),
    Size("norm_eps", "rms_norm_eps", "llama.attention.layer_norm_rms_epsilon", whole=False),
    Size("rope_theta", "rope_theta", "llama.rope.freq_base", whole=False),
)


def read_sizes(form: str, config: dict) -> dict:
    """What params.json says, from a configuration in a format's words ("hf" or "gguf").

    Raises ValueError, in these words, for a size that is missing or senseless.
    """
    params = {size.meta: positive(config, getattr(size, form), size.whole) for size in SIZES}
    hidden_dim = params.pop("hidden_dim")
    usual = params | {"multiple_of": 256}  # as in Meta's own files
    if ModelArgs(**usual).hidden_dim == hidden_dim:
        return usual
    # Meta's formula rounds up to a multiple, which makes good what the product loses.
    factor = hidden_dim / int(2 * 4 * params["dim"] / 3)
    return params | {"multiple_of": hidden_dim, "ffn_dim_multiplier": factor}


def positive(config: dict, key: str, whole: bool = False) -> int | float:
    """A number above 0 (and below 1e12) from a configuration, else ValueError."""
    value = config.get(key)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value < 1e12:
        wanted = "a whole number of 1 or more" if whole else "a number above 0"
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected {wanted}")
    return value


def scaled_rope_params(
    factor: float, high_freq_factor: float = ModelArgs.rope_high_freq_factor
) -> dict:
    """The params.json entries of Llama 3.1's rotary scaling.

    Those of the factors are ours, not Meta's: they are there only where Llama 3.1 has others.
    """
    factors = {"rope_scaling_factor": factor, "rope_high_freq_factor": high_freq_factor}
    others = {key: value for key, value in factors.items() if value != getattr(ModelArgs, key)}
    return {"use_scaled_rope": True} | others


def check_values(config: dict, accepted: dict[str, tuple]) -> None:
    """Raise ValueError for a value that is not accepted; None among these: it may be absent."""
    for key, values in accepted.items():
        found = config.get(key)
        if isinstance(found, np.ndarray) or found not in values:
            wanted = " or ".join(map(repr, values))
            raise ValueError(f"{key} is {reprlib.repr(found)}; only {wanted} can be converted")
