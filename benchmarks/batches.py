"""Tokens per second of 64 prompts, 8 at a time: places taken anew at once, against fixed batches.

OMP_NUM_THREADS=2 python benchmarks/batches.py --ckpt_dir ckpts/SmolLM2-135M-Instruct [--check]
"""

import random
import time
from collections.abc import Sequence

from llama import LLaMA, cli
from llama.options import SamplingParams
from llama.output import Row

N, BSZ, SHORTEST, LONGEST = 64, 8, 8, 256  # tokens of an answer: evenly spread, in any order
TEXT = "The sun rose over the harbour while boats came in, and people told of storms far out. "


def main(ckpt_dir: str, check: bool = False) -> None:
    """Measure both ways; with check, also compare every text with that of its prompt alone."""
    generator = LLaMA.build(ckpt_dir, max_batch_size=BSZ, dtype="float32")
    generator.tokenizer.stop_ids = frozenset()
    choose = random.Random(0)
    limits = [SHORTEST + i * (LONGEST - SHORTEST) // (N - 1) for i in range(N)]
    choose.shuffle(limits)
    ids = generator.tokenizer.encode(TEXT * 20)
    prompts = []
    for _ in range(N):
        at = choose.randrange(20)
        prompts.append(ids[at : at + choose.randint(4, 128)])

    def run(numbers: Sequence[int], limits: list[int]) -> list[Row]:
        params = [SamplingParams(limits[i], 0) for i in numbers]
        rows = [generator._row(prompts[i], f"{i}", made, {}) for i, made in zip(numbers, params)]
        list(generator._in_order(rows, generator._sampler(params[0])))
        return rows

    def fixed() -> None:
        """Each batch until its longest answer ends, as rows that ended stayed in it."""
        for first in range(0, N, BSZ):
            batch = range(first, first + BSZ)
            longest = max(limits[i] for i in batch)
            run(batch, [longest] * N)

    run(range(BSZ), [8] * N)  # warms up
    seconds = {}
    for name, work in {"fixed batches": fixed, "continuous": lambda: run(range(N), limits)}.items():
        began = time.perf_counter()
        found = work()
        seconds[name] = time.perf_counter() - began
        print(f"{name:14} {sum(limits) / seconds[name]:6.1f} tokens a second", flush=True)
    print(f"{seconds['fixed batches'] / seconds['continuous']:.2f} times as fast")
    if check:
        alone = [run([i], limits)[0] for i in range(N)]
        same = [one.output.token == other.output.token for one, other in zip(alone, found)]
        print(f"{sum(same)} of {N} texts are those of the prompt alone")


if __name__ == "__main__":
    cli.run(main)
