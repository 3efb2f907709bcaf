"""The ranks of a run: process group, device and backend, one voice, orderly failure."""

import atexit
import collections
import contextlib
import ctypes
import difflib
import functools
import inspect
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

import fire
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu
from tqdm import tqdm

# torchrun ends all ranks as soon as one has failed: a rank with nothing to say lets the one that
# has something say it first.
SILENT_EXIT_DELAY = 5.0

LOST_PEER = (  # as gloo and nccl word it
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe"),
    "remote process exited",
)
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
    n_cards, n_here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if 0 < n_cards < n_here:
        raise ValueError(
            f"this machine shows {n_cards} cards, but {n_here} ranks want one each: "
            f"run torchrun with --nproc_per_node {n_cards}, or hide the cards with "
            "CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    if n_cards:
        # A rank that sees one card cannot take another's, whatever library it runs.
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_cards)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank]
        # The driver may have read the variable before: then all cards are still there. Only the
        # driver knows; torch.cuda.device_count() reads the variable anew.
        index = 0 if torch._C._cuda_getDeviceCount() == 1 else local_rank
        _device = torch.device("cuda", index)
        torch.cuda.set_device(_device)
    else:
        _device = torch.device("cpu")
    backend = "nccl" if _device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        _end_with_parent()
        _store, rank, size = next(dist.rendezvous("env://"))
    else:
        _store, rank, size = dist.HashStore(), 0, 1
    card = _device if _device.type == "cuda" else None  # known, nccl connects and fails early
    dist.init_process_group(backend, store=_store, rank=rank, world_size=size, device_id=card)
    # gloo's threads must end before the interpreter does, or they abort it.
    atexit.register(leave)
    mpu.print = lambda *_: None  # fairscale announces itself on stdout, where results belong
    mpu.initialize_model_parallel(size)
    return _device


def _end_with_parent() -> None:
    """Have this rank killed when torchrun is: or it would go on alone, and write."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


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


def check_at_least(smallest: int, **values: float) -> None:
    """Raise ValueError, naming the flag, for a value below the smallest that makes sense."""
    for name, value in values.items():
        if not value >= smallest:
            raise ValueError(f"--{name} must be at least {smallest}, not {value}")


def say(message: str) -> None:
    """Tell the user something that is not a result: on stderr, by rank 0 alone."""
    if rank() == 0:
        print(message, file=sys.stderr, flush=True)


def show_bars() -> bool:
    """Whether progress bars belong on this rank's stderr."""
    return rank() == 0 and sys.stderr.isatty()


def byte_bar(total: int) -> tqdm:
    """A bar of bytes done, where bars belong."""
    return tqdm(total=total, unit="B", unit_scale=True, disable=not show_bars())


def local_share() -> slice:
    """Of a list of things that each machine must do once, those that this rank does."""
    return slice(
        int(os.environ.get("LOCAL_RANK", 0)), None, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    )


@contextlib.contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 do something that leaves files, and then the others, who find them."""
    if rank():
        dist.barrier()
    yield
    if not rank():
        dist.barrier()


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

    What the user got wrong (ValueError, OSError) or the machine cannot give becomes one line on
    stderr and exit code 1.
    When a rank fails, whichever is first to know says so; torchrun then ends the others.
    """
    try:
        main(**_parse_flags(main))
        if dist.is_initialized():
            dist.barrier()
            leave()
    except SystemExit:  # the help is shown, on rank 0
        if rank():
            time.sleep(SILENT_EXIT_DELAY)
        raise
    except KeyboardInterrupt:
        say("interrupted")
        os._exit(130)
    except Exception as error:
        message = _explain(error)
        if message is None and world_size() == 1:
            raise
        _end_in_one_voice(message or traceback.format_exc())


