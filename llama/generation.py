"""LLaMA: a model, its tokenizer, and text from them over all ranks of a run."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama import parallel
from llama.batch import Batch, take_alike
from llama.cache import KVCache
from llama.checkpoint.formats import open_pair
from llama.checkpoint.weights import Source, parse_dtype
from llama.cli import check_at_least, counted, end_with_torchrun, progress_bar, say, shown
from llama.files import naming
from llama.layers import quantise
from llama.memory import DEFAULTS, check_generation
from llama.model import Transformer
from llama.offload import Offload, layers_to_offload
from llama.options import SamplingParams, check_max_seq_len
from llama.output import Output, Prefix, Prompt, Row, Stream, Timing, Tuned
from llama.plan import Plan
from llama.sampling import BROKEN, INTERRUPTED, Sampler
from llama.text_stream import TextStream
from llama.tokenizer import Tokenizer

LONGEST_CONTEXT = 4096  # taken where nobody says how long it is to be
SORTED_BATCHES = 8  # so many batches' prompts are started longest first, and then the next ones


class PromptCache:
    """Keys and values of a text that grows by turns, so that each is read once."""

    def __init__(self, llama: "LLaMA") -> None:
        self.max_seq_len = llama.max_seq_len
        self.kv = KVCache(llama.model, 1, self.max_seq_len)
        self.soft_prompt: torch.Tensor | None = None
        self.n_streams = 0  # that have used it: only the last may go on
        self.ids: list[int] = []  # what it holds, behind the tuned prompt

    def keep(self, ids: list[int], prefix: Prefix | None) -> int:
        """Keep what a prompt of these ids begins with; how many tokens that are.

        The last one is read in any case: what comes after it is wanted.
        """
        self.n_streams += 1
        soft_prompt = None if prefix is None else prefix.soft_prompt
        if soft_prompt is not self.soft_prompt:
            self.ids, self.soft_prompt = [], soft_prompt
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids[:-1]))
        self.ids = [token for token, _ in pairs]
        return len(self.ids)


@dataclass
class LLaMA:
    """A generator. Make one with LLaMA.build, on every rank alike."""

    model: Transformer
    tokenizer: Tokenizer
    max_seq_len: int = 512
    max_batch_size: int = 32
    soft_prompt: torch.Tensor | None = None  # (num_virtual_tokens, dim), before prompts but Tuned
    timing: Timing = field(default_factory=Timing)
    ckpt: Source | None = None  # whose mapped files are to stay as they are meanwhile

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = 512,
        max_batch_size: int = 32,
        dtype: str | None = None,
        quantize: str | None = None,
        offload: int = 0,
        tensor_parallel: int | None = None,
    ) -> "LLaMA":
        """Load this rank's part of a checkpoint of any format, and the tokenizer.

        tokenizer_path: None takes the one that the checkpoint holds.
        max_seq_len: tokens of prompt and continuation; None takes what the model was made for, but
        at most LONGEST_CONTEXT.
        dtype: float32, bfloat16 or float16; None takes what the checkpoint holds.
        quantize: int8 or int4, of the matrices; None leaves them as the checkpoint has them.
        offload: layers whose weights stay in host memory until their turn.
        tensor_parallel: the ranks that the model is split over, where there are several replicas of
        it, each of which generates what it is given; None: all ranks. Raises
        FileNotFoundError or ValueError for files that are absent, damaged or do not fit together.
        """
        began = time.perf_counter()
        wanted = parse_dtype(dtype)
        check_at_least(1, max_batch_size=max_batch_size)
        check_max_seq_len(max_seq_len)
        end_with_torchrun()
        device = parallel.setup(tensor_parallel)
        ckpt, tokenizer = open_pair(ckpt_dir, tokenizer_path, quantize)
        chosen = (max_seq_len or 512, max_batch_size) != DEFAULTS
        made_for = ckpt.args.context_len or LONGEST_CONTEXT
        if max_seq_len is None:
            max_seq_len = min(made_for, LONGEST_CONTEXT)
        if ckpt.args.context_len and max_seq_len > made_for:
            say(f"--max_seq_len {max_seq_len}: {ckpt_dir} was made for {made_for} tokens at most")
        rows = (max_batch_size, max_seq_len)
        plan = Plan(
            ckpt, parallel.model_size(), wanted or ckpt.dtype, *rows, device, ckpt.quantize, offload
        )
        check_generation(plan, chosen)
        model = load_model(ckpt, device, wanted, offload)
        timing = Timing(load_seconds=parallel.now() - began)
        return cls(model, tokenizer, max_seq_len, max_batch_size, timing=timing, ckpt=ckpt)

    def generate(self, prompts: Sequence[Prompt], *args: Any, **params: Any) -> list[Output]:
        """Continue each prompt until its end of sequence, max_gen_len tokens or max_seq_len.

        A prompt is a text, or its token ids, taken as they are: tokenizer.encode(…,
        special_tokens=True) makes those of a text with special tokens in it. One of these in a
        Tuned has its own soft prompt in front, in place of .soft_prompt. What follows is a
        SamplingParams, or what makes one: max_gen_len, temperature, top_p, seed, top_k, min_p,
        repetition_penalty, stop, n, logprobs, echo. With n, each prompt has n outputs, side by
        side. Raises ValueError for a prompt that leaves no room in max_seq_len,
        before any work is done, for logits that are NaN or infinite, and for files of weights
        that changed meanwhile.
        """
        return list(self.outputs(prompts, *args, **params))

    def outputs(self, prompts: Sequence[Prompt], *args: Any, **params: Any) -> Iterator[Output]:
        """Give what generate() does, each as soon as it and all before it are done.

        max_batch_size of them run at a time, and one that ends gives its place to the next.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list: generate([prompt]), or stream(prompt)")
        if not prompts:
            raise ValueError("no prompts to continue: give a list with at least one")
        made, rows = SamplingParams.of(*args, **params), []
        prefixes: dict[torch.Tensor, Prefix] = {}
        for number, prompt in enumerate(prompts, 1):
            rows += [self._row(prompt, f"prompt {number}", made, prefixes) for _ in range(made.n)]
        return self._in_order(rows, self._sampler(made))

    def stream(
        self,
        prompt: Prompt,
        *args: Any,
        cache: PromptCache | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        **params: Any,
    ) -> Stream:
        """Continue one prompt: the pieces of its text as they come, to be read on every rank.

        Options and errors are those of generate(). cache: keeps what was read, so that a prompt
        that begins with an earlier one and its continuation is read from there. interrupted: asked
        on rank 0 before each token, whether to end here.
        """
        made = SamplingParams.of(*args, **params)
        if made.n != 1 or (made.echo and cache):
            raise ValueError("a stream has one continuation, and no echo where it keeps a cache")
        if cache is not None and self.max_seq_len > cache.max_seq_len:
            raise ValueError("max_seq_len was raised since this cache was made: make another")
        row, sampler = self._row(prompt, "the prompt", made, {}), self._sampler(made, interrupted)
        pieces = (piece for _, piece in self._continue([row], sampler, cache) if piece)
        return Stream(row.output, pieces)

    def check_fits(self, prompt: Prompt, max_gen_len: int = 1) -> None:
        """Raise ValueError if a prompt leaves no room in max_seq_len for any token of so many."""
        ids, soft_prompt = self._parts(prompt)
        self._room(ids, virtual_tokens(soft_prompt), min(max_gen_len, 1))

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def num_virtual_tokens(self) -> int:
        return virtual_tokens(self.soft_prompt)

    def _parts(self, prompt: Prompt) -> tuple[list[int], torch.Tensor | None]:
        """A prompt's token ids, and the soft prompt before it."""
        soft_prompt = self.soft_prompt
        if isinstance(prompt, Tuned):
            soft_prompt, prompt = prompt.soft_prompt, prompt.prompt
        dim = self.model.args.dim
        if soft_prompt is not None and (soft_prompt.dim() != 2 or soft_prompt.shape[1] != dim):
            shape = tuple(soft_prompt.shape)
            raise ValueError(f"a soft prompt is of shape (num_virtual_tokens, {dim}), not {shape}")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt), soft_prompt
        if not isinstance(prompt, list | tuple) or not all(type(i) is int for i in prompt):
            raise ValueError(f"a prompt is a text or a list of token ids, not {prompt!r:.80}")
        return list(prompt), soft_prompt

    def _row(
        self,
        prompt: Prompt,
        name: str,
        params: SamplingParams,
        prefixes: dict[torch.Tensor, Prefix],
    ) -> Row:
        """A prompt made ready; ValueError, naming it, for one that cannot be continued.

        prefixes: of the rows before, by their soft prompts, which share them.
        """
        tokenizer, (ids, soft_prompt) = self.tokenizer, self._parts(prompt)
        text = prompt.prompt if isinstance(prompt, Tuned) else prompt
        text = text if isinstance(text, str) else tokenizer.decode(ids)
        name, virtual = f"{name} ('{shown(text, 40)}')", virtual_tokens(soft_prompt)
        try:
            limit = min(params.max_gen_len, self._room(ids, virtual, min(params.max_gen_len, 1)))
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        output = Output()
        output.timing.prompt_tokens = len(ids)
        row = Row(name, ids, limit, TextStream(tokenizer, ids, params.stop), output)
        if soft_prompt is not None and virtual:
            row.prefix = prefixes.setdefault(soft_prompt, Prefix(soft_prompt))
            row.virtual = virtual
        if params.logprobs is not None:
            output.logprobs, output.top_logprobs = row.logprobs, row.top_logprobs
        return row

    def _room(self, ids: list[int], virtual: int, needed: int) -> int:
        """How many tokens may follow these; ValueError if they are fewer than needed."""
        if not ids and not virtual:
            raise ValueError("has no token to start from")
        room = self.max_seq_len - virtual - len(ids)
        if room < needed:
            tuned = f", the tuned prompt {virtual}" if virtual else ""
            raise ValueError(
                f"has {counted(len(ids), 'token')}{tuned}, which leaves no room to generate in "
                f"max_seq_len {self.max_seq_len}: shorten it or raise --max_seq_len"
            )
        return room

    def _sampler(
        self, params: SamplingParams, interrupted: Callable[[], bool] = lambda: False
    ) -> Sampler:
        generator = torch.Generator(self.device)
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        return Sampler(params, generator, interrupted)

    def _in_order(self, rows: list[Row], sampler: Sampler) -> Iterator[Output]:
        """Give the rows' outputs in their order; longest first is how they are started."""
        n, started = SORTED_BATCHES * self.max_batch_size, []
        for first in range(0, len(rows), n):
            started += sorted(rows[first : first + n], key=lambda row: -len(row.ids))
        wanted = deque(rows)
        for _ in self._continue(started, sampler):
            while wanted and wanted[0].done:
                yield wanted.popleft().output

    @torch.inference_mode()
    def _continue(
        self, prompts: list[Row], sampler: Sampler, cache: PromptCache | None = None
    ) -> Iterator[tuple[Row, str]]:
        """Give the pieces of the prompts' texts as they come, at last one that may be empty.

        max_batch_size of them run at a time, started in their order: the next where one ends.
        """
        bsz, kept = min(len(prompts), self.max_batch_size), 0  # kept: tokens that were read before
        if cache is None:
            longest = max(row.virtual + len(row.ids) + row.limit for row in prompts)
            kv = KVCache(self.model, bsz, longest)
        else:
            kv, kept = cache.kv, cache.keep(prompts[0].ids, prompts[0].prefix)
            turn = cache.n_streams
        batch, waiting = Batch(self.model, kv), deque(prompts)
        began, reading = parallel.now(), 0.0
        try:
            while batch.rows or waiting:
                if cache is not None and cache.n_streams != turn:
                    raise ValueError("another stream uses this cache: give each its own")
                logits = [batch.decode_one_token()] if batch.rows else []
                while waiting and len(batch.rows) < bsz:
                    new = take_alike(waiting, bsz - len(batch.rows), kv.max_len)
                    logits.append(batch.add(new, kept, sampler.params.echo))
                    sampler.add([row.ids for row in new], logits[-1].shape[1])
                    seconds = new[0].output.timing.prompt_seconds  # of them all
                    reading += seconds
                    self.timing.prompt_seconds += seconds
                    self.timing.prompt_tokens += sum(len(row.ids) - kept for row in new)
                if cache is not None:
                    cache.ids = batch.rows[0].ids + batch.rows[0].output.token
                yield from self._take_tokens(batch.rows, torch.cat(logits), sampler)
                if any(row.done for row in batch.rows):
                    sampler.keep(batch.drop_done())
        finally:
            self.timing.generated_seconds += parallel.now() - began - reading

    def _take_tokens(
        self, rows: list[Row], logits: torch.Tensor, sampler: Sampler
    ) -> Iterator[tuple[Row, str]]:
        """Draw the next token of each row; give what can be shown now, and all rows that end."""
        tokens = sampler.next_ids(logits).tolist()
        if sampler.params.logprobs is not None:
            self._add_logprobs(rows, tokens, logits, sampler.params.logprobs)
        for row, token in zip(rows, tokens):
            piece = "" if row.done else self._take(row, token)
            if row.done:
                row.output.timing.generated_seconds = parallel.now() - row.began
                if self.ckpt is not None:
                    self.ckpt.check_unchanged()
            if piece or row.done:
                yield row, piece

    def _take(self, row: Row, token: int) -> str:
        """Add a token to a row, or end it; what can be shown of its text now."""
        output, piece = row.output, ""
        if token == BROKEN:
            raise ValueError(
                f"{row.name}, token {len(output.token) + 1}: the model's logits "
                "are NaN or infinite; if its files are whole (split_model.py --verify), "
                "its numbers overflow their dtype: take --dtype bfloat16 or float32"
            )
        if token == INTERRUPTED:
            output.finish_reason, row.done = "interrupted", True
        elif token in self.tokenizer.stop_ids:
            output.finish_reason, row.done = "stop", True
        else:
            output.token.append(token)
            output.timing.generated_tokens += 1
            self.timing.generated_tokens += 1
            piece = row.text.add(token)
            row.done = row.text.stopped or len(output.token) == row.limit
        if row.done:
            piece += row.text.finish()
            if row.text.stopped:
                output.finish_reason = "stop"
        output.text += piece
        return piece

    def _add_logprobs(
        self, rows: list[Row], tokens: list[int], logits: torch.Tensor, top: int
    ) -> None:
        """Note the log-probability of each row's next token, and those of the likeliest ids."""
        logprobs = logits.log_softmax(dim=-1)  # (bsz, vocab_size)
        values, ids = (found.tolist() for found in logprobs.topk(min(top, logits.shape[1])))
        places = torch.tensor(tokens, device=logits.device).clamp(min=0)[:, None]
        chosen = logprobs.gather(1, places)[:, 0].tolist()
        for i, (row, token) in enumerate(zip(rows, tokens)):
            if not row.done and token >= 0 and token not in self.tokenizer.stop_ids:
                row.logprobs.append(chosen[i])
                row.top_logprobs.append(dict(zip(ids[i], values[i])))


