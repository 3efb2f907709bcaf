"""Time and memory of tokenising a dataset of Alpaca's size, made here of random words.

python benchmarks/tokens.py --tokenizer_path ckpts/SmolLM2-135M-Instruct
python benchmarks/tokens.py --tokenizer_path ckpts/8B --kind chat --n 10000
"""

import json
import random
import tempfile
import time
from pathlib import Path

from llama import cli

REPO = Path(__file__).parent.parent


def make_rows(path: Path, n: int, kind: str) -> None:
    """Write n rows: instructions as long as Alpaca's, or conversations of one to five rounds."""
    chance, words = random.Random(0), (REPO / "LICENSE").read_text().split()

    def text(average: int) -> str:
        return " ".join(chance.choices(words, k=1 + min(400, int(chance.expovariate(1 / average)))))

    def row() -> dict:
        if kind == "chat":
            roles = ["user", "assistant"] * chance.randint(1, 5)
            return {"messages": [{"role": role, "content": text(30)} for role in roles]}
        extra = text(15) if chance.random() < 0.4 else ""
        return {"instruction": text(12), "input": extra, "output": text(45)}

    path.write_text(json.dumps([row() for _ in range(n)], indent=1), encoding="utf-8")


def main(
    tokenizer_path: str, kind: str = "alpaca", n: int = 52_000, max_seq_len: int = 512
) -> None:
    """Print what ft_main.py does before it loads a model takes; memory is that of libraries too."""
    import peft  # noqa: F401 - as ft_main.py does
    import transformers  # noqa: F401

    from llama.tokenizer import Tokenizer
    from llama.tuning.data import LengthGrouped, column, tokenize_dataset

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        make_rows(path, n, kind)
        tokenizer = Tokenizer(tokenizer_path)
        watch = cli.MemoryWatch(interval=0.002)
        start, cpu = time.perf_counter(), time.process_time()
        rows = tokenize_dataset(path, tokenizer, max_seq_len, 32).rows
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        took = f"{seconds:.1f} s ({cpu:.1f} s of a core)"
        print(f"{n} rows in {took}, at most {watch.peak / 1e6:.0f} MB")
        print(LengthGrouped(column(rows, "length"), 8, 0).padding())


if __name__ == "__main__":
    cli.run(main)
