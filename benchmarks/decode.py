"""Tokens per second of greedy decoding, batch 1, against Hugging Face and against the bare work.

OMP_NUM_THREADS=2 python benchmarks/decode.py
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 benchmarks/decode.py
"""

import collections
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from random_model import random_source

from llama import LLaMA, cli, parallel
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.hf import hf_config
from llama.checkpoint.write import write_checkpoint
from llama.generation import load_model
from llama.layers import linear
from llama.output import Timing

PARAMS = {"dim": 768, "n_layers": 12, "n_heads": 12, "vocab_size": 32000, "norm_eps": 1e-5}
PROMPT_LEN, GEN_LEN, ROUNDS = 16, 64, 5


class NoText:
    """A tokenizer whose texts are numbers, and which never ends a sequence."""

    stop_ids: frozenset[int] = frozenset()
    pad_id = 0

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bare_products(model: torch.nn.Module, product: Callable) -> Callable[[], None]:
    """The matrix-vector products of one token with this rank's weights, and nothing else."""
    weights = [
        module.weight
        for name, module in model.named_modules()
        if hasattr(module, "weight") and module.weight.dim() == 2 and name != "tok_embeddings"
    ]
    vectors = [torch.randn(1, weight.shape[1], dtype=weight.dtype) for weight in weights]

    def work() -> None:
        for weight, vector in zip(weights, vectors, strict=True):
            product(vector, weight)

    return work


def bare_collectives(model: torch.nn.Module, n: int, layers_gather: bool) -> Callable[[], None]:
    """The collectives of one token, of their number and size, and nothing else.

    The two sums a layer by all_gather, as sum_over_ranks does, or by all_reduce, as fairscale does.
    """
    args = model.args
    state, token = torch.zeros(1, args.dim), torch.zeros(1, dtype=torch.long)
    part, logits = torch.zeros(1, args.dim // n), torch.zeros(1, args.vocab_size // n)
    states = [state.clone() for _ in range(n)]
    parts, all_logits = [part.clone() for _ in range(n)], [logits.clone() for _ in range(n)]

    def work() -> None:
        if n == 1:
            return
        dist.all_gather(parts, part)
        for _ in range(2 * args.n_layers):
            dist.all_gather(states, state) if layers_gather else dist.all_reduce(state)
        dist.all_gather(all_logits, logits)
        dist.broadcast(token, 0)

    return work


def hugging_face(ids: list[int], model: torch.nn.Module) -> Callable[[], object]:
    """transformers' generate over a model of the same shape."""
    reference = transformers.LlamaForCausalLM(hf_config(model.args, pad_token_id=0)).eval()
    prompt = torch.tensor([ids])
    lengths = {"max_new_tokens": GEN_LEN, "min_new_tokens": GEN_LEN}
    return lambda: reference.generate(prompt, do_sample=False, **lengths)


def main() -> None:
    """Measure all of it in turns, in one run, and print medians and ratios."""
    device, n = parallel.setup(), parallel.world_size()
    folder = parallel.gather_objects(parallel.rank() or tempfile.mkdtemp())[0]
    if parallel.rank() == 0:
        write_checkpoint(random_source(PARAMS, std=0.02), f"{folder}/ckpt", n)
    dist.barrier()
    model = load_model(Checkpoint(f"{folder}/ckpt"), device)
    generator = LLaMA(model, NoText(), max_seq_len=PROMPT_LEN + GEN_LEN)
    ids = list(range(1, PROMPT_LEN + 1))
    times: dict[str, list[float]] = collections.defaultdict(list)

    def generate() -> None:
        generator.timing = Timing()
        generator.generate([ids], GEN_LEN, temperature=0)
        # the first of the tokens comes with the prompt
        times["llama, a step"].append(generator.timing.generated_seconds / (GEN_LEN - 1))

    works = {
        "llama": generate,
        "torch F.linear": bare_products(model, F.linear),
        "bare products": bare_products(model, linear),
        "bare collectives": bare_collectives(model, n, layers_gather=True),
        "torch all_reduce": bare_collectives(model, n, layers_gather=False),
    }
    per_token = {"llama": GEN_LEN}
    if n == 1:
        works["transformers"] = hugging_face(ids, model)
        per_token["transformers"] = GEN_LEN
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            repeats = 1 if name in per_token else GEN_LEN

            def turn(work: Callable = work, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    work()

            dist.barrier()
            with torch.inference_mode():
                took = seconds(turn) / GEN_LEN
            times[name].append(took)
    if parallel.rank() == 0:
        # the first round warms up
        median = {name: statistics.median(values[1:]) for name, values in times.items()}
        for name, value in median.items():
            print(f"{name:18} {value * 1e3:7.2f} ms a token")
        print(f"\n{n} rank(s), {torch.get_num_threads()} thread(s) each; a token of llama takes")
        for products, collectives in (
            ("bare products", "bare collectives"),
            ("torch F.linear", "torch all_reduce"),
        ):
            ratio = median["llama, a step"] / (median[products] + median[collectives])
            print(f"  {ratio:.2f} times {products} + {collectives}")
        if n == 1:
            ratio = median["transformers"] / median["llama"]
            print(f"  llama runs at {ratio:.2f} times transformers' speed")
        shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(main)
