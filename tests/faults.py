"""Stop, kill and starve real runs on several ranks: each ends well, or says why and can go on.

PYTHONPATH=.:benchmarks python tests/faults.py [--only signals] [--n 100] [--seed 0] [--pause 60]
signals: to a rank or to torchrun, in each phase; disk (as root): full, read-only, taken away;
kills: of runs of ft_main.py, resumed until they end. Prints counts by outcome and what was seen of
each fault. Start reading at Faults; runs.py has what a run is.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import conftest
from conftest import REPO, hashes_of, make_ckpt
from runs import Job, Run, numbers, outcome, own_traceback, remount, same, small_disk

from llama import cli
from llama.prompts import SEPARATOR

ENDS = ("well", "fault", "missed")  # how a disturbed run may end; missed: it had ended before
PAGE = 4096
PHASES = {  # of each script, and the how many-th time each begins that the run is broken
    "example.py": {"starting": 1, "loading": 1, "prefill": 1, "decoding": 5},
    "ft_main.py": {"starting": 1, "loading": 1, "training": 7, "saving": 2, "final": 1},
    "split_model.py": {"starting": 1, "writing": 3},
    "convert_model.py": {"starting": 1, "writing": 3},
}
SIZES = {"dim": 32, "n_layers": 2, "n_kv_heads": 2}
TOKENIZER = conftest.TOKENIZERS["sentencepiece"][0]
OPTIONS = {
    "example.py": {"temperature": 0, "max_gen_len": 300, "max_seq_len": 1024},
    "ft_main.py": {
        **{"dataset_path": REPO / "datasets" / "short_answers.json", "max_seq_len": 64},
        **{"batch_size": 2, "num_virtual_tokens": 8, "lr": 1e-3, "max_steps": 12},
        **{"save_steps": 4, "logging_steps": 1, "val_set_size": 4, "eval_steps": 6},
    },
}


class Faults:
    """The jobs, what each leaves when nothing disturbs it, and the faults found."""

    def __init__(self, scratch: Path, seed: int, scripts: list[str]) -> None:
        self.scratch, self.scripts, self.choose = scratch, scripts, random.Random(seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.expected: dict[tuple, tuple] = {}
        for n in (1, 2, 4):
            make_ckpt(scratch / f"ckpt{n}", n=n, **SIZES)
            shutil.copy(TOKENIZER, scratch / f"ckpt{n}" / "tokenizer.model")
        conftest.hf_reference(**SIZES).save_pretrained(scratch / "hf")
        shutil.copy(TOKENIZER, scratch / "hf" / "tokenizer.model")
        prompts = [" ".join(map(str, range(j, j + 90))) for j in range(8)]
        (scratch / "prompts.txt").write_text("\n".join(prompts))

    def job(self, script: str, n: int | None = None, **changes: object) -> Job:
        """A job of a script over n ranks, with an output folder of its own."""
        flags = {"ckpt_dir": self.scratch / f"ckpt{n or 1}"}
        if script == "convert_model.py":
            flags = {"from": self.scratch / "hf"}
        elif script == "split_model.py":
            flags |= {"n": 4}
        else:
            flags |= {"tokenizer_path": TOKENIZER, **OPTIONS[script]} | changes
        if script == "example.py":
            return Job(script, n, flags | {"prompts_file": self.scratch / "prompts.txt"})
        return Job(script, n, flags).into(self.scratch / f"out{next(numbers)}")

    def undisturbed(self, job: Job) -> tuple:
        """What a job leaves when nothing disturbs it, its files, and how long it takes."""
        key = (job.script, job.n, job.flags.get("max_steps"))
        if key not in self.expected:
            alone = job.into(self.scratch / f"out{next(numbers)}") if job.out else job
            began = time.monotonic()
            run = Run(alone, self.scratch)
            if run.end() != 0:
                raise RuntimeError(f"an undisturbed run fails: {run.said()}")
            self.expected[key] = (outcome(run), alone.out, time.monotonic() - began)
        return self.expected[key]

    def count(self, what: str, run: Run, faults: list[str]) -> None:
        """Count how a disturbed run ended; print what was seen of a fault."""
        self.counts[what, "fault" if faults else "well"] += 1
        cli.say(f"{what}: {'fault' if faults else 'well'}")
        if faults:
            print(f"FAULT: {what}: {'; '.join(faults)}\n  {' '.join(run.command)}")
            print(f"  exit code {run.process.returncode}\n{run.said()[-3000:]}\n", flush=True)

    def wrong_end(self, run: Run) -> list[str]:
        """What is wrong with a run that was broken: in what it said, and left on the disk."""
        faults, said, text = [], run.said(), run.said("stdout")
        if run.process.returncode == 0:
            faults.append("exit code 0")
        if own_traceback(said):
            faults.append("a traceback")
        if len(re.findall("(?m)^error: ", said)) > 1:
            faults.append("more than one error line")
        if run.job.script == "example.py":
            expected = self.undisturbed(run.job)[0]["text"]
            whole = expected.startswith(text) and text.endswith(SEPARATOR)
            return faults + ["half a text on stdout"] * bool(text and not whole)
        if text and not same(outcome(run), self.undisturbed(run.job)[0]):
            faults.append("stdout says that it ended well")
        if run.job.script != "ft_main.py":
            if run.job.out.exists() and hashes_of(run.job.out) != self.undisturbed(run.job)[0]:
                faults.append("a folder that is not whole")
            return faults
        for checkpoint in run.job.out.glob("checkpoint-*"):
            hashes = hashes_of(checkpoint)
            hashes.pop("run.json")
            if json.loads((checkpoint / "run.json").read_text())["files"] != hashes:
                faults.append(f"{checkpoint} is not whole")
        return faults

    def wrong_rerun(self, job: Job) -> list[str]:
        """What is wrong when a broken job is done again: resumed, or begun anew."""
        if job.out and job.script != "ft_main.py" and job.out.exists():
            return []  # it was whole already
        resume = job.script == "ft_main.py"
        if not resume and job.out and any(job.out.glob("[!.]*")):
            return [f"not an empty folder: {os.listdir(job.out)}"]
        run = Run(job, self.scratch, **({"resume": True} if resume else {}))
        if run.end() != 0:
            return [f"it cannot be done again: {run.said()[-2000:]}"]
        return self.wrong_result(run)

    def wrong_result(self, run: Run) -> list[str]:
        """What is wrong with a run that ended well."""
        hidden = [str(path) for path in run.job.out.glob(".*")] if run.job.out else []
        right = same(outcome(run), self.undisturbed(run.job)[0])
        return ["another result"] * (not right) + [f"left behind: {hidden}"] * bool(hidden)

    def signals(self, pause: float) -> None:
        """Each signal to a rank, and to the process that was started, in each phase."""
        kills = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
        for script in self.scripts:
            ranks = (2, 4) if script in OPTIONS else (None,)
            all_of = [("rank", number) for number in (*kills, signal.SIGSTOP)]
            all_of += [("torchrun", number) for number in kills if script in OPTIONS]
            for phase, (to, number) in itertools.product(PHASES[script], all_of):
                job = self.job(script, self.choose.choice(ranks))
                rank = self.choose.randrange(job.n or 1)
                run, what = Run(job, self.scratch), f"{script} {phase} {to} {number.name}"
                run.wait_until(phase, PHASES[script][phase])
                run.wait_until("starting", rank=rank)
                time.sleep(self.choose.uniform(0, 2 if phase == "starting" else 0.02))
                if not run.send(number, None if to == "torchrun" else rank):
                    self.counts[what, "missed"] += 1
                elif number == signal.SIGSTOP:
                    time.sleep(pause)
                    run.send(signal.SIGCONT, rank)
                    failed = run.end() != 0
                    self.count(what, run, ["failed"] if failed else self.wrong_result(run))
                else:
                    faults = run.left_over() + self.wrong_end(run)
                    if phase in ("saving", "final", "writing"):
                        faults += self.wrong_rerun(job)
                    self.count(what, run, faults)

    def disk(self) -> None:
        """Too little room for each file, a disk that is read-only, a folder that is taken away."""
        for script in sorted({*self.scripts} - {"example.py"}):  # which writes no files
            job = self.job(script, 2 if script == "ft_main.py" else None)
            for name, room in rooms(self.undisturbed(job)[1]):
                with small_disk(self.scratch / "disk", room) as disk:
                    self.starve(f"{job.script} full at {name}", job.into(disk / "out"), disk)
            with small_disk(self.scratch / "disk") as disk:
                remount(disk, "ro")
                self.starve(f"{job.script} read-only", job.into(disk / "out"), disk)
        ways = {"read-only": lambda disk: remount(disk, "ro")}
        ways["removed"] = lambda disk: shutil.rmtree(disk / "out")
        for phase, n, way in itertools.product(("training", "final"), (2, 4), ways):
            if "ft_main.py" in self.scripts:
                with small_disk(self.scratch / "disk") as disk:
                    job = self.job("ft_main.py", n).into(disk / "out")
                    self.starve(f"ft_main.py {way} at {phase}", job, disk, phase, ways[way])

    def starve(
        self, what: str, job: Job, disk: Path, phase: str = "", way: Callable | None = None
    ) -> None:
        """A job on a disk that does not do: one line says so, and with a good disk it ends well."""
        run = Run(job, self.scratch)
        if way and run.wait_until(phase, PHASES[job.script][phase]):
            run.send(signal.SIGSTOP, 0)
            way(disk)
            run.send(signal.SIGCONT, 0)
        if run.end() == 0:  # nothing had to be written where there was no room
            self.count(what, run, self.wrong_result(run))
            return
        faults, errors = self.wrong_end(run), re.findall("(?m)^error: .*", run.said())
        if run.process.returncode != 1 or len(errors) != 1 or str(disk) not in errors[0]:
            faults.append(f"not one error line that names {disk}")
        elif "full" in what and "free" not in errors[0]:
            faults.append("the space left is not named")
        if job.out.exists() and (hidden := list(job.out.glob(".*"))) and "read-only" not in what:
            faults.append(f"left behind: {hidden}")
        remount(disk, "rw,size=1g")
        self.count(what, run, faults + self.wrong_rerun(job))

    def kills(self, n: int) -> None:
        """Kill ranks of ft_main.py at any moment, and resume, until so many kills were made."""
        long = {"max_steps": 300, "save_steps": 10, "logging_steps": 5, "eval_steps": 150}
        killed = 0
        while killed < n:
            job = self.job("ft_main.py", self.choose.choice((2, 4)), **long)
            seconds, ended = self.undisturbed(job)[2], False
            while not ended:
                run = Run(job, self.scratch, resume=True)
                rank = self.choose.randrange(job.n)
                until = time.monotonic() + self.choose.uniform(0, seconds)
                while time.monotonic() < until and run.process.poll() is None:
                    time.sleep(0.01)
                run.wait_until("starting", rank=rank)
                phase = (run.notes() or ["starting"])[-1]
                if killed < n and run.send(signal.SIGKILL, rank):
                    killed += 1
                    self.count(f"kill in {phase}", run, run.left_over() + self.wrong_end(run))
                else:
                    ended = True
                    failed = run.end() != 0
                    self.count("run to its end", run, ["failed"] * failed or self.wrong_result(run))


def rooms(whole: Path) -> Iterator[tuple[str, int]]:
    """For files of a folder, in the order of their writing, room for all but its last page.

    Of checkpoints those of the last.
    """
    checkpoints = sorted(whole.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
    used = 0
    for path in sorted(whole.rglob("*.*"), key=lambda path: path.stat().st_mtime_ns):
        if path.is_file():
            used += -(-path.stat().st_size // PAGE) * PAGE
            if path.parent not in checkpoints[:-1]:
                yield str(path.relative_to(whole)), max(PAGE, used - PAGE)


def main(
    only: str | None = None, script: str = "", n: int = 100, seed: int = 0, pause: float = 60
) -> int:
    """Break runs in every way; 1 if there was any fault.

    Args:
        only: signals, disk or kills; by default all.
        script: the one to break with signals or on a bad disk; by default all.
        n: how many kills.
        seed: of the ranks and moments that are drawn.
        pause: seconds for which a rank is stopped.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no disk is to be left
    with tempfile.TemporaryDirectory() as scratch:
        faults = Faults(Path(scratch), seed, [script] if script else list(PHASES))
        parts = {"signals": (pause,), "disk": (), "kills": (n,)}
        for name in [only] if only else parts:
            getattr(faults, name)(*parts[name])
    row = "{:50}{:>8}{:>8}{:>8}".format
    print(row("", *ENDS))
    for what in dict.fromkeys(what for what, _ in faults.counts):
        print(row(what, *(faults.counts[what, end] for end in ENDS)))
    return int(any(end == "fault" for _, end in faults.counts))


if __name__ == "__main__":
    sys.exit(main(**cli.parse_flags(main)))
