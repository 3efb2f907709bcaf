"""Read a Hugging Face folder of a Llama model as a checkpoint in Meta's layout."""

import json
import math
import re
import reprlib
from collections.abc import Iterable, Sequence
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llama.checkpoint import Source, role, weight_shapes
from llama.model import ModelArgs

# Meta's name of each weight of a layer, by Hugging Face's name.
LAYER_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
EMBEDDING = "model.embed_tokens.weight"
TOP_NAMES = {
    EMBEDDING: "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_WEIGHT = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)\.weight")
# A buffer that old exports saved with the weights; it follows from the configuration.
RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

ACCEPTED = (
    "give a .gguf file, a folder with one, or a Hugging Face folder (config.json and safetensors)"
)

# safetensors' names of the types that a checkpoint may hold.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# What Llama 3's rotary scaling always has in Meta's format, and what Meta's format can vary.
SCALED_ROPE_FIXED = {"low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


def open_hf(path: str | Path) -> Source:
    """Open a folder with config.json (model_type llama) and safetensors weights.

    Nothing but headers is read; Source.read reads one weight. The rows of q_proj and k_proj come
    out in Meta's order (rotary pairs are neighbours), tied embeddings come out twice.

    Raises FileNotFoundError without config.json; ValueError, naming the values, for any model that
    Meta's format cannot express and for missing, unexpected, misshapen or damaged weights.
    """
    folder = Path(path)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(
            f"{config_path}: no such file; give a Hugging Face folder (config.json, "
            "model.safetensors, tokenizer files)"
        )
    config = read_json_object(config_path)
    try:
        params = _params(config)
    except ValueError as err:
        raise ValueError(f"{config_path}: {err}") from err

    weights = _Weights(folder)
    names = _meta_names(folder, weights.names())
    if config.get("tie_word_embeddings") is True:
        names["output.weight"] = EMBEDDING
    elif "output.weight" not in names:
        # Only an explicit "false" says that the two were trained apart, so that one is now lost.
        if "tie_word_embeddings" in config:
            raise ValueError(
                f"{folder}: lm_head.weight is missing, and config.json has tie_word_embeddings "
                f"{config['tie_word_embeddings']!r}; download the folder again"
            )
        names["output.weight"] = EMBEDDING
    shapes = {name: weights.shape(hf_name) for name, hf_name in names.items()}
    check_shapes(folder, shapes, params)

    heads = {"attention.wq": params["n_heads"], "attention.wk": params["n_kv_heads"]}

    def read(name: str) -> torch.Tensor:
        weight = weights.read(names[name])
        return unpermute(weight, heads[role(name)]) if role(name) in heads else weight

    dtype = weights.dtype(names.values())
    files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    return Source(params=params, shapes=shapes, dtype=dtype, read=read, files=files)


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows (n_heads * head_dim, dim) from Hugging Face's rotary order to Meta's.

    A rotary pair is (i, i + head_dim/2) there and (2i, 2i + 1) here.
    """
    rows, dim = weight.shape
    halves = weight.view(n_heads, 2, rows // n_heads // 2, dim)
    return halves.transpose(1, 2).reshape(rows, dim)


def ffn_params(dim: int, hidden: int) -> dict:
    """The params.json entries from which Meta's formula gives this hidden size of the FFN."""
    base = int(2 * 4 * dim / 3)
    if -(-base // 256) * 256 == hidden:
        return {"multiple_of": 256}
    if hidden >= base:
        return {"multiple_of": hidden}
    factor = hidden / base
    # Rounding may fall one short, which the rounding up to multiple_of makes good.
    assert -(-int(factor * base) // hidden) * hidden == hidden
    return {"multiple_of": hidden, "ffn_dim_multiplier": factor}


def check_shapes(path: Path, shapes: dict[str, tuple[int, ...]], params: dict) -> None:
    """Compare the full shapes of the weights (Meta's names) with what params ask for.

    Raises ValueError with the path and the names that are missing, unexpected or misshapen.
    """
    # A file must not make us list more layers than it holds weights.
    if params["n_layers"] > len(shapes):
        raise ValueError(
            f"{path}: {len(shapes)} weights are too few for {params['n_layers']} layers"
        )
    wanted = weight_shapes(ModelArgs.from_params(params))
    faults = [f"{n} is missing" for n in wanted if n not in shapes]
    faults += [f"{n} is unexpected" for n in shapes if n not in wanted]
    faults += [
        f"{n} has shape {shapes[n]}, expected {s}"
        for n, s in wanted.items()
        if n in shapes and shapes[n] != s
    ]
    if faults:
        raise ValueError(f"{path}: {first_few(faults, '; ')}")


def first_few(items: Sequence[str], sep: str = ", ") -> str:
    """The first few of many items, with the number of the others, for one line of a message."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return sep.join(items[:4]) + more


def read_json_object(path: Path) -> dict:
    """A JSON object from a file; ValueError, with the path, if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path}: not a JSON file: {err}") from err
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _params(config: dict) -> dict:
    """What params.json says, from config.json."""
    for key, wanted in (
        ("model_type", "llama"),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
    ):
        # model_type alone has to be there, the others default to what is wanted.
        found = config.get(key, None if key == "model_type" else wanted)
        if found != wanted:
            raise ValueError(f"{key} is {found!r}; only {wanted!r} can be converted")

    dim = positive_int(config, "hidden_size")
    n_heads = positive_int(config, "num_attention_heads")
    n_kv_heads = positive_int(config, "num_key_value_heads", n_heads)
    if dim % n_heads or (dim // n_heads) % 2 or n_heads % n_kv_heads:
        raise ValueError(
            f"hidden_size {dim}, num_attention_heads {n_heads} and num_key_value_heads "
            f"{n_kv_heads} do not divide evenly"
        )
    head_dim = positive_int(config, "head_dim", dim // n_heads)
    if head_dim != dim // n_heads:
        raise ValueError(
            f"head_dim is {head_dim}; only hidden_size / num_attention_heads = {dim // n_heads} "
            "can be converted"
        )
    return {
        "dim": dim,
        "n_layers": positive_int(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": positive_int(config, "vocab_size"),
        **ffn_params(dim, positive_int(config, "intermediate_size")),
        "norm_eps": positive_number(config, "rms_norm_eps", 1e-6),
        **_rope_params(config),
    }


def _rope_params(config: dict) -> dict:
    """The rotary embedding, as transformers 4 (rope_scaling) or 5 (rope_parameters) writes it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {rope!r}, not an object")
    if "rope_theta" in rope:
        theta = positive_number(rope, "rope_theta")
    else:
        theta = positive_number(config, "rope_theta", 10000.0)
    for holder in (rope, config):
        partial = holder.get("partial_rotary_factor")
        if partial not in (None, 1):
            raise ValueError(f"partial_rotary_factor is {partial!r}; only 1.0 can be converted")

    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "use_scaled_rope": False}
    if kind != "llama3":
        raise ValueError(f"rope_type is {kind!r}; only 'default' and 'llama3' can be converted")
    for key, wanted in SCALED_ROPE_FIXED.items():
        if rope.get(key) != wanted:
            raise ValueError(f"rope {key} is {rope.get(key)!r}; only {wanted} can be converted")
    params = {"rope_theta": theta, "use_scaled_rope": True}
    factor = positive_number(rope, "factor")
    high_freq_factor = positive_number(rope, "high_freq_factor")
    if high_freq_factor <= SCALED_ROPE_FIXED["low_freq_factor"]:
        raise ValueError(f"rope high_freq_factor is {high_freq_factor}; it must be more than 1")
    if factor != 8:
        params["rope_scaling_factor"] = factor
    if high_freq_factor != 4:
        params["rope_high_freq_factor"] = high_freq_factor
    return params


def positive_int(config: dict, key: str, default: int | None = None) -> int:
    """A whole number of 1 or more from a model's configuration, else ValueError."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected a whole number of 1 or more")
    return value


def positive_number(config: dict, key: str, default: float | None = None) -> float:
    """A finite number above 0 from a model's configuration, else ValueError."""
    value = config.get(key)
    value = default if value is None else value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected a number above 0")
    return float(value)


def _meta_names(folder: Path, hf_names: Sequence[str]) -> dict[str, str]:
    """Hugging Face's name of each weight, by Meta's name, in the order of the layers."""
    names = {}
    unknown = []
    for hf_name in hf_names:
        layer = LAYER_WEIGHT.fullmatch(hf_name)
        if hf_name in TOP_NAMES:
            names[TOP_NAMES[hf_name]] = hf_name
        elif layer and layer[2] in LAYER_NAMES:
            names[f"layers.{int(layer[1])}.{LAYER_NAMES[layer[2]]}.weight"] = hf_name
        elif not RECOMPUTED.fullmatch(hf_name):
            unknown.append(hf_name)
    if unknown:
        raise ValueError(f"{folder}: weights that no Llama model has: {first_few(unknown)}")
    return names


class _Weights:
    """The safetensors files of a folder, mapped into memory; shapes now, weights when asked."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._handles = {}
        self._file_of = {}
        files = _weight_files(folder)
        for file_name, listed in files.items():
            path = folder / file_name
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as err:
                raise ValueError(f"{path}: cannot be read: {err}; download it again") from err
            held = set(handle.keys())
            if listed is not None and held != listed:
                raise ValueError(
                    f"{path}: disagrees with model.safetensors.index.json about "
                    f"{first_few(sorted(held ^ listed))}; download the folder again"
                )
            self._handles[path] = handle
            self._file_of |= dict.fromkeys(held, path)

    def names(self) -> list[str]:
        """Names in the order of their numbers: layer 2 before layer 10."""
        return sorted(
            self._file_of,
            key=lambda name: [int(p) if p.isdigit() else -1 for p in name.split(".")] + [name],
        )

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, names: Iterable[str]) -> torch.dtype:
        """The one type that holds all of these weights without loss."""
        found = {}
        for name in names:
            kind = self._slice(name).get_dtype()
            if kind not in DTYPES:
                raise ValueError(
                    f"{self._file_of[name]}: {name} is of type {kind}; only {', '.join(DTYPES)} "
                    "can be converted"
                )
            found[DTYPES[kind]] = name
        return reduce(torch.promote_types, found)

    def read(self, name: str) -> torch.Tensor:
        return self._handles[self._file_of[name]].get_tensor(name)

    def _slice(self, name: str):
        if name not in self._file_of:
            raise ValueError(f"{self._folder}: {name} is missing; download the folder again")
        return self._handles[self._file_of[name]].get_slice(name)


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The weight files of a folder, each with the names that the index lists in it.

    Like transformers, a single model.safetensors goes before an index; it has no list (None).
    """
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
            raise ValueError(
                f"{folder}: only pickled weights (.bin), which can run code when opened; save "
                "them as safetensors: AutoModelForCausalLM.from_pretrained(folder)"
                ".save_pretrained(folder)"
            )
        raise ValueError(
            f"{folder}: neither model.safetensors nor {index.name} is there; "
            "download the weights into this folder"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map in it; download it again")
    files: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        # A plain name, so that the index cannot lead out of the folder.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w-][\w.-]*", file_name):
            raise ValueError(f"{index}: {file_name!r} is not the name of a file in this folder")
        files.setdefault(file_name, set()).add(name)
    absent = [file_name for file_name in files if not (folder / file_name).is_file()]
    if absent:
        raise ValueError(f"{folder}: {first_few(absent)} missing; download the folder again")
    return files


def open_any(path: str | Path) -> Source:
    """Open a GGUF file, a Hugging Face folder, or a folder that holds one GGUF file.

    Raises FileNotFoundError if nothing is there, ValueError if it is none of these.
    """
    # Here and not above, because that module is built on this one.
    from llama.gguf import GGUF_MAGIC, open_gguf

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; {ACCEPTED}")
    if path.is_dir():
        if (path / "config.json").is_file():
            return open_hf(path)
        inside = sorted(path.glob("*.gguf"))
        if len(inside) > 1:
            raise ValueError(
                f"{path}: holds {len(inside)} GGUF files ({first_few([p.name for p in inside])}); "
                "give one of them"
            )
        if inside:
            return open_gguf(inside[0])
        raise ValueError(f"{path}: neither config.json nor a .gguf file in it; {ACCEPTED}")
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
            return open_gguf(path)
    raise ValueError(f"{path}: not a GGUF file; {ACCEPTED}")
