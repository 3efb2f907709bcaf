"""What evaluate.py says of a tuned prompt is what training, and generation by hand, say of it.

Start reading at evaluated(), a run in this process; on ranks in test_ranks.py.
"""

import json
import re
from pathlib import Path

import programs
import pytest
import torch
from conftest import REPO, TOKENIZERS, flags_of, make_ckpt, run_script
from formats import byte_level_vocabulary, tiny
from safetensors.torch import save_file
from test_trainer import losses, tune

from datasets import Dataset
from llama import LLaMA, parallel
from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.write import write_checkpoint
from llama.tokenizer import Tokenizer
from llama.tuning.adapter import load_soft_prompt
from llama.tuning.data import tokenize_dataset
from llama.tuning.evaluate import BASE, mean_loss
from llama.tuning.templates import alpaca_prompt, question_of

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
MODEL = {"vocab_size": VOCAB_SIZE, "n_kv_heads": 2}
DIM = 64
N_NEW = 6  # tokens of an answer
ASKED = ["Name a river.", "What is rain?", "Sing!", "Why?", "Say what you did today.", "Who?"]
OF_BASE, OF_PROMPT = {1, 2, 3}, {4, 5}  # the rows whose answers are theirs; nobody gives the last


def write_adapter(folder: Path, num_virtual_tokens: int, dim: int = DIM) -> Path:
    """A random prompt in a folder as PEFT's."""
    folder.mkdir()
    prompt = torch.randn(
        num_virtual_tokens, dim, generator=torch.Generator().manual_seed(num_virtual_tokens)
    )
    save_file({"prompt_embeddings": prompt}, folder / "adapter_model.safetensors")
    return folder


@torch.inference_mode()
def answer_by_hand(model, tokenizer: Tokenizer, prompt: torch.Tensor | None, asked: str) -> str:
    """What follows a question always by the likeliest token, without a cache."""
    ids, new = tokenizer.encode(alpaca_prompt(asked)), []
    while len(new) < N_NEW and tokenizer.eos_id not in new:
        embeds = model.tok_embeddings(torch.tensor(ids + new))
        embeds = embeds if prompt is None else torch.cat((prompt, embeds))
        new.append(model(inputs_embeds=embeds[None])[0, -1].argmax().item())
    return tokenizer.decode(new)


def for_evaluation(folder: Path) -> dict:
    """Options for a dataset with answers of the model alone, of one of two prompts, of nobody."""
    folder.mkdir(exist_ok=True)
    ckpt_dir, tokenizer = make_ckpt(folder / "ckpt", **MODEL), Tokenizer(PATH)
    adapters = [write_adapter(folder / f"{n}", n) for n in (4, 9)]
    model, prompt = programs.load(ckpt_dir), load_soft_prompt(adapters[0], DIM)
    rows = []
    for number, asked in enumerate(ASKED, 1):
        of_base = answer_by_hand(model, tokenizer, None, asked)
        of_prompt = answer_by_hand(model, tokenizer, prompt, asked)
        assert of_base.strip() != of_prompt.strip()  # or the rows would not tell them apart
        theirs = [(OF_BASE, of_base), (OF_PROMPT, of_prompt)]
        answer = next((text for numbers, text in theirs if number in numbers), "nothing at all")
        rows.append({"instruction": asked, "output": answer})
    (folder / "rows.json").write_text(json.dumps(rows))
    return {
        **{"ckpt_dir": str(ckpt_dir), "tokenizer_path": str(PATH)},
        **{"dataset_path": str(folder / "rows.json"), "max_gen_len": N_NEW, "json": True},
        "tuning_ckpt_paths": ",".join(map(str, adapters)),
    }


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> dict:
    return for_evaluation(tmp_path_factory.mktemp("evaluate") / "of")


def evaluated(**options) -> list[dict]:
    """What a run in this process prints with --json, a dict a line."""
    return [json.loads(line) for line in programs.evaluated(**options).splitlines()]


def test_exact_match_counts_the_answers_that_generation_by_hand_gives(options):
    base, prompt, other = evaluated(**options)
    adapters = options["tuning_ckpt_paths"].split(",")
    assert [row["tuning_ckpt_path"] for row in (base, prompt, other)] == [None, *adapters]
    for found, right in ((base, OF_BASE), (prompt, OF_PROMPT), (other, set())):
        assert found["exact_match"] == len(right)
        wrong = {row["row"] for row in found["wrong"]}
        assert (wrong, found["rows"]) == ({1, 2, 3, 4, 5, 6} - right, 6)
        assert all(row["wanted"] != row["given"] for row in found["wrong"])
    assert base["wrong"][-1]["wanted"] == "nothing at all"


def test_the_answer_is_the_last_of_what_a_row_teaches():
    tokenizer = Tokenizer(PATH)
    ids = tokenizer.encode("Hello, what is rain? Water that falls.", eos=True)
    labels = [token if i in (2, 3, *range(8, 20)) else -100 for i, token in enumerate(ids)]
    row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
    question = question_of(row, tokenizer)
    assert question.ids == ids[:8]
    assert (question.wanted, question.n_tokens) == (tokenizer.decode(ids[8:]).strip(), len(ids) - 8)


