"""Read and write Hugging Face folders of a Llama model: config.json and safetensors."""

import functools
import json
import math
import reprlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from llama.checkpoint.laid_out import (
    LaidOutFile,
    check_space,
    checked_blocks,
    in_dtype,
    write_weights,
)
from llama.checkpoint.params import (
    ROPE_SCALING,
    check_values,
    read_rope,
    read_sizes,
    rope_of,
    sizes_of,
)
from llama.checkpoint.weights import (
    EMBEDDING,
    OUTPUT,
    Source,
    check_layers,
    check_shapes,
    kind_of,
    meta_names,
    name_in,
    tokenizer_in,
)
from llama.cli import first_few
from llama.files import bytes_of, naming, naming_refusals, read_json, write_json
from llama.model import ModelArgs
from llama.options import dtype_name
from llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    import transformers

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LONGEST_FILE = 5_000_000_000  # bytes of weights, unless one alone is longer
# A buffer that old exports saved with the weights; it follows from the configuration.
RECOMPUTED = "rotary_emb.inv_freq"
# safetensors' names of the types that a checkpoint may hold.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class HFFolder(Source):
    """A folder with config.json (model_type llama) and safetensors weights.

    Opening it reads headers only. The rows of wq and wk come out in Meta's order (rotary pairs are
    neighbours), a tied embedding as the output too.

    Raises ValueError, naming path and values, for any model that Meta's format cannot express and
    for missing, unexpected, misshapen or damaged weights.
    """

    form = "a Hugging Face folder"

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        config = read_json(folder / CONFIG)
        with naming(folder / CONFIG):
            params = _params(config)
        files = _open_weights(folder)
        with naming(folder):
            names = meta_names("hf", [name for name in files if not name.endswith(RECOMPUTED)])
            # An explicit "false" says that the two were trained apart: then one of them is lost.
            if config.get("tie_word_embeddings", OUTPUT not in names) and EMBEDDING in names:
                names[OUTPUT] = names[EMBEDDING]
            check_layers(ModelArgs.from_params(params), len(names))
            self._slices = {name: files[hf].get_slice(hf) for name, hf in names.items()}
            types = {name: weight.get_dtype() for name, weight in self._slices.items()}
            check_values(types, dict.fromkeys(types, tuple(DTYPES)))
            dtype = functools.reduce(torch.promote_types, {DTYPES[x] for x in types.values()})
            super().__init__(folder, params, dtype, tokenizer_in(folder))
            self.stop_ids = _stop_ids(folder, config, self.args.vocab_size)
            found = {name: tuple(weight.get_shape()) for name, weight in self._slices.items()}
            check_shapes(found, self.shapes)

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows (dim 0) or columns (dim 1) start to stop of a weight; by default all of it."""
        weight, head_dim = self._slices[name], self.args.head_dim
        if not kind_of(name).rotary:
            return weight[:, start:stop] if dim else weight[start:stop]
        if dim:
            return unpermute(weight[:, start:stop], head_dim)
        # A row may come from anywhere in its head: read whole heads.
        stop = self.shapes[name][0] if stop is None else stop
        first = start // head_dim * head_dim
        heads = unpermute(weight[first : -(-stop // head_dim) * head_dim], head_dim)
        return heads[start - first : stop - first]


def _stop_ids(folder: Path, config: dict, vocab_size: int) -> frozenset[int]:
    """The ids that end an answer by config.json and generation_config.json."""
    path, found = folder / "generation_config.json", set()
    for source in (config, read_json(path) if path.is_file() else {}):
        ids = source.get("eos_token_id")
        found |= {i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int}
    return frozenset(i for i in found if 0 <= i < vocab_size)


def unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads (n * head_dim, dim) from Hugging Face's rotary order to Meta's.

    A rotary pair is (i, i + head_dim/2) there and (2i, 2i + 1) here.
    """
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def permute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of whole heads from Meta's rotary order to Hugging Face's: the inverse of unpermute."""
    pairs = weight.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def hf_config(args: ModelArgs, **options: object) -> "transformers.LlamaConfig":
    """The configuration of Hugging Face's own model of the same shape."""
    import transformers  # here, for it takes seconds, and reading a folder needs none of it

    return transformers.LlamaConfig(**config_of(args) | options)


def config_of(args: ModelArgs) -> dict:
    """What config.json says of a model: as transformers 5 reads it, and 4."""
    rope = rope_of(args)
    sizes = sizes_of("hf", args)
    of_version_4 = {"rope_scaling": rope if rope["rope_type"] != "default" else None}
    return sizes | of_version_4 | {"rope_parameters": rope | {"rope_theta": args.rope_theta}}


