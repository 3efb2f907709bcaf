"""Whether all of it works on the cards of this machine, and how fast: one report, to be sent.

make check-gpu PYTHON=python3                    # or python benchmarks/check_gpu.py: minutes
python benchmarks/check_gpu.py --only speed      # steps whose names begin so
python benchmarks/check_gpu.py --tiny            # on the CPU, with tiny sizes: two minutes

Nothing is fetched. Each step is a process of its own, with a limit of its own, and gpu-report.json
is written after each. Exit code 0: all steps passed; 1: some failed; 2: there is no card.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPO = Path(__file__).parent.parent
STEPS_PY = Path(__file__).parent / "gpu_steps.py"
NEEDS = {  # in turn, of those of requirements.txt, beside what torch and transformers bring
    "accelerate": "psutil",
    "datasets": "dill multiprocess pandas pyarrow xxhash",
    "fire": "termcolor",
    "gguf": "requests",
    "matplotlib": "contourpy cycler fonttools kiwisolver pillow pyparsing python-dateutil",
    "pandas": "python-dateutil tzdata",
    "prompt_toolkit": "wcwidth",
    "python-dateutil": "tzdata",
    "requests": "certifi charset-normalizer idna urllib3",
    "tiktoken": "requests",
}
TUNING = {  # of the small model; its tokens are bytes
    **{"max_steps": 6, "save_steps": 3, "logging_steps": 1, "warmup_steps": 1, "batch_size": 4},
    **{"method": "prompt", "lr": 1e-2, "num_virtual_tokens": 8, "max_seq_len": 320},
    "dtype": "float32",
}
# With larger weights, rounding grows from step to step. With these, losses moved by 3e-6 where the
# weights did by 1e-5, and by 0.03 where nothing was learned.
TUNED_STD = 0.1
LOSS_ERROR = 1e-4  # by which a loss in float32 may differ from the CPU's
SECONDS_TO_END = 60  # of all ranks, once one is killed
LOG_LINES = 100  # of a step that failed, kept in the report; torchrun's own take half of them

# Of what a step said and why it failed ("" if it did not): what it found, and why it failed.
Judge = Callable[[str, str], tuple[dict, str]]


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    outcome: str = "passed"  # or failed, or left out
    seconds: float = 0.0
    error: str = ""  # why it failed or was left out
    found: dict = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # its end, where it failed


@dataclass
class Step:
    """A script with its flags, run by so many ranks of torchrun (None: without it)."""

    name: str
    command: tuple
    judge: Judge
    ranks: int | None = None
    on_cpu: bool = False
    limit: float = 180  # seconds

    def run(self, log: Path) -> Outcome:
        """Run it to its end or its limit, and judge it."""
        began = time.monotonic()
        fault = self._run(log)
        seconds = round(time.monotonic() - began, 1)
        said = log.read_text(errors="replace")
        try:
            found, error = self.judge(said, fault)
        except (OSError, ValueError, KeyError) as broken:  # a file that is not what it should be
            found, error = {}, f"{fault or 'its result cannot be read'} ({broken!r})"
        if error:
            return Outcome(
                self.name, "failed", seconds, error, found, said.splitlines()[-LOG_LINES:]
            )
        reason = found.pop("left_out", "")
        return Outcome(self.name, "left out" if reason else "passed", seconds, reason, found)

    def _run(self, log: Path) -> str:
        """Run it: why it failed, in one line, or ""."""
        from bench import command_of, environment

        env = environment(self.ranks or 1) | {"OMP_NUM_THREADS": "1"}  # the model is small
        # TF32 is not float32: what a container may have set for it does not count here.
        env |= {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
        env |= {"CUDA_VISIBLE_DEVICES": ""} if self.on_cpu else {}
        command = command_of(*self.command, ranks=self.ranks)
        with log.open("w") as out:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            # In a session of its own: all of it can be ended then.
            process = subprocess.Popen(command, cwd=REPO, env=env, start_new_session=True, **pipes)
            try:
                code = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                return f"took longer than {self.limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # ranks end with their torchrun
                process.wait()
        return "" if code == 0 else why(log.read_text(errors="replace")) or f"exit code {code}"


def why(said: str) -> str:
    """The line that says why a program failed: ours, or else the first exception's."""
    from llama.cli import shown

    found = re.findall(r"(?m)^error: (.*)$", said)
    found += re.findall(r"(?m)^(?:\[rank\d+\]: )?(\w[\w.]*(?:Error|Exception)\b.*)$", said)
    return shown(found[0], 500) if found else ""


