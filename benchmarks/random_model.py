"""Models of random weights, for benchmarks and tests."""

import functools

import torch

from llama.checkpoint.weights import Source

LLAMA_2_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256}


class RandomSource(Source):
    """Random weights, the same at every call; norms lie around 1.

    Each weight is made when it is read, so a model larger than memory can be written.
    """

    def __init__(self, params: dict, dtype: torch.dtype, std: float) -> None:
        super().__init__("random weights", params, dtype)
        self.std = std
        self.seeds = {name: seed for seed, name in enumerate(self.shapes)}
        # Blocks of rows are read one after the other, on a few threads.
        self._made = functools.lru_cache(maxsize=4)(self._make)

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows or columns start to stop of a weight; by default all of it."""
        stop = self.shapes[name][dim] if stop is None else stop
        return self._made(name).narrow(dim, start, stop - start)

    def _make(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seeds[name])
        is_norm = len(self.shapes[name]) == 1
        weight = torch.randn(self.shapes[name], generator=generator) * self.std + is_norm
        return weight.to(self.dtype)


def random_source(
    params: dict, dtype: torch.dtype = torch.float32, std: float = 0.5
) -> RandomSource:
    """A model of random weights with these params.json entries."""
    return RandomSource(params, dtype, std)
