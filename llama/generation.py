"""LLaMA: a model, its tokenizer, and text from them over all ranks of a run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from llama import parallel
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.weights import parse_dtype
from llama.cli import check_at_least, end_with_torchrun, progress_bar, shown
from llama.model import KVCache, Transformer
from llama.options import check_sampling
from llama.tokenizer import Tokenizer

BROKEN = -1  # in place of a next id: the row's logits are NaN or infinite


@dataclass
class Output:
    """What was generated after one prompt: the continuation alone."""

    text: str
    token: list[int]  # without the id that ended it


@dataclass
class Timing:
    """What loading and generating have taken so far on this rank."""

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0


@dataclass
class LLaMA:
    """A generator. Make one with LLaMA.build, on every rank alike."""

    model: Transformer
    tokenizer: Tokenizer
    max_seq_len: int = 512
    max_batch_size: int = 32
    soft_prompt: torch.Tensor | None = None  # (num_virtual_tokens, dim), before every prompt
    timing: Timing = field(default_factory=Timing)
    ckpt: Checkpoint | None = None  # whose mapped files are to stay as they are meanwhile

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path,
        max_seq_len: int = 512,
        max_batch_size: int = 32,
        dtype: str | None = None,
    ) -> "LLaMA":
        """Load this rank's shard of a checkpoint, and the tokenizer.

        dtype: float32, bfloat16 or float16; None takes what the checkpoint holds. Raises
        FileNotFoundError or ValueError for files that are absent, damaged or do not fit together.
        """
        began = time.perf_counter()
        wanted = parse_dtype(dtype)
        check_at_least(1, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        end_with_torchrun()
        device = parallel.setup()
        ckpt, tokenizer = open_pair(ckpt_dir, tokenizer_path)
        model = load_model(ckpt, device, wanted)
        timing = Timing(load_seconds=parallel.now() - began)
        return cls(model, tokenizer, max_seq_len, max_batch_size, timing=timing, ckpt=ckpt)

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> list[Output]:
        """Continue each prompt until its end of sequence, max_gen_len tokens or max_seq_len.

        A prompt is a text, or its token ids, taken as they are: tokenizer.encode(…,
        special_tokens=True) makes those of a text with special tokens in it.
        temperature 0 is greedy; top_p keeps the likeliest tokens that sum to it (Holtzman et al.,
        2020); a seed makes sampling repeatable. Raises ValueError for a prompt that leaves no room
        in max_seq_len, before any work is done, for logits that are NaN or infinite, and for files
        of weights that changed meanwhile.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("no prompts to continue: give a list with at least one")
        check_sampling(max_gen_len, temperature, top_p, seed)
        encoded = [self.tokenizer.encode(x) if isinstance(x, str) else list(x) for x in prompts]
        texts = [x if isinstance(x, str) else self.tokenizer.decode(x) for x in prompts]
        names = [f"prompt {i} ({shown(text, 40)!r})" for i, text in enumerate(texts, 1)]
        self._check_lengths(names, encoded)
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        sampling = Sampling(temperature, top_p, generator)
        outputs: list[Output] = []
        for first in range(0, len(encoded), self.max_batch_size):
            rows = slice(first, first + self.max_batch_size)
            batch = encoded[rows]
            continuations = self._generate_batch(names[rows], batch, max_gen_len, sampling)
            for ids, new in zip(batch, continuations):
                outputs.append(Output(self._text_after(ids, new), new))
        if self.ckpt is not None:
            self.ckpt.check_unchanged()
        return outputs

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.soft_prompt is None else len(self.soft_prompt)

    def _check_lengths(self, names: list[str], encoded: list[list[int]]) -> None:
        virtual = self.num_virtual_tokens
        for name, ids in zip(names, encoded):
            if not ids and not virtual:
                raise ValueError(f"{name} has no token to start from")
            if virtual + len(ids) >= self.max_seq_len:
                tuned = f", the tuned prompt {virtual}" if virtual else ""
                raise ValueError(
                    f"{name} has {len(ids)} tokens{tuned}, which leaves no room to generate in "
                    f"max_seq_len {self.max_seq_len}: shorten it or raise --max_seq_len"
                )

    @torch.inference_mode()
    def _generate_batch(
        self, names: list[str], batch: list[list[int]], max_gen_len: int, sampling: "Sampling"
    ) -> list[list[int]]:
        """The new ids of each row of prompt ids, without the id that ended it."""
        # How much of the cache each row fills, and how much more it may.
        lengths = [self.num_virtual_tokens + len(ids) for ids in batch]
        limits = [min(max_gen_len, self.max_seq_len - length) for length in lengths]
        max_len = max(length + limit for length, limit in zip(lengths, limits))
        cache = KVCache(self.model, len(batch), max_len)
        continuations: list[list[int]] = [[] for _ in batch]
        done = [False] * len(batch)
        began = parallel.now()
        logits = self._prefill(batch, lengths, cache)
        prefilled = parallel.now()
        self.timing.prompt_seconds += prefilled - began
        self.timing.prompt_tokens += sum(map(len, batch))
        while True:
            next_ids = sample_on_rank_0(logits, sampling)
            for row, token in enumerate(next_ids.tolist()):
                if done[row]:
                    continue
                if token == BROKEN:
                    raise ValueError(
                        f"{names[row]}, token {len(continuations[row]) + 1}: the model's logits "
                        "are NaN or infinite; if its files are whole (split_model.py --verify), "
                        "its numbers overflow their dtype: take --dtype bfloat16 or float32"
                    )
                if token in self.tokenizer.stop_ids:
                    done[row] = True
                else:
                    continuations[row].append(token)
                    done[row] = len(continuations[row]) == limits[row]
            if all(done):
                break
            logits = self._decode_one_token(next_ids, lengths, cache)
            # A finished row stays in the batch: it writes again and again where it ended.
            lengths = [length + (not end) for length, end in zip(lengths, done)]
        self.timing.generated_seconds += parallel.now() - prefilled
        self.timing.generated_tokens += sum(map(len, continuations))
        return continuations

    def _prefill(self, batch: list[list[int]], lengths: list[int], cache: KVCache) -> torch.Tensor:
        """Logits (bsz, vocab_size) after each prompt, all rows in one pass, padded on the right.

        What a pad puts into the cache lies behind its row's end, and is overwritten before the row
        gets there.
        """
        longest = max(map(len, batch))
        padded = [ids + [self.tokenizer.pad_id] * (longest - len(ids)) for ids in batch]
        h = self.model.tok_embeddings(torch.tensor(padded, dtype=torch.long, device=self.device))
        if self.soft_prompt is not None:
            soft = self.soft_prompt.to(h).expand(len(batch), -1, -1)
            h = torch.cat((soft, h), dim=1)  # (bsz, num_virtual_tokens + longest, dim)
        h = self.model.hidden_states(inputs_embeds=h, cache=cache, start_pos=[0] * len(batch))
        rows, lasts = range(len(batch)), [length - 1 for length in lengths]
        return self.model.gather_logits(h[rows, lasts])  # of the last token of each row

    def _decode_one_token(
        self, ids: torch.Tensor, lengths: list[int], cache: KVCache
    ) -> torch.Tensor:
        h = self.model.hidden_states(ids[:, None], cache=cache, start_pos=lengths)
        return self.model.gather_logits(h[:, -1])

    def _text_after(self, prompt_ids: list[int], ids: list[int]) -> str:
        # Decoded by itself, a continuation loses the space that SentencePiece drops in front.
        before, whole = (self.tokenizer.decode(x) for x in (prompt_ids, prompt_ids + ids))
        return whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(ids)


