"""Products in half precision on CPUs that cannot calculate in it."""

import pytest
import torch

from llama import layers
from llama.layers import linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_rows_are_multiplied_in_float32_and_rounded_once(monkeypatch, dtype):
    monkeypatch.setattr(layers, "computes", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(layers, "WIDENED_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 48, generator=generator).to(dtype)
    x = torch.randn(2, 9, 48, generator=generator).to(dtype).requires_grad_()
    product = linear(x, weight)
    assert type(product.grad_fn).__name__ == "WidenedBackward"
    exact = x.detach().double().requires_grad_()
    expected = torch.nn.functional.linear(exact, weight.double())
    torch.testing.assert_close(product, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    seed = torch.randn(product.shape, generator=generator).to(dtype)
    product.backward(seed)
    expected.backward(seed.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad, exact.grad.to(dtype), rtol=eps, atol=1e-5)
    few = linear(x[:1, :9], weight)
    assert type(few.grad_fn).__name__ != "WidenedBackward"


def test_what_a_cpu_computes_in_is_read_off_its_flags(monkeypatch):
    def of(text: str) -> list[bool]:
        monkeypatch.setattr(layers.Path, "read_text", lambda _: text)
        layers.computes.cache_clear()
        return [layers.computes(x) for x in (torch.float32, torch.bfloat16, torch.float16)]

    assert of("model name: x\nflags\t\t: fpu avx2 f16c\nflags: amx_bf16\n") == [True, False, False]
    assert of("flags\t\t: avx2 avx512_bf16") == [True, True, False]
    assert of("Features\t: fp asimd asimdhp bf16") == [True, True, True]
    assert of("nothing") == [True, True, True]
    layers.computes.cache_clear()
