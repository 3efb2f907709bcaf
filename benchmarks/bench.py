"""How fast and small it is, beside llama.cpp, transformers, PEFT and the bare matrix products.

python benchmarks/bench.py                                       # all of it: make bench
python benchmarks/bench.py --only decode --dtypes float32        # under a minute
python benchmarks/bench.py --only ranks,context,batch --quick

Every side runs in a process of its own, on the same weights, and all are asked in turns, round
after round. Each figure is a median over the rounds; the first round only warms up.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from table import ALL, FLOAT, Record, Results, plot

from llama import cli

REPO = Path(__file__).parent.parent
SIDES_PY = Path(__file__).parent / "sides.py"
GGUF = {"float32": "f32", "bfloat16": "f16", "float16": "f16", "int8": "q8_0", "int4": "q4_0"}
GENERATING = ("decode_b1", "decode_b8", "prefill", "load")
PARTS = (*GENERATING, "tune", "ranks", "context", "batch")
RANDOM = {"dim": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 32000, "norm_eps": 1e-5}
# Layers like SmolLM2's, and few ids: what grows with the context is most of a step.
SHALLOW = {"dim": 576, "n_layers": 4, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 576}
PROMPT_LEN, PREFILL = 16, 512
STEPS = {1: 16, 8: 8}  # of a figure, by the number of texts
CONTEXTS, BATCHES, CURVE_STEPS = (128, 256, 512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32), 4
# Where all parts are measured these are in some variants alone, so that it takes ten minutes.
IN_ALL = {"tune": ("float32", "int8", "int4")} | dict.fromkeys(
    ("ranks", "context", "batch"), ("float32",)
)


class Models:
    """The weights in every side's format, made once and kept in a folder."""

    def __init__(self, folder: Path, ckpt_dir: Path) -> None:
        self.folder, self.ckpt_dir = folder, ckpt_dir
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, model: str, side: str, dtype: str, ranks: int = 1) -> Path:
        """Where a side finds a model."""
        shards = self._shards(model, ranks)
        if side.startswith("llama") and side != "llama.cpp":
            return shards
        target = self.folder / model / (GGUF[dtype] if side == "llama.cpp" else "hf")
        if not target.exists():
            cli.say(f"writing {target}")
            if target.name == "q4_0":
                write_q4_0(self.path(model, side, "float32"), target)
            else:
                names = {"f32": "float32", "f16": "float16"}
                to, dtype = ("gguf", target.name) if side == "llama.cpp" else ("hf", "float32")
                flags = ["--from", shards, "--out_dir", target, "--to", to]
                flags += ["--dtype", names.get(dtype, dtype)]
                run = [sys.executable, REPO / "convert_model.py", *flags]
                subprocess.run(
                    list(map(str, run)), check=True, env=environment(1), stdout=subprocess.DEVNULL
                )
        return next(target.glob("*.gguf")) if side == "llama.cpp" else target

    def _shards(self, model: str, ranks: int) -> Path:
        if model == self.ckpt_dir.name:
            if not self.ckpt_dir.exists():
                raise FileNotFoundError(f"{self.ckpt_dir}: no such folder; make demo makes it")
            return self.ckpt_dir
        target = self.folder / model / f"fs{ranks}"
        if not target.exists():
            from random_model import random_source
            from reshard import TOKENIZER

            from llama.checkpoint.write import write_checkpoint

            source = random_source(SHALLOW if model == "shallow" else RANDOM, std=0.02)
            source.files["tokenizer.model"] = TOKENIZER
            write_checkpoint(source, target, ranks)
        return target


def write_q4_0(source: Path, folder: Path) -> None:
    """Write a float32 GGUF file's matrices as Q4_0, token_embd and output as Q8_0.

    llama.cpp's own tool gives those two 6 or 8 bits; SmolLM2's rows only divide into 8.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    from gguf.quants import quantize

    from llama.checkpoint.gguf import read_header
    from llama.files import new_folder

    data = np.asarray(np.memmap(source, mode="r"))
    meta, tensors = read_header(data.data)
    with new_folder(folder) as partial:
        writer = GGUFWriter(partial / "q4_0.gguf", "llama")
        del meta["general.architecture"]
        for key, value in (meta | {"general.file_type": 2}).items():
            value = value.tolist() if isinstance(value, np.ndarray) else value
            whole = type(value) is int
            kind = GGUFValueType.UINT32 if whole else GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
        for name, tensor in tensors.items():
            array = data[tensor.start : tensor.stop].view(np.float32).reshape(tensor.shape)
            kind = GGMLQuantizationType.Q4_0
            if array.ndim == 1:
                kind = GGMLQuantizationType.F32
            elif name in ("token_embd.weight", "output.weight"):
                kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


def environment(ranks: int) -> dict[str, str]:
    """The variables of a side: all cores, and no rank more of them than another."""
    others = os.environ.get("PYTHONPATH", "")  # where packages may lie
    paths = f"{REPO}:{Path(__file__).parent}:{others}".removesuffix(":")
    n_threads = str(max(1, n_cores() // ranks))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": n_threads, "HF_HUB_OFFLINE": "1"}


def command_of(script: Path, *flags: object, ranks: int | None = None) -> list[str]:
    """The command that runs a script in this Python: plain, or with torchrun over some ranks."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", ranks]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    return list(map(str, [sys.executable, *(torchrun if ranks else []), script, *flags]))


