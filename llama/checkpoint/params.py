"""A model's sizes as each format calls them, and params.json's entries made from them."""

import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from llama.model import ModelArgs


@dataclass(frozen=True)
class Size:
    """A number of a model's configuration, by its names in ModelArgs and in each format."""

    meta: str
    hf: str
    gguf: str
    whole: bool = True
    needed: bool = True


SIZES = (
    Size("dim", "hidden_size", "llama.embedding_length"),
    Size("n_layers", "num_hidden_layers", "llama.block_count"),
    Size("n_heads", "num_attention_heads", "llama.attention.head_count"),
    Size("n_kv_heads", "num_key_value_heads", "llama.attention.head_count_kv"),
    Size("head_dim", "head_dim", "llama.attention.key_length", needed=False),
    Size("vocab_size", "vocab_size", "llama.vocab_size"),
    Size("hidden_dim", "intermediate_size", "llama.feed_forward_length"),
    Size("context_len", "max_position_embeddings", "llama.context_length", needed=False),
    Size("norm_eps", "rms_norm_eps", "llama.attention.layer_norm_rms_epsilon", whole=False),
    Size("rope_theta", "rope_theta", "llama.rope.freq_base", whole=False),
)


def read_sizes(form: str, config: dict) -> dict:
    """What params.json says, from a configuration in a format's words ("hf" or "gguf").

    Raises ValueError, in these words, for a size that is missing or senseless.
    """
    params: dict = {
        size.meta: positive(config, getattr(size, form), size.whole)
        for size in SIZES
        if size.needed or config.get(getattr(size, form)) is not None
    }
    if params.get("head_dim") == params["dim"] / params["n_heads"]:
        del params["head_dim"]
    hidden_dim = params.pop("hidden_dim")
    usual = params | {"multiple_of": 256}  # as in Meta's own files
    if ModelArgs(**usual).hidden_dim == hidden_dim:
        return usual
    # Meta's formula truncates a product, then rounds up to multiple_of: that gives hidden_dim back.
    factor = hidden_dim / int(2 * 4 * params["dim"] / 3)
    return params | {"multiple_of": hidden_dim, "ffn_dim_multiplier": factor}


def sizes_of(form: str, args: ModelArgs) -> dict[str, int | float]:
    """The sizes of a model in a format's words: what read_sizes() reads."""
    values = vars(args) | {"hidden_dim": args.hidden_dim, "context_len": context_len(args)}
    # A format that has types wants 10000.0 where params.json has 10000.
    return {
        getattr(size, form): values[size.meta] if size.whole else float(values[size.meta])
        for size in SIZES
    }


def context_len(args: ModelArgs) -> int:
    """How long a text may be, where params.json does not say: by what tells the families apart."""
    if args.context_len is not None:
        return args.context_len
    if args.use_scaled_rope:  # Llama 3.1 and later
        return 131072
    if args.rope_theta != ModelArgs.rope_theta:
        return {500000.0: 8192, 1000000.0: 16384}.get(args.rope_theta, 4096)  # Llama 3, Code Llama
    biggest_llama1 = args.n_layers == 80 and args.n_kv_heads == args.n_heads
    return 2048 if args.norm_eps == 1e-6 or biggest_llama1 else 4096  # Llama 1; Llama 2


def positive(config: dict, key: str, whole: bool = False) -> int | float:
    """A number above 0 (and below 1e12) from a configuration, else ValueError."""
    value: Any = config.get(key)
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value < 1e12:
        wanted = "a whole number of 1 or more" if whole else "a number above 0"
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected {wanted}")
    return value


# The numbers of each kind of rotary scaling: Hugging Face's name of each, and ModelArgs'.
ROPE_SCALING = {
    "default": {},
    "linear": {"factor": "rope_linear_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        "original_max_position_embeddings": "rope_original_len",
    },
}


def read_rope(kind: str, scaling: dict) -> dict:
    """What params.json says of a rotary scaling in Hugging Face's words.

    Raises ValueError for numbers that make no sense.
    """
    params: dict = {"use_scaled_rope": True} if kind == "llama3" else {}
    for name, ours in ROPE_SCALING[kind].items():
        value = positive(scaling, name, whole=ours == "rope_original_len")
        if value != getattr(ModelArgs, ours):
            params[ours] = value
    return params


def rope_of(args: ModelArgs) -> dict:
    """The rotary scaling of a model in Hugging Face's words: its rope_type, and its numbers."""
    if args.use_scaled_rope and args.rope_linear_factor != 1:
        raise ValueError("only Meta's format has rotary embeddings scaled in two ways")
    linear = "linear" if args.rope_linear_factor != 1 else "default"
    kind = "llama3" if args.use_scaled_rope else linear
    numbers = {name: getattr(args, ours) for name, ours in ROPE_SCALING[kind].items()}
    whole = "original_max_position_embeddings"
    floats = {name: float(value) for name, value in numbers.items() if name != whole}
    return {"rope_type": kind} | numbers | floats


def check_values(config: dict, accepted: dict[str, tuple]) -> None:
    """Raise ValueError for a value that is not accepted; None among these: it may be absent."""
    for key, values in accepted.items():
        found = config.get(key)
        if isinstance(found, np.ndarray) or found not in values:
            wanted = " or ".join("no entry" if x is None else repr(x) for x in values)
            raise ValueError(f"{key} is {reprlib.repr(found)}; only {wanted} can be converted")
