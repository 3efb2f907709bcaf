"""A token's products and attention on a CPU, compiled by numba where it is installed.

torch's own read a float32 weight at two thirds of the speed of memory, those of 8 and 4 bits at a
tenth, and a step is made of many calls of microseconds. These read weights at the speed of memory,
compute in float32, and do in one call what lies between two sums over ranks: see Decoder.
"""

import os
import sys
from typing import Any

import numpy as np
import torch

# Each product wakes all threads of numba's pool: idle ones took a hundred times as long as it.
if "numba" not in sys.modules:  # else they may have begun
    os.environ["NUMBA_NUM_THREADS"] = str(torch.get_num_threads())
import numba
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload

from llama.quantize import QuantizedWeight, pack

f32 = np.float32
MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
# Sums in any order, so that they are vectors'; but NaN stays NaN.
FASTMATH = {"reassoc", "contract", "nsz"}
inner = njit(cache=True, fastmath=FASTMATH)
kernel = njit(parallel=True, cache=True, fastmath=FASTMATH)
numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]  # the threads of torch: others would wait for these
if (flags := binding.get_host_cpu_features()).get("sse2") and not flags.get("f16c"):
    raise ImportError("this CPU does not convert float16 by itself")

# Functions of a docstring alone are compiled as the @overload below them says.
# numba has neither half precision: of bfloat16 it is given the bits as uint16, of float16 as int16.
ARRAYS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@intrinsic
def of_float16(typing: Any, bits: Any) -> Any:
    """The float32 of a float16's bits, int16."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(bits), build


@intrinsic
def to_float16(typing: Any, number: Any) -> Any:
    """The bits of the float16 nearest to a float32, int16."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(number), build


def widen(number: Any) -> Any:
    """The float32 of a number in an array: float32, or the bits of a half precision."""


@overload(widen, inline="always")
def _(number):  # type: ignore[no-untyped-def]
    if isinstance(number, types.Float):
        return lambda number: number
    if number == types.int16:
        return lambda number: of_float16(number)  # type: ignore[call-arg]
    return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(f32)


def put(array: Any, place: Any, number: Any) -> None:
    """Write a float32 into an array such as widen() reads, rounded to the nearest."""


@overload(put)
def _(array, place, number):  # type: ignore[no-untyped-def]
    def to_float32(array, place, number):  # type: ignore[no-untyped-def]
        array[place] = number

    def to_bfloat16(array, place, number):  # type: ignore[no-untyped-def]
        bits = f32(number).view(np.uint32)
        # half of the last bit that stays is added, less a little if that is even
        bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        array[place] = np.uint16(bits >> np.uint32(16) if number == number else 0x7FC0)

    def as_float16(array, place, number):  # type: ignore[no-untyped-def]
        array[place] = to_float16(f32(number))  # type: ignore[call-arg]

    if isinstance(array.dtype, types.Float):
        return to_float32
    return as_float16 if array.dtype == types.int16 else to_bfloat16


@njit(inline="always")
def low(byte: Any) -> Any:
    """The lower four bits."""
    return f32(np.uint8(byte & np.uint8(15)))


@njit(inline="always")
def high(byte: Any) -> Any:
    """The upper four bits."""
    return f32(np.uint8(byte >> np.uint8(4)))