def _explain(error: Exception) -> str | None:
    """The line for a failure that is no fault of the program's; None for one that may be."""
    text = str(error)
    if isinstance(error, ValueError | OSError | ImportError):
        return f"error: {text}"
    out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if out_of_memory or "can't allocate memory" in text:
        return (
            f"error: out of memory ({text.splitlines()[0] if text else 'in Python'}); lower "
            "the batch size or --max_seq_len, take --dtype bfloat16, use more ranks, or in "
            "training --gradient_checkpointing"
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST_PEER):
        return (
            "error: another rank ended before its time, so this run cannot go on; torchrun's "
            f"report below says which ({text.splitlines()[-1].strip()})"
        )
    return None


def _end_in_one_voice(message: str) -> None:
    if _store is not None:
        # torchrun's store outlives any rank, and tells which of several is the first.
        first = True
        with contextlib.suppress(dist.DistError):
            first = _store.add("llama/ended", 1) == 1
        speaks = first
    else:
        # Without the process group all ranks mostly meet the same error, and rank 0 says it. When
        # it does not, nothing ends the others while they wait.
        speaks = True
        if rank():
            time.sleep(SILENT_EXIT_DELAY)
    if speaks:
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

    if {"--help", "-h"} & set(sys.argv[1:]):
        _show_help(take, parameters)
    fire.Fire(take, command=_spell(sys.argv[1:], parameters))
    return {name: _typed(name, value, parameters[name].annotation) for name, value in given.items()}


def _show_help(main: Callable[..., None], parameters: Mapping[str, inspect.Parameter]) -> NoReturn:
    """fire's page for main, on stdout, as its flags are taken here: by their names alone."""
    os.environ.setdefault("PAGER", "cat")
    by_name = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    main.__signature__ = inspect.Signature(by_name)
    page = io.StringIO()
    with contextlib.redirect_stderr(page), contextlib.suppress(SystemExit):
        fire.Fire(main, command=["--help"])
    lines = [line for line in page.getvalue().splitlines() if not line.startswith("INFO:")]
    text = re.sub(r"\b(from|FROM)_\b", r"\1", "\n".join(lines).strip())  # see _spell
    text = re.sub(r"(?m)^    -\w, --", "    --", text)
    text = re.sub(r"Optional\[(\w+)( \| None)?\]", r"\1", text)
    if not rank():
        print(text)
    raise SystemExit(0)


def _spell(arguments: list[str], parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """The command line in fire's terms; raises ValueError for what is no flag or lacks its value.

    --from means the parameter from_, since Python keeps that word for itself; and the value of a
    text is quoted, or fire would make a number of the folder 1.10 and a tuple of "one, two".
    """
    flags = {name.rstrip("_"): name for name in parameters}
    spelt, given = [], set()
    waiting = collections.deque(arguments)
    while waiting:
        flag, equals, value = waiting.popleft().partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not flag.startswith("--") or name not in flags:
            close = difflib.get_close_matches(name, flags, 1)
            hint = f"did you mean --{close[0]}?" if close else "see --help"
            raise ValueError(f"no flag {flag}; {hint}")
        kinds = _allowed(parameters[flags[name]].annotation)
        if not equals:
            follows = waiting[0] if waiting else "--"
            if kinds == (bool,) and follows not in ("True", "False"):
                value = "True"
            elif follows.startswith("--"):
                raise ValueError(f"--{name} needs a value; see --help")
            else:
                value = waiting.popleft()
        spelt.append(f"--{flags[name]}={value!r}" if str in kinds else f"--{flags[name]}={value}")
        given.add(flags[name])
    for flag, name in flags.items():
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            raise ValueError(f"--{flag} is needed; see --help")
    return spelt


def _allowed(annotation: object) -> tuple[type, ...]:
    return getattr(annotation, "__args__", (annotation,))


def _typed(name: str, value: object, annotation: object) -> object:
    """The value of a flag, if it is of its parameter's type."""
    allowed = _allowed(annotation)
    if type(value) in allowed or (float in allowed and type(value) is int):
        return value
    kinds = " or ".join(t.__name__ for t in allowed if t is not type(None))
    raise ValueError(f"--{name.rstrip('_')} wants {kinds}, not {value!r}")