class Side:
    """A process of sides.py, or several ranks of it."""

    def __init__(self, name: str, path: Path, dtype: str, ranks: int, log: Path) -> None:
        flags = ["--side", name, "--path", path, "--dtype", dtype]
        self.name, self.log = name, log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command_of(SIDES_PY, *flags, ranks=ranks if ranks > 1 else None),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment(ranks),
            )

    def ask(self, method: str, **arguments: object) -> float | str:
        """Have it do something, and return what it says of that."""
        try:
            self.process.stdin.write(json.dumps([method, arguments]) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            code = self.process.wait()
            last = self.log.read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"{self.name}, {method}: ended with {code}, {last}") from None


@contextlib.contextmanager
def started(
    names: Sequence[str], models: Models, model: str, dtype: str, ranks: int = 1
) -> Iterator[dict[str, Side]]:
    """Start these sides, and load the model in each."""
    sides: dict[str, Side] = {}
    try:
        for name, path in [(name, models.path(model, name, dtype, ranks)) for name in names]:
            sides[name] = Side(name, path, dtype, ranks, models.folder.parent / f"{name}.log")
        for side in sides.values():
            side.ask("load")
        yield sides
    finally:
        for side in sides.values():
            side.process.stdin.close()  # then it ends
        for side in sides.values():
            side.process.wait()


@dataclasses.dataclass
class Work:
    """What a side is asked for in each round, and what it has answered."""

    measure: str
    side: Side
    method: str
    arguments: dict
    label: str = ""  # of the column, if it is not the side's name
    size: int = 0  # on a curve
    samples: list[float] = dataclasses.field(default_factory=list)

    def warm_up(self) -> None:
        few = {"steps": 2} if "steps" in self.arguments else {}
        self.side.ask(self.method, **self.arguments | few)

    def do(self) -> None:
        speed = self.side.ask(self.method, **self.arguments)
        in_seconds = (self.size if self.measure == "batch" else 1) / speed
        self.samples.append(in_seconds if self.size else speed)


def works_of(measures: Sequence[str], sides: dict[str, Side]) -> list[Work]:
    """What to ask these sides for, so that figures to be compared come right after each other."""
    works = []
    for measure in measures:
        for name, side in sides.items():
            if measure in ("decode_b1", "decode_b8"):
                bsz = int(measure[-1])
                arguments = {"bsz": bsz, "prompt_len": PROMPT_LEN, "steps": STEPS[bsz]}
                works.append(Work(measure, side, "decode", arguments))
                if name == "llama":
                    bare = {"bsz": bsz, "steps": STEPS[bsz]}
                    works.append(Work(measure, side, "bare", bare, "bare"))
            elif measure == "prefill":
                works.append(Work(measure, side, "prefill", {"length": PREFILL}))
            elif measure == "tune":
                label = "llama" if name == "llama-tuning" else "transformers"
                works.append(Work(measure, side, "tune", {}, label))
            elif measure == "batch" and name == "llama":
                for bsz in BATCHES:
                    arguments = {"bsz": bsz, "prompt_len": PROMPT_LEN, "steps": CURVE_STEPS}
                    works.append(Work(measure, side, "decode", arguments, size=bsz))
            elif measure == "context":
                for length in CONTEXTS:
                    arguments = {"length": length, "steps": CURVE_STEPS}
                    works.append(Work(measure, side, "decode_behind", arguments, size=length))
    return works


