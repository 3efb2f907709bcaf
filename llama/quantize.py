"""Weights of 8 and 4 bits: packed as files hold them, and laid out for products.

A row's inputs are quantised by groups, each with a scale of its own, so that a cut between groups
changes nothing. int8: a number is its byte times the scale. int4: its four bits less the group's
zero, times the scale. Packed, a group of int8 is GGUF's block of Q8_0 where it has 32 inputs: the
scale (float16), then the bytes. One of int4 is the scale, the zero (int8, in eighths), and bytes of
two inputs each, i and i + group / 2, as in GGUF's Q4_1.
"""

import torch
from torch import nn

GROUPS = {8: (64, 32), 4: (32,)}  # inputs of a group, by bits: the most first
KEPT_GROUP = 32  # inputs of a group of those types of GGUF that are kept as they are
ZERO_STEPS = 8  # a step of four bits is so many of the zero's
TILES = (64, 32, 16, 8, 4, 2, 1)  # rows that lie together: the most that divide them


def group_bytes(bits: int, group: int) -> int:
    """The bytes of a packed group."""
    return 2 + group if bits == 8 else 3 + group // 2


def group_of(bits: int, in_features: int, packed_bytes: int) -> int:
    """The inputs of a group, of what a packed row takes; ValueError if it cannot be one."""
    for group in GROUPS[bits]:
        if in_features % group == 0 and in_features // group * group_bytes(bits, group) == (
            packed_bytes
        ):
            return group
    raise ValueError(
        f"rows of {packed_bytes} bytes do not hold {in_features} numbers of {bits} bits"
    )


def pack(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Quantise a matrix (out, in): uint8 (out, in / group * group_bytes).

    Raises ValueError for numbers that are not finite, or too large for a float16 scale.
    """
    groups = weight.float().unflatten(1, (-1, group))  # (out, in / group, group)
    if bits == 8:
        scale = (groups.abs().amax(-1) / 127).half()
        numbers = _steps(groups, scale).round().clamp(-127, 127).to(torch.int8)
        parts = [scale[..., None].view(torch.uint8), numbers.view(torch.uint8)]
    else:
        lowest, highest = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((highest - lowest) / 15).half()
        zero = (_steps(-lowest[..., None], scale) * ZERO_STEPS).round().clamp(0, 127)
        steps = _steps(groups, scale) + zero / ZERO_STEPS
        numbers = steps.round().clamp(0, 15).to(torch.uint8)
        first, second = numbers.chunk(2, -1)
        parts = [scale[..., None].view(torch.uint8), zero.to(torch.int8).view(torch.uint8)]
        parts.append(first | second << 4)
    if not scale.isfinite().all():
        raise ValueError("numbers that are infinite, NaN or too large to be quantised")
    return torch.cat(parts, -1).flatten(1)


def _steps(numbers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Numbers (…, n) in steps of scale (…); 0 where that is 0."""
    scale = scale.float()[..., None]
    return torch.where(scale > 0, numbers / scale, 0)


class QuantizedWeight(nn.Module):
    """A matrix of 8 or 4 bits, in place of a layer's weight.

    Its rows lie in tiles: of each input, or of each two, the numbers of a tile's rows are
    neighbours, so that a product multiplies many rows at once by one input.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor  # of 4 bits alone

    def __init__(self, packed: torch.Tensor, bits: int, in_features: int) -> None:
        """Take a matrix as pack() makes it, (out, bytes). Raises ValueError for another."""
        super().__init__()
        group = group_of(bits, in_features, packed.shape[1])
        self.bits, self.shape = bits, (len(packed), in_features)
        rows = next(tile for tile in TILES if len(packed) % tile == 0)
        # (tiles, rows, groups, bytes)
        tiled = packed.view(-1, rows, in_features // group, group_bytes(bits, group))
        scales = tiled[..., :2].contiguous().view(torch.float16)[..., 0]
        if not (scales.isfinite() & (scales >= 0)).all():
            raise ValueError("damaged: a scale is negative, infinite or NaN")
        self._keep("scales", scales.transpose(1, 2))  # (tiles, groups, rows)
        if bits == 8:
            numbers = tiled[..., 2:].view(torch.int8).unflatten(-1, (-1, 8))
        else:
            self._keep("zeros", tiled[..., 2].view(torch.int8).transpose(1, 2))
            halves = tiled[..., 3:]
            numbers = torch.cat((halves & 15, halves >> 4), -1).unflatten(-1, (-1, 4, 2))
            numbers = numbers[..., 0] | numbers[..., 1] << 4
        # (tiles, groups, group / 8, 8 inputs or 4 bytes of two, rows)
        self._keep("numbers", numbers.permute(0, 2, 3, 4, 1))

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name, tensor.contiguous(), persistent=False)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """Rows (n, in) in float32; they are to begin and end with tiles."""
        tiles = slice(rows.start // self.tile, min(rows.stop, len(self)) // self.tile)
        numbers, scales = self.numbers[tiles], self.scales[tiles].float()
        if self.bits == 8:
            steps = numbers.float()
        else:
            steps = torch.stack((numbers & 15, numbers >> 4), 4).flatten(3, 4).float()
            steps -= (self.zeros[tiles].float() / ZERO_STEPS)[:, :, None, None]
        steps *= scales[:, :, None, None]  # (tiles, groups, group / 8, 8, rows)
        return steps.permute(0, 4, 1, 2, 3).reshape(-1, self.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.numbers.shape[-1]
