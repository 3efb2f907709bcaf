"""Products of a few rows on a CPU, compiled by numba where it is installed.

torch's own read a float32 weight at two thirds of the speed of memory, those of 8 and 4 bits at a
tenth, and a step of one token is made of many calls of a few microseconds each. These read weights
at the speed of memory, compute in float32, and do in one call what belongs together. Start reading
at of_rows().
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# Before numba is imported: each product wakes all threads of its pool, and where ranks share cores
# those that have nothing to do took a hundred times as long as the product.
os.environ["NUMBA_NUM_THREADS"] = str(torch.get_num_threads())
import numba
from numba import njit, prange, types
from numba.extending import overload

from llama.quantize import QuantizedWeight, pack

f32 = np.float32
MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
# Sums in any order, so that they are vectors'; but NaN stays NaN.
OPTIONS: Any = {"parallel": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz"}}
numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # the threads of torch: others would wait for these


def widen(number: Any) -> Any:
    """The float32 of a float32, or of a bfloat16's bits."""
    raise NotImplementedError("compiled by the function below")


@overload(widen, inline="always")
def _(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Float):
        return lambda number: number
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(f32)


# A float16's bits, moved up, are those of its 2**112th part in float32. Half of that is made good
# in x and half in the products: a factor beside others may be taken first, and overflow.
HALF_WAY = f32(2.0**56)


@njit(inline="always")
def scale_of(bits: Any) -> Any:
    """The 2**112th part of a float16 that is not negative, of its bits."""
    return np.uint32(np.uint32(bits) << np.uint32(13)).view(f32)


@njit(inline="always")
def low(byte: Any) -> Any:
    """The lower four bits."""
    return f32(np.uint8(byte & np.uint8(15)))


@njit(inline="always")
def high(byte: Any) -> Any:
    """The upper four bits."""
    return f32(np.uint8(byte >> np.uint8(4)))


@njit(inline="always")
def rotate(x, freqs, y):  # type: ignore[no-untyped-def]
    """Turn each pair of x (head_dim,) by its angle's cosine and sine, freqs (head_dim / 2, 2)."""
    for i in range(len(freqs)):
        cos, sin, a, b = freqs[i, 0], freqs[i, 1], x[2 * i], x[2 * i + 1]
        y[2 * i], y[2 * i + 1] = a * cos - b * sin, a * sin + b * cos


@njit(**OPTIONS)
def _of_floats(weights, x, products, threads):  # type: ignore[no-untyped-def]
    # weights (out, in) each, x (bsz, in), products (bsz, out). One row of x goes through each row
    # of a weight; several go two at a time through four, so that neither is read too often.
    bsz, n_in = x.shape
    pairs = bsz - bsz % 2
    for thread in prange(threads):
        for which in range(len(weights)):
            weight, y = weights[which], products[which]
            start = thread * len(weight) // threads
            stop = (thread + 1) * len(weight) // threads
            fours = stop - (stop - start) % 4 if pairs else start
            for i in range(start, fours, 4):
                w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
                for m in range(0, pairs, 2):
                    x0, x1 = x[m], x[m + 1]
                    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = f32(0)
                    for j in range(n_in):
                        v0, v1, v2, v3 = widen(w0[j]), widen(w1[j]), widen(w2[j]), widen(w3[j])
                        a0 += v0 * x0[j]
                        a1 += v1 * x0[j]
                        a2 += v2 * x0[j]
                        a3 += v3 * x0[j]
                        b0 += v0 * x1[j]
                        b1 += v1 * x1[j]
                        b2 += v2 * x1[j]
                        b3 += v3 * x1[j]
                    y[m, i], y[m, i + 1], y[m, i + 2], y[m, i + 3] = a0, a1, a2, a3
                    y[m + 1, i], y[m + 1, i + 1] = b0, b1
                    y[m + 1, i + 2], y[m + 1, i + 3] = b2, b3
            for i in range(start, stop):
                row = weight[i]
                for m in range(pairs if i < fours else 0, bsz):
                    xm, total = x[m], f32(0)
                    for j in range(n_in):
                        total += widen(row[j]) * xm[j]
                    y[m, i] = total