class Bench:
    """A run: what is asked for, and the records so far."""

    def __init__(self, models: Models, parts: Sequence[str], rounds: int) -> None:
        self.models, self.parts, self.rounds = models, parts, rounds
        self.records: list[Record] = []

    def variant(
        self, names: Sequence[str], measures: Sequence[str], model: str, dtype: str, ranks: int = 1
    ) -> None:
        """Measure one model in one dtype on all these sides."""
        began = time.perf_counter()
        with started(names, self.models, model, dtype, ranks) as sides:
            works = works_of(measures, sides)
            for work in works:
                work.warm_up()
            peaks = {name: side.ask("peak") for name, side in sides.items()}
            for turn in range(self.rounds):
                for work in works if turn % 2 else reversed(works):
                    work.do()
            if "load" in measures:
                loads = [Work("load", side, "load", {}) for side in sides.values()]
                for _ in range(self.rounds):
                    for work in loads:
                        work.do()
                works += loads
        for work in works:
            label = work.label or work.side.name
            key = (model, ranks, dtype, work.measure, label)
            self.records.append(Record(*key, tuple(work.samples), work.size))
        for name, peak in peaks.items():
            if "tune" in measures or "load" in measures:
                label = "transformers" if name == "peft-tuning" else name.removesuffix("-tuning")
                measure = "tune_peak" if "tune" in measures else "peak"
                self.records.append(Record(model, ranks, dtype, measure, label, (peak,)))
        took = time.perf_counter() - began
        cli.say(f"{model}, {dtype}, {ranks} rank(s), {', '.join(measures)}: {took:.0f} s")

    def run(self, model: str, dtypes: Sequence[str]) -> None:
        """Measure all parts that are wanted."""
        llama_cpp = ["llama.cpp"] if importlib.util.find_spec("xllamacpp") else []
        if not llama_cpp:
            cli.say("no llama.cpp: pip install xllamacpp -c constraints.txt")
        for dtype in dtypes:
            parts = [part for part in self.parts if self._wanted(part, dtype)]
            transformers = ["transformers"] if dtype in FLOAT else []
            generating = [part for part in parts if part in GENERATING]
            if generating:
                self.variant(["llama", *llama_cpp, *transformers], generating, model, dtype)
            if "batch" in parts:
                self.variant(["llama"], ["batch"], model, dtype)
            if "tune" in parts:
                peft = ["peft-tuning"] if dtype in FLOAT else []
                self.variant(["llama-tuning", *peft], ["tune"], model, dtype)
            if "context" in parts:
                self.variant(["llama"], ["context"], "shallow", dtype)
            if "ranks" in parts:
                measures = ["decode_b1", "prefill", "load"]
                self.variant(["llama", *transformers], measures, "random-134M", dtype)
                self.variant(["llama"], measures, "random-134M", dtype, ranks=2)

    def _wanted(self, part: str, dtype: str) -> bool:
        return len(self.parts) < len(PARTS) or dtype in IN_ALL.get(part, ALL)


def able(dtypes: Sequence[str]) -> list[str]:
    """Those of the variants that LLaMA.build has; the others are named."""
    quantised = sorted(set(dtypes) - set(FLOAT))
    if quantised:
        from llama import LLaMA  # here, as torch is read with it

        if "quantize" not in inspect.signature(LLaMA.build).parameters:
            cli.say(f"{', '.join(quantised)}: left out, as LLaMA.build has no quantize")
            return [dtype for dtype in dtypes if dtype in FLOAT]
    return list(dtypes)


def machine() -> dict:
    """What the figures were measured on, and with what."""
    text = Path("/proc/cpuinfo").read_text()
    cpu = re.search(r"(?m)^model name\s*: (.*)$", text)
    flags = set(re.findall(r"avx2|avx512_?\w*|avx_vnni\w*|amx_\w+|f16c", text))
    versions = {}
    for package in ("torch", "transformers", "peft", "xllamacpp"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": n_cores(),
        "flags": sorted(flags),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def main(
    only: str = "",
    dtypes: str = ",".join(ALL),
    quick: bool = False,
    rounds: int = 5,
    ckpt_dir: str = "ckpts/SmolLM2-135M-Instruct",
    out_dir: str = "bench",
) -> None:
    """Measure, print one table, and write it with a JSON file and a plot.

    Args:
        only: parts, by their names or how those begin: decode_b1, decode_b8, prefill, load, tune,
            ranks, context, batch.
        dtypes: variants: float32, bfloat16, float16, int8, int4.
        quick: take a third of the rounds, for a first look.
        rounds: how many figures each median is of.
        ckpt_dir: the model, in Meta's format.
        out_dir: folder for bench.md, bench.json, bench.png, and for the models in other formats.
    """
    names = tuple(name.strip() for name in only.split(","))
    parts = [part for part in PARTS if part.startswith(names)]
    chosen = [name.strip() for name in dtypes.split(",")]
    if not parts or set(chosen) - set(ALL):
        raise ValueError(f"--only takes {', '.join(PARTS)}, --dtypes takes {', '.join(ALL)}")
    out, model = Path(out_dir).resolve(), Path(ckpt_dir).resolve()
    bench = Bench(Models(out / "models", model), parts, 2 if quick else rounds)
    bench.run(model.name, able(chosen))
    results, here = Results(bench.records), machine()
    heading = f"{here['cpu']}, {here['cores']} cores ({', '.join(here['flags'])}), {here['date']}"
    text = f"{heading}\n\n{results.text()}"
    print(text)
    (out / "bench.md").write_text(text + "\n")
    records = [dataclasses.asdict(r) | {"median": r.median} for r in bench.records]
    (out / "bench.json").write_text(json.dumps({"machine": here, "records": records}, indent=1))
    plot(results, out / "bench.png")


if __name__ == "__main__":
    cli.run(main)
