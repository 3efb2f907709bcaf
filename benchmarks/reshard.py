"""Time and peak memory of cutting a checkpoint, against cp and against upstream's method.

python benchmarks/reshard.py                                # 500 MB float32, 1 to 2
python benchmarks/reshard.py --billion --from_n 1 --n 4     # 2.2 GB bfloat16
python benchmarks/reshard.py --billion --convert            # into other formats as well
"""

import base64
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import random_source

from llama import cli
from llama.checkpoint.folder import Checkpoint, shard_name
from llama.checkpoint.weights import cut_of
from llama.checkpoint.write import write_checkpoint

SMALL = {"dim": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 26000}
BILLION = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 32000}
ROUNDS = 5
TOKENS = [*(bytes([i]) for i in range(256)), b"th"]
TOKENIZER = b"".join(base64.b64encode(x) + b" %d\n" % i for i, x in enumerate(TOKENS))
REPO = Path(__file__).parent.parent


def load_all_cut_save(ckpt_dir: Path, out_dir: Path, n: int) -> None:
    """Cut as upstream does: all shards in memory, all parts beside them, then written."""
    ckpt = Checkpoint(ckpt_dir)
    shards = [torch.load(path, weights_only=True) for path in ckpt.paths]
    new = [{} for _ in range(n)]
    for name in ckpt.shapes:
        cut, into = ckpt.cut_here(name), cut_of(name, ckpt.args, n)
        parts = [shards[cut.first_shard_with(i)][name] for i in range(cut.parts)]
        whole = torch.cat(parts, cut.dim)
        for i in range(n):
            new[i][name] = whole.chunk(into.parts, into.dim)[into.part_in(i)].clone()
    out_dir.mkdir()
    for i in range(n):
        torch.save(new[i], out_dir / shard_name(i))


def measure(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MB of a command; what it writes is removed again."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    watch = cli.MemoryWatch(process.pid, interval=0.002)
    if process.wait():
        raise RuntimeError(f"{command} failed")
    seconds = time.perf_counter() - start
    subprocess.run(["sync"], check=True)  # so that one command's writing does not slow the next
    shutil.rmtree(out, ignore_errors=True)
    return seconds, watch.peak / 1e6


def main(
    billion: bool = False, from_n: int = 1, n: int = 2, convert: bool = False, ckpt_dir: str = ""
) -> None:
    """Measure all in turns, in one run, and print medians and ratios.

    Args:
        billion: take the 1.1B-parameter model in bfloat16 and not the 500 MB one in float32.
        from_n: shards to begin with.
        n: shards to cut into.
        convert: also write a Hugging Face folder and GGUF files.
        ckpt_dir: cut this folder as upstream does, into one named out beside it. Not for users.
    """
    if ckpt_dir:
        load_all_cut_save(Path(ckpt_dir), Path(ckpt_dir).with_name("out"), n)
        return
    folder = Path(tempfile.mkdtemp())
    source, out = folder / "ckpt", folder / "out"
    params, dtype = (BILLION, torch.bfloat16) if billion else (SMALL, torch.float32)
    model = random_source(params, dtype)
    model.files["tokenizer.model"] = TOKENIZER
    write_checkpoint(model, source, from_n)
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    flags = ["--ckpt_dir", str(source), "--n", str(n), "--out_dir", str(out)]
    commands = {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "cp -r, sync": ["sh", "-c", f"cp -r {source} {out} && sync {out}/*"],
        "import torch": [sys.executable, "-c", "import torch"],
        "start-up": [sys.executable, "split_model.py", "--help"],
        "split_model.py": [sys.executable, "split_model.py", *flags],
        "load all, cut, save": [sys.executable, __file__, *flags[:4]],
    }
    for name, to in (("hf", "hf"), ("gguf", "gguf"), ("q8_0", "gguf --dtype q8_0")):
        if convert:
            arguments = f"convert_model.py --from {source} --out_dir {out} --to {to}".split()
            commands[f"convert_model.py {name}"] = [sys.executable, *arguments]
    results = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for name, command in commands.items():
            results[name].append(measure(command, out))
    shutil.rmtree(folder)
    median = {name: [statistics.median(x) for x in zip(*rows)] for name, rows in results.items()}
    print(f"{size:.0f} MB, {from_n} to {n} shards")
    for name, (seconds, peak) in median.items():
        above = peak - median["import torch"][1]
        print(f"{name:20} {seconds:6.2f} s, peak {peak:6.0f} MB ({above:+.0f} to import torch)")
    for name in filter(lambda name: "_model.py" in name, median):
        work = median[name][0] - median["start-up"][0]
        ratios = [f"{work / median[copy][0]:.2f} times {copy}" for copy in ("cp -r", "cp -r, sync")]
        # What we write is on the disk at the end.
        print(f"{name} after start-up: {' and '.join(ratios)}")


if __name__ == "__main__":
    cli.run(main)
