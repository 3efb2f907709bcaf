"""The ranks of a run: process group, device, backend, what they tell each other, how they end."""

import atexit
import contextlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu

_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)

PATIENCE = timedelta(minutes=1)  # after which a rank that waits says for what

_device: torch.device | None = None
_store: dist.Store | None = None
_n_given = 0  # what from_rank_0() has given so far
_n_met = 0  # how often ranks have met


def setup() -> torch.device:
    """Join torchrun's process group, or make one of a single rank; return this rank's device.

    nccl and one card a rank where there are cards, else gloo on the CPU. A second call changes
    nothing. Before anything that may ask for cards is imported, as transformers and PEFT are.
    Raises ValueError when a node has fewer cards than ranks, or only some have any.
    """
    global _device, _store
    if _device is None:
        _device = _take_device()
        if "RANK" in os.environ:
            _store, rank, size = next(dist.rendezvous("env://"))
        else:
            _store, rank, size = dist.HashStore(), 0, 1
        _check_alike(_store, rank, size)
        backend = "nccl" if _device.type == "cuda" else "gloo"
        # Given the card, nccl connects now, and fails now.
        card = _device if _device.type == "cuda" else None
        group = {"store": _store, "rank": rank, "world_size": size, "timeout": _timeout()}
        dist.init_process_group(backend, device_id=card, **group)
        # gloo's threads must end before the interpreter does, or they abort it.
        atexit.register(leave)
        # All ranks are one model's. fairscale's own set-up would connect the same ranks once more,
        # and each rank with itself, and every nccl connection takes memory of a card.
        mpu._MODEL_PARALLEL_GROUP = dist.group.WORLD
    return _device


def _timeout() -> timedelta:
    """How long ranks wait for each other in a collective.

    nccl's own ten minutes are met by a large model on a slow disk. A rank that ends is noticed at
    once anyway.
    """
    given = os.environ.get("LLAMA_TIMEOUT_HOURS", "24")
    with contextlib.suppress(ValueError):
        if 0 < float(given) <= 1000:
            return timedelta(hours=float(given))
    raise ValueError(f"LLAMA_TIMEOUT_HOURS={given}: a number of hours, at most 1000, is wanted")


