"""The ranks of a run: groups, device, backend, what they tell each other, how they end.

A model is split over ranks that follow each other: over all, or over so many as --tensor_parallel
says. Then there are several models, the replicas. rank() and world_size() count the ranks of the
run, model_rank() and model_size() those of one model, replica() and n_replicas() the models.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu

_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)

PATIENCE = timedelta(minutes=1)  # after which a rank that waits says for what
FOREVER = timedelta(days=365)  # where a rank that ends is noticed otherwise: torchrun ends all

_device: torch.device | None = None
_store: dist.Store | None = None
_data_group: dist.ProcessGroup | None = None  # of the ranks with the same part, if several have
_n_given = 0  # what from_rank_0() has given so far
_n_merged = 0  # how often merged() was called
_n_met = 0  # how often ranks have met


def setup(tensor_parallel: int | None = None) -> torch.device:
    """Join torchrun's process group, or make one of a single rank; return this rank's device.

    nccl and one card a rank where there are cards, else gloo on the CPU. tensor_parallel: the ranks
    that one model is split over; None: all. A second call changes nothing. Before anything that may
    ask for cards is imported, as transformers and PEFT are.
    Raises ValueError when a node has fewer cards than ranks, or only some have any, for ranks that
    cannot be shared out so, and for a network that gloo is to use and that is not there.
    """
    global _device, _store
    size = world_size()
    if tensor_parallel is not None and (tensor_parallel < 1 or size % tensor_parallel):
        divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(
            f"--tensor_parallel {tensor_parallel}: the number of ranks of this run, {size}, does "
            f"not divide by it; give one of {divisors}, or another --nproc_per_node to torchrun"
        )
    if _device is None:
        _device = _take_device()
        if "RANK" in os.environ:
            _store, rank, size = next(dist.rendezvous("env://"))
        else:
            _store, rank, size = dist.HashStore(), 0, 1
        _check_alike(_store, rank, size)
        backend = "nccl" if _device.type == "cuda" else "gloo"
        if backend == "gloo":
            _check_network()
        # Given the card, nccl connects now, and fails now.
        card = _device if _device.type == "cuda" else None
        group = {"store": _store, "rank": rank, "world_size": size, "timeout": _timeout()}
        dist.init_process_group(backend, device_id=card, **group)
        # gloo's threads must end before the interpreter does, or they abort it.
        atexit.register(leave)
        _make_groups(size, tensor_parallel or size)
    elif tensor_parallel not in (None, model_size()):
        raise ValueError(
            f"--tensor_parallel {tensor_parallel}: models have {model_size()} ranks in this run"
        )
    return _device


def _make_groups(size: int, n: int) -> None:
    """Connect the n ranks of each model, and the ranks that have the same part of their models.

    fairscale's own set-up would connect the same ranks several times, and each rank with itself,
    and every nccl connection takes memory of a card.
    """
    global _data_group
    everyone = dist.group.WORLD
    mpu._MODEL_PARALLEL_GROUP = everyone
    if n == size:
        return
    models = [list(range(first, first + n)) for first in range(0, size, n)]
    same_part = [list(ranks) for ranks in zip(*models)]
    make, timeout = dist.new_subgroups_by_enumeration, _timeout()
    mpu._MODEL_PARALLEL_GROUP, _ = make(models, timeout=timeout)
    _data_group = everyone if n == 1 else make(same_part, timeout=timeout)[0]


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


def _check_network() -> None:
    """Raise ValueError where gloo is told to use a network that this machine does not have."""
    here = [name for _, name in socket.if_nameindex()]
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    if given and not set(given.split(",")) <= set(here):
        raise ValueError(
            f"GLOO_SOCKET_IFNAME={given}: {socket.gethostname()} has no such network; its networks "
            f"are {', '.join(here)}"
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
    global _data_group
    if dist.is_initialized():
        mpu._MODEL_PARALLEL_GROUP = _data_group = None
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


def model_size() -> int:
    """The number of ranks that each model is split over."""
    group = mpu._MODEL_PARALLEL_GROUP
    return world_size() if group is None else dist.get_world_size(group)


def model_rank() -> int:
    """Which of its model's ranks this one is."""
    return rank() % model_size()


def n_replicas() -> int:
    """The number of models."""
    return world_size() // model_size()


def replica() -> int:
    """Which of the models this rank belongs to."""
    return rank() // model_size()


def own_share() -> slice:
    """Of a list of things that the replicas share, those that this one does: every n-th."""
    return slice(replica(), None, n_replicas())


def reads_own_part_of(n: int) -> bool:
    """Whether a model's n ranks are on several machines: each then reads one of n shards alone."""
    return model_size() == n > int(os.environ.get("LOCAL_WORLD_SIZE", n))


def is_first_with_its_part() -> bool:
    """Whether no rank before this one on this machine has the same part of a model."""
    return int(os.environ.get("LOCAL_RANK", 0)) < model_size()


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


def check_same(value: object, message: str) -> None:
    """Raise ValueError with a message, on every rank, unless all of them have the same value."""
    if any(other != value for other in gather_objects(value)):
        raise ValueError(message)


def broadcast_in_model(x: torch.Tensor) -> None:
    """Give x, as the first rank of this model has it, to the others of them."""
    if model_size() > 1:
        dist.broadcast(x, group=mpu.get_model_parallel_group(), group_src=0)


def sum_over_replicas(x: torch.Tensor) -> torch.Tensor:
    """Add up x, which is contiguous, over the replicas, in place; return it."""
    if _data_group is not None:
        dist.all_reduce(x, group=_data_group)
    return x


def merged(n: int, own: Iterable[tuple[int, Any]]) -> Iterator[Any]:
    """Give n values, which JSON must hold, in their order, on every rank; each replica makes some.

    To be read to the end. own: this replica's, each with its place. They are made without waiting
    for the others; in between comes what has come so far, without a gap, of all. JSON runs no
    code: whoever reaches the store's port can write into it.
    """
    global _n_merged
    if _store is None or n_replicas() == 1:
        yield from (value for _, value in own)
        return
    _n_merged += 1
    keys, given = [f"llama/merged/{_n_merged}/{place}" for place in range(n)], 0
    for place, value in own:
        if model_rank() == 0:
            _store.set(keys[place], json.dumps(value))
        while given < n and _store.check([keys[given]]):
            yield json.loads(_store.get(keys[given]))
            given += 1
    for key in keys[given:]:
        _store.wait([key], FOREVER)
        yield json.loads(_store.get(key))


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
    _store.wait([key], FOREVER)  # a user may think for long
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


def memory_peaks(resident: int) -> str:
    """Tell each rank's peak of memory: that on its card, or the resident one that it gives."""
    allocated, reserved = device_peaks()
    ranks = gather_objects((allocated or resident, reserved))
    peaks, reserves = (", ".join(f"{size / 1e6:.0f}" for size in sizes) for sizes in zip(*ranks))
    on_cards = f" (allocated; reserved {reserves})" if reserved else ""
    return f"memory at most {peaks} MB by rank{on_cards}"
