"""fairscale's model-parallel layers, products that use every thread, and sums over ranks."""

import functools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as mpu
from fairscale.nn.model_parallel import layers as fairscale_layers
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from llama.quantize import QuantizedWeight

# What a CPU's flags (on ARM: features) must have for products in half precision of its own.
ARITHMETIC = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
FEW_ROWS = 8  # of an input, up to which our own kernels are faster than torch's
MANY_ROWS = 16  # of an input, from which widening a matrix costs less than it saves
WIDENED_ROWS = 512  # of a matrix, at once
SMALL_SUM = 1 << 16  # elements over all ranks, below which latency and not bandwidth counts


def _unallocated(*shape: int) -> nn.Parameter:
    """A weight of which only the shape is laid down: the content comes from a checkpoint.

    fairscale's own constructors allocate it and, for more than one rank, the full matrix.
    """
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class ParallelEmbedding(fairscale_layers.ParallelEmbedding):
    """fairscale's embedding, cut on the embedding dimension, its weight not yet allocated."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        nn.Module.__init__(self)
        # what fairscale's forward hands to F.embedding
        self.padding_idx, self.max_norm, self.norm_type = None, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.weight = _unallocated(
            num_embeddings, embedding_dim // mpu.get_model_parallel_world_size()
        )


class ColumnParallelLinear(fairscale_layers.ColumnParallelLinear):
    """fairscale's linear layer, cut on the output dimension, its weight not yet allocated."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.gather_output, self.bias = False, None
        self.weight = _unallocated(out_features // mpu.get_model_parallel_world_size(), in_features)


class RowParallelLinear(fairscale_layers.RowParallelLinear):
    """fairscale's linear layer, cut on the input dimension, its weight not yet allocated."""

    def __init__(self, in_features: int, out_features: int) -> None:
        nn.Module.__init__(self)
        self.input_is_parallel, self.bias = True, None
        self.weight = _unallocated(out_features, in_features // mpu.get_model_parallel_world_size())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (part,) = products(x, self.weight)
        if torch.is_grad_enabled():  # fairscale's sum passes gradients on, ours does not
            return reduce_from_model_parallel_region(part)
        return sum_over_ranks(part)


def quantise(layer: nn.Module, packed: torch.Tensor, bits: int) -> None:
    """Give a linear layer, in place of its weight, one of 8 or 4 bits, as pack() makes it."""
    n_in = layer.weight.shape[1]  # type: ignore[index]
    del layer.weight
    layer.weight = QuantizedWeight(packed, bits, int(n_in))


class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _unallocated(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def column_parallel(x: torch.Tensor, *layers: ColumnParallelLinear) -> list[torch.Tensor]:
    """Apply several column-parallel layers to one input (bsz, seqlen, in_features).

    fairscale's forward all-reduces the input's gradient once a layer; here one serves them all.
    """
    if torch.is_grad_enabled():
        x = copy_to_model_parallel_region(x)
    return products(x, *(layer.weight for layer in layers))


Weight = torch.Tensor | QuantizedWeight


def products(x: torch.Tensor, *weights: Weight) -> list[torch.Tensor]:
    """Multiply x (..., in_features) by the transposes of weights (out_features, in_features).

    A few rows on a CPU go through our own kernels, where numba is installed.
    """
    few = x.device.type == "cpu" and x.numel() <= FEW_ROWS * x.shape[-1]
    ours = kernels() if few and not torch.is_grad_enabled() else None
    return [ours.of_rows(x, weight) if ours else linear(x, weight) for weight in weights]


def linear(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Multiply x (..., in_features) by the transpose of weight (out_features, in_features).

    What a device cannot multiply by itself, quantised weights and many rows in some CPUs' half
    precision, is widened first.
    """
    on_cpu, n_rows = x.device.type == "cpu", x.numel() // x.shape[-1]
    if isinstance(weight, QuantizedWeight) or (
        on_cpu and n_rows >= MANY_ROWS and not computes(x.dtype)
    ):
        return Widened.apply(x, weight)
    threads, one_row = torch.get_num_threads(), on_cpu and n_rows == 1 and x.dtype == torch.float32
    if not one_row or threads == 1 or len(weight) % threads or torch.is_grad_enabled():
        return torch_linear(x, weight)
    # torch's kernel reads the weight with a single thread. Given as a batch of slices, each thread
    # reads its own.
    slices = weight.view(threads, -1, weight.shape[1]).transpose(1, 2)
    rows = x.reshape(1, -1).expand(threads, 1, -1)
    return torch.bmm(rows, slices).view(*x.shape[:-1], -1)


def torch_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply as F.linear does; on a CPU in float32 by oneDNN, as torch's compiler does.

    On CPUs that are not Intel's that is 1.3 times as fast as MKL. It knows no gradients.
    """
    float32 = x.device.type == "cpu" and x.dtype == torch.float32
    if float32 and torch.backends.mkldnn.is_available() and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@functools.cache
def kernels() -> ModuleType | None:
    """Our own kernels for CPUs; None without numba."""
    try:
        from llama import kernels

        kernels.of_rows(torch.ones(1, 1), torch.ones(1, 1))
    except (ImportError, ValueError):  # also of a system without the threads that they share
        return None
    return kernels


@functools.cache
def computes(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies in a dtype by itself; yes where nothing tells."""
    try:
        found = re.search(r"(?m)^(flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text())
    except OSError:
        return True
    flags = set(found[2].split()) if found else ARITHMETIC.get(dtype, set())
    return dtype not in ARITHMETIC or bool(flags & ARITHMETIC[dtype])


def attends_in_groups(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has a kernel for heads in groups, without a mask: cards since Ampere do."""
    older = device.type == "cuda" and torch.cuda.is_available()
    older = older and torch.cuda.get_device_capability(device) < (8, 0)
    return dtype != torch.float32 and not older


def widened(weight: Weight, rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a weight, by tiles where it is quantised, in another dtype."""
    packed = isinstance(weight, QuantizedWeight) and weight.numbers.device.type == "cpu"
    ours = kernels() if packed else None
    return (ours.unpack(weight, rows) if ours else weight[rows]).to(dtype)


class Widened(torch.autograd.Function):
    """The product of linear(), with some rows of the weight widened at a time.

    Widened and multiplied in the dtype of x, or in float32 where a CPU does not compute in that.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
        """Multiply x (..., in_features) by the transpose of weight (out_features, in_features)."""
        by_itself = x.device.type != "cpu" or computes(x.dtype)
        ctx.weight, ctx.dtype = weight, x.dtype if by_itself else torch.float32
        wide, product = x.to(ctx.dtype), x.new_empty(*x.shape[:-1], len(weight))
        for start in range(0, len(weight), WIDENED_ROWS):
            rows = slice(start, start + WIDENED_ROWS)
            product[..., rows] = torch_linear(wide, widened(weight, rows, ctx.dtype))
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of x; the weights stay as they are."""
        total = gradient.new_zeros(*gradient.shape[:-1], ctx.weight.shape[1], dtype=torch.float32)
        for start in range(0, len(ctx.weight), WIDENED_ROWS):
            rows = slice(start, start + WIDENED_ROWS)
            total += gradient[..., rows].to(ctx.dtype) @ widened(ctx.weight, rows, ctx.dtype)
        return total.to(gradient.dtype), None


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Sum x over all ranks, the same on each to the last bit. For inference only.

    On a CPU, small tensors are gathered and each rank adds them up: for one token's states gloo's
    all_reduce takes 2.5 times as long as its all_gather.
    """
    n, group = mpu.get_model_parallel_world_size(), mpu.get_model_parallel_group()
    if n == 1:
        return x
    if x.device.type == "cpu" and x.numel() * n <= SMALL_SUM:
        parts = x.new_empty((n, *x.shape))
        dist.all_gather(list(parts.unbind(0)), x, group=group)
        return parts.sum(0)
    dist.all_reduce(x, group=group)
    return x
