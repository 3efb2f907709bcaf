"""Time and peak memory of cutting a checkpoint, against cp and against upstream's method.

python benchmarks/reshard.py                                # 500 MB float32, 1 to 2
python benchmarks/reshard.py --billion --from_n 1 --n 4     # 2.2 GB bfloat16
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import random_source

from llama import parallel
from llama.reshard import write_checkpoint

SMALL = {"dim": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 26000}
BILLION = {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 32000}
ROUNDS = 5
REPO = Path(__file__).parent.parent

UPSTREAM = """
import sys, torch
from pathlib import Path
from llama.checkpoint import cut_of, SHARD_DIMS
from llama.reshard import write_checkpoint
from llama.model import ModelArgs
import json
source, out, n = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
args = ModelArgs.from_params(json.loads((source / "params.json").read_text()))
paths = sorted(source.glob("*.pth"))
shards = [torch.load(path, weights_only=True) for path in paths]
out.mkdir()
new = [{} for _ in range(n)]
for name in shards[0]:
    cut, into = cut_of(name, args, len(shards)), cut_of(name, args, n)
    parts = [shards[cut.first_shard_with(i)][name] for i in range(cut.pieces)]
    whole = torch.cat(parts, cut.dim)
    for i in range(n):
        new[i][name] = whole.chunk(into.pieces, into.dim)[into.piece_of(i)].clone()
for i in range(n):
    torch.save(new[i], out / f"fs_consolidated.{i:02d}.pth")
"""


def measure(command: list[str], out: Path) -> tuple[float, float]:
    """Seconds and peak MB of a command; what it writes is removed again."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    watch = parallel.MemoryWatch(process.pid, interval=0.002)
    if process.wait():
        raise RuntimeError(f"{command} failed")
    seconds = time.perf_counter() - start
    subprocess.run(["sync"], check=True)  # so that one command's writing does not slow the next
    shutil.rmtree(out, ignore_errors=True)
    return seconds, watch.peak / 1e6


def main(billion: bool = False, from_n: int = 1, n: int = 2) -> None:
    """Measure all in turns, in one run, and print medians and ratios.

    Args:
        billion: take the 1.1B-parameter model in bfloat16 and not the 500 MB one in float32.
        from_n: shards to begin with.
        n: shards to cut into.
    """
    folder = Path(tempfile.mkdtemp())
    source, out = folder / "ckpt", folder / "out"
    params, dtype = (BILLION, torch.bfloat16) if billion else (SMALL, torch.float32)
    write_checkpoint(random_source(params, dtype), source, from_n)
    size = sum(path.stat().st_size for path in source.iterdir()) / 1e6
    paths = [str(source), str(out), str(n)]
    flags = ["--ckpt_dir", str(source), "--n", str(n), "--out_dir", str(out)]
    commands = {
        "cp -r": ["cp", "-r", str(source), str(out)],
        "cp -r, sync": ["sh", "-c", f"cp -r {source} {out} && sync {out}/*"],
        "import torch": [sys.executable, "-c", "import torch"],
        "start-up": [sys.executable, "split_model.py", "--help"],
        "split_model.py": [sys.executable, "split_model.py", *flags],
        "load all, cut, save": [sys.executable, "-c", UPSTREAM, *paths],
    }
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
    work = median["split_model.py"][0] - median["start-up"][0]
    for copy in ("cp -r", "cp -r, sync"):  # split_model.py ends with its files on the disk
        print(f"split_model.py after start-up: {work / median[copy][0]:.2f} times {copy}")


if __name__ == "__main__":
    parallel.run(main)
