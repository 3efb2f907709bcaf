"""LLaMA: a model, its tokenizer, and text from them over all ranks of a run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu

from llama import parallel
from llama.checkpoint import Checkpoint, check_shard_count, counted, parse_dtype
from llama.model import KVCache, Transformer
from llama.tokenizer import Tokenizer


@dataclass
class Output:
    """What was generated after one prompt: the continuation alone."""

    text: str
    token: list[int]  # without the id that ended it


@dataclass
class Timing:
    """What generation has taken so far on this rank."""

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

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path,
        *,
        max_seq_len: int = 512,
        max_batch_size: int = 32,
        dtype: str | None = None,
    ) -> "LLaMA":
        """Load this rank's shard of a checkpoint, and the tokenizer.

        dtype: float32, bfloat16 or float16; None takes what the checkpoint holds. Raises
        FileNotFoundError or ValueError for files that are absent, damaged or do not fit together.
        """
        wanted = parse_dtype(dtype)
        device = parallel.setup()
        parallel.check_at_least(1, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
        ckpt, tokenizer = open_pair(ckpt_dir, tokenizer_path)
        model = load_model(ckpt, device, wanted)
        return cls(model, tokenizer, max_seq_len, max_batch_size)

    def generate(
        self,
        prompts: Sequence[str],
        max_gen_len: int = 256,
        temperature: float = 0.8,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> list[Output]:
        """Continue each prompt until its end of sequence, max_gen_len tokens or max_seq_len.

        temperature 0 is greedy; top_p keeps the likeliest tokens that sum to it (Holtzman et al.,
        2020); a seed makes sampling repeatable. Raises ValueError for a prompt that leaves no room
        in max_seq_len, before any work is done.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError("no prompts to continue: give a list with at least one")
        check_sampling(max_gen_len, temperature, top_p, seed)
        encoded = [self.tokenizer.encode(prompt, bos=True) for prompt in prompts]
        self._check_lengths(prompts, encoded)
        generator = torch.Generator(self.device)
        generator.seed() if seed is None else generator.manual_seed(seed)
        outputs: list[Output] = []
        with torch.inference_mode():
            for first in range(0, len(encoded), self.max_batch_size):
                batch = encoded[first : first + self.max_batch_size]
                continuations = self._generate_batch(
                    batch, max_gen_len, temperature, top_p, generator
                )
                outputs += [
                    Output(self._text_after(ids, new), new)
                    for ids, new in zip(batch, continuations)
                ]
        return outputs

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def num_virtual_tokens(self) -> int:
        return 0 if self.soft_prompt is None else len(self.soft_prompt)

    def _check_lengths(self, prompts: Sequence[str], encoded: list[list[int]]) -> None:
        for number, (prompt, ids) in enumerate(zip(prompts, encoded), 1):
            name = f"prompt {number} ({prompt[:40]!r})"
            if not ids and not self.num_virtual_tokens:
                raise ValueError(f"{name} has no token to start from")
            if self.num_virtual_tokens + len(ids) >= self.max_seq_len:
                virtual = f" after {self.num_virtual_tokens} virtual ones" * bool(
                    self.num_virtual_tokens
                )
                raise ValueError(
                    f"{name} has {len(ids)} tokens{virtual}, which leaves no room to generate in "
                    f"max_seq_len {self.max_seq_len}: shorten it or raise --max_seq_len"
                )

    def _generate_batch(
        self,
        batch: list[list[int]],
        max_gen_len: int,
        temperature: float,
        top_p: float,
        generator: torch.Generator,
    ) -> list[list[int]]:
        lengths = [self.num_virtual_tokens + len(ids) for ids in batch]
        limits = [min(max_gen_len, self.max_seq_len - length) for length in lengths]
        cache = KVCache(self.model, len(batch), max(map(sum, zip(lengths, limits))))
        continuations: list[list[int]] = [[] for _ in batch]
        done = [False] * len(batch)
        clock = parallel.Stopwatch(self.device)
        logits = self._prefill(batch, lengths, cache)
        self.timing.prompt_seconds += clock.lap()
        self.timing.prompt_tokens += sum(map(len, batch))
        while True:
            next_ids = choose(logits, temperature, top_p, generator)
            for row, token in enumerate(next_ids.tolist()):
                if done[row]:
                    continue
                if token in self.tokenizer.stop_ids:
                    done[row] = True
                else:
                    continuations[row].append(token)
                    done[row] = len(continuations[row]) == limits[row]
            if all(done):
                break
            logits = self._decode_one_token(next_ids, lengths, cache)
            # A finished row stays in the batch, at the place where it ended.
            lengths = [length + (not end) for length, end in zip(lengths, done)]
        self.timing.generated_seconds += clock.lap()
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
        ends = torch.tensor(lengths, device=self.device) - 1
        return self.model.gather_logits(h[cache.rows[:, 0], ends])

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
    memory, but for those that such a cut takes apart by columns.
    """
    rank, n = mpu.get_model_parallel_rank(), mpu.get_model_parallel_world_size()
    parts = [(rank, name) for name in ckpt.shapes]
    if ckpt.n != n:
        check_shard_count(ckpt.args, n, f"{ckpt.dir}: with {n} ranks running, it")
        parallel.say(
            f"{ckpt.dir}: {counted(ckpt.n, 'shard')}, cut for {counted(n, 'rank')} while loading; "
            f"to save that work: python split_model.py --ckpt_dir {ckpt.dir} --n {n}"
        )
        # Each rank reads of every shard, but one rank of a machine vouches for each part.
        parts = [(i, name) for i in range(ckpt.n) for name in ckpt.shapes][parallel.local_share()]
    for shard, name in parts:
        ckpt.check_part(shard, name)
    model = Transformer(ckpt.args)
    state = {
        name: ckpt.slice(name, rank, n).to(device, dtype or ckpt.dtype) for name in ckpt.shapes
    }
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def choose(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """The next id of each row, (bsz,): rank 0 chooses and tells the others, so none can drift."""
    next_ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    if mpu.get_model_parallel_rank() == 0:
        next_ids.copy_(sample(logits, temperature, top_p, generator))
    if mpu.get_model_parallel_world_size() > 1:
        dist.broadcast(next_ids, mpu.get_model_parallel_src_rank(), mpu.get_model_parallel_group())
    return next_ids


def sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> torch.Tensor:
    """One id a row of logits (bsz, vocab_size): the likeliest at temperature 0, else at random."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # From the greatest down, so that a temperature near 0 divides into no infinity.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probs, ids = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True)
    # A token stays while those before it do not yet sum to top_p: the first one always does.
    probs[probs.cumsum(dim=-1) - probs > top_p] = 0
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]


def check_sampling(max_gen_len: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Raise ValueError, naming the flag, for what generate cannot take."""
    parallel.check_at_least(1, max_gen_len=max_gen_len)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {top_p}")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, not {seed}")