def _check_alike(store: dist.Store, rank: int, size: int) -> None:
    """Raise ValueError where some ranks found cards and others none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    found = "a card" if _device.type == "cuda" else "no card"  # type: ignore[union-attr]
    store.set(f"llama/found/{rank}", f"{found} ({socket.gethostname()}{why})")
    keys = [f"llama/found/{other}" for other in range(size)]
    try:
        store.wait(keys, PATIENCE)
    except dist.DistStoreError:
        _say_missing(store, keys, "to start")
        store.wait(keys, dist.default_pg_timeout)
    all_found = [store.get(key).decode() for key in keys]
    if len({text.split(" (")[0] for text in all_found}) > 1:
        each = "; ".join(f"rank {i}: {text}" for i, text in enumerate(all_found))
        raise ValueError(
            f"ranks on cards and on CPUs cannot work together. {each}. Give every machine as many "
            "cards as ranks, or hide all cards with CUDA_VISIBLE_DEVICES="
        )


def meet(what: str) -> None:
    """Wait for every rank, which is to do something that may take long; after a minute, say so."""
    global _n_met
    if _store is None or world_size() == 1:
        return
    _n_met += 1
    keys = [f"llama/met/{_n_met}/{i}" for i in range(world_size())]
    _store.set(keys[rank()], "")
    timer = threading.Timer(PATIENCE.total_seconds(), _say_missing, (_store, keys, what))
    timer.daemon = True
    timer.start()
    dist.barrier()  # and not the store, which would not notice a rank that ends
    timer.cancel()


def _say_missing(store: dist.Store, keys: list[str], what: str) -> None:
    """Say which ranks have not set their keys; one of those that have speaks."""
    missing = [i for i, key in enumerate(keys) if not store.check([key])]
    if missing and rank() == min(set(range(len(keys))) - set(missing)):
        names = ", ".join(map(str, missing))
        print(f"{socket.gethostname()}: waiting for rank {names} {what}", file=sys.stderr)


def _take_device() -> torch.device:
    """This rank's card, which is then the only one it sees; the CPU where there are none."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_cards, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if n_cards == 0:
        return torch.device("cpu")
    if n_cards < n_here:
        raise ValueError(
            f"this machine shows {n_cards} card{'s' * (n_cards > 1)}, but {n_here} ranks want one "
            f"each: run torchrun with --nproc_per_node {n_cards}, or hide the cards with "
            "CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    # A rank that sees one card cannot take another's, whatever library it runs.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_cards)))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]
    # The driver may have read the variable before: then all cards are still there. Only the
    # driver knows; torch.cuda.device_count() reads the variable anew.
    try:
        index = 0 if torch._C._cuda_getDeviceCount() == 1 else local_rank
        torch.cuda.set_device(index)
    except RuntimeError as error:  # too old a driver, a card that another program has for itself
        raise ValueError(
            f"{socket.gethostname()}: torch cannot use card {local_rank} of {n_cards}: "
            f"{str(error).splitlines()[0]}; nvidia-smi tells more. CUDA_VISIBLE_DEVICES= hides the "
            "cards, to run on the CPU"
        ) from error
    return torch.device("cuda", index)


def leave() -> None:
    """Leave the process group, if there is one; done at the end of every program that joined it."""
    if dist.is_initialized():
        mpu._MODEL_PARALLEL_GROUP = None
        dist.destroy_process_group()


def leave_together() -> None:
    """Wait until every rank is done, then leave."""
    if dist.is_initialized():
        dist.barrier()
        leave()


def how_to_fail() -> tuple[bool, bool]:
    """Whether this rank, which has failed, is to wait before it ends, and whether to say why.

    torchrun's store outlives any rank, and tells which of several failed first: that one speaks.
    Before setup() there is none. Then all ranks mostly meet the same error, and rank 0 speaks; the
    others wait, and speak only if nothing has ended them.
    """
    if _store is None:
        return rank() > 0, True
    first = True
    with contextlib.suppress(dist.DistError):
        first = _store.add("llama/failed", 1) == 1
    return not first, first


def hide_ranks() -> None:
    """Hide torchrun's variables, so that the Trainer and accelerate see one process of one card.

    They would take the ranks for data-parallel workers, give each other batches, and let DDP
    overwrite every shard with rank 0's. The process group stays as setup made it.
    """
    for name in list(os.environ):
        if name in _TORCHRUN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def rank() -> int:
    """This process's rank, known from torchrun even before the process group is."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of ranks that torchrun started, 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def reads_own_part_of(n: int) -> bool:
    """Whether n ranks run, on several machines: each then reads one of n shards alone."""
    return world_size() == n > int(os.environ.get("LOCAL_WORLD_SIZE", n))


def local_share() -> slice:
    """Of a list of things that each machine must do once, those that this rank does."""
    return slice(
        int(os.environ.get("LOCAL_RANK", 0)), None, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


def gather_objects(value: object) -> list:
    """Every rank's value, in the order of the ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(make: Callable[[], Any]) -> Any:
    """Call make() on rank 0 and give its value, which JSON must hold, or its ValueError, on all.

    However long that takes: a collective would give up waiting after some minutes, and a user may
    think for longer.
    """
    global _n_given
    if _store is None or world_size() == 1:
        return make()
    _n_given += 1
    key = f"llama/given/{_n_given}"
    if rank() == 0:
        try:
            given = {"value": make()}
        except ValueError as error:
            given = {"error": str(error)}
        _store.set(key, json.dumps(given))
    _store.wait([key], timedelta(days=365))  # of a user's thinking
    given = json.loads(_store.get(key))
    if "error" in given:
        raise ValueError(given["error"])
    return given["value"]


def now() -> float:
    """Seconds on a clock, read when the work given to this rank's device is done."""
    if _device is not None and _device.type == "cuda":
        torch.cuda.synchronize(_device)
    return time.perf_counter()


def device_peaks() -> tuple[int, int]:
    """The peaks of memory allocated and reserved on this rank's card, in bytes; 0 on a CPU."""
    if _device is None or _device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(_device), torch.cuda.max_memory_reserved(_device)


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
