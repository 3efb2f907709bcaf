"""How the next token is drawn, held to a plain reference written out here."""

import math

import pytest
import torch

from llama.options import SamplingParams
from llama.sampling import Sampler

LOGITS = [2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.9, -0.5]
DRAWS = 10_000
CASES = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_k of all": {"top_k": 100},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"top_k": 5, "top_p": 0.75},
    "penalty": {"repetition_penalty": 1.7},
    "all": {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2},
}


def reference(params: SamplingParams, seen: set[int]) -> dict[int, float]:
    """The probability of each id that is left, in Python's own numbers."""
    penalty = params.repetition_penalty
    lowered = [(x / penalty if x > 0 else x * penalty) if i in seen else x
               for i, x in enumerate(LOGITS)]  # fmt: skip
    weights = {i: math.exp(x / params.temperature) for i, x in enumerate(lowered)}
    kept = sorted(weights, key=weights.get, reverse=True)[: params.top_k or None]
    total, before, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if before / total <= params.top_p:
            nucleus.append(i)
        before += weights[i]
    nucleus = [i for i in nucleus if weights[i] >= params.min_p * weights[nucleus[0]]]
    total = sum(weights[i] for i in nucleus)
    return {i: weights[i] / total for i in nucleus}


@pytest.mark.parametrize("name", CASES)
def test_draws_are_distributed_as_the_reference_says(name):
    params = SamplingParams(**({"temperature": 1.0, "top_p": 1.0} | CASES[name]))
    seen = [0, 2, 4]
    sampler = Sampler(params, torch.Generator().manual_seed(5))
    sampler.add([seen] * DRAWS, len(LOGITS))
    ids = sampler.next_ids(torch.tensor([LOGITS]).repeat(DRAWS, 1))
    counts = torch.bincount(ids, minlength=len(LOGITS)).tolist()
    expected = reference(params, set(seen))
    assert {i for i, count in enumerate(counts) if count} == expected.keys()
    chi2 = sum((counts[i] - DRAWS * p) ** 2 / (DRAWS * p) for i, p in expected.items())
    # The mean of chi-square is its degrees of freedom d, its variance 2 d: five deviations.
    d = len(expected) - 1
    assert chi2 <= d + 5 * math.sqrt(2 * d)


def test_what_was_drawn_is_penalised_from_then_on():
    params = SamplingParams(temperature=0, repetition_penalty=3.0)
    sampler = Sampler(params, torch.Generator())
    sampler.add([[7]], len(LOGITS))
    drawn = [sampler.next_ids(torch.tensor([LOGITS])).item() for _ in range(4)]
    assert drawn == [0, 6, 3, 0]  # 2.0, 1.9, 1.5, and then 2.0 / 3 before 1.9 / 3
