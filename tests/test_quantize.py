"""Weights of 8 and 4 bits: rounding, products, gradients, cuts, folders."""

import json

import numpy as np
import pytest
import torch
from conftest import (
    edit_json,
    edit_shard,
    hashes_of,
    make_params,
    random_source,
    shard_of,
)
from formats import write_gguf
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

import split_model
from llama import layers, parallel
from llama.checkpoint.convert import check_floats
from llama.checkpoint.folder import Checkpoint, compare
from llama.checkpoint.gguf import GGUFFile
from llama.checkpoint.gguf_blocks import keep
from llama.checkpoint.quantized import QuantizedSource, quantized
from llama.checkpoint.weights import OUTPUT
from llama.checkpoint.write import write_checkpoint
from llama.generation import load_model
from llama.quantize import QuantizedWeight, group_of, pack

MODEL = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 128}
KINDS = [(8, 64), (8, 32), (4, 32)]


def matrix(n_out: int = 96, n_in: int = 128) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_numbers_are_rounded_to_the_nearest_step_and_only_once(bits, group):
    weight = matrix()
    weight[3, :group] = 0
    weight[4, :group] = 2.0**-20  # of which the scale is one of float16's smallest
    weight[5, :group] += 100  # no zero among them
    packed = pack(weight, bits, group)
    rounded = QuantizedWeight(packed, bits, 128)[slice(0, 96)]
    groups = weight.unflatten(1, (-1, group))
    if bits == 8:
        step = groups.abs().amax(-1) / 127
    else:
        step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
    # half a step, as float16 rounds the step itself; of four bits the zero is rounded too
    limit = (step * (0.51 if bits == 8 else 0.6) + 2.0**-24 * 127)[..., None]
    assert ((rounded.unflatten(1, (-1, group)) - groups).abs() <= limit).all()
    assert not rounded[3, :group].any()
    if bits == 8:
        assert torch.equal(pack(rounded, bits, group), packed)
    assert len(packed[0]) * 8 / 128 == {(8, 64): 8.25, (8, 32): 8.5, (4, 32): 4.75}[bits, group]