def open_pair(ckpt_dir: str | Path, tokenizer_path: str | Path) -> tuple[Checkpoint, Tokenizer]:
    """A checkpoint, not yet read, and its tokenizer; ValueError where their vocabularies differ."""
    ckpt, tokenizer = Checkpoint(ckpt_dir), Tokenizer(tokenizer_path)
    if tokenizer.n_words != ckpt.args.vocab_size:
        raise ValueError(
            f"{tokenizer_path}: a vocabulary of {tokenizer.n_words}, but the model in "
            f"{ckpt_dir} has {ckpt.args.vocab_size}; give the tokenizer that came with it"
        )
    return ckpt, tokenizer


def load_model(
    ckpt: Checkpoint, device: torch.device, dtype: torch.dtype | None = None
) -> Transformer:
    """This rank's part of a checkpoint as a model.

    What the manifest says of the weights is checked. A checkpoint of another number of shards is
    cut anew. On a CPU and in the checkpoint's own dtype, weights stay mapped files and take no
    memory, but for those that are taken apart by columns or put together from several shards.
    """
    dtype = dtype or ckpt.dtype
    parts = ckpt.load(parallel.rank(), parallel.world_size())
    bar = progress_bar("loading", len(ckpt.shapes), "weight", items=parts)
    weights = {name: part.to(device, dtype) for name, part in bar}
    model = Transformer(ckpt.args)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


@dataclass
class Sampling:
    """How the next token is chosen."""

    temperature: float  # 0: the likeliest
    top_p: float
    generator: torch.Generator


def sample_on_rank_0(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Sample the next id of each row, (bsz,), on rank 0, and broadcast it, so that none differs."""
    next_ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    if parallel.rank() == 0:
        next_ids.copy_(sample(logits, sampling))
    if parallel.world_size() > 1:
        dist.broadcast(next_ids, src=0)
    return next_ids


def sample(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One id a row of logits (bsz, vocab_size): the likeliest at temperature 0, else at random.

    BROKEN for a row with a logit that is NaN or infinite.
    """
    broken = ~logits.sum(dim=-1).isfinite()  # (bsz,)
    if sampling.temperature == 0:
        ids = logits.argmax(dim=-1)
    else:
        logits = logits.masked_fill(broken[:, None], 0)
        # Less the greatest, which then stays 0 divided by the tiniest temperature, while the others
        # go to minus infinity; 1e-30, as float32 may take smaller ones for 0.
        logits -= logits.amax(dim=-1, keepdim=True)
        probs = torch.softmax(logits / max(sampling.temperature, 1e-30), dim=-1)
        order = None
        if sampling.top_p < 1:  # to sort takes longer than all else
            probs, order = probs.sort(dim=-1, descending=True)
            # A token stays while those before it do not yet sum to top_p: the first always does.
            probs[probs.cumsum(dim=-1) - probs > sampling.top_p] = 0
        ids = torch.multinomial(probs, 1, generator=sampling.generator)
        ids = (ids if order is None else order.gather(-1, ids))[:, 0]
    return ids.masked_fill(broken, BROKEN)
