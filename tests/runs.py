"""A run of a script as a user starts it, followed through its phases; what it leaves; small disks.

Start reading at Run.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import REPO, command_of, flags_of, hashes_of

SECONDS_TO_END = 10  # after a signal
HANG = 300  # seconds after which a run is taken to hang
numbers = itertools.count()


@dataclass
class Job:
    """What a user asks for: a script with its flags, on n ranks (None: without torchrun)."""

    script: str
    n: int | None
    flags: dict
    out: Path | None = None  # the folder that is written, if any

    def into(self, out: Path) -> "Job":
        """The same job with another output folder."""
        name = "output_dir" if self.script == "ft_main.py" else "out_dir"
        return Job(self.script, self.n, self.flags | {name: out}, out)


class Run:
    """A run of a job, started in processes of its own, which note their phases in a folder."""

    def __init__(self, job: Job, scratch: Path, **more: object) -> None:
        self.job, self.folder = job, scratch / f"run{next(numbers)}"
        self.folder.mkdir()
        flags = [REPO / job.script, *flags_of(**job.flags, **more)]
        self.command = command_of("tests/marked.py", self.folder, *flags, n=job.n)
        paths = f"{REPO}:{os.environ.get('PYTHONPATH', '')}"
        env = os.environ | {"PYTHONPATH": paths, "FAULTS_RUN": str(self.folder)}
        with (self.folder / "stdout").open("w") as out, (self.folder / "stderr").open("w") as err:
            pipes = {"stdout": out, "stderr": err}
            self.hangs_at = time.monotonic() + HANG
            self.process = subprocess.Popen(self.command, cwd=REPO, env=env, **pipes)

    def said(self, stream: str = "stderr") -> str:
        """What all ranks and torchrun have said on a stream."""
        return (self.folder / stream).read_bytes().decode(errors="replace")

    def notes(self, rank: int | str = 0) -> list[str]:
        """The process id of a rank and the phases that it began."""
        path = self.folder / str(rank)
        return path.read_text().splitlines() if path.exists() else []

    def wait_until(self, phase: str, times: int = 1, rank: int = 0) -> bool:
        """Wait until a rank begins a phase, so many times; False if the run ends before."""
        while self.notes(rank).count(phase) < times:
            if self.process.poll() is not None or time.monotonic() > self.hangs_at:
                return False
            time.sleep(0.001)
        return True

    def pid(self, rank: int | str | None) -> int:
        """The process id of a rank, or with None of the process that was started."""
        return self.process.pid if rank is None else int(self.notes(rank)[0])

    def processes(self) -> list[int]:
        """The processes of this run that are there, zombies left out."""
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"FAULTS_RUN={self.folder}\0".encode() in environment.read_bytes():
                    found.append(int(environment.parent.name))
        return found

    def end(self) -> int:
        """Wait for the end; the exit code, -9 for a run that hangs and is killed."""
        try:
            return self.process.wait(HANG)
        except subprocess.TimeoutExpired:
            self.left_over()
            return self.process.returncode

    def left_over(self) -> list[str]:
        """Wait until no process is left, and say so if there is one too late; then kill them."""
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = [path.name for path in self.folder.glob("[0-9]") if self.pid(path.name) in left]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()
        return [f"{len(left)} processes are left, of them ranks {ranks}"] * bool(left)

    def send(self, number: int, rank: int | None) -> bool:
        """Send a signal to a rank, or with None to the process that was started."""
        there = self.process.poll() is None and self.pid(rank) in self.processes()
        if there:
            os.kill(self.pid(rank), number)
        return there


def outcome(run: Run) -> dict:
    """What a whole run leaves behind: texts, the files of a checkpoint, or losses and prompt."""
    if run.job.script == "example.py":
        return {"text": run.said("stdout")}
    if run.job.script != "ft_main.py":
        return hashes_of(run.job.out)
    history = json.loads((run.job.out / "trainer_state.json").read_text())["log_history"]
    found = {"prompt": (run.job.out / "adapter_model.safetensors").read_bytes()}
    for kind, row in itertools.product(("loss", "eval_loss"), history):
        if kind in row and found.setdefault((kind, row["step"]), row[kind]) != row[kind]:
            found["two losses of one step"] = row
    return found


def same(found: dict, expected: dict) -> bool:
    """Whether two runs came to the same; one that was resumed has evaluated there once more."""
    more = [key for key in found.keys() - expected.keys() if key[0] != "eval_loss"]
    return not more and all(found.get(key) == expected[key] for key in expected)


def own_traceback(said: str) -> bool:
    """Whether there is a traceback that is not torchrun's own report."""
    pieces = said.split("Traceback (most recent call last)")[1:]
    return any("torch/distributed/run.py" not in piece for piece in pieces)


@contextlib.contextmanager
def small_disk(path: Path, room: int = 1 << 30) -> Iterator[Path]:
    """A disk of so many bytes, in memory."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def remount(disk: Path, options: str) -> None:
    """Give a disk other options."""
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)
