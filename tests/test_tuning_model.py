"""The model under PEFT: the same loss and gradient as Hugging Face's; on ranks in test_ranks.py."""

from pathlib import Path

import peft
import programs
import pytest
import torch
from conftest import TOKENIZERS, hf_model, make_ckpt, make_params
from random_model import random_source

from llama import layers
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.write import write_checkpoint
from llama.tuning.adapter import load_soft_prompt, save_adapter
from llama.tuning.model import LlamaForPromptTuning, add_soft_prompt, soft_prompt_of
from llama.tuning.options import METHODS

VOCAB_SIZE = TOKENIZERS["sentencepiece"][1]
MODEL = {"vocab_size": VOCAB_SIZE, "n_kv_heads": 2}


# std 0.2: at 0.5 Hugging Face's own float32 is 2e-5 away from its float64
SOURCE = random_source(make_params(**MODEL), std=0.2)


def batch() -> dict[str, torch.Tensor]:
    """Four rows, of which one is padded, with prompts that are not learned."""
    ids = torch.randint(VOCAB_SIZE, (4, 24), generator=torch.Generator().manual_seed(3))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :8] = -100
    mask[1, 18:], labels[1, 18:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def for_gradient(folder: Path, n: int, checkpointing: bool) -> dict:
    """What programs.gradient() is given, its model written in n shards."""
    write_checkpoint(SOURCE, folder, n)
    values = {"ckpt_dir": str(folder), "checkpointing": checkpointing}
    return values | {"batch": {name: tensor.tolist() for name, tensor in batch().items()}}


def assert_gradient(found: dict) -> None:
    """What programs.gradient() gave is what PEFT over Hugging Face's model gives."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
    reference = peft.get_peft_model(hf_model(SOURCE), config)
    weight = soft_prompt_of(reference)
    with torch.no_grad():
        weight.copy_(SOURCE.read("tok_embeddings.weight")[50:66])
    loss = reference(**batch()).loss
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    difference = torch.tensor(found["gradient"]) - weight.grad
    assert difference.norm() <= 1e-5 * weight.grad.norm()


def test_gradient_equals_peft_over_hugging_face(tmp_path):
    assert_gradient(programs.gradient(**for_gradient(tmp_path / "ckpt", 1, False)))


def test_what_is_recomputed_changes_no_bit_and_sums_over_no_ranks_twice(tmp_path, monkeypatch):
    ckpt_dir, ids = make_ckpt(tmp_path / "ckpt", n_layers=3, **MODEL), torch.arange(40).view(2, 20)
    found, sums = [], []
    reduce = layers.reduce_from_model_parallel_region
    monkeypatch.setattr(
        layers, "reduce_from_model_parallel_region", lambda x: (sums.append(x), reduce(x))[1]
    )
    for checkpointing, recompute_ffn in ((False, False), (False, True), (True, True)):
        model = programs.load(ckpt_dir)
        model.gradient_checkpointing, model.recompute_ffn = checkpointing, recompute_ffn
        tuned = add_soft_prompt(model, 4, [7, 8], "ckpt")
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append((loss, soft_prompt_of(tuned).grad))
        # two a layer; of layers recomputed two together all but the last of the two
        assert len(sums) == (6 + 4 if checkpointing else 6)
        sums.clear()
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_p_tuning_goes_through_the_same_model(tmp_path):
    model = programs.load(make_ckpt(tmp_path / "ckpt", **MODEL))
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16
    )
    tuned = peft.get_peft_model(LlamaForPromptTuning(model), config)
    ids = torch.arange(1, 13)[None]
    tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    gradients = [p.grad for p in tuned.parameters() if p.requires_grad]
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    save_adapter(tuned, tmp_path)
    assert load_soft_prompt(tmp_path, 64).shape == (4, 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_gradients_through_a_half_precision_model_keep_their_size(tmp_path, dtype, tolerance, size):
    write_checkpoint(SOURCE, tmp_path / "ckpt")
    ids = torch.randint(VOCAB_SIZE, (2, 24), generator=torch.Generator().manual_seed(3))
    gradients = []
    for wanted in (torch.float32, getattr(torch, dtype)):
        model = programs.load(tmp_path / "ckpt", wanted)
        tuned = add_soft_prompt(model, 16, list(range(50, 66)), "ckpt")
        # As in long batches, where each token has a small part in the mean.
        loss = tuned(input_ids=ids, labels=ids, num_items_in_batch=46 / size).loss
        loss.backward()
        gradients.append(soft_prompt_of(tuned).grad)
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() <= tolerance * gradients[0].norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_starts_as_the_embeddings_of_a_text_or_where_the_seed_says(tmp_path, method):
    model = programs.load(make_ckpt(tmp_path / "ckpt", **MODEL))
    prompt = soft_prompt_of(add_soft_prompt(model, 5, [7, 8], "ckpt", method))
    assert prompt.dtype == torch.float32
    embeddings = Checkpoint(tmp_path / "ckpt").read("tok_embeddings.weight")
    assert torch.equal(prompt.detach(), embeddings[[7, 8, 7, 8, 7]])
    for init in ("vocab", "random"):
        prompts = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            prompts.append(soft_prompt_of(add_soft_prompt(model, 5, [7], "ckpt", method, init)))
        assert torch.equal(prompts[0], prompts[1])
        assert not torch.equal(prompts[0], prompts[2])
        distances = torch.cdist(prompts[0].detach(), embeddings).min(dim=1).values
        assert (distances < 0.01).all() == (init == "vocab")
