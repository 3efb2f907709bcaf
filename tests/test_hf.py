"""Hugging Face folders against transformers itself, and what cannot be converted."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama import parallel
from llama.checkpoint import Checkpoint
from llama.formats import ffn_params
from llama.generation import load_model
from llama.hf import open_any, open_hf
from llama.model import ModelArgs
from llama.reshard import write_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "heads = kv heads": {"num_key_value_heads": 4},
    "grouped queries": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "narrow FFN": {"intermediate_size": 91},
    "bfloat16": {"dtype": torch.bfloat16},
    "scaled rope": {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
    "other scaled rope": {
        "rope_parameters": LLAMA3_ROPE
        | {"rope_theta": 5e5, "factor": 32.0, "high_freq_factor": 3.0}
    },
}


def save_model(folder, dtype=torch.float32, max_shard_size="1GB", **changes) -> None:
    """A random model with weights large enough that every mistake shows, saved to a folder."""
    torch.manual_seed(0)
    config = {
        "hidden_size": 64,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 131072,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    model = LlamaForCausalLM(LlamaConfig(**(config | changes))).to(dtype)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))


def rewrite_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@torch.inference_mode()
def assert_same_logits(folder, tmp_path):
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    write_checkpoint(open_any(folder), tmp_path / "ckpt")
    model = load_model(Checkpoint(tmp_path / "ckpt"), parallel.setup(), torch.float32)
    ids = torch.randint(96, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = reference(ids).logits
    assert expected.std() > 1
    torch.testing.assert_close(model(ids), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_converted_model_gives_the_logits_of_transformers(tmp_path, changes):
    save_model(tmp_path / "hf", **changes)
    assert open_hf(tmp_path / "hf").dtype == changes.get("dtype", torch.float32)
    assert_same_logits(tmp_path / "hf", tmp_path)


def test_sharded_folder_is_read_through_its_index(tmp_path):
    save_model(tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert_same_logits(tmp_path / "hf", tmp_path)


def test_rope_as_transformers_4_wrote_it(tmp_path):
    save_model(tmp_path / "hf", rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    edit(
        tmp_path / "hf/config.json",
        rope_parameters=None,
        rope_theta=5e5,
        rope_scaling=LLAMA3_ROPE,
    )
    assert_same_logits(tmp_path / "hf", tmp_path)


def test_params_name_only_what_differs_from_the_defaults(tmp_path):
    save_model(tmp_path)
    edit(tmp_path / "config.json", rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    params = open_hf(tmp_path).params
    assert params["use_scaled_rope"] is True
    assert params["rope_theta"] == 5e5
    assert not {"rope_scaling_factor", "rope_high_freq_factor"} & params.keys()
    edit(tmp_path / "config.json", rope_parameters={"rope_type": "default"})
    params = open_hf(tmp_path).params
    assert params["rope_theta"] == 10000.0
    assert params["use_scaled_rope"] is False


def test_ffn_params_give_every_hidden_size_back():
    for dim, sizes in ((64, range(2, 1000)), (4096, (2, 11008, 14336, 10923)), (8192, (28672,))):
        for hidden in sizes:
            args = ModelArgs(dim=dim, n_heads=1, **ffn_params(dim, hidden))
            assert args.hidden_dim == hidden
    assert ffn_params(4096, 11008) == {"multiple_of": 256}  # Llama 7B, as Meta writes it
    with pytest.raises(ValueError, match="FFN size 1"):
        ffn_params(37, 1)


def test_tokenizer_files_come_along_and_other_files_do_not(tmp_path):
    save_model(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).write_text(name)
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    assert open_hf(tmp_path).files == {name: name.encode() for name in names}


def test_buffers_of_old_exports_are_left_out(tmp_path):
    save_model(tmp_path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite_weights(tmp_path, lambda weights: weights.update({name: torch.ones(8)}))
    assert not any("inv_freq" in name for name in open_hf(tmp_path).shapes)


def test_absent_output_weight_means_tied_unless_config_says_otherwise(tmp_path):
    save_model(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"output.weight is missing"):
        open_hf(tmp_path)
    edit(tmp_path / "config.json", tie_word_embeddings=None)
    source = open_hf(tmp_path)
    assert source.read("output.weight").equal(source.read("tok_embeddings.weight"))


BAD_CONFIGS = {
    "model_type": ({"model_type": "mistral"}, "model_type is 'mistral'"),
    "no model_type": ({"model_type": None}, "model_type is None"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "head_dim": ({"head_dim": 32}, "head_dim is 32"),
    "uneven heads": ({"num_attention_heads": 5, "head_dim": None}, "head_dim is 12"),
    "uneven kv heads": ({"num_key_value_heads": 3}, "n_kv_heads 3"),
    "no size": ({"hidden_size": None}, "hidden_size is None"),
    "size is text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "size is true": ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    "size is huge": ({"hidden_size": 10**400}, "hidden_size is 1000"),
    "size is zero": ({"intermediate_size": 0}, "intermediate_size is 0"),
    "endless layers": ({"num_hidden_layers": 2**31 - 1}, "too few for 2147483647 layers"),
    "eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "rope is a list": ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    "rope kind": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    "old rope kind": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type is 'linear'",
    ),
    "rope theta": ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
    "low_freq_factor": ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2}}, "is 2; only 1"),
    "context": (
        {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 4096}},
        "is 4096; only 8192",
    ),
    "high_freq_factor": ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1}}, "is 1.0"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of rope is 0.5"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_config_that_cannot_be_converted_is_named(tmp_path, changes, message):
    save_model(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        open_any(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000], ids=len)
def test_config_that_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        open_any(tmp_path)


NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD_WEIGHTS = {
    "missing": (lambda w: w.pop(NORM), r"norm.weight is missing"),
    "no embedding": (lambda w: w.pop("model.embed_tokens.weight"), "tok_embeddings.weight is miss"),
    "unknown": (lambda w: w.update({"model.x.weight": torch.ones(1)}), "model.x.weight"),
    "bias": (lambda w: w.update({Q_PROJ[:-6] + "bias": torch.ones(64)}), "q_proj.bias"),
    "shape": (lambda w: w.update({NORM: torch.ones(65)}), r"norm.weight has shape \(65,\)"),
    "rank": (lambda w: w.update({Q_PROJ: torch.ones(64, 64, 1)}), r"wq.weight has shape"),
    "layer": (
        lambda w: w.update({Q_PROJ.replace("0", "7"): w[Q_PROJ] + 1}),
        "layers.7.+unexpected",
    ),
    "odd layer": (lambda w: w.update({Q_PROJ.replace("0", "01"): w[Q_PROJ] + 1}), r"layers.01"),
    "type": (lambda w: w.update({NORM: torch.ones(64, dtype=torch.float64)}), "F64"),
}


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    save_model(tmp_path)
    rewrite_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_hf(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_weights_are_an_error(tmp_path, keep):
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        open_hf(tmp_path)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b", "..", 3, ""])
def test_index_cannot_lead_out_of_the_folder(tmp_path, name):
    save_model(tmp_path, max_shard_size="100KB")
    edit(tmp_path / "model.safetensors.index.json", weight_map={NORM: name})
    with pytest.raises(ValueError, match="is not the name of a file in this folder"):
        open_hf(tmp_path)


def test_index_that_disagrees_with_its_files(tmp_path):
    save_model(tmp_path, max_shard_size="100KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={name: file for name, file in weight_map.items() if name != NORM})
    with pytest.raises(ValueError, match=NORM):
        open_hf(tmp_path)
    edit(index, weight_map=weight_map | {NORM: "gone.safetensors"})
    with pytest.raises(ValueError, match=r"gone\.safetensors missing"):
        open_hf(tmp_path)
    edit(index, weight_map={})
    with pytest.raises(ValueError, match="no weight_map"):
        open_hf(tmp_path)


def test_pickled_weights_alone_are_refused(tmp_path):
    save_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights .* safetensors"):
        open_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="download the weights"):
        open_hf(tmp_path)


def test_open_any_says_what_it_accepts(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; give a"):
        open_any(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither config.json nor a .gguf file"):
        open_any(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        open_hf(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.gguf: not a GGUF file"):
        open_any(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        open_any(tmp_path)
