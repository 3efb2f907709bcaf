"""The next token: chosen from logits on a model's first rank, and the same on all its ranks."""

from collections.abc import Callable, Sequence

import torch

from llama import parallel
from llama.options import SamplingParams

BROKEN = -1  # in place of a next id: the row's logits are NaN or infinite
INTERRUPTED = -2  # in place of all: rank 0 was asked to stop here


class Sampler:
    """Chooses the next ids of the rows at work, which come and go with add() and keep().

    generator: of random numbers, on the device of the logits. interrupted: asked on the model's
    first rank before each choice, whether to end all rows here.
    """

    def __init__(
        self,
        params: SamplingParams,
        generator: torch.Generator,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self.params, self.generator, self.interrupted = params, generator, interrupted
        self.seen: torch.Tensor | None = None  # (bsz, vocab_size) bool: ids that are penalised

    def add(self, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Take up rows, of these prompts' ids, behind those that there are."""
        if self.params.repetition_penalty != 1:
            device = self.generator.device
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for row, ids in zip(seen, prompts):
                row[torch.tensor(ids, dtype=torch.long, device=device)] = True
            self.seen = seen if self.seen is None else torch.cat((self.seen, seen))

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows alone, in this order."""
        if self.seen is not None:
            self.seen = self.seen[rows]

    def next_ids(self, logits: torch.Tensor) -> torch.Tensor:
        """The next id of each row, (bsz,), of its logits (bsz, vocab_size).

        BROKEN for a row with a logit that is NaN or infinite, INTERRUPTED for all if asked to.
        """
        ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        if parallel.model_rank() == 0:
            broken = ~logits.sum(dim=-1).isfinite()  # (bsz,)
            ids.copy_(self._choose(logits, broken).masked_fill(broken, BROKEN))
            if self.interrupted():
                ids.fill_(INTERRUPTED)
        parallel.broadcast_in_model(ids)
        return ids

    def _choose(self, logits: torch.Tensor, broken: torch.Tensor) -> torch.Tensor:
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.params.repetition_penalty)
        if self.params.temperature == 0:
            ids = logits.argmax(dim=-1)
        else:
            logits = logits.masked_fill(broken[:, None], 0)
            probs, order = filtered(logits, self.params)
            ids = torch.multinomial(probs, 1, generator=self.generator)
            ids = (ids if order is None else order.gather(-1, ids))[:, 0]
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        return ids


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make the tokens seen before less likely (Keskar et al., 2019, section 4.1)."""
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def filtered(
    logits: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities to sample from, which need not sum to 1, and the ids that they belong to.

    logits (bsz, vocab_size). The ids are None where the probabilities are in their order. First
    temperature, then top_k, top_p (Holtzman et al., 2020) and min_p (Nguyen et al., 2024).
    """
    # Less the greatest, which then stays 0 divided by the tiniest temperature, while the others
    # go to minus infinity; 1e-30, as float32 may take smaller ones for 0.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / max(params.temperature, 1e-30)
    order = None
    if 0 < params.top_k < logits.shape[-1]:
        logits, order = logits.topk(params.top_k)  # the greatest first
    probs = torch.softmax(logits, dim=-1)
    if params.top_p < 1:
        if order is None:  # to sort takes longer than all else
            probs, order = probs.sort(dim=-1, descending=True)
        # A token stays while those before it do not yet sum to top_p: the first always does.
        probs[probs.cumsum(dim=-1) - probs > params.top_p] = 0
    if params.min_p > 0:
        probs[probs < params.min_p * probs.amax(dim=-1, keepdim=True)] = 0
    return probs, order
