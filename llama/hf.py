"""Read a Hugging Face folder of a Llama model as a checkpoint in Meta's layout."""

import re
import reprlib
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from llama.checkpoint import Source, first_few, role, weight_shapes
from llama.formats import (
    check_shapes,
    ffn_params,
    meta_names,
    naming,
    positive_int,
    positive_number,
)
from llama.gguf import GGUF_MAGIC, open_gguf
from llama.manifest import read_json_object
from llama.model import ModelArgs

if TYPE_CHECKING:
    import transformers

EMBEDDING = "model.embed_tokens.weight"
NAMES = {
    EMBEDDING: "tok_embeddings.weight",
    "model.layers.N.self_attn.q_proj.weight": "layers.N.attention.wq.weight",
    "model.layers.N.self_attn.k_proj.weight": "layers.N.attention.wk.weight",
    "model.layers.N.self_attn.v_proj.weight": "layers.N.attention.wv.weight",
    "model.layers.N.self_attn.o_proj.weight": "layers.N.attention.wo.weight",
    "model.layers.N.mlp.gate_proj.weight": "layers.N.feed_forward.w1.weight",
    "model.layers.N.mlp.down_proj.weight": "layers.N.feed_forward.w2.weight",
    "model.layers.N.mlp.up_proj.weight": "layers.N.feed_forward.w3.weight",
    "model.layers.N.input_layernorm.weight": "layers.N.attention_norm.weight",
    "model.layers.N.post_attention_layernorm.weight": "layers.N.ffn_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
# A buffer that old exports saved with the weights; it follows from the configuration.
RECOMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

# safetensors' names of the types that a checkpoint may hold.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
ACCEPTED = (
    "give a .gguf file, a folder with one, or a Hugging Face folder (config.json and safetensors)"
)


def open_any(path: str | Path) -> Source:
    """Open a GGUF file, a Hugging Face folder, or a folder that holds one GGUF file.

    Raises FileNotFoundError if nothing is there, ValueError if it is none of these.
    """
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
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
                return open_gguf(path)
    raise ValueError(f"{path}: not a GGUF file; {ACCEPTED}")


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
        raise FileNotFoundError(f"{config_path}: no such file; {ACCEPTED}")
    config = read_json_object(config_path)
    with naming(config_path):
        params = _params(config)
        args = ModelArgs.from_params(params)

    weights = _open_weights(folder)
    with naming(folder):
        names, unknown = meta_names(weights, NAMES)
        unknown = [name for name in unknown if not RECOMPUTED.fullmatch(name)]
        if unknown:
            raise ValueError(f"weights that no Llama model has: {first_few(unknown)}")
        # An explicit "false" says that the two were trained apart: then one of them is lost.
        tied = config.get("tie_word_embeddings", "output.weight" not in names)
        if tied and EMBEDDING in weights:
            names["output.weight"] = EMBEDDING
        slices = {name: weights[hf_name].get_slice(hf_name) for name, hf_name in names.items()}
        check_shapes({name: tuple(s.get_shape()) for name, s in slices.items()}, args)
        dtype = _common_dtype({names[name]: s.get_dtype() for name, s in slices.items()})

    heads = {"attention.wq": args.n_heads, "attention.wk": args.n_kv_heads}

    def read(name: str) -> torch.Tensor:
        weight = weights[names[name]].get_tensor(names[name])
        return unpermute(weight, heads[role(name)]) if role(name) in heads else weight

    files = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    return Source(params, weight_shapes(args), dtype, read, files)


def hf_config(args: ModelArgs, **options: object) -> "transformers.LlamaConfig":
    """The configuration of Hugging Face's own model of the same shape."""
    import transformers  # here, for it takes seconds, and reading a folder needs none of it

    return transformers.LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        vocab_size=args.vocab_size,
        intermediate_size=args.hidden_dim,
        rms_norm_eps=args.norm_eps,
        **options,
    )


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows (n_heads * head_dim, dim) from Hugging Face's rotary order to Meta's.

    A rotary pair is (i, i + head_dim/2) there and (2i, 2i + 1) here.
    """
    rows, dim = weight.shape
    halves = weight.view(n_heads, 2, rows // n_heads // 2, dim)
    return halves.transpose(1, 2).reshape(rows, dim)


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
            raise ValueError(f"{key} is {reprlib.repr(found)}; only {wanted!r} can be converted")
    dim = positive_int(config, "hidden_size")
    n_heads = positive_int(config, "num_attention_heads")
    head_dim = positive_int(config, "head_dim", dim // n_heads)
    if head_dim * n_heads != dim:
        raise ValueError(
            f"head_dim is {head_dim}; only hidden_size / num_attention_heads = {dim} / {n_heads} "
            "can be converted"
        )
    return {
        "dim": dim,
        "n_layers": positive_int(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": positive_int(config, "num_key_value_heads", n_heads),
        "vocab_size": positive_int(config, "vocab_size"),
        **ffn_params(dim, positive_int(config, "intermediate_size")),
        "norm_eps": positive_number(config, "rms_norm_eps", 1e-6),
        **_rope_params(config),
    }


def _rope_params(config: dict) -> dict:
    """The rotary embedding, as transformers 4 (rope_scaling) or 5 (rope_parameters) writes it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {reprlib.repr(rope)}, not an object")
    holder = rope if "rope_theta" in rope else config
    params = {
        "rope_theta": positive_number(holder, "rope_theta", 10000.0),
        "use_scaled_rope": False,
    }
    # Wanted of every kind, and of llama3 alone: Meta's format has no place for other values.
    fixed = {"partial_rotary_factor": (None, 1)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        params["use_scaled_rope"] = True
        fixed |= {"low_freq_factor": (1,), "original_max_position_embeddings": (8192,)}
    elif kind != "default":
        raise ValueError(
            f"rope_type is {reprlib.repr(kind)}; only 'default' and 'llama3' can be converted"
        )
    for key, wanted in fixed.items():
        found = rope.get(key, config.get(key) if key == "partial_rotary_factor" else None)
        if found not in wanted:
            raise ValueError(
                f"{key} of rope is {reprlib.repr(found)}; only {wanted[-1]} can be converted"
            )
    if kind == "llama3":
        if (factor := positive_number(rope, "factor")) != 8:
            params["rope_scaling_factor"] = factor
        if (high := positive_number(rope, "high_freq_factor")) != 4:
            params["rope_high_freq_factor"] = high
        if high <= 1:
            raise ValueError(f"high_freq_factor of rope is {high}; it must be above the low one, 1")
    return params


def _common_dtype(kinds: dict[str, str]) -> torch.dtype:
    """The one type that holds weights of all these safetensors types without loss."""
    for name, kind in kinds.items():
        if kind not in DTYPES:
            raise ValueError(f"{name} is {kind}; only {', '.join(DTYPES)} can be converted")
    return reduce(torch.promote_types, {DTYPES[kind] for kind in kinds.values()})


def _open_weights(folder: Path) -> dict[str, safe_open]:
    """The safetensors file, mapped into memory, that holds each weight."""
    weights = {}
    for file_name, listed in _weight_files(folder).items():
        path = folder / file_name
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as err:
            raise ValueError(f"{path}: cannot be read: {err}; download it again") from err
        held = set(file.keys())
        if listed is not None and held != listed:
            raise ValueError(
                f"{path}: disagrees with model.safetensors.index.json about "
                f"{first_few(sorted(held ^ listed))}; download the folder again"
            )
        weights |= dict.fromkeys(held, file)
    return weights


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
            raise ValueError(
                f"{index}: {reprlib.repr(file_name)} is not the name of a file in this folder"
            )
        files.setdefault(file_name, set()).add(name)
    absent = [file_name for file_name in files if not (folder / file_name).is_file()]
    if absent:
        raise ValueError(f"{folder}: {first_few(absent)} missing; download the folder again")
    return files