@dataclass
class Check:
    """The steps for so many cards, or on the CPU, and the folder for what they write."""

    folder: Path
    n_cards: int
    tiny: bool

    def steps(self) -> Iterator[Step]:
        """All steps, each made when those before it have ended."""
        from gpu_steps import SMALL, write_model

        from llama import ModelArgs
        from llama.checkpoint.weights import valid_shard_counts

        write_model(self.folder / "ckpt")
        write_model(self.folder / "ckpt_tuned", TUNED_STD)
        counts = [n for n in valid_shard_counts(ModelArgs(**SMALL)) if n <= self.n_cards]
        yield self.step("environment", "environment")
        yield self.step("roofline", "roofline")
        yield self.step("parity: CPU", "reference", on_cpu=True, limit=300)
        for n in counts:
            yield self.step(f"parity: {self.cards(n)}", "parity", ranks=n)
        yield self.tuning("tuning: CPU", on_cpu=True)
        yield self.tuning(f"tuning: {self.cards(1)}")
        yield self.tuning("tuning: checkpointing", gradient_checkpointing=True)
        half = f"checkpoint-{TUNING['save_steps']}"
        for path in self.folder.glob(f"tuning_CPU/{half}"):
            shutil.copytree(path, self.folder / "tuning_resumed" / half)
        yield self.tuning("tuning: resumed", resume=True)
        for n in counts[1:]:
            yield self.tuning(f"tuning: {self.cards(n)}", ranks=n)
        if counts[1:]:
            yield self.step("kill of a rank", "kill", ranks=2, judge=self.judge_kill)
        for size in ("tiny",) if self.tiny else ("1B", "7B"):
            yield self.step(f"speed: {size}", "speed", "--size", size, limit=240)

    def cards(self, n: int) -> str:
        """So many cards; on the CPU, so many ranks."""
        return f"{n} {'rank' if self.tiny else 'card'}{'s' * (n > 1)}"

    def step(
        self,
        name: str,
        work: str,
        *flags: object,
        judge: Judge | None = None,
        ranks: int | None = None,
        on_cpu: bool = False,
        limit: float = 180,
    ) -> Step:
        """One of gpu_steps.py, judged by its exit code if not otherwise."""
        result = self.folder / f"{name}.json"
        command = [STEPS_PY, "--step", work, "--folder", self.folder, "--result", result, *flags]

        def by_exit_code(_: str, fault: str) -> tuple[dict, str]:
            return json.loads(result.read_text()) if result.exists() else {}, fault

        command += ["--tiny"] * self.tiny
        on_cpu |= self.tiny
        return Step(name, tuple(command), judge or by_exit_code, ranks, on_cpu, limit)

    def tuning(
        self, name: str, ranks: int | None = None, on_cpu: bool = False, **more: object
    ) -> Step:
        """ft_main.py on the small model: its losses must be those of the CPU's run."""
        cpu, out = self.folder / "tuning_CPU", self.folder / name.replace(": ", "_")
        given = TUNING | {"ckpt_dir": self.folder / "ckpt_tuned", "output_dir": out} | more
        given["dataset_path"] = REPO / "datasets" / "short_answers.json"
        flags = [f"--{key}={value}" for key, value in given.items()]

        def by_losses(_: str, fault: str) -> tuple[dict, str]:
            return ({}, fault) if fault else compare_losses(losses_of(out), losses_of(cpu))

        return Step(name, (REPO / "ft_main.py", *flags), by_losses, ranks, on_cpu or self.tiny)

    def judge_kill(self, said: str, fault: str) -> tuple[dict, str]:
        """All ranks must end soon after one is killed, and say so in one line."""
        killed = self.folder / "killed"
        if not killed.exists():
            return {}, fault or "no rank was killed"
        seconds = time.time() - float(killed.read_text())
        ids = [path.read_text() for path in self.folder.glob("rank*")]
        left = [number for number in ids if Path("/proc", number).exists()]
        lines = re.findall(r"(?m)^error: .*$", said)
        found = {"seconds_to_end": round(seconds, 1), "lines": lines}
        if left or seconds > SECONDS_TO_END:
            return found, f"it took {seconds:.0f} s after the kill, and left {len(left)} ranks"
        told = fault and len(lines) <= 1 and "SIGKILL" in said  # the latter by torchrun
        return found, "" if told else f"not told once that a rank was killed: {lines}, {fault}"


