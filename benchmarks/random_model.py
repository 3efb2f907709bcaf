"""Models of random weights, for benchmarks and tests."""

import torch

from llama.checkpoint import Source, weight_shapes
from llama.model import ModelArgs


def random_source(params: dict, dtype: torch.dtype = torch.float32, std: float = 0.5) -> Source:
    """Random weights, the same at every call; norms lie around 1.

    Each weight is made when it is read, so a model larger than memory can be written.
    """
    shapes = weight_shapes(ModelArgs.from_params(params))
    seeds = {name: seed for seed, name in enumerate(shapes)}

    def read(name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seeds[name])
        is_norm = len(shapes[name]) == 1
        return (torch.randn(shapes[name], generator=generator) * std + is_norm).to(dtype)

    return Source(params, shapes, dtype, read)
