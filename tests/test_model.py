"""Transformer against Hugging Face's LlamaForCausalLM; on several ranks in test_ranks.py."""

from pathlib import Path

import programs
import pytest
import torch
from conftest import hf_reference, make_ckpt, make_params

from llama import layers
from llama.cache import KVCache
from llama.checkpoint.folder import Checkpoint
from llama.model import ModelArgs

SHAPES = {
    "heads = kv heads": {"n_kv_heads": 8},
    "heads = 4 kv heads": {"n_kv_heads": 2},
    "one kv head": {"n_kv_heads": 1},
    "scaled rope": {"n_kv_heads": 2, "use_scaled_rope": True, "rope_theta": 500000.0},
    "linear rope": {"n_kv_heads": 2, "rope_linear_factor": 4.0},
    "wide heads": {"n_kv_heads": 2, "head_dim": 24},
}


def build(tmp_path, **changes):
    changes = {"vocab_size": 512} | changes
    return programs.load(make_ckpt(tmp_path / "ckpt", **changes)), hf_reference(**changes)


def token_ids(bsz, seqlen, vocab_size=512):
    return torch.randint(vocab_size, (bsz, seqlen), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_logits_equal_hugging_face(tmp_path, changes):
    model, reference = build(tmp_path, **changes)
    ids = token_ids(2, 40)
    logits = model(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference(ids).logits, atol=1e-3, rtol=0)


@torch.inference_mode()
def test_padding_left_or_right_changes_no_real_position(tmp_path):
    model, reference = build(tmp_path, n_kv_heads=2)
    ids, mask = token_ids(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :9] = 0
    mask[1, 21:] = 0
    expected = reference(ids, attention_mask=mask).logits
    for given, rows in ((mask, slice(None)), (mask[1:], slice(1, None))):  # with and without left
        logits = model(ids[rows], attention_mask=given)
        assert logits.isfinite().all()
        seen = given.bool()
        torch.testing.assert_close(logits[seen], expected[rows][seen], atol=1e-3, rtol=0)


@torch.inference_mode()
def test_cached_decoding_equals_full_pass_at_every_position(tmp_path):
    model, _ = build(tmp_path, n_kv_heads=2)
    ids = token_ids(3, 24)
    full = model(ids)
    cache = KVCache(model, bsz=3, max_len=24)
    cached = [model.hidden_states(ids[:, :5], cache=cache, start_pos=[0] * 3)]
    cached.append(model.hidden_states(ids[:, 5:9], cache=cache, start_pos=[5] * 3))  # a chunk
    for position in range(9, 24):
        step = ids[:, position : position + 1]
        cached.append(model.hidden_states(step, cache=cache, start_pos=[position] * 3))
    torch.testing.assert_close(model.gather_logits(torch.cat(cached, 1)), full, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [(torch.float32, (8, 0)), (torch.bfloat16, (8, 0)), (torch.bfloat16, (7, 5))],
)
@torch.inference_mode()
def test_heads_in_groups_take_no_kernel_that_most_cards_lack(
    tmp_path, monkeypatch, dtype, capability
):
    """With groups that attention is to spread itself, newer cards have one for halves, no mask."""
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    in_groups = layers.attends_in_groups(dtype, card)
    assert in_groups == (dtype != torch.float32 and capability >= (8, 0))
    monkeypatch.setattr("llama.model.attends_in_groups", lambda dtype, device: in_groups)
    model, _ = build(tmp_path, n_kv_heads=2)
    model, ids, calls = model.to(dtype), token_ids(3, 24), []

    def watched(query, key, value, attn_mask=None, enable_gqa=False, **kwargs):
        calls.append(attn_mask)
        assert not enable_gqa or (attn_mask is None and in_groups)
        assert enable_gqa or key.shape[1] == query.shape[1]
        if attn_mask is not None:  # as it is, no layer need copy it
            assert attn_mask.dtype == query.dtype
            assert attn_mask.stride(-2) % 16 == 0
        return attend(query, key, value, attn_mask=attn_mask, enable_gqa=enable_gqa, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr("llama.model.computes", lambda dtype: True)
    cache = KVCache(model, bsz=3, max_len=24)
    masked = []
    for start_pos, width in (([0] * 3, 8), ([8] * 3, 5), ([13] * 3, 1), ([5, 9, 14], 1)):
        model.hidden_states(ids[:, :width], cache=cache, start_pos=start_pos)
        masked.append(calls[-1] is not None)
        assert calls[-1] is calls[-2]  # made once for all layers
    assert masked == [False, True, False, True]


def test_building_and_loading_copy_no_weight(tmp_path):
    model, _ = build(tmp_path)
    shard = Checkpoint(tmp_path / "ckpt").shard(0)
    assert shard.keys() == model.state_dict().keys()
    size = (tmp_path / "ckpt" / "fs_consolidated.00.pth").stat().st_size
    for name, weight in model.state_dict().items():
        # one mapping of the whole file lies behind each weight
        assert weight.untyped_storage().nbytes() <= size, name
        assert not weight.requires_grad, name
    assert str(tmp_path / "ckpt" / "fs_consolidated.00.pth") in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dim": 0}, "dim"),
        ({"dim": "64"}, "dim"),
        ({"n_heads": 7}, "n_heads 7"),
        ({"n_kv_heads": 3}, "n_kv_heads 3"),
        ({"n_layers": -1}, "n_layers"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"rope_theta": None}, "rope_theta"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"context_len": 0}, "context_len"),
        ({"rope_high_freq_factor": 1.0}, "rope_high_freq_factor 1.0"),
    ],
)
def test_impossible_arguments_are_named(changes, word):
    with pytest.raises(ValueError, match=word):
        ModelArgs.from_params(make_params(**changes))


@pytest.mark.parametrize(
    ("params", "hidden"),
    [  # FFN sizes of published models
        ({"dim": 4096, "n_heads": 32, "multiple_of": 256}, 11008),  # Llama 1 and 2, 7B
        ({"dim": 5120, "n_heads": 40, "multiple_of": 256}, 13824),  # 13B
        ({"dim": 8192, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"dim": 4096, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    ],
)
def test_ffn_size_of_published_models(params, hidden):
    assert ModelArgs.from_params(params).hidden_dim == hidden
