"""A step's attention and feed-forward on a CPU, each in one call: see Decoder.

A step is made of many calls of microseconds: each does all that lies between two sums over ranks.
"""

import numpy as np
import torch

from llama.intrinsics import f32, inner, kernel, prange, put, widen
from llama.kernels import ARRAYS, array, arrays, product, unpack
from llama.quantize import QuantizedWeight, pack


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
    # query, out (head_dim,), keys and values (length, head_dim), scores (length,); four positions
    # at a time, as query and out are then read a quarter as often
    length, fours = len(keys), len(keys) // 4 * 4
    for t in range(0, fours, 4):
        k0, k1, k2, k3 = keys[t], keys[t + 1], keys[t + 2], keys[t + 3]
        s0 = s1 = s2 = s3 = f32(0)
        for i in range(len(query)):
            s0 += query[i] * widen(k0[i])
            s1 += query[i] * widen(k1[i])
            s2 += query[i] * widen(k2[i])
            s3 += query[i] * widen(k3[i])
        scores[t], scores[t + 1], scores[t + 2], scores[t + 3] = s0, s1, s2, s3
    for t in range(fours, length):
        key, score = keys[t], f32(0)
        for i in range(len(query)):
            score += query[i] * widen(key[i])
        scores[t] = score
    highest, weights, scale = f32(-np.inf), f32(0), f32(len(query) ** -0.5)
    for t in range(length):
        scores[t] *= scale
        if scores[t] > highest:
            highest = scores[t]
    for t in range(length):
        scores[t] = np.exp(scores[t] - highest)
        weights += scores[t]  # NaN if any score is, and so is then all of the output
    out[:] = f32(0)
    for t in range(0, fours, 4):
        v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
        s0, s1, s2, s3 = scores[t], scores[t + 1], scores[t + 2], scores[t + 3]
        for i in range(len(out)):
            first = s0 * widen(v0[i]) + s1 * widen(v1[i])
            out[i] += first + (s2 * widen(v2[i]) + s3 * widen(v3[i]))
    for t in range(fours, length):
        for i in range(len(out)):
            out[i] += scores[t] * widen(values[t, i])
    for i in range(len(out)):
        out[i] /= weights


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
    product(wq, x, xq, threads)
    product(wk, x, xk, threads)
    product(wv, x, xv, threads)
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
    product(wo, output, out, threads)


@kernel
def feed_forward(h, norm, w1, w2, w3, hidden_dim, out, eps, threads):  # type: ignore[no-untyped-def]
    """Leave in out (bsz, dim) what w2 gives (SwiGLU), to be summed over ranks.

    h (bsz, dim); norm (dim,); w1, w2, w3 as arrays() gives them; hidden_dim: this rank's part of
    the FFN, the rows of w1 and w3.
    """
    x = _normalised(h, norm, eps)
    gate, up = np.empty((len(h), hidden_dim), f32), np.empty((len(h), hidden_dim), f32)
    product(w1, x, gate, threads)
    product(w3, x, up, threads)
    for thread in prange(threads):
        for m in range(len(h)):
            for i in range(thread * hidden_dim // threads, (thread + 1) * hidden_dim // threads):
                gate[m, i] *= up[m, i] / (f32(1) + np.exp(-gate[m, i]))
    product(w2, gate, out, threads)


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