def losses_of(folder: Path) -> dict[int, float]:
    """The losses of a tuning run, by their steps."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return {row["step"]: row["loss"] for row in state["log_history"] if "loss" in row}


def compare_losses(found: dict[int, float], expected: dict[int, float]) -> tuple[dict, str]:
    """How far losses are from those expected, and what is wrong with that."""
    if found.keys() != expected.keys():
        return {"losses": found}, f"losses of steps {list(found)}, not {list(expected)}"
    errors = [abs(found[step] / loss - 1) for step, loss in expected.items()]
    about = {"losses": found, "error": max(errors), "most": LOSS_ERROR}
    right = all(error <= LOSS_ERROR for error in errors)  # and not NaN
    return about, "" if right else f"losses differ by {max(errors):.2g}, above {LOSS_ERROR:g}"


def add_shares(found: dict, roofline: dict) -> None:
    """Add to each measure of speed how much of the device's bare copy or product it reaches."""
    product = roofline.get(found.get("dtype"))
    for about in found.get("measures", {}).values():
        work, roof = about.get("bytes"), roofline.get("copy")
        if work is None:
            work, roof = about.get("flop"), product
        if work and roof:
            about["share"] = work / roof / about["seconds"]


def lines_of(found: dict) -> Iterator[str]:
    """What a step found, for people."""
    if "cards" in found:
        for card in found["cards"]:
            reaches = f", reaches {card['reaches']}" if len(found["cards"]) > 1 else ""
            yield f"{card['name']}, {card['bytes'] / 1e9:.1f} GB{reaches}"
        known = {"driver": found.get("driver"), "CUDA": found["cuda"], "nccl": found.get("nccl")}
        versions = found["versions"] | {key: value for key, value in known.items() if value}
        yield f"{found['cpu']}, {found['cores']} cores"
        yield ", ".join(f"{key} {value}" for key, value in versions.items())
    if "copy" in found:
        products = [f"{key} {x / 1e12:.3g}" for key, x in found.items() if key != "copy"]
        yield f"copy {found['copy'] / 1e9:.4g} GB/s; products {', '.join(products)} TFLOP/s"
    for name, about in found.get("variants", {}).items():
        error = f"logits differ by {about['error']:.1e} (at most {about['most']:g})"
        yield f"{name}: {error}, {about['same_tokens']:.0%} of tokens the same"
    if "losses" in found:
        losses = ", ".join(f"{loss:.4f}" for loss in found["losses"].values())
        error = f"; differ by {found['error']:.1e} (at most {found['most']:g})"
        yield f"losses {losses}{error if 'error' in found else ''}"
    if "seconds_to_end" in found:
        yield f"all ended {found['seconds_to_end']} s after it"
    for name, about in found.get("measures", {}).items():
        yield f"{name}: {about.get('left_out') or measured(about)}"


