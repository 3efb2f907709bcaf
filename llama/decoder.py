"""A step of one token a row on a CPU: Transformer.forward's, in two calls of kernels a layer."""

from typing import Any

import numpy as np
import torch

from llama.cache import KVCache
from llama.layers import sum_over_ranks
from llama.model import Transformer


class Decoder:
    """Reads a token a row into a KV cache, as Transformer.hidden_states does.

    Hidden states are float32 between layers, whatever the weights are. Where layers.kernels() gives
    None there can be none.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        from llama import kernels, step  # here, as they need numba

        self.kernels, self.step, self.model = kernels, step, model
        # what attention() and feed_forward() take of each layer
        self.layers: list[tuple[tuple, tuple]] = []
        for layer, cached in zip(model.layers, cache.layers):
            heads: Any = layer.attention
            ffn: Any = layer.feed_forward
            n_heads = len(heads.wq.weight) // heads.head_dim
            attention = self._arrays(layer.attention_norm, heads.wq, heads.wk, heads.wv, heads.wo)
            feed_forward = self._arrays(layer.ffn_norm, ffn.w1, ffn.w2, ffn.w3)
            self.layers.append(
                (
                    (*attention, n_heads, *map(kernels.array, cached)),
                    (*feed_forward, len(ffn.w1.weight)),
                )
            )

    def _arrays(self, norm: Any, *layers: Any) -> list:
        return [norm.weight.float().numpy(), *(self.kernels.arrays(x.weight) for x in layers)]

    def hidden_states(self, ids: list[int], start_pos: list[int]) -> torch.Tensor:
        """Read the next token of the cache's first rows, ids[i] at start_pos[i].

        Returns what the output layer reads, (bsz, dim).
        """
        step, model, starts = self.step, self.model, np.array(start_pos)
        freqs = torch.view_as_real(model.rotations(torch.from_numpy(starts))).numpy()
        h = model.tok_embeddings(torch.tensor(ids)).float().numpy()  # (bsz, dim)
        part = torch.empty(h.shape)  # of what is added to h, this rank's
        common = part.numpy(), model.args.norm_eps, self.kernels.n_threads()
        for attention, feed_forward in self.layers:
            step.attention(h, *attention, freqs, starts, *common)
            h += sum_over_ranks(part).numpy()
            step.feed_forward(h, *feed_forward, *common)
            h += sum_over_ranks(part).numpy()
        return model.norm(torch.from_numpy(h).to(model.norm.weight.dtype))
