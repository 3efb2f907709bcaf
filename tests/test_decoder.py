"""A step through kernels is the step of Transformer.forward, in every kind of weight."""

import subprocess
import sys

import pytest
import torch
from conftest import make_params
from random_model import random_source

from llama import parallel
from llama.cache import KVCache
from llama.checkpoint.quantized import quantized
from llama.decoder import Decoder
from llama.generation import load_model

KINDS = ["float32", "bfloat16", "float16", "int8", "int4"]
LENGTHS = [3, 9, 1, 5, 2, 7, 8, 4]  # of the rows' prompts


def build(kind: str, **changes: object):
    device = parallel.setup()
    params = {"dim": 128, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 128}
    source = random_source(make_params(**params | changes))
    if kind.startswith("int"):
        return load_model(quantized(source, kind), device)
    return load_model(source, device, getattr(torch, kind))


@torch.inference_mode()
def steps_of(model, bsz: int, read) -> list[torch.Tensor]:
    """Three steps behind prompts of different lengths: states, and what lies in the cache."""
    ids = torch.randint(0, 512, (bsz, 12), generator=torch.Generator().manual_seed(1))
    cache, found = KVCache(model, bsz, 12), []
    model.hidden_states(ids[:, : max(LENGTHS[:bsz])], cache=cache, start_pos=[0] * bsz)
    step = read(model, cache)
    for i in range(3):
        starts = [length + i for length in LENGTHS[:bsz]]
        found.append(step([int(ids[row, start]) for row, start in enumerate(starts)], starts))
    return [*found, torch.stack(cache.layers)]


def by_kernels(model, cache):
    return Decoder(model, cache).hidden_states


def by_forward(model, cache):
    def step(ids: list[int], starts: list[int]) -> torch.Tensor:
        tokens = torch.tensor(ids)[:, None]
        return model.hidden_states(tokens, cache=cache, start_pos=starts)[:, -1]

    return step


@pytest.mark.parametrize("bsz", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_the_states_and_the_cache_of_forward(kind, bsz):
    model = build(kind)
    results, forward = steps_of(model, bsz, by_kernels), steps_of(model, bsz, by_forward)
    # of 8 and 4 bits forward computes in float32 already
    exact = forward if kind.startswith("int") else steps_of(model.float(), bsz, by_forward)
    for ours, expected, reference in zip(results, forward, exact):
        assert ours.dtype == expected.dtype
        # of half precision forward rounds whatever it computes, kernels what they keep
        error, limit = (ours - reference).norm(), (expected - reference).norm()
        assert error <= max(limit, 1e-5 * reference.norm())


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["attention.wv", "attention.wk", "feed_forward.w1"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_states(kind, name, broken):
    model = build(kind)
    layer = model.get_submodule(f"layers.0.{name}")
    layer.weight = torch.nn.Parameter(torch.full_like(layer.weight, broken), requires_grad=False)
    assert not steps_of(model, 1, by_kernels)[2].isfinite().all()


@pytest.mark.parametrize("position", [1, 8])  # of nine: one of four, and the one left over
@pytest.mark.parametrize("which", [0, 1], ids=["key", "value"])
def test_one_position_that_is_not_finite_reaches_the_states(position, which):
    model = build("float32")
    cache = KVCache(model, 1, 12)
    step = by_kernels(model, cache)
    for start in range(8):
        step([start], [start])
    assert step([8], [8]).isfinite().all()
    cache.layers[0][which, 0, position] = float("nan")
    assert not step([9], [9]).isfinite().any()


def test_halves_are_rounded_to_the_nearest_even_number():
    from llama.intrinsics import inner, put
    from llama.kernels import array

    @inner
    def written(numbers, bits):
        for i in range(len(numbers)):
            put(bits, i, numbers[i])

    some = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65520.0, 2.0**-25, 3e38]
    some += [float("inf"), float("-inf"), float("nan")]
    any_bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int32)
    numbers = torch.cat((torch.tensor(some), any_bits.view(torch.float32)))
    for dtype in (torch.bfloat16, torch.float16):
        result = torch.empty(len(numbers), dtype=dtype)
        written(numbers.numpy(), array(result))
        torch.testing.assert_close(result, numbers.to(dtype), atol=0, rtol=0, equal_nan=True)


def test_a_program_that_uses_numba_itself_has_kernels_too():
    program = (
        "import numba, torch, numpy\n"
        "@numba.njit(parallel=True)\n"
        "def twice(x):\n    for i in numba.prange(len(x)):\n        x[i] *= 2\n"
        "twice(numpy.ones(9))\ntorch.set_num_threads(1)\n"
        "from llama.layers import kernels\n"
        "assert kernels()\n"
        "numba.njit(lambda x: x)(1)"  # to compile it reads its variables again
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
