"""A signature as a command line, failures in one line, progress and memory: all without torch."""

import contextlib
import ctypes
import difflib
import inspect
import io
import math
import os
import re
import signal
import sys
import threading
import time
import traceback
import unicodedata
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_origin

import fire
from tqdm import tqdm

# Seconds that a silent rank waits before it exits: torchrun ends all ranks once one has exited, and
# the one that speaks needs time to.
SILENT_EXIT_DELAY = 5.0
LOST_PEER = (  # as gloo and nccl word it
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)
_RANK = int(os.environ.get("RANK", 0))  # as torchrun gives it, before there is a process group
_PARENT = os.getppid()
_mid_line = False  # whether a result on the terminal waits for its end


def run(main: Callable[..., None], options: type | None = None) -> None:
    """Run a script: main's signature is its command line, and a failure is one line.

    options: a dataclass, which takes the signature's place; main is then given one, as flags.
    What the user got wrong (ValueError, OSError) or the machine cannot give becomes one line on
    stderr and exit code 1. When ranks fail, whichever is first says so, and torchrun ends all.
    """
    end_with_torchrun()
    signal.signal(signal.SIGINT, _interrupt)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - to the end
    if sys.stdout is None:
        _fail("error: stdout is closed: give results a place to go", wait=False, speak=True)
    try:
        _run(main, options)
    except KeyboardInterrupt:  # at any moment: torch alone takes seconds to import
        _end_interrupted()


def _interrupt(_: int, frame: FrameType | None) -> NoReturn:
    """End as Python does at Ctrl-C, or at once where something is being imported.

    Then nothing is to be tidied, and a library might take the exception for its own.
    """
    while frame is not None:
        if "importlib" in frame.f_code.co_filename:
            _end_interrupted()
        frame = frame.f_back
    raise KeyboardInterrupt


def _end_interrupted() -> NoReturn:
    _fail("interrupted", wait=False, speak=_RANK == 0, code=130)


class Stopped(Exception):
    """A run that a signal ends in order: its text says how to go on, its code is as a shell's."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + number


@contextlib.contextmanager
def noting_signals(promise: str) -> Iterator[Callable[[], int]]:
    """Note Ctrl-C and SIGTERM, and go on, so that the body can end in order.

    Gives a function that tells the number of the signal that came, 0 for none. promise: what is
    said when it comes. One that comes more than a second later ends the program at once; before
    that it is the same one, which a terminal or SLURM sends to ranks, and torchrun once more.
    """
    noted, came_at = 0, 0.0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal noted, came_at
        if noted and time.monotonic() > came_at + 1:
            _fail("interrupted", wait=False, speak=_RANK == 0, code=128 + number)
        if not noted:
            noted, came_at = number, time.monotonic()
            if _RANK == 0:  # not print(), in the midst of which the signal may have come
                os.write(2, f"\n{promise}\n".encode())

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(main: Callable[..., None], options: type | None) -> None:
    try:
        flags = parse_flags(options or main)
        if options:
            flags = {"flags": options(**flags)}
    except (ValueError, OSError) as error:
        _fail(str(_explain(error)), wait=_RANK > 0, speak=_RANK == 0)
    from llama import parallel  # here, so that help and a mistyped flag need no torch

    try:
        main(**flags)
        parallel.leave_together()
    except Stopped as stopped:
        say(str(stopped))
        parallel.leave_together()  # or torchrun might end rank 0 before it has spoken
        _fail("", wait=False, speak=False, code=stopped.code)
    except Exception as error:
        message = _explain(error)
        if message is None and parallel.world_size() == 1:
            raise
        _fail(message or traceback.format_exc(), *parallel.how_to_fail())


def end_with_torchrun() -> None:
    """Have this rank killed when torchrun is: or it would go on alone, and write."""
    if "RANK" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != _PARENT:  # it was killed before
            os._exit(1)


def _explain(error: Exception) -> str | None:
    """The line for a failure that is no fault of the program's; None for one that may be."""
    text = str(error)
    if isinstance(error, ValueError | OSError | ImportError):
        return f"error: {shown(text, 2000, ending=500)}"
    lines = text.splitlines() or ["in Python"]
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate" in text:
        return (
            f"error: out of memory ({lines[0]}); lower the batch size or --max_seq_len, take "
            "--dtype bfloat16, --quantize int8 or more ranks, in training --gradient_checkpointing"
        )
    if isinstance(error, RuntimeError) and any(sign in text for sign in LOST_PEER):
        return (
            "error: another rank ended before its time, so this run cannot go on; torchrun's "
            f"report below says which ({lines[-1].strip()})"
        )
    return None


