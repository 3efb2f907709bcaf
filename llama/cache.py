"""Keys and values of what was read before, and the masks that say where queries may look."""

import copy
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of so many rows, each of just the length that the longest needs.

    Before each pass advance() says where its keys and values go; then each layer calls update().
    A pass over some of the rows takes the narrow() of them.
    """

    def __init__(self, model: Any, bsz: int, max_len: int) -> None:
        weight = model.norm.weight
        shape = (model.args.n_layers, 2, bsz, max_len, model.n_local_kv_heads, model.args.head_dim)
        # Zeros: what a row has not written yet is masked, but 0 times NaN would still be NaN. What
        # an earlier prompt left is finite: the first logits that are not have ended the run.
        self.all = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.layers = self.all.unbind(0)
        self.rows = torch.arange(bsz, device=weight.device)[:, None]  # (bsz, 1)
        self.end = 0  # of what any row has written
        self.place: tuple = ()  # index into (bsz, max_len) of what the pass writes

    def narrow(self, start: int, bsz: int) -> "KVCache":
        """The cache of bsz rows from start on, in the same memory."""
        if bsz == len(self.rows):
            return self
        part = copy.copy(self)
        part.all = self.all[:, :, start : start + bsz]
        part.layers = part.all.unbind(0)
        part.rows = self.rows[:bsz]
        return part

    @property
    def max_len(self) -> int:
        """Positions that each row has."""
        return self.all.shape[3]

    def copy_row(self, target: int, other: "KVCache", source: int, length: int) -> None:
        """Copy the first positions of another cache's row, or of this one's, so many, to a row."""
        self.all[:, :, target, :length] = other.all[:, :, source, :length]

    def advance(
        self, start_pos: list[int], seqlen: int, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Have the next pass write row i at start_pos[i] onward; starts: that on the device.

        Returns its positions (bsz, seqlen), and where its queries may look, (bsz, 1, seqlen, end):
        of one row for all at the same place; None for everything (one token), or is_causal.
        """
        starts = torch.tensor(start_pos, device=self.rows.device) if starts is None else starts
        positions = starts[:, None] + torch.arange(seqlen, device=starts.device)
        first, last = min(start_pos), max(start_pos)
        self.end = last + seqlen
        if first == last:  # all rows are at the same place
            self.place = (slice(None), slice(first, self.end))
            if seqlen == 1 or first == 0:
                return positions, None
            positions = positions[:1]
        else:
            self.place = (self.rows, positions)
        seen = torch.arange(self.end, device=starts.device) <= positions[:, None, :, None]
        return positions, added_to_scores(seen, self.layers[0].dtype)

    def update(self, layer: int, xk: Tensor, xv: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values (bsz, seqlen, n_local_kv_heads, head_dim).

        Returns all keys and values so far, (bsz, end, n_local_kv_heads, head_dim) each.
        """
        keys, values = self.layers[layer]
        keys[self.place] = xk
        values[self.place] = xv
        return keys[:, : self.end], values[:, : self.end]


def added_to_scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of the same shape: 0 where a query may look, else minus infinity.

    Made once a pass, in rows of 16 numbers, as cards take them: else each layer makes its own.
    """
    end = seen.shape[-1]
    shape = (*seen.shape[:-1], -(-end // 16) * 16)
    mask = torch.zeros(shape, dtype=dtype, device=seen.device)[..., :end]
    return mask.masked_fill_(~seen, -torch.inf)


def padding_mask(attention_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Where a query may look in whole sequences, (bsz, 1, seqlen, seqlen); None for causal alone.

    attention_mask (bsz, seqlen) is 0 on padding.
    """
    # Padding on the right needs no mask: causal attention never looks there.
    if attention_mask is None or not (attention_mask.diff(dim=1) > 0).any():
        return None
    seqlen, device = attention_mask.shape[1], attention_mask.device
    causal = torch.ones(seqlen, seqlen, dtype=torch.bool, device=device).tril()
    mask = causal & attention_mask.bool()[:, None, None, :]
    # A padded position looks at itself: a softmax over nothing would be NaN.
    seen = mask | torch.eye(seqlen, dtype=torch.bool, device=device)
    return added_to_scores(seen, dtype)
