"""Products of a few rows on a CPU, compiled by numba where it is installed.

torch's own read a float32 weight at two thirds of the speed of memory, those of 8 and 4 bits at a
tenth. These read weights at the speed of memory, of 4 bits at that of unpacking them, and compute
in float32.
"""

from typing import Any

import numpy as np
import torch

from llama.intrinsics import (
    MOST_THREADS,
    f32,
    high,
    inner,
    kernel,
    low,
    overload,
    prange,
    prefetch,
    widen,
)
from llama.quantize import QuantizedWeight

# numba has neither half precision: of bfloat16 it is given the bits as uint16, of float16 as int16.
ARRAYS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16}


@inner
def _floats(weight, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # weight (out, in). Rows of x go two at a time through four rows of it, so that neither is read
    # too often; but one or two of them go alone first, as memory is read the fastest so. With many
    # rows of x against half precision, the next four rows of it are fetched meanwhile instead.
    bsz, n_in = x.shape
    start, stop = thread * len(weight) // threads, (thread + 1) * len(weight) // threads
    ahead = bsz >= 6 and weight.itemsize == 2
    for i in range(start, stop, 4):
        end = min(i + 4, stop)
        alone = bsz if end - i < 4 else bsz % 2 if ahead else min(bsz, 2 - bsz % 2)
        for m in range(alone):
            for k in range(i, end):
                row, xm, total = weight[k], x[m], f32(0)
                for j in range(n_in):
                    total += widen(row[j]) * xm[j]
                y[m, k] = total
        for m in range(alone, bsz, 2):
            if ahead:
                for k in range(end + 4 * m // bsz, end + 4 * (m + 2) // bsz):
                    row = weight[k]
                    for j in range(0, n_in, 64 // weight.itemsize):
                        prefetch(row, j)  # type: ignore[call-arg]
            w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
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


@inner
def _bytes(numbers, scales, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # numbers (tiles, groups, group / 8, 8, rows of a tile) int8, scales (tiles, groups, rows). As
    # many rows of x as make fours go through _bytes_by_four, what is left one by one.
    tiles, groups, eights, _, rows = numbers.shape
    by_group, tiled = x.reshape(len(x), groups, eights, 8), y.reshape(len(y), tiles, rows)
    part = np.empty(rows, f32)
    for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
        for m in range(len(x) // 4 * 4, len(x)):
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
def _bytes_by_four(numbers, scales, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # so that a number is widened once for four rows of x; four inputs at a time, as all that they
    # take fits into a CPU's registers
    tiles, groups, eights, _, rows = numbers.shape
    by_group, tiled = x.reshape(len(x), groups, eights, 8), y.reshape(len(y), tiles, rows)
    # an array each: of one for all, the compiler would not know that they do not overlap
    p0, p1 = np.empty(rows, f32), np.empty(rows, f32)
    p2, p3 = np.empty(rows, f32), np.empty(rows, f32)
    for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
        for m in range(0, len(x) // 4 * 4, 4):
            tiled[m : m + 4, tile] = f32(0)
            t0, t1 = tiled[m, tile], tiled[m + 1, tile]
            t2, t3 = tiled[m + 2, tile], tiled[m + 3, tile]
            for group in range(groups):
                p0[:], p1[:], p2[:], p3[:] = f32(0), f32(0), f32(0), f32(0)
                for k in range(eights):
                    w, v = numbers[tile, group, k], by_group[m : m + 4, group, k]
                    for i in range(0, 8, 4):
                        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
                        a0, a1, a2, a3 = v[0, i], v[0, i + 1], v[0, i + 2], v[0, i + 3]
                        b0, b1, b2, b3 = v[1, i], v[1, i + 1], v[1, i + 2], v[1, i + 3]
                        c0, c1, c2, c3 = v[2, i], v[2, i + 1], v[2, i + 2], v[2, i + 3]
                        d0, d1, d2, d3 = v[3, i], v[3, i + 1], v[3, i + 2], v[3, i + 3]
                        for r in range(rows):
                            n0, n1, n2, n3 = f32(w0[r]), f32(w1[r]), f32(w2[r]), f32(w3[r])
                            p0[r] += (n0 * a0 + n1 * a1) + (n2 * a2 + n3 * a3)
                            p1[r] += (n0 * b0 + n1 * b1) + (n2 * b2 + n3 * b3)
                            p2[r] += (n0 * c0 + n1 * c1) + (n2 * c2 + n3 * c3)
                            p3[r] += (n0 * d0 + n1 * d1) + (n2 * d2 + n3 * d3)
                for r in range(rows):
                    scale = widen(scales[tile, group, r])
                    t0[r] += p0[r] * scale
                    t1[r] += p1[r] * scale
                    t2[r] += p2[r] * scale
                    t3[r] += p3[r] * scale


@inner
def _nibbles(numbers, scales, zeros, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # as _bytes (one function for both took twice as long), but numbers (tiles, groups, group / 8,
    # 4, rows) uint8 are of two inputs each, and zeros (tiles, groups, rows) int8 are in eighths
    tiles, groups, eights, _, rows = numbers.shape
    by_group, tiled = x.reshape(len(x), groups, eights, 8), y.reshape(len(y), tiles, rows)
    part = np.empty(rows, f32)
    for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
        for m in range(len(x) // 4 * 4, len(x)):
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


@inner
def _nibbles_by_four(numbers, scales, zeros, x, y, thread, threads):  # type: ignore[no-untyped-def]
    # as _bytes_by_four; one function for both took a fifth longer with 4 bits
    tiles, groups, eights, _, rows = numbers.shape
    by_group, tiled = x.reshape(len(x), groups, eights, 8), y.reshape(len(y), tiles, rows)
    p0, p1 = np.empty(rows, f32), np.empty(rows, f32)
    p2, p3 = np.empty(rows, f32), np.empty(rows, f32)
    for tile in range(thread * tiles // threads, (thread + 1) * tiles // threads):
        for m in range(0, len(x) // 4 * 4, 4):
            tiled[m : m + 4, tile] = f32(0)
            t0, t1 = tiled[m, tile], tiled[m + 1, tile]
            t2, t3 = tiled[m + 2, tile], tiled[m + 3, tile]
            for group in range(groups):
                p0[:], p1[:], p2[:], p3[:] = f32(0), f32(0), f32(0), f32(0)
                a = b = c = d = f32(0)
                for k in range(eights):
                    w, v = numbers[tile, group, k], by_group[m : m + 4, group, k]
                    for i in range(0, 8, 4):
                        w0, w1 = w[i // 2], w[i // 2 + 1]
                        a0, a1, a2, a3 = v[0, i], v[0, i + 1], v[0, i + 2], v[0, i + 3]
                        b0, b1, b2, b3 = v[1, i], v[1, i + 1], v[1, i + 2], v[1, i + 3]
                        c0, c1, c2, c3 = v[2, i], v[2, i + 1], v[2, i + 2], v[2, i + 3]
                        d0, d1, d2, d3 = v[3, i], v[3, i + 1], v[3, i + 2], v[3, i + 3]
                        a += a0 + a1 + a2 + a3
                        b += b0 + b1 + b2 + b3
                        c += c0 + c1 + c2 + c3
                        d += d0 + d1 + d2 + d3
                        for r in range(rows):
                            n0, n1, n2, n3 = low(w0[r]), high(w0[r]), low(w1[r]), high(w1[r])
                            p0[r] += (n0 * a0 + n1 * a1) + (n2 * a2 + n3 * a3)
                            p1[r] += (n0 * b0 + n1 * b1) + (n2 * b2 + n3 * b3)
                            p2[r] += (n0 * c0 + n1 * c1) + (n2 * c2 + n3 * c3)
                            p3[r] += (n0 * d0 + n1 * d1) + (n2 * d2 + n3 * d3)
                for r in range(rows):
                    scale = widen(scales[tile, group, r])
                    zero = f32(zeros[tile, group, r]) * f32(0.125)
                    t0[r] += (p0[r] - zero * a) * scale
                    t1[r] += (p1[r] - zero * b) * scale
                    t2[r] += (p2[r] - zero * c) * scale
                    t3[r] += (p3[r] - zero * d) * scale


# Functions of a docstring alone are compiled as the @overload below them says.


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

    def bytes_(weight, x, y, thread, threads):  # type: ignore[no-untyped-def]
        _bytes_by_four(weight[0], weight[1], x, y, thread, threads)
        _bytes(weight[0], weight[1], x, y, thread, threads)

    def nibbles(weight, x, y, thread, threads):  # type: ignore[no-untyped-def]
        _nibbles_by_four(weight[0], weight[1], weight[2], x, y, thread, threads)
        _nibbles(weight[0], weight[1], weight[2], x, y, thread, threads)

    return bytes_ if len(weight) == 2 else nibbles


@kernel
def product(weight, x, y, threads):  # type: ignore[no-untyped-def]
    """Write x (bsz, in) times the transpose of a weight, as arrays() has it, to y (bsz, out)."""
    for thread in prange(threads):
        multiply(weight, x, y, thread, threads)


def of_rows(x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """Multiply a few rows x (..., in) by the transpose of a weight (out, in), in float32.

    Returns (..., out) in the dtype of x.
    """
    rows = x.float().numpy().reshape(-1, x.shape[-1])
    y = np.empty((len(rows), len(weight)), f32)
    product(arrays(weight), rows, y, n_threads())
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
