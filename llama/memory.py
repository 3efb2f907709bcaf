"""What each rank needs in memory, beside what it has: shown by --dry_run, checked when loading."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama import parallel
from llama.batch import chunk_of
from llama.checkpoint.weights import (
    Source,
    bits_of,
    cut_of,
    kind_of,
    valid_shard_counts,
    weight_shapes,
)
from llama.cli import counted, say
from llama.layers import WIDENED_ROWS, computes
from llama.options import QUANTIZATIONS, dtype_name
from llama.quantize import GROUPS, group_bytes

# What needs so much more than there is cannot run. The plan is the least: what glibc keeps of
# freed tensors came to a quarter more in tuning on CPUs (to give it back at once made it slow).
SURE = 1.05
LEAST_TOKENS = 16  # of one row: the smallest work that is of use
DEFAULTS = (512, 32)  # LLaMA.build's max_seq_len and max_batch_size, which nobody chose
SAMPLED = 33  # bytes a logit at the peak of Sampler: five float32, ids, cumulated, compared


def weight_bytes(
    name: str, shape: Sequence[int], dtype: torch.dtype, quantize: str | None = None
) -> int:
    """The size in memory of a weight, or of a part of this shape; in dtype where not quantised.

    Raises ValueError for a part that does not divide into groups.
    """
    bits = bits_of(name, quantize) if quantize else 0
    if not bits:
        return math.prod(shape) * dtype.itemsize
    for group in GROUPS[bits]:
        if shape[1] % group == 0:
            return math.prod(shape) // group * group_bytes(bits, group)
    raise ValueError(
        f"--quantize {quantize}: {name} has {shape[1]} inputs a rank, which groups of "
        f"{GROUPS[bits][-1]} do not divide; take fewer ranks, or leave it out"
    )


@dataclass(frozen=True)
class Plan:
    """What each of n ranks needs, in bytes, to run bsz rows of seqlen tokens at once.

    seqlen: with num_virtual_tokens of a soft prompt. offload: layers whose
    matrices stay in host memory. learned: tokens of a row that have a loss in tuning; None: all.
    """

    ckpt: Source
    n: int
    dtype: torch.dtype
    bsz: int
    seqlen: int
    device: torch.device
    quantize: str | None = None
    offload: int = 0
    tuning: bool = False
    gradient_checkpointing: bool = False
    num_virtual_tokens: int = 0
    learned: int | None = None

    def _parts(self, name: str = "") -> Iterator[tuple[str, int]]:
        """Each weight whose name begins so, with the size of a rank's part of it."""
        ckpt = self.ckpt
        as_it_is = self.quantize == ckpt.quantize
        shapes = ckpt.shapes if as_it_is else weight_shapes(ckpt.args)  # of quantised ones bytes
        for found, shape in shapes.items():
            if found.startswith(name):
                part = cut_of(found, ckpt.args, self.n).shape(shape)
                size = math.prod(part) * ckpt.dtype_of(found, self.dtype).itemsize
                if not as_it_is:
                    size = weight_bytes(found, part, self.dtype, self.quantize)
                yield found, size

    @property
    def numbers(self) -> str:
        """What numbers the weights are of, for people."""
        dtype = dtype_name(self.dtype)
        return f"{self.quantize} and {dtype}" if self.quantize else dtype

    @property
    def mapped(self) -> int:
        """Of weights that stay files mapped into memory: the kernel drops and reads them again."""
        if self.device.type != "cpu":
            return 0
        stays = (
            size
            for name, size in self._parts()
            if not (self.quantize and bits_of(name, self.quantize))
            and self.ckpt.stays_mapped(name, self.n, self.dtype)
        )
        return sum(stays)

    @property
    def pinned(self) -> int:
        """Of weights that stay in host memory beside a card."""
        parts = self._parts("layers.0.")
        layer = sum(size for name, size in parts if kind_of(name).cut is not None)
        return self.offload * layer if self.device.type != "cpu" else 0

    @property
    def weights(self) -> int:
        """Of weights in the rank's own memory, with the two buffers through which others come."""
        buffers = 2 * self.pinned // max(self.offload, 1)
        return sum(size for _, size in self._parts()) - self.mapped - self.pinned + buffers

    @property
    def cache(self) -> int:
        """Of keys and values (KVCache); none in tuning."""
        args = self.ckpt.args
        kv_dim = args.n_local_kv_heads(self.n) * args.head_dim
        numbers = 2 * args.n_layers * self.bsz * self.seqlen * kv_dim
        return 0 if self.tuning else numbers * self.dtype.itemsize

    @property
    def soft_prompt(self) -> int:
        """Of the soft prompt, float32; in tuning with its gradient and AdamW's two means."""
        return (16 if self.tuning else 4) * self.num_virtual_tokens * self.ckpt.args.dim

    @property
    def activations(self) -> int:
        """Of what a prefill of all rows, or a step of tuning, holds at its peak beside all else.

        Counted from what Transformer allocates. Sizes: d, q, kv, f of a token's states, queries,
        keys and FFN on this rank, b bytes a number.
        """
        args, b = self.ckpt.args, self.dtype.itemsize
        positions = self.seqlen if self.tuning else min(self.seqlen, chunk_of(self.bsz))
        tokens = self.bsz * positions  # in one pass
        d, q, f = args.dim, args.q_dim // self.n, args.hidden_dim // self.n
        kv = args.n_local_kv_heads(self.n) * args.head_dim
        on_cpu = self.device.type == "cpu"
        # Products by way of float32, a few rows of the matrix at a time: see layers.linear().
        widened = on_cpu and not computes(self.dtype)  # attention too
        by_float = self.quantize is not None or widened
        # Keys and values: see attend().
        repeated = kv < q and (widened or b == 4 or positions < self.seqlen)
        block = 4 * WIDENED_ROWS * (tokens + f) if by_float else 0
        if not self.tuning:
            # Embeddings, the layer's input, the same after attention, normed; gate, up, silu, and
            # the product of both, or what it is multiplied to by way of float32.
            ffn = 4 * d * b + 4 * f * b
            if by_float:
                ffn = max(ffn, 5 * d * b + 3 * f * b + 4 * f)
            # Queries, keys, values; queries and keys together, in float32, turned, and as before.
            turned = b + 4 if b == 4 else b + 4 + 4 + b
            # Then the first are left, and what attend() repeats, and its output.
            looks = (q + 2 * q * self.seqlen // positions) * b * repeated
            attention = (3 * d + q + 2 * kv) * b + max((q + kv) * turned, looks)
            angles = 8 + 6 * args.head_dim  # positions, float32 angles, complex64 turns
            prefill = tokens * (angles + max(ffn, attention)) + block
            return max(prefill, self.bsz * args.vocab_size * SAMPLED)
        # RMSNorm on a CPU keeps its input in float32; a copy, where that is not what there is.
        normed = 4 if on_cpu else b
        # What autograd keeps of a layer: inputs of both norms; turned queries and keys, values,
        # attention's output and its float32 log-sums; gate, up, silu. Or the layer's input alone.
        attended = 2 * (q + (q if repeated else kv)) * (4 if widened else b)
        kept = 2 * d * normed + attended + 4 * q // args.head_dim + 3 * f * b
        recomputed = args.n_layers if self.gradient_checkpointing else self.offload
        layers = recomputed * d * b + (args.n_layers - recomputed) * kept
        embeddings = d * b if normed != b and not recomputed else 0
        # At the loss: the last norm's input and output, logits and their softmax in float32.
        of_row = self.seqlen - self.num_virtual_tokens
        learned = self.bsz * min(of_row if self.learned is None else self.learned, of_row)
        prompts = 4 * self.bsz * self.num_virtual_tokens * d  # PEFT's, one for each row
        logits = 2 * learned * args.vocab_size // self.n * 4
        loss = tokens * (d * normed + d * b) + logits + prompts
        # In the last layer's backward pass: the gradient of its output; of the product, and of
        # both that were multiplied, or of one by way of float32, in two halves of a sum.
        backward = tokens * (d * b + max(3 * f * b, 8 * f if by_float else 0)) + block
        if recomputed:
            backward += tokens * (kept - (d * b if normed == b else 0))
        forward = tokens * (4 * d * b + (f + d) * b + 4 * f) + block if by_float else 0
        return tokens * (layers + embeddings) + max(loss, backward, forward)

    @property
    def total(self) -> int:
        """All of it; mapped files and pinned host memory apart."""
        return self.weights + self.cache + self.activations + self.soft_prompt

    def but(self, **changes: Any) -> "Plan":
        """The same with changes."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Free:
    """Bytes that each rank may still take, on its device and of the host's memory."""

    device: float
    host: float

    @classmethod
    def now(cls, device: torch.device) -> "Free":
        """The least that any rank has. Called by all ranks, before any of them loads."""
        host = parallel.free_host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_card = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
        return cls(*map(min, zip(*parallel.gather_objects((on_card, host)))))

    def holds(self, plan: Plan) -> bool:
        """Whether a plan fits."""
        return plan.total <= self.device and plan.pinned <= self.host


def check_generation(full: Plan, chosen: bool) -> None:
    """Raise ValueError, before anything is loaded, where the weights leave no room to generate.

    A cache is made for each batch, as long as that needs: bsz prompts of seqlen tokens may never
    come. So only what cannot run at all is refused: the weights and one short prompt. If all of it
    does not fit, that is said, but only where somebody chose these numbers.
    """
    if full.n not in valid_shard_counts(full.ckpt.args):
        return  # which loading refuses
    free, path = Free.now(full.device), full.ckpt.path
    least = full.but(bsz=1, seqlen=min(full.seqlen, LEAST_TOKENS))
    _refuse_unless(free, least, "the weights and one short prompt")
    if least.mapped + least.total > free.device:
        say(
            f"{path}: {_mb(least.mapped)} MB of weights a rank stay in mapped files, and "
            f"{_mb(free.device)} MB are free: the rest is read from the disk at each token"
        )
    if chosen and not free.holds(full):
        work = f"{counted(full.bsz, 'prompt')} of {full.seqlen} tokens at once"
        say(f"{path}: {_shortage(full, free, work)}")


def check_tuning(plan: Plan, rows: Sequence[dict[str, torch.Tensor]]) -> None:
    """Raise ValueError, before anything is loaded, where the rows cannot be trained on.

    The longest row comes in every epoch, and its batch is padded to it: that must fit, with as
    many learned tokens as rows have on average. If it would not with most of them, that is said.
    """
    if plan.n not in valid_shard_counts(plan.ckpt.args):
        return  # which loading refuses
    free, bsz = Free.now(plan.device), min(plan.bsz, len(rows))
    longest = plan.num_virtual_tokens + max(len(row["input_ids"]) for row in rows)
    learned = sorted(int((row["labels"] >= 0).sum()) for row in rows)
    work = f"batches of {counted(bsz, 'row')} of {longest} tokens"
    usual = plan.but(bsz=bsz, seqlen=longest, learned=sum(learned) // len(rows))
    _refuse_unless(free, usual, work)
    most = usual.but(learned=math.ceil(sum(learned[-bsz:]) / bsz))
    if not free.holds(most):
        say(f"{plan.ckpt.path}: {_shortage(most, free, f'{work}, the most learned together,')}")


def _refuse_unless(free: Free, plan: Plan, work: str) -> None:
    if plan.total > SURE * free.device or plan.pinned > SURE * free.host:
        raise ValueError(f"{plan.ckpt.path}: {_shortage(plan, free, work)}")


def _shortage(plan: Plan, free: Free, work: str) -> str:
    """Tell what is needed and there, and what fits, found by trying it."""
    pinned = f", and {_mb(plan.pinned)} of {_mb(free.host)} of the host's" if plan.pinned else ""
    ways = " or ".join(ways_to_fit(plan, free.holds))
    fitting = f"what fits: {ways}" if ways else "nothing makes it fit: take a smaller model"
    return (
        f"{work} in {plan.numbers} need {_mb(plan.total)} MB on each of "
        f"{counted(plan.n, 'rank')} (weights {_mb(plan.weights)}, cache {_mb(plan.cache)}, "
        f"activations {_mb(plan.activations)}), and {_mb(free.device)} are free{pinned}; {fitting}"
    )


def ways_to_fit(plan: Plan, fits: Callable[[Plan], bool]) -> list[str]:
    """The flags with which a plan fits: each alone, else the fewest together; and more ranks."""

    def possible(plan: Plan) -> bool:
        with contextlib.suppress(ValueError):  # a quantisation whose groups do not divide
            return fits(plan)
        return False

    found = [*_sizes(plan, possible), *_others(plan, possible)]
    together, flags = plan, ""
    for flag, change in _savings(plan) if not found else ():
        together, flags = together.but(**change), f"{flags} {flag}".strip()
        found = [flags] * possible(together)
        found += [f"{flags} {size}" for size in _sizes(together, possible) if not found]
        if found:
            break
    if plan.device.type != "cpu":  # on a CPU, ranks share what there is
        more = (n for n in valid_shard_counts(plan.ckpt.args) if n > plan.n)
        found += [counted(n, "rank") for n in more if possible(plan.but(n=n))][:1]
    return found


def _sizes(plan: Plan, fits: Callable[[Plan], bool]) -> Iterator[str]:
    """The largest batch, and the largest length, with which a plan fits."""
    least = LEAST_TOKENS + plan.num_virtual_tokens * plan.tuning
    flag = "--batch_size" if plan.tuning else "--max_batch_size"
    if bsz := _largest(1, plan.bsz - 1, lambda x: fits(plan.but(bsz=x))):
        yield f"{flag} {bsz}"
    if seqlen := _largest(least, plan.seqlen - 1, lambda x: fits(plan.but(seqlen=x))):
        yield f"--max_seq_len {seqlen}"


def _largest(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The largest of low to high that is good, where all below a good one are; 0 for none."""
    if low > high or not good(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def _others(plan: Plan, fits: Callable[[Plan], bool]) -> Iterator[str]:
    """Other flags with which a plan fits: of several of a kind the one that changes least."""
    if plan.tuning and fits(plan.but(gradient_checkpointing=True)):
        yield "--gradient_checkpointing"
    if plan.quantize is None:
        dtypes = [x for x in (plan.ckpt.dtype, torch.bfloat16) if x.itemsize < plan.dtype.itemsize]
        named = [(f"--dtype {dtype_name(x)}", {"dtype": x}) for x in dtypes]
        for kind in (named, [(f"--quantize {x}", {"quantize": x}) for x in QUANTIZATIONS]):
            yield from [flag for flag, change in kind if fits(plan.but(**change))][:1]
    if plan.device.type != "cpu":
        more = range(plan.offload + 1, plan.ckpt.args.n_layers + 1)
        yield from [f"--offload {x}" for x in more if fits(plan.but(offload=x))][:1]


def _savings(plan: Plan) -> Iterator[tuple[str, dict]]:
    """All that saves memory, to be taken together: first what costs least."""
    if plan.tuning:
        yield "--gradient_checkpointing", {"gradient_checkpointing": True}
    if plan.device.type != "cpu":
        yield f"--offload {plan.ckpt.args.n_layers}", {"offload": plan.ckpt.args.n_layers}
    if plan.quantize is None:
        yield "--quantize int4", {"quantize": "int4"}


def table(
    ckpt: Source,
    n: int,
    dtype: torch.dtype | None,
    max_seq_len: int,
    max_batch_size: int,
    num_virtual_tokens: int = 32,
) -> str:
    """A table of what cutting into n would write, and of what each rank then needs to run."""
    args, dtype = ckpt.args, dtype or ckpt.dtype
    ckpt.check_cut(n, str(ckpt.path))
    kinds: dict[str, list[str]] = {}
    for name in ckpt.shapes:
        kinds.setdefault(kind_of(name).meta, []).append(name)
    row = "{:15}  {:>6}  {:>16}  {:>16}  {:>16}  {:>18}".format
    lines = [row("weight", "count", "whole", f"in each of {ckpt.n}", f"of {n}", "bytes in a shard")]
    weights = 0
    for kind, names in kinds.items():
        whole = ckpt.shapes[names[0]]  # of quantised weights bytes
        before, after = ckpt.cut_here(names[0]).shape(whole), cut_of(names[0], args, n).shape(whole)
        size = len(names) * math.prod(after) * ckpt.dtype_of(names[0], dtype).itemsize
        weights += size
        shapes = (" x ".join(map(str, shape)) for shape in (whole, before, after))
        lines.append(row(kind, len(names), *shapes, f"{size:,}"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Plan(ckpt, n, dtype, max_batch_size, max_seq_len, device, ckpt.quantize)
    of = f"{counted(n, 'shard')} of {weights:,} bytes, {n * weights:,} in all, in {run.numbers}"
    tuning = run.but(tuning=True, num_virtual_tokens=min(num_virtual_tokens, max_seq_len))
    plans = [run, tuning, tuning.but(gradient_checkpointing=True)]
    row = "{:30}  {:>14}  {:>14}  {:>24}".format
    each = f"each of {counted(n, 'rank')} needs, in MB"
    lines += [of, "", row(each, "generation", "tuning", "--gradient_checkpointing")]
    needs = {
        "weights": [plan.weights + plan.mapped for plan in plans],
        "KV cache": [plan.cache for plan in plans],
        "activations": [plan.activations for plan in plans],
        "soft prompt": [plan.soft_prompt for plan in plans],
    }
    needs["in all"] = [sum(of_one) for of_one in zip(*needs.values())]
    lines += [row(name, *map(_mb, of_each)) for name, of_each in needs.items()]
    free = (
        torch.cuda.mem_get_info()[0] if device.type == "cuda" else parallel.free_host_memory() / n
    )
    lines.append(row("free here for each", *[_mb(free)] * 3))
    work = f"{max_batch_size} rows of {max_seq_len} tokens at once"
    lines.append(f"for {work}; tuning: a prompt of {tuning.num_virtual_tokens}, all others learned")
    if ckpt.quantize is None:
        lines.append(
            "on a CPU the weights of such a folder stay mapped files, which take no memory"
        )
    return "\n".join(lines)


def _mb(n_bytes: float) -> str:
    """A size in megabytes, for people."""
    return f"{n_bytes / 1e6:,.0f}"