def measured(about: dict) -> str:
    """A measure of speed, for people."""
    parts = [f"{about['rate']:.4g} {about['unit']}"]
    if "share" in about:
        of = "copy" if "bytes" in about else "product"
        parts.append(f"{about['share']:.0%} of the bare {of}")
    if about["allocated"]:
        ratio = about["allocated"] / about["planned"]
        parts.append(f"{about['allocated'] / 1e9:.2f} GB allocated, {ratio:.2f} of what is planned")
        parts.append(f"{about['reserved'] / 1e9:.2f} GB reserved")
    return ", ".join(parts)


def table_of(outcomes: list[Outcome]) -> str:
    """All steps in one Markdown table."""
    from table import table

    rows = []
    for x in outcomes:
        lines = [*([x.error] if x.error else []), *lines_of(x.found)] or [""]
        rows.append([x.step, x.outcome, f"{x.seconds:.0f}", lines[0]])
        rows += [["", "", "", line] for line in lines[1:]]
    return table(
        ["step", "outcome", "s", "found"], [[x.replace("|", "/") for x in r] for r in rows]
    )


def commit() -> str:
    """The commit that is checked out; "" where git does not tell."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(REPO), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def installed(name: str) -> bool:
    """Whether a package is there, by the name that pip has for it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


def missing() -> list[str]:
    """The packages of requirements.txt that are not installed, with what they need in turn."""
    lines = (REPO / "requirements.txt").read_text().splitlines()
    waiting = [re.split("[<>=]", line)[0] for line in lines if line and not line.startswith("#")]
    found: list[str] = []
    for name in waiting:  # which grows meanwhile
        if name not in found and not installed(name):
            found.append(name)
            waiting += NEEDS.get(name, "").split()
    return found


def how_to_install(names: list[str]) -> str:
    """What to do on this machine about packages that are not installed, in one line."""
    all_names = " ".join(names)
    return (
        f"error: {sys.executable} lacks packages. With a network: {sys.executable} -m pip install "
        f"-c constraints.txt {all_names}. Without one, on a machine that has one and Python "
        f"{platform.python_version()}: pip wheel --no-deps -c constraints.txt -w wheels "
        f"{all_names}. Then here, with that folder: {sys.executable} -m pip install --no-index "
        f"--find-links wheels {all_names}"
    )


def main(tiny: bool = False, only: str = "", report: str = "gpu-report.json") -> None:
    """Check the cards of this machine; print one table, and write a report.

    Args:
        tiny: run on the CPU, with 1 and 2 ranks and tiny sizes.
        only: steps, by their names or how those begin: environment, roofline, parity, tuning,
            kill, speed.
        report: the file to write.
    """
    import torch

    from llama import cli
    from llama.files import write_json, write_whole

    n_cards = 2 if tiny else torch.cuda.device_count()
    if n_cards == 0:
        print(f"no card that torch {torch.__version__} can use: nothing to check", file=sys.stderr)
        raise SystemExit(2)
    wanted = tuple(name.strip() for name in only.split(","))
    about = {"commit": commit(), "date": time.strftime("%Y-%m-%d"), "tiny": tiny, "cards": n_cards}
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
        for step in Check(Path(folder), n_cards, tiny).steps():
            if not step.name.startswith(wanted):
                continue
            outcomes.append(step.run(Path(folder, f"{len(outcomes)}.log")))
            last = outcomes[-1]
            error = f": {last.error}" if last.error else ""
            cli.say(f"{last.step}: {last.outcome}, {last.seconds:.0f} s{error}")
            roofline = next((x.found for x in outcomes if x.step == "roofline"), {})
            add_shares(last.found, roofline)
            passed = all(x.outcome != "failed" for x in outcomes)
            content = about | {"passed": passed, "steps": [asdict(x) for x in outcomes]}
            with write_whole(Path(report).resolve()) as partial:
                write_json(partial, content)
    if not outcomes:
        raise ValueError(f"--only {only}: no step's name begins so")
    print(table_of(outcomes))
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))  # where the package is not installed
    if lacking := missing():
        sys.exit(how_to_install(lacking))
    from llama import cli

    cli.run(main)