def _params(config: dict) -> dict:
    """What params.json says, from config.json."""
    # Mistral's is the same architecture, but where it looks at the last few thousand tokens alone.
    check_values(config, {"model_type": ("llama", "mistral")})
    if config["model_type"] == "mistral" and config.get("sliding_window", 4096) is not None:
        raise ValueError("sliding_window is set, or absent, which means 4096; only null will do")
    config = {key: value for key, value in config.items() if value is not None}
    # What transformers 5 says of the rotary embedding in an object, 4 says in part beside it.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters is {reprlib.repr(rope)}, not an object")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta", config.get("rope_theta", ModelArgs.rope_theta))
    defaults = {"num_key_value_heads": config.get("num_attention_heads"), "rms_norm_eps": 1e-6}
    params = read_sizes("hf", defaults | config | {"rope_theta": theta})
    accepted = {
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1),
    }
    check_values(config, accepted)
    check_values(rope, {"partial_rotary_factor": (None, 1)})
    check_values({"rope_type": kind}, {"rope_type": tuple(ROPE_SCALING)})
    return params | read_rope(kind, rope)


def _open_weights(folder: Path) -> dict[str, safe_open]:
    """The open safetensors file that holds each weight, by the names in the folder."""
    weights: dict[str, safe_open] = {}
    for path in _weight_files(folder):
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; download it again") from error
        weights |= dict.fromkeys(file.keys(), file)
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """The one file of weights or, like transformers only without it, the set of numbered ones."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    number = "[0-9]" * 5
    found = {path.name for path in folder.glob(f"model-{number}-of-{number}.safetensors")}
    if not found:
        raise ValueError(
            f"{folder}: no {WEIGHTS}. Pickled weights (.bin) can run code and are not read; where "
            "you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    total = max(found).removesuffix(".safetensors")[-5:]
    names = [f"model-{i:05}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    if wrong := sorted(found.symmetric_difference(names)):
        raise ValueError(f"{folder}: {first_few(wrong)} missing or of another set; download again")
    return [folder / name for name in names]


def write_hf(source: Source, folder: Path, dtype: torch.dtype, tokenizer: Tokenizer | None) -> None:
    """Write a model into a folder: config.json, generation_config.json and safetensors files.

    tokenizer: whose ids the configurations name. Weights are streamed, a few rows at a time.
    """
    args = source.args
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= config_of(args) | {"tie_word_embeddings": source.tied, "attention_bias": False}
    config |= {"dtype": dtype_name(dtype)}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if tokenizer is not None:
        others = sorted((tokenizer.stop_ids | source.stop_ids) - {tokenizer.eos_id})
        eos = [tokenizer.eos_id, *others] if others else tokenizer.eos_id
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos}
        write_json(folder / "generation_config.json", ids | {"pad_token_id": tokenizer.pad_id})
        # In a model's own configuration it is a row that never learns: so not the end's.
        ids["pad_token_id"] = tokenizer.pad_id if tokenizer.pad_id != tokenizer.eos_id else None
    write_json(folder / CONFIG, config | ids)
    names = source.different_names
    files = _lay_out(source, folder, dtype, names)

    def write(name: str) -> None:
        file = next(file for file in files if name in file.offsets)
        rotary, done = kind_of(name).rotary, 0
        for block in checked_blocks(source, name, args.head_dim if rotary else 1):
            rows = permute(block, args.head_dim) if rotary else block
            data = bytes_of(in_dtype(rows, dtype, name))
            file.write(name, done, data)
            done += len(data)

    write_weights(source, files, names, write)


def _lay_out(
    source: Source, folder: Path, dtype: torch.dtype, names: list[str]
) -> list[LaidOutFile]:
    """Write the headers of the safetensors files, each of at most LONGEST_FILE bytes of weights.

    The format: https://github.com/huggingface/safetensors, "Format". The library itself writes
    only what is in memory as a whole.
    """
    size = {name: math.prod(source.shapes[name]) * dtype.itemsize for name in names}
    check_space(folder, sum(size.values()))
    groups: list[list[str]] = [[]]
    for name in names:
        if groups[-1] and sum(size[x] for x in [*groups[-1], name]) > LONGEST_FILE:
            groups.append([])
        groups[-1].append(name)
    files, index = [], {}
    code = next(code for code, known in DTYPES.items() if known == dtype)
    for i, group in enumerate(groups, 1):
        path = folder / WEIGHTS
        if len(groups) > 1:
            path = folder / f"model-{i:05}-of-{len(groups):05}.safetensors"
        end, entries, offsets = 0, {}, {}
        for name in group:
            offsets[name], there = end, name_in("hf", name)
            end += size[name]
            places = {"data_offsets": [offsets[name], end]}
            entries[there] = {"dtype": code, "shape": source.shapes[name]} | places
            index[there] = path.name
        header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()
        header += b" " * (-len(header) % 8)
        with naming_refusals(path):
            path.write_bytes(struct.pack("<Q", len(header)) + header)
        data = 8 + len(header)
        offsets = {name: data + start for name, start in offsets.items()}
        files.append(LaidOutFile(path, offsets, data + end))
    if len(groups) > 1:
        total = {"total_size": sum(size.values())}
        write_json(folder / f"{WEIGHTS}.index.json", {"metadata": total, "weight_map": index})
    return files