@njit(**OPTIONS)
def _of_bytes(numbers_of, scales_of, x, products, threads):  # type: ignore[no-untyped-def]
    # of each weight: numbers (tiles, groups, group / 8, 8, rows of a tile) int8, scales (tiles,
    # groups, rows); x (bsz, in), products (bsz, tiles, rows): see HALF_WAY
    for thread in prange(threads):
        for which in range(len(numbers_of)):
            numbers, scales = numbers_of[which], scales_of[which]
            tiles, groups, eights, _, rows = numbers.shape
            by_group = x.reshape(len(x), groups, eights, 8)
            part = np.empty(rows, f32)
            for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
                for m in range(len(x)):
                    total = products[which][m, tile]
                    total[:] = f32(0)
                    for group in range(groups):
                        part[:] = f32(0)
                        for k in range(eights):
                            w, v = numbers[tile, group, k], by_group[m, group, k]
                            v0, v1, v2, v3 = v[0], v[1], v[2], v[3]
                            v4, v5, v6, v7 = v[4], v[5], v[6], v[7]
                            for r in range(rows):
                                part[r] += (
                                    (f32(w[0, r]) * v0 + f32(w[1, r]) * v1)
                                    + (f32(w[2, r]) * v2 + f32(w[3, r]) * v3)
                                    + (f32(w[4, r]) * v4 + f32(w[5, r]) * v5)
                                    + (f32(w[6, r]) * v6 + f32(w[7, r]) * v7)
                                )
                        for r in range(rows):
                            total[r] += part[r] * scale_of(scales[tile, group, r])


@njit(**OPTIONS)
def _of_nibbles(numbers_of, scales_of, zeros_of, x, products, threads):  # type: ignore[no-untyped-def]
    # as above, but numbers (tiles, groups, group / 8, 4, rows) uint8 are of two inputs each, and
    # each weight has zeros (tiles, groups, rows) int8, in eighths
    for thread in prange(threads):
        for which in range(len(numbers_of)):
            numbers, scales, zeros = numbers_of[which], scales_of[which], zeros_of[which]
            tiles, groups, eights, _, rows = numbers.shape
            by_group = x.reshape(len(x), groups, eights, 8)
            part = np.empty(rows, f32)
            for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
                for m in range(len(x)):
                    total = products[which][m, tile]
                    total[:] = f32(0)
                    for group in range(groups):
                        part[:] = f32(0)
                        inputs = f32(0)
                        for k in range(eights):
                            w, v = numbers[tile, group, k], by_group[m, group, k]
                            v0, v1, v2, v3 = v[0], v[1], v[2], v[3]
                            v4, v5, v6, v7 = v[4], v[5], v[6], v[7]
                            inputs += v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7
                            for r in range(rows):
                                part[r] += (
                                    (low(w[0, r]) * v0 + high(w[0, r]) * v1)
                                    + (low(w[1, r]) * v2 + high(w[1, r]) * v3)
                                    + (low(w[2, r]) * v4 + high(w[2, r]) * v5)
                                    + (low(w[3, r]) * v6 + high(w[3, r]) * v7)
                                )
                        eighth = inputs * f32(0.125)
                        for r in range(rows):
                            shifted = part[r] - f32(zeros[tile, group, r]) * eighth
                            total[r] += shifted * scale_of(scales[tile, group, r])


FLOATS = (torch.float32, torch.bfloat16)


def knows(weight: torch.Tensor | QuantizedWeight) -> bool:
    """Whether of_rows() multiplies by such a weight."""
    return isinstance(weight, QuantizedWeight) or weight.dtype in FLOATS


def of_rows(
    x: torch.Tensor, weights: Sequence[torch.Tensor | QuantizedWeight]
) -> list[torch.Tensor]:
    """Multiply a few rows x (..., in) by the transpose of each weight (out, in), in float32.

    weights: of one kind, float32, bfloat16 or quantised, on a CPU. Returns (..., out) of each, in
    the dtype of x.
    """
    # In numpy's hands, as each of torch's calls takes a microsecond, and a step has thousands.
    inputs = _rows(x)
    products = [np.empty((len(inputs), len(weight)), f32) for weight in weights]
    first, threads = weights[0], _threads()
    if isinstance(first, QuantizedWeight):
        arrays = [weight.arrays() for weight in weights]  # type: ignore[union-attr]
        tiled = [y.reshape(len(y), -1, of[0].shape[-1]) for y, of in zip(products, arrays)]
        multiply = _of_bytes if first.bits == 8 else _of_nibbles
        multiply(*map(_three, zip(*arrays)), inputs * HALF_WAY, _three(tiled), threads)
        for product in products:
            product *= HALF_WAY
    else:
        floats = [_array(weight) for weight in weights]  # type: ignore[arg-type]
        _of_floats(_three(floats), inputs, _three(products), threads)
    return [_tensor(y, x) for y in products]