def virtual_tokens(soft_prompt: torch.Tensor | None) -> int:
    """How many tokens a soft prompt has."""
    return 0 if soft_prompt is None else len(soft_prompt)


def load_model(
    ckpt: Source, device: torch.device, dtype: torch.dtype | None = None, offload: int = 0
) -> Transformer:
    """This rank's part of a checkpoint as a model.

    What the manifest says of the weights is checked. A checkpoint of another number of shards or
    another format is cut anew. In Meta's format, on a CPU and in the checkpoint's own dtype,
    weights stay mapped files and take no memory, but for those that are taken apart by columns or
    put together from several shards. offload: layers whose weights stay in host memory until
    their turn; ValueError for more than there are.
    """
    away = layers_to_offload(ckpt.args.n_layers, offload, device)
    names_away = tuple(f"layers.{i}." for i in away)
    parts = ckpt.load(parallel.model_rank(), parallel.model_size(), dtype)
    bar = progress_bar("loading", len(ckpt.shapes), "weight", items=parts)
    model, weights = Transformer(ckpt.args), {}
    for name, part in bar:
        part = part if name.startswith(names_away) else part.to(device)
        if bits := ckpt.bits_of(name):
            with naming(ckpt.path):
                quantise(model.get_submodule(name.removesuffix(".weight")), part, bits)
        else:
            weights[name] = part
    model.load_state_dict(weights, assign=True)
    del weights  # or those that become pinned would be in host memory twice
    if away:
        Offload([model.layers[i] for i in away], device).say_cost()
    parallel.meet("to load its part of the model")
    return model.to(device).eval()
