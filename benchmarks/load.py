"""Start-up and memory of ranks that cut a checkpoint while loading, against a ready-cut one.

python benchmarks/load.py                  # 2.2 GB bfloat16, 1 shard on 4 ranks
python benchmarks/load.py --from_n 4 --n 2
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from random_model import random_source
from reshard import BILLION

from llama import cli
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.write import write_checkpoint

ROUNDS = 5
REPO = Path(__file__).parent.parent


def start_up(ckpt_dir: Path, n: int) -> tuple[float, float, float]:
    """Seconds of a whole run that only loads, of loading alone, and the peak MB of a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    out = subprocess.check_output(
        [*command, __file__, "--ckpt_dir", ckpt_dir], env=environment, stderr=subprocess.DEVNULL
    )
    total = time.perf_counter() - start
    seconds, peaks = zip(*json.loads(out))
    return total, max(seconds), max(peaks) / 1e6


def load(ckpt_dir: str) -> None:
    """Load as one of several ranks; rank 0 prints each rank's seconds and peak memory."""
    watch = cli.MemoryWatch(interval=0.002)
    from llama import parallel
    from llama.generation import load_model

    device = parallel.setup()
    start = time.perf_counter()
    model = load_model(Checkpoint(ckpt_dir), device)
    seconds = time.perf_counter() - start
    results = parallel.gather_objects((seconds, watch.peak))
    if parallel.rank() == 0:
        print(json.dumps(results))
    del model


def main(from_n: int = 1, n: int = 4, ckpt_dir: str = "") -> None:
    """Load both folders in turns and print medians and ratios.

    Args:
        from_n: shards of the folder that is cut while loading.
        n: ranks, and shards of the ready-cut folder.
        ckpt_dir: load this folder as one rank, and print what it took. Not for users.
    """
    if ckpt_dir:
        load(ckpt_dir)
        return
    folder = Path(tempfile.mkdtemp())
    write_checkpoint(random_source(BILLION, torch.bfloat16), folder / "other", from_n)
    write_checkpoint(Checkpoint(folder / "other"), folder / "ready", n)
    share = sum(path.stat().st_size for path in folder.glob("ready/*.pth")) / n / 1e6
    results = {name: [] for name in ("ready", "other")}
    for _ in range(ROUNDS):
        for name, rows in results.items():
            rows.append(start_up(folder / name, n))
    shutil.rmtree(folder)
    median = {name: [statistics.median(x) for x in zip(*rows)] for name, rows in results.items()}
    print(f"{n} ranks, a share of {share:.0f} MB each")
    for name, label in (("ready", f"{n} shards"), ("other", f"{from_n}, cut while loading")):
        total, seconds, peak = median[name]
        print(f"{label:22} start-up {total:5.2f} s, of it loading {seconds:5.2f} s; peak of a rank "
              f"{peak:4.0f} MB ({peak - share:+.0f} to its share)")  # fmt: skip
    ratios = [median["other"][i] / median["ready"][i] for i in range(2)]
    print(f"cutting while loading: {ratios[0]:.2f} times the start-up, {ratios[1]:.2f} times the "
          "loading")  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