def test_loss_is_that_of_training_over_tokens_and_not_over_batches(tmp_path, capsys):
    held_out = {"val_set_size": 6, "seed": 4, "max_seq_len": 96}
    # one batch: the Trainer takes the mean over rows of what batches lose
    out = tune(tmp_path, "out", max_steps=2, eval_steps=2, batch_size=6, **held_out)
    options = {"ckpt_dir": tmp_path / "ckpt1", "tokenizer_path": PATH, "exact_match": False}
    options |= {"dataset_path": REPO / "datasets/short_answers.json", **held_out, "json": True}
    capsys.readouterr()
    for batch_size in (6, 4):
        _, tuned = evaluated(**options, tuning_ckpt_paths=str(out), batch_size=batch_size)
        assert tuned["loss"] == pytest.approx(dict(losses(out, "eval_loss"))[2], rel=1e-5)
        assert "exact_match" not in tuned
    assert "another template" not in capsys.readouterr().err
    (out / "chat_template.jinja").write_text("{{ messages }}")
    evaluated(**options, tuning_ckpt_paths=str(out), n_rows=1)
    assert f"{out}: was trained in another template" in capsys.readouterr().err


def test_loss_of_the_model_alone_is_that_of_its_logits(options):
    (found,) = evaluated(**options | {"tuning_ckpt_paths": "", "batch_size": 4})
    rows = tokenize_dataset(options["dataset_path"], Tokenizer(PATH), 256).rows
    model, of_tokens = programs.load(options["ckpt_dir"]), []
    for row in rows:
        with torch.inference_mode():
            logits = model(row["input_ids"][None].long())[0, :-1]
        targets = row["labels"][1:].long()
        of_row = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        of_tokens.append(of_row[targets != -100])
    expected = torch.cat(of_tokens).mean()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-4)


def test_the_table_has_a_line_for_each_and_starts_as_a_module(options):
    flags = options | {"json": False, "n_rows": 4}
    result = run_script("llama.tuning.evaluate", *flags_of(**flags))
    assert result.returncode == 0, result.stderr
    head, *lines = result.stdout.splitlines()
    names = [BASE, *options["tuning_ckpt_paths"].split(",")]
    assert head.strip() == "loss per token  perplexity  exact match"
    matches = ["3 of 4 (75.0%)", "1 of 4 (25.0%)", "0 of 4 (0.0%)"]
    for line, name, matched in zip(lines, names, matches, strict=True):
        found = re.fullmatch(r"  +([\d.]+)  +([\d.]+)  (.+)", line.removeprefix(name))
        assert found, line
        assert float(found[2]) > 1
        assert found[3] == matched


def test_prompts_of_other_lengths_are_asked_the_same(options):
    """Rows are cut for the longest, and all may write what that leaves."""
    small = options | {"max_seq_len": 60, "max_gen_len": 20}
    one, *_ = evaluated(**small)
    alone = evaluated(**small | {"tuning_ckpt_paths": "", "max_seq_len": 60 - 9})
    assert alone == [one]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_ckpt_paths": "nowhere"}, "^nowhere: no such adapter"),
        ({"tuning_ckpt_paths": "wide"}, r"shape \(4, 32\), but the model's dim is 64"),
        ({"max_seq_len": 20}, "no row fits into the 11 tokens"),
        ({"val_set_size": 6}, "--val_set_size 6 cannot be taken out of 6 rows"),
        ({"n_rows": 0}, "--n_rows must be at least 1"),
        ({"max_gen_len": 0}, "--max_gen_len must be at least 1"),
        ({"base": False, "tuning_ckpt_paths": ","}, "--base False leaves nothing to evaluate"),
        ({"template": "chat ml"}, "--template must be one of alpaca"),
    ],
)
def test_what_cannot_be_evaluated_is_one_error(options, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "wide", 4, dim=32)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluated(**options | changes)


def test_texts_ask_nothing_and_have_a_loss_alone(tmp_path):
    vocabulary = byte_level_vocabulary(748) | {"tokenizer.ggml.add_bos_token": False}
    write_checkpoint(tiny(tokenizer_files(vocabulary, 768), vocab_size=768), tmp_path / "ckpt")
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "It rains."}, {"text": "Hm"}]))
    options = {"ckpt_dir": tmp_path / "ckpt", "dataset_path": tmp_path / "rows.json", "json": True}
    with pytest.raises(ValueError, match=r"nothing stands before an answer.*--exact_match False"):
        evaluated(**options)
    (found,) = evaluated(**options, exact_match=False)
    assert found.keys() == {"tuning_ckpt_path", "loss", "perplexity"}


def test_a_first_token_counts_for_none_and_a_loss_that_is_not_finite_is_an_error(options):
    generator = LLaMA(programs.load(options["ckpt_dir"]), Tokenizer(PATH))

    def loss(*labels: int) -> float:
        rows = {"input_ids": [[5, 6, 7]], "labels": [labels], "length": [3], "n_learned": [3]}
        tokens = Dataset.from_dict(rows).with_format("torch", columns=["input_ids", "labels"])
        return mean_loss(generator, tokens, "x")

    generator.soft_prompt = torch.ones(4, DIM)
    assert loss(5, 6, 7) == loss(-100, 6, 7) != loss(-100, -100, 7)
    generator.soft_prompt = torch.full((4, DIM), torch.nan)
    with pytest.raises(ValueError, match=r"^x: the loss is NaN or infinite"):
        loss(5, 6, 7)


def test_machines_with_other_files_are_told(options, monkeypatch):
    monkeypatch.setattr(parallel, "gather_objects", lambda value: [value, [*value[:1], "other"]])
    with pytest.raises(ValueError, match="the ranks read different datasets or adapters"):
        evaluated(**options)
