"""The ranks of a run: process group, device and backend, one voice, orderly failure."""

import atexit
import contextlib
import functools
import inspect
import io
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import fire
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu

# torchrun ends all ranks as soon as one has failed: a rank with nothing to say lets the one that
# has something say it first.
SILENT_EXIT_DELAY = 5.0

_TORCHRUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)

_device: torch.device | None = None
_store: dist.Store | None = None


def setup() -> torch.device:
    """Join torchrun's process group, or make one of a single rank; return this rank's device.

    nccl and one card a rank where there are cards, else gloo on the CPU. A second call changes
    nothing. Raises ValueError when a node has fewer cards than ranks.
    """
    global _device, _store
    if _device is not None:
        return _device
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_cards = torch.cuda.device_count()
    if 0 < n_cards <= local_rank:
        raise ValueError(
            f"this machine shows {n_cards} cards, but rank {local_rank} wants one of its own: "
            f"run torchrun with --nproc_per_node {n_cards}, or hide the cards with "
            "CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if n_cards:
        # A rank that sees one card cannot take another's, whatever library it runs.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_cards)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]
        # The driver may have read the variable before: then all cards are still there.
        index = 0 if torch.cuda.device_count() == 1 else local_rank
        _device = torch.device("cuda", index)
        torch.cuda.set_device(_device)
    else:
        _device = torch.device("cpu")
    backend = "nccl" if _device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        _store, rank, size = next(dist.rendezvous("env://"))
    else:
        _store, rank, size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size)
    # gloo's threads must end before the interpreter does, or they abort it.
    atexit.register(leave)
    mpu.print = lambda *_: None  # fairscale announces itself on stdout, where results belong
    mpu.initialize_model_parallel(size)
    return _device


def leave() -> None:
    """Leave the process group, if there is one; done at the end of every program that joined it."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def stand_alone() -> None:
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


def say(message: str) -> None:
    """Tell the user something that is not a result: on stderr, by rank 0 alone."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def show_bars() -> bool:
    """Whether progress bars belong on this rank's stderr."""
    return rank() == 0 and sys.stderr.isatty()


def from_rank_0(value: object) -> object:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device)
    return box[0]


def gather_objects(value: object) -> list:
    """Every rank's value, in the order of the ranks, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Stopwatch:
    """Seconds since it was made or last read, the device's pending work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        last, self.last = getattr(self, "last", 0.0), time.perf_counter()
        return self.last - last


class MemoryWatch(threading.Thread):
    """Follows the peak of a process's anonymous resident memory, in bytes; no mapped files.

    Pages of a mapped file are the kernel's to drop, so they are no memory that the process needs.
    """

    def __init__(self, pid: int | str = "self", interval: float = 0.01) -> None:
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.interval = interval
        self.peak = 0
        self.start()

    def run(self) -> None:
        # The file is empty or gone when the process is.
        with contextlib.suppress(OSError):
            while found := re.search(r"RssAnon:\s+(\d+) kB", self.status.read_text()):
                self.peak = max(self.peak, int(found[1]) * 1024)
                time.sleep(self.interval)

    def device_peak(self) -> int:
        """The peak of this rank's card where there is one, else of its memory."""
        if _device is not None and _device.type == "cuda":
            return torch.cuda.max_memory_allocated(_device)
        return self.peak


def run(main: Callable[..., None]) -> None:
    """Run a script: its signature is its command line, and it ends in one voice.

    What the user got wrong (ValueError, OSError) becomes one line on stderr and exit code 1.
    When a rank fails, whichever is first to know says so; torchrun then ends the others.
    """
    try:
        main(**_parse_flags(main))
        if dist.is_initialized():
            dist.barrier()
            leave()
    except SystemExit:  # fire has answered, on rank 0
        if rank():
            time.sleep(SILENT_EXIT_DELAY)
        raise
    except (ValueError, OSError) as error:
        _end_in_one_voice(f"error: {error}")
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        _end_in_one_voice(
            "error: another rank ended before its time, so this run cannot go on; "
            "torchrun's report below says which"
        )


def _is_lost_peer(error: Exception) -> bool:
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL error")
    return any(sign in str(error) for sign in lost)


def _end_in_one_voice(message: str) -> None:
    # Before the process group all ranks meet the same error. After it, one may be alone with its
    # own; torchrun's store, which outlives any rank, tells who is first.
    first = rank() == 0
    if _store is not None:
        with contextlib.suppress(dist.DistError):
            first = _store.add("llama/ended", 1) == 1
    if first:
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(SILENT_EXIT_DELAY)
    sys.stdout.flush()
    os._exit(1)  # not sys.exit: the process group's threads may wait for ranks that are gone


def _parse_flags(main: Callable[..., None]) -> dict:
    """What fire reads from the command line for main's signature, before any work is done."""
    parameters = inspect.signature(main).parameters
    given: dict = {}

    @functools.wraps(main)
    def take(*args: object, **kwargs: object) -> None:
        given.update(inspect.signature(main).bind(*args, **kwargs).arguments)

    os.environ.setdefault("PAGER", "cat")
    # Every rank parses the same line; one of them answers a mistake in it.
    quiet = contextlib.redirect_stderr(io.StringIO()) if rank() else contextlib.nullcontext()
    with quiet:
        fire.Fire(take, command=[_spell(argument, parameters) for argument in sys.argv[1:]])
    return {name: _typed(name, value, parameters[name].annotation) for name, value in given.items()}


def _spell(argument: str, parameters: Mapping[str, inspect.Parameter]) -> str:
    """The flag --from means the parameter from_, since Python keeps the word for itself."""
    flag, equals, value = argument.partition("=")
    if flag.startswith("--") and f"{flag[2:]}_" in parameters:
        return f"{flag}_{equals}{value}"
    return argument


def _typed(name: str, value: object, wanted: type) -> object:
    """The value of a flag, if it is of its parameter's type; a folder may be named 7."""
    allowed = getattr(wanted, "__args__", (wanted,))
    if type(value) in allowed or (float in allowed and type(value) is int):
        return value
    if str in allowed and type(value) in (int, float):
        return str(value)
    kinds = " or ".join(t.__name__ for t in allowed if t is not type(None))
    raise ValueError(f"--{name.rstrip('_')} wants {kinds}, not {value!r}")
