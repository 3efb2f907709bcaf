"""The blocks of GGUF's quantised types: their size, numbers made into them, and them into pack()'s.

Types: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import math

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import Q4_K, dequantize, quantize

from llama.checkpoint.laid_out import in_dtype
from llama.quantize import KEPT_GROUP, ZERO_STEPS, group_bytes, pack

HALF_TYPES = {
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# The types of which each 32 numbers have a scale, and so become groups of pack() in as many bits.
KEPT = {
    GGMLQuantizationType.Q8_0: 8,
    GGMLQuantizationType.Q4_0: 4,
    GGMLQuantizationType.Q4_1: 4,
    GGMLQuantizationType.Q4_K: 4,
}


def size_as(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a weight as a type; ValueError where its rows do not divide into blocks."""
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % per_block:
        raise ValueError(
            f"{name} has rows of {shape[-1]} numbers, which {kind.name} cannot hold: they must be "
            f"a multiple of {per_block}; take another --dtype"
        )
    return math.prod(shape) // per_block * block_bytes


def blocks_of(block: torch.Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    """The bytes of some rows of a weight as a type."""
    if kind == GGMLQuantizationType.Q8_0:
        return quantize(block.float().numpy(), kind)
    dtype = HALF_TYPES.get(kind, torch.float32)
    return in_dtype(block, dtype, name).contiguous().view(torch.uint8).numpy()


def keep(raw: np.ndarray, kind: GGMLQuantizationType) -> torch.Tensor:
    """Rows of blocks (n, bytes) of a type of KEPT as groups of pack(), (n, groups, bytes).

    Of Q8_0 and Q4_0 each number stays what it is. Of Q4_1 and Q4_K the four bits stay, and what is
    subtracted is rounded to an eighth of a step. Groups that cannot be said so are packed anew.
    """
    bits, n_bytes = KEPT[kind], group_bytes(KEPT[kind], KEPT_GROUP)
    if bits == 8:  # our groups are its blocks
        kept = torch.tensor(raw).view(-1, n_bytes)
        scale = kept[:, :2].contiguous().view(torch.float16)[:, 0]
        fits = (scale >= 0) & scale.isfinite()
    else:
        scale, offset, numbers = _steps_of(raw, kind)  # (groups,), (groups,), (groups, 32)
        # A negative step counts down from the other end.
        offset = torch.where(scale < 0, offset - 15 * scale, offset)
        numbers = torch.where(scale[:, None] < 0, 15 - numbers, numbers)
        scale = scale.abs().half()
        zero = (offset / scale.float() * ZERO_STEPS).round()
        fits = (scale > 0) & scale.isfinite() & (zero >= 0) & (zero <= 127)
        parts = [scale[:, None].view(torch.uint8), zero.to(torch.int8)[:, None].view(torch.uint8)]
        kept = torch.cat((*parts, numbers[:, :16] | numbers[:, 16:] << 4), 1)
    if not fits.all():
        anew = pack(torch.from_numpy(dequantize(raw, kind)), bits, KEPT_GROUP)
        kept = torch.where(fits[:, None], kept, anew.view(-1, n_bytes))
    return kept.view(len(raw), -1, n_bytes)


def _steps_of(raw: np.ndarray, kind: GGMLQuantizationType) -> tuple[torch.Tensor, ...]:
    """Scale, what is subtracted, and four-bit numbers of each group: scale * number - offset."""
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])
    first, second = (_floats(blocks[:, at : at + 2]) for at in (0, 2))
    if kind == GGMLQuantizationType.Q4_K:  # eight groups, whose scales are numbers too
        scales, offsets = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
        scale, offset = first * scales, second * offsets
        bytes_ = blocks[:, 16:].reshape(-1, 4, 32)
        numbers = np.stack((bytes_ & 15, bytes_ >> 4), 2)
    else:
        scale, offset = first, first * 8 if kind == GGMLQuantizationType.Q4_0 else -second
        numbers = np.concatenate((blocks[:, -16:] & 15, blocks[:, -16:] >> 4), 1)
    return (
        torch.from_numpy(scale.reshape(-1)),
        torch.from_numpy(offset.reshape(-1)),
        torch.from_numpy(numbers.reshape(-1, KEPT_GROUP)),
    )


def _floats(halves: np.ndarray) -> np.ndarray:
    """Float16 numbers, of their bytes (n, 2), as float32 (n, 1)."""
    return np.ascontiguousarray(halves).view(np.float16).astype(np.float32)
