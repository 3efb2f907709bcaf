"""What each rank needs in memory, beside what it has: shown by --dry_run, checked when loading."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llama import parallel
from llama.checkpoint.weights import Source, cut_of, kind_of, valid_shard_counts
from llama.cli import counted, say
from llama.options import QUANTIZATIONS, dtype_name
from llama.plan import Plan

# What needs so much more than there is cannot run. The plan is the least: what glibc keeps of
# freed tensors came to a quarter more in tuning on CPUs (to give it back at once made it slow).
SURE = 1.05
ROOM = 1.25  # what is only to save time must leave as much as that
LEAST_TOKENS = 16  # of one row: the smallest work that is of use
DEFAULTS = (512, 32)  # LLaMA.build's max_seq_len and max_batch_size, which nobody chose


@dataclass(frozen=True)
class Free:
    """Bytes that each rank may still take, on its device and of the host's memory."""

    device: float
    host: float

    @classmethod
    def now(cls, device: torch.device) -> "Free":
        """The least that any rank has. Called by all ranks, before any of them loads."""
        host = free_host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        on_card = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
        return cls(*map(min, zip(*parallel.gather_objects((on_card, host)))))

    def holds(self, plan: Plan, room: float = 1) -> bool:
        """Whether a plan fits; room: so many times over, for what none counts."""
        return room * plan.total <= self.device and plan.pinned <= self.host


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


def check_tuning(plan: Plan, lengths: Sequence[int], n_learned: Sequence[int]) -> bool:
    """Raise ValueError, before anything is loaded, where the rows cannot be trained on.

    lengths, n_learned: the tokens that each row has, and those of them that are learned. Return
    whether FFNs are to be recomputed: there is too little memory to hold what they compute.

    The longest row comes in every epoch, and its batch is padded to it: that must fit, with as
    many learned tokens as rows have on average. If it would not with most of them, that is said.
    """
    if plan.n not in valid_shard_counts(plan.ckpt.args):
        return True  # which loading refuses
    free, bsz = Free.now(plan.device), min(plan.bsz, len(lengths))
    longest = plan.num_virtual_tokens + max(lengths)
    learned = sorted(n_learned)
    work = f"batches of {counted(bsz, 'row')} of {longest} tokens"
    usual = plan.but(bsz=bsz, seqlen=longest, learned=sum(learned) // len(learned))
    _refuse_unless(free, usual, work)
    most = usual.but(learned=math.ceil(sum(learned[-bsz:]) / bsz))
    if not free.holds(most):
        say(f"{plan.ckpt.path}: {_shortage(most, free, f'{work}, the most learned together,')}")
    return not free.holds(most.but(recompute_ffn=False), ROOM)


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
        each = " for each replica" * (parallel.n_replicas() > 1)
        found += [f"{counted(n, 'rank')}{each}" for n in more if possible(plan.but(n=n))][:1]
    return found


def _sizes(plan: Plan, fits: Callable[[Plan], bool]) -> Iterator[str]:
    """The largest batch, and the largest length, with which a plan fits."""
    least = LEAST_TOKENS + plan.num_virtual_tokens * plan.tuning
    with_loss = plan.tuning or plan.learned is not None
    flag = "--batch_size" if with_loss else "--max_batch_size"
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
    num_virtual_tokens: int = 64,
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
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_host_memory() / n
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


def free_host_memory(root: str = "/") -> float:
    """What this machine, and each control group that this process is in, still gives; or infinite.

    Pages of files count as free, since the kernel drops them when it needs the room.
    """
    found = [math.inf]
    meminfo = _numbers(Path(root, "proc/meminfo"))
    if "MemAvailable" in meminfo:
        found.append(1024 * meminfo["MemAvailable"])
    cgroups = Path(root, "proc/self/cgroup")
    for line in cgroups.read_text().splitlines() if cgroups.is_file() else ():
        _, kinds, place = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        # Version 1 has a tree for each kind, version 2 (no kinds) one for all.
        tree = Path(root, "sys/fs/cgroup", "memory" if kinds else "")
        limit, used = ("limit_in_bytes", "usage_in_bytes") if kinds else ("max", "current")
        own = tree / place.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(tree):
                break
            at_most, taken = (_number(folder / f"memory.{name}") for name in (limit, used))
            if at_most < math.inf:
                stat = _numbers(folder / "memory.stat")
                total = "total_" if kinds else ""  # with the groups below it
                files = sum(stat.get(f"{total}{x}_file", 0) for x in ("inactive", "active"))
                found.append(max(at_most - taken + files, 0))
    return min(found)


def _number(path: Path) -> float:
    """The number in a file; infinite for "max", and where there is no such file."""
    text = path.read_text().strip() if path.is_file() else "max"
    return int(text) if text.isdecimal() else math.inf


def _numbers(path: Path) -> dict[str, int]:
    """The names and numbers in a file's lines."""
    text = path.read_text() if path.is_file() else ""
    return {name: int(value) for name, value in re.findall(r"(?m)^([\w()]+):?\s+(\d+)", text)}
