"""What 2 and 4 ranks compute is what one computes: text, logits, a tuned prompt's gradient.

Start reading at answers(): all that is asked of so many ranks, which start once.
"""

import functools
import json
import random
from pathlib import Path

import programs
import pytest
import torch
from conftest import (
    TOKENIZERS,
    cut_by_vocabulary,
    hf_reference,
    make_ckpt,
    make_params,
    run_program,
    small_params,
)
from test_evaluate import for_evaluation
from test_generation import MODELS, PROMPTS, any_format, assert_alike, build, of_hugging_face  # noqa: F401
from test_model import token_ids
from test_quantize import MODEL
from test_tuning_model import assert_gradient, for_gradient

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.quantized import quantized
from llama.checkpoint.weights import valid_shard_counts
from llama.checkpoint.write import write_checkpoint
from llama.model import ModelArgs


def shapes_for(n: int) -> list[tuple[str, int]]:
    """Tokenizer and KV heads of the models that write text; logits of others are compared too."""
    return [model for model in MODELS if n == 2 or model[1] < n]


def for_text(folder: Path, n: int, models: list) -> dict:
    """Models of any format and some in Meta's, ready cut, for programs.generated_tokens()."""
    for i, (kind, n_kv_heads) in enumerate(shapes_for(n)):
        path, vocab_size = TOKENIZERS[kind]
        ckpt_dir = make_ckpt(folder / f"{i}", n, vocab_size=vocab_size, n_kv_heads=n_kv_heads)
        models = [*models, (str(ckpt_dir), str(path))]
    return {"models": models, "prompts": PROMPTS}


def for_tuned(folder: Path, n: int) -> dict:
    """The first model that for_text() cut, for programs.tuned_tokens()."""
    return {
        "model": [str(folder / "0"), str(TOKENIZERS[shapes_for(n)[0][0]][0])],
        "prompts": PROMPTS,
    }


@functools.cache
def quantised(folder: Path) -> dict:
    """Models of 8 and 4 bits in two shards, for programs.generated_tokens()."""
    path, vocab_size = TOKENIZERS["sentencepiece"]
    models = []
    make_ckpt(folder / "float", **(MODEL | {"vocab_size": vocab_size}))
    for quantize in ("int8", "int4"):
        write_checkpoint(quantized(Checkpoint(folder / "float"), quantize), folder / quantize, 2)
        models.append((str(folder / quantize), str(path)))
    return {"models": models, "prompts": PROMPTS}


@functools.cache
def to_evaluate(folder: Path) -> dict:
    """A model, prompts and a dataset, for programs.evaluated()."""
    return for_evaluation(folder / "to_evaluate")


def models_for(n: int) -> list[dict]:
    """params.json of models of many shapes."""
    choose = random.Random(n)
    models = [make_params(vocab_size=512, n_kv_heads=heads) for heads in (8, 2)]  # below 4 ranks
    return models + [small_params(choose) for _ in range(16)]


def for_logits(folder: Path, n: int) -> dict:
    """Models of many shapes, ready cut or to be cut while loading, for programs.logits()."""
    choose, folders = random.Random(n), []
    for i, params in enumerate(models_for(n)):
        counts = valid_shard_counts(ModelArgs.from_params(params))
        m = n if i % 2 else choose.choice(counts)
        made = make_ckpt(folder / f"{i}", n=m, **params)
        if m > 1 and choose.random() < 0.5:
            cut_by_vocabulary(made)
        folders.append(str(made))
    return {"folders": folders, "ids": token_ids(2, 40, vocab_size=12).tolist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def answers(folder, any_format):  # noqa: F811
    """What n ranks return to all that is asked of them, by what it is."""

    @functools.cache
    def of(n: int) -> dict:
        here = folder / f"{n}"
        here.mkdir()
        asked = {"text": (programs.generated_tokens, for_text(here / "text", n, any_format))}
        if n == 2:
            asked["quantised"] = (programs.generated_tokens, quantised(folder))
            asked["evaluated"] = (programs.evaluated, to_evaluate(folder))
        else:
            asked["gradient"] = (programs.gradient, for_gradient(here / "tuned", n, True))
        asked["tuned"] = (programs.tuned_tokens, for_tuned(here / "text", n))
        asked["logits"] = (programs.logits, for_logits(here / "logits", n))
        calls = [(program.__name__, values) for program, values in asked.values()]
        result = run_program(here, n, programs.all_of, calls=calls)
        assert result.returncode == 0, result.stderr[-4000:]
        return dict(zip(asked, json.loads(result.stdout)))

    return of


@pytest.mark.parametrize("n", [2, 4])
def test_greedy_text_of_ranks_equals_hugging_face(tmp_path, answers, any_format, n):  # noqa: F811
    *found, sampled = answers(n)["text"]
    assert_alike(any_format, found[: len(any_format)])
    assert found[len(any_format) :] == [of_hugging_face(*model) for model in shapes_for(n)]
    one = build(tmp_path, *shapes_for(n)[-1], max_batch_size=programs.MAX_BATCH_SIZE)
    alone = one.generate(PROMPTS, **programs.SAMPLING)
    assert sampled == [output.token for output in alone]


@pytest.mark.parametrize("n", [2, 4])
def test_several_soft_prompts_on_ranks_give_what_they_give_on_one(answers, folder, n):
    expected = programs.tuned_tokens(**for_tuned(folder / f"{n}" / "text", n))
    assert answers(n)["tuned"] == expected
    assert expected[0] != expected[1] != expected[2]


def test_quantised_ranks_write_what_one_writes(answers, folder):
    assert answers(2)["quantised"] == programs.generated_tokens(**quantised(folder))


def test_ranks_evaluate_prompts_as_one_does(answers, folder):
    ranks, one = answers(2)["evaluated"], programs.evaluated(**to_evaluate(folder))
    for found, expected in zip(ranks.splitlines(), one.splitlines(), strict=True):
        found, expected = json.loads(found), json.loads(expected)
        assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-5)
        assert found.pop("perplexity") == pytest.approx(expected.pop("perplexity"), rel=1e-4)
        assert found == expected


def test_gradient_of_four_ranks_equals_peft_over_hugging_face(answers):
    assert_gradient(answers(4)["gradient"])


@pytest.mark.parametrize("n", [2, 4])
@torch.inference_mode()
def test_ranks_give_the_logits_of_hugging_face_from_any_number_of_shards(answers, n):
    found, ids = answers(n)["logits"], token_ids(2, 40, vocab_size=12)
    for logits, params in zip(found["logits"], models_for(n), strict=True):
        expected = hf_reference(**params)(ids).logits
        torch.testing.assert_close(torch.tensor(logits), expected, atol=1e-3, rtol=1e-4)
    # embedding, two a layer, logits, token; what the layers sum is gathered (see sum_over_ranks)
    assert found["collectives"] == ["all_gather"] * (1 + 2 * 2 + 1) + ["broadcast"]
