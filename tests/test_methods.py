"""Whatever a prompt is computed from, all of that is trained, and a plain prompt comes out."""

import peft
import programs
import pytest
import torch
import torch.nn.functional as F
from conftest import hf_reference, make_ckpt

from llama.tuning.adapter import load_soft_prompt, save_adapter
from llama.tuning.methods import SCALE, network_size
from llama.tuning.model import add_soft_prompt, encoder_of, soft_prompt_of
from llama.tuning.options import INITS, METHODS

VIRTUAL, DIM = 6, 64
MODEL = {"n_kv_heads": 2, "dim": DIM}
BATCH = torch.arange(1, 41).view(2, 20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return programs.load(make_ckpt(tmp_path_factory.mktemp("methods") / "ckpt", **MODEL))


def trained(model, method: str, init: str = "text", steps: int = 4) -> tuple:
    """A prompt after some steps of training, and the loss that the model then has."""
    torch.manual_seed(1)
    tuned = add_soft_prompt(model, VIRTUAL, [5, 9], "ckpt", method, init)
    optimizer = torch.optim.AdamW(encoder_of(tuned).parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for _ in range(steps + 1):
        loss = tuned(input_ids=BATCH, labels=BATCH).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) <= steps:
            optimizer.step()
    assert losses[-1] < losses[0]
    return tuned, losses[-1]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_a_plain_prompt_with_the_loss_of_training(tmp_path, model, method, init):
    tuned, expected = trained(model, method, init)
    for name, part in encoder_of(tuned).named_parameters():
        assert part.grad.abs().sum() > 0, name
    save_adapter(tuned, tmp_path)
    prompt = load_soft_prompt(tmp_path, DIM)
    assert torch.equal(prompt, soft_prompt_of(tuned))
    reference = peft.PeftModel.from_pretrained(hf_reference(**MODEL), tmp_path)
    assert reference.peft_config["default"].peft_type == "PROMPT_TUNING"
    assert reference(input_ids=BATCH, labels=BATCH).loss.item() == pytest.approx(expected, rel=1e-4)


def test_residual_adds_a_networks_output_to_the_prompt(model):
    tuned, _ = trained(model, "residual")
    state = {name.split("weight.", 1)[1]: x for name, x in encoder_of(tuned).state_dict().items()}
    names = ("0.down.weight", "0.down.bias", "0.up.weight", "0.up.bias")
    down, down_bias, up, up_bias = (state[name] for name in names)
    prompt = state["0.start"] + SCALE * state["original"]
    normed = prompt / prompt.pow(2).mean(dim=1, keepdim=True).sqrt()
    expected = prompt + F.relu(normed @ down.T + down_bias) @ up.T + up_bias
    torch.testing.assert_close(soft_prompt_of(tuned), expected, rtol=0, atol=1e-5)
    assert (prompt - expected).abs().max() > 1e-2  # the network has a part in it


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_is_trained(model, method):
    tuned = add_soft_prompt(model, VIRTUAL, [5], "ckpt", method)
    n_trained = sum(part.numel() for part in encoder_of(tuned).parameters())
    assert VIRTUAL * DIM + network_size(method, DIM) == n_trained


@pytest.mark.parametrize("method", METHODS)
def test_the_state_of_a_checkpoint_is_all_that_a_prompt_is_made_of(model, method):
    tuned, _ = trained(model, method)
    resumed = add_soft_prompt(model, VIRTUAL, [7], "ckpt", method)
    encoder_of(resumed).load_state_dict(encoder_of(tuned).state_dict())
    assert torch.equal(soft_prompt_of(resumed), soft_prompt_of(tuned))