def _three(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """One to three arrays as three, others empty: each number would be compiled for itself."""
    return (*arrays, *[arrays[0][:0]] * (3 - len(arrays)))


def _rows(x: torch.Tensor) -> np.ndarray:
    """Inputs (..., n) as float32 (rows, n)."""
    return (x if x.dtype == torch.float32 else x.float()).numpy().reshape(-1, x.shape[-1])


def _tensor(rows: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Rows (rows, n) as (..., n), in the shape and dtype of the x that they were made of."""
    result = torch.from_numpy(rows.reshape(*x.shape[:-1], -1))
    return result if x.dtype == torch.float32 else result.to(x.dtype)


def _threads() -> int:
    """The number of threads that torch uses, and these kernels too."""
    return min(torch.get_num_threads(), MOST_THREADS)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor for the kernels: of bfloat16 the bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@njit(**OPTIONS)
def _attend(xq, xk, xv, freqs, starts, keys, values, output, threads):  # type: ignore[no-untyped-def]
    # xq (bsz, n_heads, head_dim), xk and xv (bsz, n_kv_heads, head_dim), freqs (bsz,
    # head_dim / 2, 2), starts (bsz,), keys and values (bsz, max_len, n_kv_heads, head_dim),
    # output as xq
    bsz, n_heads, head_dim = xq.shape
    n_kv_heads = xk.shape[1]
    group, total = n_heads // n_kv_heads, bsz * n_kv_heads
    for thread in prange(threads):
        query = np.empty(head_dim, f32)
        scores = np.empty(keys.shape[1], f32)
        for part in range(thread * total // threads, (thread + 1) * total // threads):
            row, kv_head = part // n_kv_heads, part % n_kv_heads
            end = starts[row]
            rotate(xk[row, kv_head], freqs[row], query)
            for i in range(head_dim):
                keys[row, end, kv_head, i] = query[i]
                values[row, end, kv_head, i] = xv[row, kv_head, i]
            for head in range(kv_head * group, (kv_head + 1) * group):
                rotate(xq[row, head], freqs[row], query)
                highest = f32(-np.inf)
                for t in range(end + 1):
                    key, score = keys[row, t, kv_head], f32(0)
                    for i in range(head_dim):
                        score += query[i] * key[i]
                    scores[t] = score * f32(head_dim**-0.5)
                    # NaN stays the highest, and makes all of the output NaN
                    if not scores[t] <= highest:
                        highest = scores[t]
                weights, out = f32(0), output[row, head]
                out[:] = f32(0)
                for t in range(end + 1):
                    weight, value = np.exp(scores[t] - highest), values[row, t, kv_head]
                    weights += weight
                    for i in range(head_dim):
                        out[i] += weight * value[i]
                for i in range(head_dim):
                    out[i] /= weights


def attend(
    xq: torch.Tensor,
    xk: torch.Tensor,
    xv: torch.Tensor,
    freqs_cis: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    starts: np.ndarray,
) -> torch.Tensor:
    """Write one token's key and value a row into a float32 cache, and attend to all in it so far.

    xq (bsz, 1, n_heads, head_dim), xk and xv (bsz, 1, n_kv_heads, head_dim), not yet rotated;
    freqs_cis (bsz, 1, 1, head_dim / 2); cache: keys and values (bsz, max_len, n_kv_heads,
    head_dim); starts (bsz,): where a row's token goes. Returns (bsz, 1, n_heads * head_dim).
    """
    bsz, _, n_heads, head_dim = xq.shape
    query, key, value = (x.numpy().reshape(bsz, -1, head_dim) for x in (xq, xk, xv))
    output = np.empty((bsz, n_heads, head_dim), f32)
    freqs = torch.view_as_real(freqs_cis).numpy().reshape(bsz, -1, 2)
    keys, values = (x.numpy() for x in cache)
    _attend(query, key, value, freqs, starts, keys, values, output, _threads())
    return torch.from_numpy(output.reshape(bsz, 1, -1))


@njit(cache=True, fastmath=OPTIONS["fastmath"])
def _normalise(x, weight, eps, y):  # type: ignore[no-untyped-def]
    for m in range(len(x)):
        total = f32(0)
        for j in range(x.shape[1]):
            total += x[m, j] * x[m, j]
        factor = f32(1) / np.sqrt(total / f32(x.shape[1]) + f32(eps))
        for j in range(x.shape[1]):
            y[m, j] = x[m, j] * factor * weight[j]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise a few rows x (..., dim) of float32 on a CPU."""
    rows = _rows(x)
    y = np.empty_like(rows)
    _normalise(rows, weight.numpy(), eps, y)
    return _tensor(y, x)


def compile_all() -> None:
    """Compile every kernel, where this was not done on this machine before."""
    one = torch.ones(1, 64)
    weights: list[torch.Tensor | QuantizedWeight] = [one, one.bfloat16()]
    weights += [QuantizedWeight(pack(one, bits, 32), bits, 64) for bits in (8, 4)]
    for weight in weights:
        of_rows(one, [weight])
    rms_norm(one, one[0], 1e-5)
    heads, freqs = torch.ones(1, 1, 1, 64), torch.ones(1, 1, 1, 32, dtype=torch.complex64)
    attend(heads, heads, heads, freqs, (heads, heads.clone()), np.zeros(1, int))