@inner
def _floats(weight, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # weight (out, in). One row of x goes through each row of it; several go two at a time through
    # four, so that neither is read too often.
    bsz, n_in = x.shape
    pairs = bsz - bsz % 2
    start, stop = thread * len(weight) // threads, (thread + 1) * len(weight) // threads
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


@inner
def _bytes(numbers, scales, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # numbers (tiles, groups, group / 8, 8, rows of a tile) int8, scales (tiles, groups, rows)
    tiles, groups, eights, _, rows = numbers.shape
    by_group, tiled = x.reshape(len(x), groups, eights, 8), y.reshape(len(y), tiles, rows)
    part = np.empty(rows, f32)
    for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
        for m in range(len(x)):
            total = tiled[m, tile]
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
                    total[r] += part[r] * widen(scales[tile, group, r])


@inner
def _nibbles(numbers, scales, zeros, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # as above (one function for both took twice as long), but numbers (tiles, groups, group / 8, 4,
    # rows) uint8 are of two inputs each, and zeros (tiles, groups, rows) int8 are in eighths
    tiles, groups, eights, _, rows = numbers.shape
    by_group, tiled = x.reshape(len(x), groups, eights, 8), y.reshape(len(y), tiles, rows)
    part = np.empty(rows, f32)
    for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
        for m in range(len(x)):
            total = tiled[m, tile]
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
                    total[r] += shifted * widen(scales[tile, group, r])


def steps_of(weight: Any, tile: Any, group: Any, k: Any, q: Any, r: Any) -> Any:
    """The number of input q of eight of a tile's row, in steps of its scale."""


@overload(steps_of, inline="always")
def _(weight, tile, group, k, q, r):  # type: ignore[no-untyped-def]
    if len(weight) == 2:
        return lambda weight, tile, group, k, q, r: f32(weight[0][tile, group, k, q, r])
    return lambda weight, tile, group, k, q, r: (
        low(weight[0][tile, group, k, q // 2, r] >> np.uint8(q % 2 * 4))
        - f32(weight[2][tile, group, r]) * f32(0.125)
    )


def multiply(weight: Any, x: Any, y: Any, thread: Any, threads: Any) -> None:
    """Write a thread's share of x (bsz, in) times the transpose of a weight into y (bsz, out)."""


@overload(multiply)
def _(weight, x, y, thread, threads):  # type: ignore[no-untyped-def]
    if len(weight) == 1:
        return lambda weight, x, y, thread, threads: _floats(weight[0], x, y, thread, threads)
    if len(weight) == 2:
        return lambda weight, x, y, thread, threads: _bytes(
            weight[0], weight[1], x, y, thread, threads
        )
    return lambda weight, x, y, thread, threads: _nibbles(
        weight[0], weight[1], weight[2], x, y, thread, threads
    )


@inner
def _normalised(x, weight, eps):  # type: ignore[no-untyped-def]
    y = np.empty_like(x)
    for m in range(len(x)):
        total = f32(0)
        for j in range(x.shape[1]):
            total += x[m, j] * x[m, j]
        factor = f32(1) / np.sqrt(total / f32(x.shape[1]) + f32(eps))
        for j in range(x.shape[1]):
            y[m, j] = x[m, j] * factor * weight[j]
    return y


@inner
def _rotate(x, freqs, y):  # type: ignore[no-untyped-def]
    # each pair of x (head_dim,) by the angle of which freqs (head_dim / 2, 2) are cosine and sine
    for i in range(len(freqs)):
        cos, sin, a, b = freqs[i, 0], freqs[i, 1], x[2 * i], x[2 * i + 1]
        put(y, 2 * i, a * cos - b * sin)
        put(y, 2 * i + 1, a * sin + b * cos)


@inner
def _attend(query, keys, values, scores, out):  # type: ignore[no-untyped-def]
    # query, out (head_dim,), keys and values (length, head_dim), scores (length,)
    highest, weights = f32(-np.inf), f32(0)
    for t in range(len(keys)):
        key, score = keys[t], f32(0)
        for i in range(len(query)):
            score += query[i] * widen(key[i])
        scores[t] = score * f32(len(query) ** -0.5)
        if not scores[t] <= highest:  # NaN stays the highest, and makes all of the output NaN
            highest = scores[t]
    out[:] = f32(0)
    for t in range(len(keys)):
        weight, value = np.exp(scores[t] - highest), values[t]
        weights += weight
        for i in range(len(query)):
            out[i] += weight * widen(value[i])
    for i in range(len(query)):
        out[i] /= weights


@kernel
def _product(weight, x, y, threads):  # type: ignore[no-untyped-def]
    for thread in prange(threads):
        multiply(weight, x, y, thread, threads)


@kernel
def attention(h, norm, wq, wk, wv, wo, n_heads, keys, values, freqs, starts, out, eps, threads):  # type: ignore[no-untyped-def]
    """Add one token a row to the cache, and attend to all of its row that is in there.

    h (bsz, dim); norm (dim,); wq, wk, wv, wo as arrays() gives them; keys and values of the cache
    (at least bsz, max_len, n_kv_heads, head_dim); freqs (bsz, head_dim / 2, 2): cosines and sines;
    starts (bsz,): where a row's token goes; out (bsz, dim): what wo gives, to be summed over ranks.
    """
    bsz, n_kv_heads, head_dim = len(h), keys.shape[2], keys.shape[3]
    group, total, x = n_heads // n_kv_heads, bsz * n_heads, _normalised(h, norm, eps)
    xq, xk = np.empty((bsz, n_heads * head_dim), f32), np.empty((bsz, n_kv_heads * head_dim), f32)
    xv, output = np.empty_like(xk), np.empty_like(xq)
    _product(wq, x, xq, threads)
    _product(wk, x, xk, threads)
    _product(wv, x, xv, threads)
    for row in range(bsz):
        for head in range(n_kv_heads):
            part, end = slice(head * head_dim, (head + 1) * head_dim), starts[row]
            _rotate(xk[row, part], freqs[row], keys[row, end, head])
            for i in range(head_dim):
                put(values[row, end, head], i, xv[row, head * head_dim + i])
    for thread in prange(threads):
        query, scores = np.empty(head_dim, f32), np.empty(keys.shape[1], f32)
        for which in range(thread * total // threads, (thread + 1) * total // threads):
            row, head = which // n_heads, which % n_heads
            part, end = slice(head * head_dim, (head + 1) * head_dim), starts[row] + 1
            _rotate(xq[row, part], freqs[row], query)
            kv = head // group
            _attend(query, keys[row, :end, kv], values[row, :end, kv], scores, output[row, part])
    _product(wo, output, out, threads)


@kernel
def feed_forward(h, norm, w1, w2, w3, hidden_dim, out, eps, threads):  # type: ignore[no-untyped-def]
    """Leave in out (bsz, dim) what w2 gives (SwiGLU), to be summed over ranks; else as above."""
    x = _normalised(h, norm, eps)
    gate, up = np.empty((len(h), hidden_dim), f32), np.empty((len(h), hidden_dim), f32)
    _product(w1, x, gate, threads)
    _product(w3, x, up, threads)
    for thread in prange(threads):
        for m in range(len(h)):
            for i in range(thread * hidden_dim // threads, (thread + 1) * hidden_dim // threads):
                gate[m, i] *= up[m, i] / (f32(1) + np.exp(-gate[m, i]))
    _product(w2, gate, out, threads)


def of_rows(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """Multiply a few rows x (..., in) by the transpose of a weight (out, in), in float32.

    Returns (..., out) in the dtype of x.
    """
    rows = x.float().numpy().reshape(-1, x.shape[-1])
    y = np.empty((len(rows), len(weight)), f32)
    _product(arrays(weight), rows, y, n_threads())
    return torch.from_numpy(y.reshape(*x.shape[:-1], -1)).to(x.dtype)


@kernel
def _unpack(weight, out, threads):  # type: ignore[no-untyped-def]
    # by eight inputs of a tile's rows, which fit where both orders are quick to reach
    tiles, groups, eights, _, rows = weight[0].shape
    tiled = out.reshape(tiles, rows, groups, eights, 8)
    for thread in prange(threads):
        wide = np.empty((8, rows), f32)
        for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
            for group in range(groups):
                for k in range(eights):
                    for q in range(8):
                        for r in range(rows):
                            steps = steps_of(weight, tile, group, k, q, r)
                            wide[q, r] = steps * widen(weight[1][tile, group, r])
                    for r in range(rows):
                        y = tiled[tile, r, group, k]
                        y[0], y[1], y[2], y[3] = wide[0, r], wide[1, r], wide[2, r], wide[3, r]
                        y[4], y[5], y[6], y[7] = wide[4, r], wide[5, r], wide[6, r], wide[7, r]


def unpack(weight: QuantizedWeight, rows: slice) -> torch.Tensor:
    """Rows (n, in) of a quantised weight in float32; they are to begin and end with tiles."""
    tiles = slice(rows.start // weight.tile, min(rows.stop, len(weight)) // weight.tile)
    part = tuple(x[tiles] for x in arrays(weight))
    out = np.empty((len(part[0]) * weight.tile, weight.shape[1]), f32)
    _unpack(part, out, n_threads())
    return torch.from_numpy(out)


def n_threads() -> int:
    """The number of threads that torch uses, and these kernels too."""
    return min(torch.get_num_threads(), MOST_THREADS)


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor on a CPU for the kernels."""
    return tensor.view(ARRAYS.get(tensor.dtype, tensor.dtype)).numpy()


def arrays(weight: torch.Tensor | QuantizedWeight) -> tuple[np.ndarray, ...]:
    """A weight for the kernels: itself, or its numbers and scales, or those and its zeros."""
    if isinstance(weight, QuantizedWeight):
        zeros = [weight.zeros] if weight.bits == 4 else []
        return tuple(map(array, (weight.numbers, weight.scales, *zeros)))
    return (array(weight),)


def compile_all() -> None:
    """Compile what steps need with every kind of weight, where this was not done here before."""
    ones = torch.ones(64, 64)
    floats = [ones.to(dtype) for dtype in ARRAYS]
    pairs: list = [(weight, [weight]) for weight in floats]  # a weight, and what caches go with it
    pairs += [(QuantizedWeight(pack(ones, bits, 32), bits, 64), floats) for bits in (8, 4)]
    h, freqs, starts = ones.numpy()[:1], np.ones((1, 32, 2), f32), np.zeros(1, int)
    for weight, caches in pairs:
        w = arrays(weight)
        if isinstance(weight, QuantizedWeight):
            unpack(weight, slice(0, 64))
        feed_forward(h, h[0], w, w, w, 64, h.copy(), 1e-5, 1)
        for cached in caches:
            kv = array(cached.view(64, 1, 1, 64))
            attention(h, h[0], w, w, w, w, 1, kv, kv, freqs, starts, h.copy(), 1e-5, 1)