def _fail(message: str, wait: bool, speak: bool, code: int = 1) -> NoReturn:
    """End with an exit code, after waiting for a rank that speaks, or saying why, or both."""
    if wait:
        time.sleep(SILENT_EXIT_DELAY)
    if speak:
        clear = "\r\x1b[2K" if sys.stderr.isatty() else ""  # of a bar, which may be another rank's
        print("\n" if _mid_line else clear, message, sep="", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # whoever read it may be gone
        sys.stdout.flush()
    os._exit(code)  # not sys.exit: the process group's threads may wait for ranks that are gone


def parse_flags(main: Callable[..., None]) -> dict:
    """What the command line gives for main's parameters, each of its parameter's type.

    --from means the parameter from_, since Python keeps that word for itself. Raises ValueError
    for a flag that is unknown, lacks its value or has one of another type, and for one too few.
    """
    parameters = inspect.signature(main).parameters
    if {"--help", "-h"} & set(sys.argv[1:]):
        _show_help(main, parameters)
    names = {name.rstrip("_"): name for name in parameters}
    flags: dict[str, Any] = {}
    waiting = deque(sys.argv[1:])
    while waiting:
        flag, equals, value = waiting.popleft().partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in names:
            close = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean --{close[0]}?" if close else "see --help"
            raise ValueError(f"no flag {flag}; {hint}")
        follows = waiting[0] if waiting else "--"
        if not equals and parameters[names[name]].annotation is bool:
            value = waiting.popleft() if follows in ("True", "False") else "True"
        elif not equals:
            if follows.startswith("--"):
                raise ValueError(f"--{name} needs a value; see --help")
            value = waiting.popleft()
        parsed: Any = _value(parameters[names[name]], value)
        if get_origin(parameters[names[name]].annotation) is list:  # may be given several times
            parsed = [*flags.get(names[name], []), parsed]
        flags[names[name]] = parsed
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in flags:
            raise ValueError(f"--{name.rstrip('_')} is needed; see --help")
    return flags


def _value(parameter: inspect.Parameter, text: str) -> object:
    """The value of a flag, of its parameter's type."""
    kinds = getattr(parameter.annotation, "__args__", (parameter.annotation,))
    kind = next(kind for kind in kinds if kind is not type(None))
    with contextlib.suppress(ValueError, KeyError):
        return {"True": True, "False": False}[text] if kind is bool else kind(text)
    raise ValueError(f"--{parameter.name.rstrip('_')} wants {kind.__name__}, not {text!r}")


def _show_help(main: Callable[..., None], parameters: Mapping[str, inspect.Parameter]) -> NoReturn:
    """Print fire's page for main on stdout, once, without what fire says of itself."""

    def page_of(**_: object) -> None: ...

    # By their names alone, as they are taken here.
    by_name = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    by_name.sort(key=lambda p: p.default is not inspect.Parameter.empty)  # first what is needed
    by_name = [p.replace(default=[]) if get_origin(p.annotation) is list else p for p in by_name]
    page_of.__doc__ = main.__doc__
    page_of.__signature__ = inspect.Signature(by_name)  # type: ignore[attr-defined]  # fire reads it
    os.environ.setdefault("PAGER", "cat")
    page = io.StringIO()
    with contextlib.redirect_stderr(page), contextlib.suppress(SystemExit):
        fire.Fire(page_of, command=["--help"])
    lines = [line for line in page.getvalue().splitlines() if not line.startswith("INFO:")]
    text = re.sub(r"\b(from|FROM)_\b", r"\1", "\n".join(lines).strip())
    text = re.sub(r"(?m)^    -\w, --", "    --", text)
    text = re.sub(r"Optional\[(\w+)( \| None)?\]", r"\1", text)
    if _RANK == 0:
        print(text)
    else:
        time.sleep(SILENT_EXIT_DELAY)
    raise SystemExit(0)


def check_at_least(smallest: int, **values: float) -> None:
    """Raise ValueError, naming the flag, for a value below the smallest that makes sense."""
    for name, value in values.items():
        if not value >= smallest:  # and not <, which is false for NaN
            raise ValueError(f"--{name} must be at least {smallest}, not {value}")


def say(message: str) -> None:
    """Tell the user something that is not a result: on stderr, by rank 0 alone."""
    if _RANK == 0:
        with tqdm.external_write_mode(sys.stderr):  # above the bar, where there is one
            print(shown(message, 2000, ending=500), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a part of a result on stdout, by rank 0; a terminal gets no control characters."""
    global _mid_line
    if _RANK == 0:
        _mid_line = sys.stdout.isatty() and not text.endswith("\n")
        if sys.stdout.isatty():  # which would obey what a model writes
            text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
        with tqdm.external_write_mode():  # above the bar, where there is one
            print(text, end="", flush=True)


def show_bars() -> bool:
    """Whether progress bars belong on this rank's stderr."""
    return _RANK == 0 and sys.stderr.isatty()


def progress_bar(
    what: str,
    total: int | None = None,
    unit: str = "B",
    done: int = 0,
    items: Iterable | None = None,
) -> tqdm:
    """A bar of the work that is done, with rate and time left, where bars belong.

    Call its update(), or go through it for items. It is taken away when the work ends.
    """
    size = None
    with contextlib.suppress(OSError, ValueError):  # where there is no terminal
        size = os.get_terminal_size(sys.stderr.fileno())
    # One that does not know its size, as in containers: tqdm would draw nothing.
    fit = {"ncols": 80, "nrows": 24} if size == (0, 0) else {"dynamic_ncols": True}
    return tqdm(
        iterable=items,
        desc=what,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        initial=done,
        leave=False,
        disable=not show_bars(),
        **fit,
    )


def counted(n: int, noun: str) -> str:
    """A number of things: 1 shard, 2 shards."""
    return f"{n} {noun}{'s' * (n != 1)}"


def first_few(items: Sequence[str], sep: str = ", ", longest: int = 200) -> str:
    """The first few of many items, with the number of the others, for one line of a message."""
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return sep.join(shown(item, longest) for item in items[:4]) + more


def mended(text: str) -> str:
    """A text with U+FFFD for halves of surrogate pairs, which are no characters.

    They come from cut JSON escapes, and from bytes on the command line that are no UTF-8.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def shown(text: str, longest: int = 200, ending: int = 0) -> str:
    """A text that may be a file's, fit for a message: one line, no terminal codes, not too long.

    Of one that is too long, the middle is left out; ending is how much of it stays at the end.
    """
    if len(text) > longest:
        text = f"{text[: longest - ending]}…{text[len(text) - ending :]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# Seconds in which this process ran: one that is stopped, as by Ctrl-Z, is not late for it.
_seconds = 0
_deadline: list = [math.inf, ""]  # of these, and what is then said
_watch = threading.Thread()  # one for all texts: a Timer each takes longer than most texts do


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the program, saying why, if the body takes too long: for what nothing can interrupt.

    The body must let other threads run.
    """
    global _watch
    if not _watch.is_alive():
        _watch = threading.Thread(target=_end_when_time_is_up, daemon=True)
        _watch.start()
    _deadline[:] = _seconds + seconds, message
    try:
        yield
    finally:
        _deadline[0] = math.inf


def _end_when_time_is_up() -> None:
    global _seconds
    while _seconds <= _deadline[0]:
        time.sleep(1)
        _seconds += 1
    from llama import parallel

    _fail(f"error: {_deadline[1]}", *parallel.how_to_fail())


@contextlib.contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Make a MemoryError of what asks for so much more memory than the process has (on Linux)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError, ValueError):  # where there is no such file, or a lower limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class MemoryWatch:
    """Follow the peak of a process's anonymous resident memory, in bytes; no mapped files.

    Pages of a mapped file are the kernel's to drop, so they are no memory that the process needs.
    It watches until nothing refers to it any more.
    """

    def __init__(self, pid: int | str = "self", interval: float = 0.01) -> None:
        self.peak = 0
        follow = weakref.ref(self), Path(f"/proc/{pid}/status"), interval
        threading.Thread(target=_follow_memory, args=follow, daemon=True).start()


def _follow_memory(watch: weakref.ref[MemoryWatch], status: Path, interval: float) -> None:
    with contextlib.suppress(OSError):  # the file is empty or gone when the process is
        while found := re.search(r"RssAnon:\s+(\d+) kB", status.read_text()):
            if not (followed := watch()):
                break
            followed.peak = max(followed.peak, int(found[1]) * 1024)
            del followed  # which would keep it alive
            time.sleep(interval)
