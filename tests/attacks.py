"""Attack all that reads files: what comes out must be right, or an error of one line.

PYTHONPATH=.:benchmarks python tests/attacks.py --minutes 20 [--seed 0] [--only shard]
Small files are damaged over and over, each kind of victims.py in processes of its own, with 1 GB
more memory than they begin with. Prints counts by outcome, and keeps what failed in fuzz-failed/.
Start reading at attempt().
"""

import contextlib
import faulthandler
import fnmatch
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import REPO
from victims import HANG, KINDS, Files, Kind

from llama import cli, tokenizer

with contextlib.suppress(ImportError):  # once, and not by each process that is forked
    import llama.step  # noqa: F401

MEMORY = 1 << 30  # bytes of address space above what the process has when an attempt begins
FAULTS = ("traceback", "hang", "abort", "memory", "changed")
FAILED = REPO / "fuzz-failed"
KEPT = 3  # of the faults that look alike


def files_of(folder: Path) -> Files:
    """The content of the files in a folder, by their names."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def damaged(kind: Kind, name: str, seed: int, files: Files) -> Files:
    """The files of an attempt: one of them damaged, missing, or the copy of another."""
    choose, files = random.Random(f"{name} {seed}"), dict(files)
    target, ways = choose.choice(fnmatch.filter(files, kind.targets)), list(kind.ways)
    if choose.random() < 0.03 and not kind.named:
        files[target] = files[choose.choice(list(files))]
    elif choose.random() < 0.02 and not kind.named:
        del files[target]
    else:
        while ways:
            way = choose.choice(ways)
            try:
                files[target] = way(files[target], choose)
                break
            except (ValueError, LookupError, TypeError, OverflowError):  # no way for this content
                ways.remove(way)
    kind.finish(files)
    return files


CODE_RAN: list[str] = []


def forbid_code(event: str, arguments: tuple) -> None:
    """Stop at what code out of a file would have to do."""
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        CODE_RAN.append(f"{event} {arguments}")
        raise PermissionError(event)


def attempt(kind: Kind, folder: Path, files: Files, right: object) -> tuple[str, str]:
    """Read damaged files: the outcome, and why that is a fault if it is one."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        found = kind.read(folder)
        if kind.voucher in files and found != right:
            return "changed", f"{found}, not {right}"
        return "read", ""
    except subprocess.TimeoutExpired as error:
        return "hang", str(error)
    except BaseException as error:  # a panic of Rust's is no Exception
        why = traceback.format_exc()
        if CODE_RAN:
            return "traceback", f"code ran: {CODE_RAN.pop()}\n{why}"
        if out_of_memory(error):
            return "memory", why
        return (
            ("refused", "") if is_refusal(error, kind.named or str(folder)) else ("traceback", why)
        )


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory has run out, whatever was made of that later."""
    if error is None:
        return False
    ran_out = isinstance(error, MemoryError) or re.search("allocate|bad_alloc", str(error))
    return bool(ran_out) or out_of_memory(error.__context__)


def is_refusal(error: BaseException, name: str) -> bool:
    """Whether the user is told what is wrong, and where: in one line, fit for a terminal."""
    if not isinstance(error, ValueError | OSError):
        return False
    line = cli._explain(error)
    return name in line and line.isprintable() and len(line) < 3000


def prepare(kind: Kind, folder: Path, log: int, pipe: Connection) -> None:
    """Make the files of a kind, and read them as they are."""
    hush(log)
    folder.mkdir()
    kind.make(folder)
    files = files_of(folder)
    pipe.send((files, (kind.right or kind.read)(folder)))


def work(
    name: str, seeds: range, until: float, given: tuple, folder: Path, log: int, pipe: Connection
) -> None:
    """Make attempts, until the time is over, and tell of each before it begins and when it ends."""
    kind, (files, right) = KINDS[name], given
    hush(log)
    tokenizer.TIME_LIMIT = 3  # or hostile ones would take most of the time
    if kind.in_process:
        sys.addaudithook(forbid_code)
    for seed in seeds:
        pipe.send((seed, "", ""))
        changed = damaged(kind, name, seed, files)
        os.ftruncate(log, 0)
        if kind.in_process:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
        signal.alarm(HANG)
        outcome, why = attempt(kind, folder, changed, right)
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        pipe.send((seed, outcome, why))
        if time.monotonic() > until:
            break


def hush(log: int) -> None:
    """Have all that this process says in a file: where it was, too, when a signal ends it."""
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    warnings.simplefilter("ignore")
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)


class Attacks:
    """Attacks of one kind: their outcomes so far, and what failed.

    Made in processes that are forked: not where gloo runs, whose threads would be missing in them.
    """

    def __init__(self, name: str, scratch: Path) -> None:
        self.name, self.kind = name, KINDS[name]
        self.counts: Counter[str] = Counter()
        self.faults: dict[str, list[int]] = {}  # by what is said of them, the seeds
        self.folder = scratch / name.replace(" ", "_") / "files"
        self.folder.parent.mkdir()
        self.log = self.folder.with_name("log").open("ab")
        self.given = self._child(prepare, self.kind, self.folder)[0].recv()

    def _child(self, function: Callable, *arguments: object) -> tuple[Connection, BaseProcess]:
        """Run a function in a process; what it sends, and the process."""
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (*arguments, self.log.fileno(), theirs)
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        process.start()
        theirs.close()  # so that recv() ends when the process does
        return ours, process

    def run(self, seeds: range, seconds: float = math.inf) -> int:
        """Make attempts, for so long at the most; the seed after the last of them."""
        until, seed = time.monotonic() + seconds, seeds.start - 1
        while seed + 1 < seeds.stop and (seed < seeds.start or time.monotonic() < until):
            rest = range(seed + 1, seeds.stop)
            pipe, process = self._child(work, self.name, rest, until, self.given, self.folder)
            outcome = ""
            with contextlib.suppress(EOFError):
                while True:
                    seed, outcome, why = pipe.recv()
                    if outcome:
                        self._count(seed, outcome, why)
            process.join()
            if not outcome:  # it died in the midst of an attempt
                self._count(seed, self._how_it_died(process), f"exit code {process.exitcode}")
        return seed + 1

    def _how_it_died(self, process: BaseProcess) -> str:
        """The outcome of an attempt that ended its process."""
        said = self._said()
        if process.exitcode == -signal.SIGALRM:
            return "hang"
        if "memory allocation of" in said:  # as Rust says it
            return "memory"
        errors = re.findall("(?m)^error: .*", said)  # as cli.time_limit() says it
        named = len(errors) == 1 and (self.kind.named or str(self.folder)) in errors[0]
        return "refused" if process.exitcode == 1 and named else "abort"

    def _said(self) -> str:
        """What the processes said since the last attempt began."""
        return Path(self.log.name).read_text(errors="replace")[-20_000:]

    def _count(self, seed: int, outcome: str, why: str) -> None:
        """Count an outcome; keep the files and the reason of a fault."""
        self.counts[outcome] += 1
        if outcome not in FAULTS:
            return
        why = f"{why}\n{self._said()}"
        seeds = self.faults.setdefault(f"{outcome}: {gist(why)}", [])
        seeds.append(seed)
        if len(seeds) <= KEPT:
            kept = FAILED / f"{self.name}-{seed}"
            for name, content in damaged(self.kind, self.name, seed, self.given[0]).items():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (kept / name).write_bytes(content)
            (kept / "why.txt").write_text(f"{outcome}\n{why}", errors="replace")


def gist(why: str) -> str:
    """Of a traceback the place, in our code if any, and what was raised."""
    first, *rest = re.split("(?m)^.*most recent call first.*$", why, maxsplit=1)
    places = re.findall(r'File "(?:.*/)?([^"]+)", line (\d+)', why)
    ours = re.findall(r'File "[^"]*/(llama/[^"]+)", line (\d+)', why)
    place = (ours or places or [("?", "?")])[0 if rest else -1]
    raised = re.findall(r"(?m)^([\w.]*(?:Error|Exception|Expired)\w*)\b", first) or [
        first[:40].strip()
    ]
    return f"{raised[-1]} at {':'.join(place)}"


def main(minutes: float = 0.0, seed: int | None = None, only: str | None = None) -> int:
    """Attack all kinds by turns, with new seeds; 1 if there was any fault.

    Args:
        minutes: how long; by default one turn each, of as many attempts as `make test` makes.
        seed: where the seeds begin; by default anywhere.
        only: the one kind to attack.
    """
    first = random.randrange(10**9) if seed is None else seed
    print(f"seeds from {first}", flush=True)
    until = time.monotonic() + minutes * 60
    with tempfile.TemporaryDirectory() as scratch:
        attacks = [Attacks(name, Path(scratch)) for name in ([only] if only else KINDS)]
        if not minutes:
            for attack in attacks:
                attack.run(range(first, first + attack.kind.tries))
        following = dict.fromkeys(attacks, first)
        while time.monotonic() < until:
            for attack in attacks:
                seeds = range(following[attack], sys.maxsize)
                following[attack] = attack.run(seeds, attack.kind.seconds)
    total = sum((attack.counts for attack in attacks), Counter())
    outcomes = ("refused", "read", *FAULTS)
    row = "{:16}" + "{:>10}" * len(outcomes)
    print(row.format("kind", *outcomes))
    for name, counts in (*((x.name, x.counts) for x in attacks), (f"{total.total():,}", total)):
        print(row.format(name, *(counts[outcome] for outcome in outcomes)))
    for attack in attacks:
        for fault, seeds in attack.faults.items():
            few = ", ".join(map(str, seeds[:KEPT]))
            print(f"{attack.name}: {len(seeds)} times {fault}; seeds {few}")
    return int(any(total[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main(**cli.parse_flags(main)))
