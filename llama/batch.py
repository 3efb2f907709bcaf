"""Rows that run together over one KV cache: prompts read, tokens decoded, ended rows left out."""

from collections import deque

import torch

from llama import parallel
from llama.cache import KVCache
from llama.decoder import Decoder
from llama.layers import FEW_ROWS, kernels
from llama.model import Transformer
from llama.output import Row

MAX_PADDING = 64  # tokens in a pass over prompts: more take longer than a pass of their own
CHUNK_TOKENS = 2048  # of prompts in one pass: more take memory, and are no faster
CHUNK_POSITIONS = 64  # of each of many prompts, at least
ECHO_ROWS = 128  # positions of a prompt whose logits are in memory at once


class Batch:
    """Rows of one KV cache: the first of it are at work, one for each of .rows, in their order.

    Rows come and go between any two steps (continuous batching: Yu et al., 2022).
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self.rows: list[Row] = []
        ours = cache.rows.device.type == "cpu" and kernels()
        self.decoder = Decoder(model, cache) if ours else None

    @torch.inference_mode()
    def add(self, rows: list[Row], kept: int = 0, echo: bool = False) -> torch.Tensor:
        """Read the prompts of new rows: logits (bsz, vocab_size) after the last token of each.

        They begin behind their tuned prompts, are padded on the right, and read a chunk of all at a
        time. What a pad puts into the cache lies behind its row's end, and is overwritten before
        the row gets there. kept: tokens of a single row that the cache holds already, behind its
        tuned prompt. echo: log-probabilities of the prompts are noted too.
        """
        began = parallel.now()
        cache = self.cache.narrow(len(self.rows), len(rows))
        prompts = [row.ids[kept:] for row in rows]
        longest = max(map(len, prompts))
        padded = [ids + [0] * (longest - len(ids)) for ids in prompts]
        ids = torch.tensor(padded, dtype=torch.long, device=self.model.norm.weight.device)
        starts = [row.virtual + kept for row in rows]
        before = [None if kept else self._begin(cache, i, row) for i, row in enumerate(rows)]
        finals: list = list(before)  # states of each row's last token
        found: list[torch.Tensor] = []  # states of all positions, if echo
        n_positions = chunk_of(len(rows))
        for at in range(0, longest, n_positions):
            h = self.model.hidden_states(
                ids[:, at : at + n_positions],
                cache=cache,
                start_pos=[start + at for start in starts],
            )
            for i, prompt in enumerate(prompts):
                if at < len(prompt) <= at + n_positions:
                    finals[i] = h[i, len(prompt) - 1 - at].clone()
            found += [h] if echo else []
            del h  # before the next is made
        for i, row in enumerate(rows if echo else ()):
            states = [h[i] for h in found]
            row.output.prompt_logprobs = self._prompt_logprobs(row.ids, states, before[i])
        logits = self.model.gather_logits(torch.stack(finals))
        ended = parallel.now()
        for row in rows:
            row.began, row.done = ended, row.limit == 0
            row.output.timing.prompt_seconds = ended - began
        self.rows += rows
        return logits

    def _begin(self, cache: KVCache, i: int, row: Row) -> torch.Tensor | None:
        """Put the keys and values of its tuned prompt into row i of a cache.

        Returns the states (dim,) of its last token; None where there is no such prompt.
        """
        prefix, row.prefix = row.prefix, None
        if prefix is None:
            return None
        if prefix.read is None:
            prefix.read = self._read(prefix.soft_prompt)
        read, last = prefix.read
        cache.copy_row(i, read, 0, row.virtual)
        return last

    def _read(self, soft_prompt: torch.Tensor) -> tuple[KVCache, torch.Tensor]:
        """Compute the keys and values of a tuned prompt, and the states of its last token."""
        n_positions, cache = chunk_of(1), KVCache(self.model, 1, len(soft_prompt))
        for at in range(0, len(soft_prompt), n_positions):
            part = soft_prompt[None, at : at + n_positions].to(self.model.norm.weight)
            h = self.model.hidden_states(inputs_embeds=part, cache=cache, start_pos=[at])
        return cache, h[0, -1].clone()

    def _prompt_logprobs(
        self, ids: list[int], states: list[torch.Tensor], before: torch.Tensor | None
    ) -> list[float | None]:
        """The log-probability of each id of a prompt, of its states, chunks of (…, dim).

        before: the states (dim,) of the tuned token before the first id, if there is one.
        """
        found: list[float | None] = []
        if before is None:
            found, ids = [None], ids[1:]
        else:
            states = [before[None], *states]
        h = torch.cat(states)
        for start in range(0, len(ids), ECHO_ROWS):
            wanted = torch.tensor(ids[start : start + ECHO_ROWS], device=h.device)[:, None]
            logits = self.model.gather_logits(h[start : start + len(wanted)])
            found += logits.log_softmax(dim=-1).gather(1, wanted)[:, 0].tolist()
        return found

    def decode_one_token(self) -> torch.Tensor:
        """Read the last token of each row: logits (bsz, vocab_size) after it."""
        ids = [row.output.token[-1] for row in self.rows]
        starts = [self._filled(row) for row in self.rows]
        if self.decoder and len(ids) <= FEW_ROWS:
            return self.model.gather_logits(self.decoder.hidden_states(ids, starts))
        cache = self.cache.narrow(0, len(ids))
        # one copy to the device for both
        both = torch.tensor((ids, starts), device=self.model.norm.weight.device)
        tokens = both[0][:, None]
        h = self.model.hidden_states(tokens, cache=cache, start_pos=starts, starts=both[1])
        return self.model.gather_logits(h[:, -1])

    def drop_done(self) -> list[int]:
        """Leave out the rows that are done: which of the rows are left, in their new order.

        The last row takes the place of one that is done, so that those at work stay the first.
        """
        kept = list(range(len(self.rows)))
        for i in reversed(range(len(self.rows))):
            if self.rows[i].done:
                last = kept.pop()
                if i < len(kept):
                    kept[i] = last
                    self.cache.copy_row(i, self.cache, last, self._filled(self.rows[last]))
        self.rows = [self.rows[i] for i in kept]
        return kept

    def _filled(self, row: Row) -> int:
        """Positions of the cache that a row fills: not yet with its last token."""
        return row.virtual + len(row.ids) + len(row.output.token) - 1


def take_alike(waiting: deque[Row], most: int, max_len: int) -> list[Row]:
    """Take the next prompts, so many at most, as long as padding them alike costs little.

    max_len: positions of the cache, in which pads must lie too.
    """
    taken: list[Row] = []
    lens: list[int] = []
    virtual = 0
    while waiting and len(taken) < most:
        lens.append(len(waiting[0].ids))
        virtual = max(virtual, waiting[0].virtual)
        padding = len(lens) * max(lens) - sum(lens)
        if padding > MAX_PADDING or virtual + max(lens) > max_len:
            break
        taken.append(waiting.popleft())
    return taken


def chunk_of(bsz: int) -> int:
    """Positions of each of so many prompts that are read in one pass."""
    return max(CHUNK_POSITIONS, CHUNK_TOKENS // bsz)
