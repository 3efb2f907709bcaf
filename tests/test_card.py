"""The model card: what it tells of a run, and that what it says of PEFT works."""

import dataclasses
import re
import sys

import programs
import pytest
import torch
from conftest import hf_reference, make_ckpt

import convert_model
from llama import cli
from llama.options import TunedGenerationOptions
from llama.tuning.adapter import CARD, base_model_facts, load_soft_prompt, save_adapter
from llama.tuning.card import model_card
from llama.tuning.model import add_soft_prompt
from llama.tuning.options import TuningOptions

HISTORY = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.75},
    {"step": 2, "eval_loss": 1.5},
    {"step": 3, "loss": 2.25},
    {"step": 4, "eval_loss": 2.0},
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny model, its card and the adapter that it was written for."""
    folder = tmp_path_factory.mktemp("card")
    model = programs.load(make_ckpt(folder / "ckpt"))
    tuned = add_soft_prompt(model, 4, [5, 6], str(folder / "ckpt"))
    out = folder / "out"
    out.mkdir()
    options = TuningOptions(
        *(str(folder / "ckpt"), "rows.json", str(out)), num_virtual_tokens=4, lr=0.5
    )
    facts = base_model_facts(model) | {"dataset_sha256": "abc"}
    card = model_card(options, facts, (7, 2), HISTORY)
    save_adapter(tuned, out, card=card)
    return folder, model, card, (options, facts)


def test_a_card_tells_of_model_data_options_and_losses(saved):
    folder, model, card, (options, facts) = saved
    assert (folder / "out" / CARD).read_text() == card
    lines = dict(re.findall(r"(?m)^\| (.+?) \| (.+) \|$", card))
    assert lines["base model"].startswith(f"{folder / 'ckpt'}: dim {model.args.dim}, n_layers ")
    assert lines["base model"].endswith("torch.float32")
    assert lines["data"] == "rows.json: 7 rows trained on, 2 held out"
    assert lines["SHA-256 of the data"] == "abc"
    assert lines["options"] == "`--num_virtual_tokens 4`, `--lr 0.5`"
    assert lines["evaluation at step 0"] == "loss 3.0000, perplexity 20.09"
    assert lines["evaluation at step 2"].startswith("loss 1.5000, perplexity 4.48; this prompt")
    without = model_card(options, facts, (7, 0), HISTORY[1::2])
    lines = dict(re.findall(r"(?m)^\| (.+?) \| (.+) \|$", without))
    assert lines["data"] == "rows.json: 7 rows trained on"
    assert lines["training at step 3"] == "loss 2.2500"
    assert len(card) < 2500


def test_what_a_card_says_of_peft_gives_the_logits_that_we_give(saved):
    folder, model, card, _ = saved
    hf_reference().save_pretrained(folder / "hf")
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```$", card)
    names: dict = {}
    exec(program.replace("HF_FOLDER", str(folder / "hf")), names)
    ids = torch.tensor([[1, 7, 9, 11]])
    prompt = load_soft_prompt(folder / "out", model.args.dim)
    with torch.no_grad():
        found = names["model"](input_ids=ids).logits[:, len(prompt) :]
        embeds = torch.cat((prompt[None], model.tok_embeddings(ids)), dim=1)
        expected = model(inputs_embeds=embeds)[:, len(prompt) :]
        plain = names["model"].get_base_model()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


def test_the_commands_of_a_card_have_flags_that_there_are(saved, monkeypatch):
    folder, _, card, (options, facts) = saved
    with_tokenizer = dataclasses.replace(
        options, tokenizer_path="tok", init="text", init_prompt="a|{b}\n" * 90
    )
    other = model_card(with_tokenizer, facts, (7, 0), [])
    assert "example_ft.py --ckpt_dir" in other
    assert "--tokenizer_path tok --tuning_ckpt_path" in other
    for line in re.findall(r"(?m)^`?python (.+?)`?$", card + other):
        monkeypatch.setattr(sys, "argv", line.split())
        script = line.split()[0]
        wanted = TunedGenerationOptions if script == "example_ft.py" else convert_model.main
        assert str(folder) in str(cli.parse_flags(wanted))
