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

    Rows come and go between any two steps (continuous batching: Yu et al., 2022). soft_prompt
    (num_virtual_tokens, dim) stands before every prompt, if there is one.
    """

    def __init__(
        self, model: Transformer, soft_prompt: torch.Tensor | None, cache: KVCache
    ) -> None:
        self.model, self.soft_prompt, self.cache = model, soft_prompt, cache
        self.virtual = 0 if soft_prompt is None else len(soft_prompt)
        self.rows: list[Row] = []
        ours = kernels() if cache.rows.device.type == "cpu" else None
        self.decoder = Decoder(ours, model, cache) if ours else None

    @torch.inference_mode()
    def add(self, rows: list[Row], kept: int = 0, echo: bool = False) -> torch.Tensor:
        """Read the prompts of new rows: logits (bsz, vocab_size) after the last token of each.

        They are padded on the right, and read a chunk of all at a time. What a pad puts into the
        cache lies behind its row's end, and is overwritten before the row gets there. kept: tokens
        of a single row that the cache holds already. echo: log-probabilities of the prompts are
        noted too.
        """
        began = parallel.now()
        cache = self.cache.narrow(len(self.rows), len(rows))
        prompts = [row.ids[kept:] for row in rows]
        longest = max(map(len, prompts))
        padded = [ids + [0] * (longest - len(ids)) for ids in prompts]
        ids = torch.tensor(padded, dtype=torch.long, device=self.model.norm.weight.device)
        virtual = 0 if kept else self.virtual  # that are read now
        start, width = self.virtual - virtual + kept, virtual + longest
        lasts = [virtual + len(prompt) - 1 for prompt in prompts]
        found: list[torch.Tensor] = []  # states of all positions, if echo
        finals: dict[int, torch.Tensor] = {}  # of each row's last token
        n_positions = chunk_of(len(rows))
        for at in range(0, width, n_positions):
            h = self.model.hidden_states(
                inputs_embeds=self._embedded(ids, virtual, slice(at, at + n_positions)),
                cache=cache,
                start_pos=[start + at] * len(rows),
            )
            for i, last in enumerate(lasts):
                if at <= last < at + n_positions:
                    finals[i] = h[i, last - at].clone()
            found += [h] if echo else []
            del h  # before the next is made
        for row, states in zip(rows, torch.cat(found, 1) if echo else ()):
            row.output.prompt_logprobs = self._prompt_logprobs(row.ids, states)
        logits = self.model.gather_logits(torch.stack([finals[i] for i in range(len(rows))]))
        ended = parallel.now()
        for row in rows:
            row.began, row.done = ended, row.limit == 0
            row.output.timing.prompt_seconds = ended - began
        self.rows += rows
        return logits

    def _embedded(self, ids: torch.Tensor, virtual: int, positions: slice) -> torch.Tensor:
        """Some positions of prompts ids (bsz, longest) behind so many virtual tokens, embedded."""
        start, stop = (max(x - virtual, 0) for x in (positions.start, positions.stop))
        parts = []
        if self.soft_prompt is not None and positions.start < virtual:
            soft = self.soft_prompt[positions].to(self.model.norm.weight)
            parts.append(soft.expand(len(ids), -1, -1))
        if stop > start:
            parts.append(self.model.tok_embeddings(ids[:, start:stop]))
        return torch.cat(parts, dim=1)  # (bsz, positions, dim)

    def _prompt_logprobs(self, ids: list[int], h: torch.Tensor) -> list[float | None]:
        """The log-probability of each id of a prompt, of its states (… + longest, dim)."""
        first = 0 if self.virtual else 1  # only a tuned prompt stands before the first id
        found: list[float | None] = [None] * first
        for start in range(first, len(ids), ECHO_ROWS):
            wanted = torch.tensor(ids[start : start + ECHO_ROWS], device=h.device)[:, None]
            before = self.virtual + start - 1
            logits = self.model.gather_logits(h[before : before + len(wanted)])
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
                    self.cache.move(last, i, self._filled(self.rows[last]))
        self.rows = [self.rows[i] for i in kept]
        return kept

    def _filled(self, row: Row) -> int:
        """Positions of the cache that a row fills: not yet with its last token."""
        return self.virtual + len(row.ids) + len(row.output.token) - 1


def take_alike(waiting: deque[Row], most: int) -> list[Row]:
    """Take the next prompts, so many at most, as long as padding them alike costs little."""
    taken: list[Row] = []
    lens: list[int] = []
    while waiting and len(taken) < most:
        lens.append(len(waiting[0].ids))
        if len(lens) * max(lens) - sum(lens) > MAX_PADDING:
            break
        taken.append(waiting.popleft())
    return taken


def chunk_of(bsz: int) -> int:
    """Positions of each of so many prompts that are read in one pass."""
    return max(CHUNK_POSITIONS, CHUNK_TOKENS // bsz)