@pytest.mark.parametrize("ours", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize(("bits", "group"), KINDS)
def test_products_and_gradients_are_those_of_the_rounded_numbers(monkeypatch, bits, group, ours):
    if not ours:
        monkeypatch.setattr(layers, "kernels", lambda: None)
    for n_out in (96, 7):  # tiles of 32 rows, and of one
        weight = QuantizedWeight(pack(matrix(n_out), bits, group), bits, 128)
        wide = weight[slice(0, n_out)]
        assert torch.equal(layers.widened(weight, slice(0, n_out), wide.dtype), wide)
        for shape in ((1, 128), (3, 128), (2, 4, 128), (1, 20, 128)):
            x = torch.randn(shape) * 1000  # as some of a model's are
            with torch.inference_mode():
                for product in layers.products(x, weight, weight):
                    torch.testing.assert_close(product, x @ wide.T, rtol=1e-5, atol=0.02)
        x.requires_grad = True
        (product,) = layers.products(x, weight)
        (gradient,) = torch.autograd.grad(product.sum(), x)
        torch.testing.assert_close(gradient, wide.sum(0).expand_as(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bsz", [1, 2, 3, 8])
def test_our_products_of_floats_are_torchs(dtype, bsz):
    kernels, x, weight = layers.kernels(), torch.randn(bsz, 1, 70).to(dtype), matrix(37, 70)
    product = kernels.of_rows(x, weight.to(dtype))
    expected = x.float() @ weight.to(dtype).float().T
    assert product.dtype == dtype
    torch.testing.assert_close(product, expected.to(dtype), rtol=1e-2, atol=1e-4)


@pytest.fixture
def source():
    return random_source(make_params(**MODEL))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_what_n_ranks_hold_are_parts_of_what_one_holds(source, quantize):
    quantised = QuantizedSource(source, quantize)
    for name in source.shapes:
        whole = quantised.part(name, 0, 1)
        if not (bits := quantised.bits_of(name)):
            assert whole.dtype == torch.float32
            continue
        assert bits == (4 if quantize == "int4" and name != OUTPUT else 8)
        dim = quantised.range_of(name, 0, 4)[0]
        parts = [quantised.part(name, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat(parts, dim), whole)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_a_quantised_folder_cut_anew_is_the_model_quantised_so(source, tmp_path, quantize):
    write_checkpoint(QuantizedSource(source, quantize), tmp_path / "one", 1)
    write_checkpoint(Checkpoint(tmp_path / "one"), tmp_path / "two", 2)
    write_checkpoint(QuantizedSource(source, quantize), tmp_path / "direct", 2)
    assert hashes_of(tmp_path / "two") == hashes_of(tmp_path / "direct")
    ckpt = Checkpoint(tmp_path / "two")
    assert ckpt.quantize == quantize
    assert ckpt.verify() == Checkpoint(tmp_path / "one").verify()
    ids = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(0))
    device = parallel.setup()
    loaded = load_model(Checkpoint(tmp_path / "two"), device)(ids)
    assert torch.equal(loaded, load_model(QuantizedSource(source, quantize), device)(ids))
    exact = load_model(source, device)(ids)
    off = (loaded - exact).norm() / exact.norm()
    assert 1e-4 < off < {"int8": 0.1, "int4": 0.9}[quantize]


def test_what_cannot_be_quantised_is_told(source, tmp_path):
    with pytest.raises(ValueError, match="--quantize must be one of int8, int4, not 'int5'"):
        quantized(source, "int5")
    odd = random_source(make_params(**(MODEL | {"dim": 80, "head_dim": 20})))
    with pytest.raises(ValueError, match=r"wq.weight has 80 inputs.* groups of 32"):
        QuantizedSource(odd, "int4")
    narrow = random_source(make_params(dim=64, n_heads=8, multiple_of=32, vocab_size=512))
    with pytest.raises(ValueError, match="quantised in groups of 64 of its 64 inputs; take fewer"):
        QuantizedSource(narrow, "int8").check_cut(8, "it")
    with pytest.raises(ValueError, match="infinite, NaN or too large"):
        pack(torch.full((1, 64), torch.nan), 8, 64)
    with pytest.raises(ValueError, match="rows of 30 bytes do not hold 64 numbers of 8 bits"):
        group_of(8, 64, 30)
    damaged = pack(matrix(), 8, 64)
    damaged[0, :2] = 255
    with pytest.raises(ValueError, match="damaged: a scale is negative, infinite or NaN"):
        QuantizedWeight(damaged, 8, 128)
    folder = tmp_path / "int8"
    write_checkpoint(QuantizedSource(source, "int8"), folder)
    with pytest.raises(ValueError, match=r"quantised to int8: leave --quantize away.* to int4"):
        quantized(Checkpoint(folder), "int4")
    with pytest.raises(ValueError, match="quantised to int8, which no other format holds"):
        check_floats(Checkpoint(folder))
    write_checkpoint(source, tmp_path / "float")
    with pytest.raises(ValueError, match=r"one is quantised.*give --quantize int8 with"):
        compare(Checkpoint(tmp_path / "float"), Checkpoint(folder))
    (folder / "manifest.json").unlink()
    wq = Checkpoint(folder).read("layers.0.attention.wq.weight")
    edit_shard(shard_of(folder, 0), **{"layers.0.attention.wq.weight": torch.full_like(wq, 255)})
    with pytest.raises(ValueError, match="int8: damaged: a scale is negative, infinite or NaN"):
        load_model(Checkpoint(folder), parallel.setup())
    for value, message in ((None, "wq.weight has shape"), ("x", "--quantize must be one of")):
        edit_json(folder / "params.json", quantize=value)
        with pytest.raises(ValueError, match=message):
            Checkpoint(folder)


def test_split_model_writes_and_verifies_a_quantised_folder(source, tmp_path, capsys):
    write_checkpoint(source, tmp_path / "7B")
    split_model.main(str(tmp_path / "7B"), n=2, quantize="int4", verify=True)
    folder = tmp_path / "7B_fs2_int4"
    assert json.loads((folder / "params.json").read_text())["quantize"] == "int4"
    assert "the same model, whole, cut in 1 and 2" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K"])
def test_what_gguf_has_quantised_is_kept(tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", Kind[kind], dim=256, multiple_of=256, n_kv_heads=4)
    source = GGUFFile(tmp_path / "m.gguf")
    kept = QuantizedSource(source, "int8" if kind == "Q8_0" else "int4")
    for name in ("layers.0.attention.wq.weight", "layers.1.feed_forward.w2.weight"):
        bits, n_in = kept.bits_of(name), source.shapes[name][1]
        packed, expected = kept.read(name), source.read(name)
        rounded = QuantizedWeight(packed, bits, n_in)[slice(0, len(packed))]
        if kind in ("Q8_0", "Q4_0"):
            assert torch.equal(rounded, expected)
        else:  # half an eighth of a step, and a float16's rounding of each step
            step = packed.view(len(packed), -1, 19)[..., :2].contiguous().view(torch.float16)
            error = (rounded - expected).unflatten(1, (-1, 32)).abs()
            assert (error <= (1 / 16 + 15 * 2**-11) * step.float()).all()
        left = QuantizedWeight(
            kept.block(name, 3, 40, slice(0, packed.shape[1] // 4)), bits, n_in // 4
        )
        assert torch.equal(left[slice(0, 37)], rounded[3:40, : n_in // 4])


def test_blocks_that_cannot_be_kept_are_quantised_anew():
    block = np.zeros((6, 20), np.uint8)  # of Q4_1: scale, least number, four-bit numbers
    scale, least = [0, 1, -1, 1, 1, 2**-14], [1, 1, 1, -20, -4.3, -1]
    block[:, :4] = np.array([scale, least], np.float16).T.copy().view(np.uint8).reshape(6, 4)
    block[:, 4:] = np.arange(16) * 17
    expected = torch.from_numpy(dequantize(block, Kind.Q4_1))
    rounded = QuantizedWeight(keep(block, Kind.Q4_1).flatten(1), 4, 32)[slice(0, 6)]
    spread = expected.amax(1).clamp(min=0) - expected.amin(1).clamp(max=0)
    assert ((rounded - expected).abs().amax(1) <= 0.04 * spread).all()
    block[0, 0:2] = 255  # NaN
    with pytest.raises(ValueError, match="infinite, NaN"):
        keep(block, Kind.Q4_1)
    block = np.zeros((1, 34), np.uint8)
    block[0, :2] = np.array([-1], np.float16).view(np.uint8)  # of Q8_0, a negative scale
    block[0, 2:] = np.arange(32)
    rounded = QuantizedWeight(keep(block, Kind.Q8_0).flatten(1), 8, 32)[slice(0, 1)]
    torch.testing.assert_close(rounded[0], -torch.arange(32.0), atol=0.13, rtol=0)
