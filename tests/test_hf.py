"""Hugging Face folders against transformers itself, and what cannot be converted."""

import json

import pytest
import torch
from formats import assert_fails, assert_ranges_are_slices, assert_same_logits, save_hf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llama.checkpoint.hf import HFFolder
from llama.checkpoint.params import read_sizes
from llama.model import ModelArgs


def llama3_rope(**changes):
    """The rotary embedding of Llama 3.1 in config.json."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    return {"rope_parameters": rope | changes}


NORM = "model.norm.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
MODELS = {
    "heads = kv heads": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "narrow FFN": {"intermediate_size": 91},
    "bfloat16": {"dtype": torch.bfloat16},
    "scaled rope": llama3_rope(),
    "other scaled rope": llama3_rope(factor=32.0, high_freq_factor=3.0, low_freq_factor=1.5),
    "rope of another context": llama3_rope(original_max_position_embeddings=512),
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "wide heads": {"head_dim": 32},
    "Mistral's": {"model_type": "mistral", "head_dim": 24},
}


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in value.items() if v is not None}))


def rewrite_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def assert_equals_transformers(folder):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_logits(folder, reference)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_converted_model_gives_the_logits_of_transformers(tmp_path, changes):
    save_hf(tmp_path / "hf", **changes)
    assert HFFolder(tmp_path / "hf").dtype == changes.get("dtype", torch.float32)
    assert_equals_transformers(tmp_path / "hf")


def test_sharded_folder_needs_no_index_and_is_led_nowhere_by_one(tmp_path):
    save_hf(tmp_path / "hf", max_shard_size="100KB")
    reference = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    index = tmp_path / "hf/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: "/etc/passwd"}}))
    assert_same_logits(tmp_path / "hf", reference)
    index.unlink()
    assert HFFolder(tmp_path / "hf").shapes


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_any_rows_or_columns_are_those_of_the_whole_weight(tmp_path, changes):
    save_hf(tmp_path, **changes)
    assert_ranges_are_slices(HFFolder(tmp_path))


def test_rope_as_transformers_4_wrote_it(tmp_path):
    save_hf(tmp_path / "hf", **llama3_rope())
    rope = llama3_rope()["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {"rope_parameters": None, "rope_theta": theta, "rope_scaling": rope | {"type": kind}}
    edit(tmp_path / "hf/config.json", **old)
    assert_equals_transformers(tmp_path / "hf")


def test_params_name_only_what_differs_from_the_defaults(tmp_path):
    save_hf(tmp_path)
    edit(tmp_path / "config.json", **llama3_rope())
    params = HFFolder(tmp_path).params
    assert params["use_scaled_rope"] is True
    assert params["rope_theta"] == 5e5
    assert not {"rope_scaling_factor", "rope_high_freq_factor"} & params.keys()
    edit(tmp_path / "config.json", rope_parameters={"rope_type": "default"})
    params = HFFolder(tmp_path).params
    assert params["rope_theta"] == 10000.0
    assert "use_scaled_rope" not in params


def test_params_give_every_ffn_size_back_in_metas_words_where_they_can():
    config = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    config |= {"vocab_size": 1, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    for dim, sizes in ((64, range(2, 1000)), (4096, (2, 11008, 14336, 10923)), (8192, (28672,))):
        for hidden in sizes:
            sized = config | {"hidden_size": dim, "intermediate_size": hidden}
            params = read_sizes("hf", sized)
            assert ModelArgs.from_params(params).hidden_dim == hidden
            as_metas = params["multiple_of"] == 256 and "ffn_dim_multiplier" not in params
            assert as_metas == ((dim, hidden) in ((64, 256), (4096, 11008)))


def test_tokenizer_files_come_along_and_other_files_do_not(tmp_path):
    save_hf(tmp_path)
    names = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"]
    for name in [*names, "vocab.txt"]:
        (tmp_path / name).touch()
    assert HFFolder(tmp_path).files == {name: tmp_path / name for name in names}


def test_buffers_of_old_exports_are_left_out(tmp_path):
    save_hf(tmp_path)
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    rewrite_weights(tmp_path, lambda weights: weights.update({name: torch.ones(8)}))
    assert not any("inv_freq" in name for name in HFFolder(tmp_path).shapes)


def test_absent_output_weight_means_tied_unless_config_says_otherwise(tmp_path):
    save_hf(tmp_path)
    rewrite_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    assert_fails(tmp_path, "output.weight is missing")
    edit(tmp_path / "config.json", tie_word_embeddings=None)
    source = HFFolder(tmp_path)
    assert source.read("output.weight").equal(source.read("tok_embeddings.weight"))


BAD_CONFIGS = {
    "model_type": ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
    "sliding window": ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window is set"),
    "the usual window": ({"model_type": "mistral"}, "or absent, which means 4096"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "attention bias": ({"attention_bias": True}, "attention_bias is True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias is True"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "head_dim": ({"head_dim": 32}, "wq.weight has shape (64, 64), expected (128, 64)"),
    "odd head_dim": ({"head_dim": 17}, "head_dim 17 must be even"),
    "uneven heads": ({"num_attention_heads": 5, "head_dim": None}, "n_heads 5"),
    "no size": ({"hidden_size": None}, "hidden_size is None"),
    "size is text": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "size is huge": ({"hidden_size": 10**400}, "hidden_size is 1000"),
    "size is zero": ({"intermediate_size": 0}, "intermediate_size is 0"),
    "endless layers": ({"num_hidden_layers": 2**31 - 1}, "too few for 2147483647 layers"),
    "eps": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "rope is a list": ({"rope_parameters": [1]}, "rope_parameters is [1]"),
    "rope kind": ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
    "old rope kind": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "'dynamic'"),
    "rope theta": ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
    "linear rope": ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
    "context": (llama3_rope(original_max_position_embeddings=0.5), "embeddings is 0.5"),
    "high_freq_factor": (llama3_rope(high_freq_factor=1), "1 must be above the low one, 1.0"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_config_that_cannot_be_converted_is_named(tmp_path, changes, message):
    save_hf(tmp_path)
    edit(tmp_path / "config.json", **changes)
    assert_fails(tmp_path, message)


BAD_WEIGHTS = {
    "missing": (lambda w: w.pop(NORM), r"norm.weight is missing"),
    "no embedding": (lambda w: w.pop("model.embed_tokens.weight"), "tok_embeddings.weight is miss"),
    "bias": (lambda w: w.update({Q_PROJ[:-6] + "bias": torch.ones(64)}), "q_proj.bias"),
    "shape": (lambda w: w.update({NORM: torch.ones(65)}), "norm.weight has shape (65,)"),
    "layer": (lambda w: w.update({Q_PROJ.replace("0", "7"): w[Q_PROJ] + 1}), "is unexpected"),
    "odd layer": (lambda w: w.update({Q_PROJ.replace("0", "01"): w[Q_PROJ] + 1}), r"layers.01"),
    "type": (lambda w: w.update({NORM: torch.ones(64, dtype=torch.float64)}), "F64"),
}


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    save_hf(tmp_path)
    rewrite_weights(tmp_path, change)
    assert_fails(tmp_path, message)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_weights_are_an_error(tmp_path, keep):
    save_hf(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_fails(tmp_path, "model.safetensors: cannot be read")


def test_shard_that_is_missing_or_of_another_set_is_named(tmp_path):
    save_hf(tmp_path, max_shard_size="100KB")
    second = next(tmp_path.glob("model-00002-of-*"))
    other = second.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert_fails(tmp_path, f"{other.name}, {second.name} missing or of another set")


def test_pickled_weights_alone_are_refused(tmp_path):
    save_hf(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_fails(tmp_path, "Pickled weights (.bin) can run code and are not read")
