"""One side of bench.py's comparisons, in a process of its own.

bench.py starts it, writes requests to its stdin, a line of JSON each (the name of a method and its
arguments), and reads an answer a line from its stdout. Speeds are tokens or steps a second.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama import cli

VIRTUAL, TUNING_BSZ, TUNING_LEN = 32, 8, 64  # of a tuning step; half of the tokens are learned
LONGEST = 8192 + 64  # what a cache may hold
SLOT = 640  # tokens that each text may have in llama.cpp


def prompt_of(length: int) -> list[int]:
    """Ids that any of the models has."""
    return [(37 * i) % 500 + 10 for i in range(length)]


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes, until the device is done with it."""
    from llama import parallel

    start = parallel.now()
    work()
    return parallel.now() - start


class Llama:
    """This repository: on several ranks, each of them does the same."""

    def __init__(self, path: str, dtype: str) -> None:
        from llama import LLaMA, parallel

        parallel.setup()
        self.build, self.path = LLaMA.build, path
        self.variant = {"quantize" if dtype.startswith("int") else "dtype": dtype}
        self.generator: Any = None
        self.caches: dict = {}

    def load(self) -> float:
        self.generator = None
        gc.collect()
        self.generator = self.build(self.path, max_seq_len=LONGEST, **self.variant)
        self.generator.tokenizer.stop_ids = frozenset()  # no text ends before its time
        return self.generator.timing.load_seconds

    def _timing(self, work: Callable[[], object]) -> Any:
        from llama.output import Timing

        self.generator.timing = Timing()
        work()
        return self.generator.timing

    def decode(self, bsz: int, prompt_len: int, steps: int) -> float:
        prompts = [prompt_of(prompt_len)] * bsz  # the first token comes with the prompt
        work = lambda: self.generator.generate(prompts, steps + 1, temperature=0)  # noqa: E731
        return bsz * steps / self._timing(work).generated_seconds

    def prefill(self, length: int, bsz: int = 1) -> float:
        prompts = [prompt_of(length)] * bsz
        work = lambda: self.generator.generate(prompts, 1, temperature=0)  # noqa: E731
        return bsz * length / self._timing(work).prompt_seconds

    def decode_behind(self, length: int, steps: int) -> float:
        """As decode, for one text after so many tokens, which are read the first time only."""
        from llama.generation import PromptCache

        if length not in self.caches:
            self.caches[length] = PromptCache(self.generator)
        ids, cache = prompt_of(length), self.caches[length]
        work = lambda: list(self.generator.stream(ids, steps + 1, temperature=0, cache=cache))  # noqa: E731
        return steps / self._timing(work).generated_seconds

    def bare(self, bsz: int, steps: int) -> float:
        """Tokens a second if a step were its matrix products and collectives alone."""
        import torch

        works = [bare_products(self.generator.model, bsz)]
        works.append(bare_collectives(self.generator.model, bsz))
        with torch.inference_mode():
            taken = seconds(lambda: [work() for _ in range(steps) for work in works])
        return bsz * steps / taken


def bare_products(model: Any, bsz: int) -> Callable[[], None]:
    """The matrix products of one step with this rank's weights, and nothing else."""
    import torch

    from llama.layers import ColumnParallelLinear, RowParallelLinear, products

    kinds = (ColumnParallelLinear, RowParallelLinear)
    weights = [layer.weight for layer in model.modules() if isinstance(layer, kinds)]
    dtype = model.norm.weight.dtype
    inputs = [torch.randn(bsz, 1, weight.shape[1], dtype=dtype) for weight in weights]

    def work() -> None:
        for x, weight in zip(inputs, weights):
            products(x, weight)

    return work


def bare_collectives(model: Any, bsz: int) -> Callable[[], None]:
    """The collectives of one step, of their number and size, and nothing else."""
    import torch
    import torch.distributed as dist

    from llama import parallel
    from llama.layers import sum_over_ranks

    n, args, dtype = parallel.model_size(), model.args, model.norm.weight.dtype
    state, token = torch.zeros(bsz, args.dim, dtype=dtype), torch.zeros(bsz, dtype=torch.long)
    parts = [torch.zeros(bsz, size // n, dtype=dtype) for size in (args.dim, args.vocab_size)]
    gathered = [[torch.zeros_like(part) for _ in range(n)] for part in parts]

    def work() -> None:
        if n == 1:
            return
        dist.all_gather(gathered[0], parts[0])
        for _ in range(2 * args.n_layers):
            sum_over_ranks(state)
        dist.all_gather(gathered[1], parts[1])
        dist.broadcast(token, 0)

    return work


def tuning_step(
    model: Any, vocab_size: int, bsz: int = TUNING_BSZ, length: int = TUNING_LEN
) -> Callable[[], None]:
    """A step of prompt tuning: forward, backward, AdamW; labels on the second half of each text."""
    import torch

    ids = torch.randint(vocab_size, (bsz, length), device=model.device)
    labels = ids.clone()
    labels[:, : length // 2] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def work() -> None:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


class LlamaTuning(Llama):
    """Prompt tuning with this repository."""

    def load(self) -> float:
        from llama.tuning.model import add_soft_prompt

        took, model = super().load(), self.generator.model
        tuned = add_soft_prompt(model, VIRTUAL, None, self.path)
        self.work = tuning_step(tuned, model.args.vocab_size)
        return took

    def tune(self) -> float:
        return 1 / seconds(self.work)


class Transformers:
    """Hugging Face's LlamaForCausalLM over the same weights."""

    def __init__(self, path: str, dtype: str) -> None:
        import torch
        import transformers

        self.torch, self.made_by = torch, transformers.LlamaForCausalLM.from_pretrained
        self.path, self.dtype, self.model = path, dtype, None

    def load(self) -> float:
        self.model = None
        gc.collect()
        start = time.perf_counter()
        self.model = self.made_by(self.path, dtype=getattr(self.torch, self.dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        return time.perf_counter() - start

    def _times(self, prompts: list[list[int]], n_tokens: int) -> list[float]:
        """When it began, and when it had each token of the rows."""
        ids, times = self.torch.tensor(prompts), [time.perf_counter()]
        more = self.torch.zeros(len(prompts), dtype=self.torch.bool)

        def note(*_: object, **__: object) -> object:
            times.append(time.perf_counter())
            return more

        self.model.generate(
            ids,
            attention_mask=self.torch.ones_like(ids),
            max_new_tokens=n_tokens,
            do_sample=False,
            stopping_criteria=[note],
        )
        return times

    def decode(self, bsz: int, prompt_len: int, steps: int) -> float:
        times = self._times([prompt_of(prompt_len)] * bsz, steps + 1)
        return bsz * steps / (times[-1] - times[1])

    def prefill(self, length: int) -> float:
        times = self._times([prompt_of(length)], 1)
        return length / (times[1] - times[0])


class PeftTuning(Transformers):
    """Prompt tuning with PEFT over Hugging Face's model."""

    def load(self) -> float:
        import peft

        took = super().load()
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
        tuned = peft.get_peft_model(self.model, prompt)
        self.work = tuning_step(tuned, self.model.config.vocab_size)
        return took

    def tune(self) -> float:
        return 1 / seconds(self.work)


class LlamaCpp:
    """llama.cpp over a GGUF file, all options as they come."""

    def __init__(self, path: str, dtype: str) -> None:
        self.path, self.servers = path, {}

    def load(self) -> float:
        self.servers.clear()
        gc.collect()
        return seconds(lambda: self._server(1))

    def _server(self, bsz: int) -> Any:
        """A server of so many texts at once."""
        import xllamacpp

        if bsz not in self.servers:
            params = xllamacpp.CommonParams()
            params.model.path = self.path
            params.n_parallel, params.n_ctx = bsz, bsz * SLOT
            params.warmup, params.port, params.verbosity = False, 0, 1
            params.cache_prompt, params.cache_ram_mib, params.kv_unified = False, 0, False
            n_threads = int(os.environ["OMP_NUM_THREADS"])
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n_threads
            self.servers[bsz] = xllamacpp.Server(params)
        return self.servers[bsz]

    def _timings(self, bsz: int, length: int, n_tokens: int) -> list[dict]:
        """What llama.cpp says it took, for each of bsz texts that are written side by side."""
        request = {"prompt": prompt_of(length), "n_predict": n_tokens, "ignore_eos": True}
        request |= {"temperature": 0, "cache_prompt": False}
        server, found = self._server(bsz), []

        def ask() -> None:
            found.append(server.handle_completions(dict(request))["timings"])

        threads = [threading.Thread(target=ask) for _ in range(bsz)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if [x["predicted_n"] for x in found] != [n_tokens] * bsz or found[0]["prompt_n"] != length:
            raise RuntimeError(f"llama.cpp did not do what it was asked for: {found}")
        return found

    def decode(self, bsz: int, prompt_len: int, steps: int) -> float:
        # predicted_ms runs from the first token, which comes with the prompt, to the last.
        found = self._timings(bsz, prompt_len, steps + 1)
        return bsz * steps * 1000 / max(x["predicted_ms"] for x in found)

    def prefill(self, length: int) -> float:
        return self._timings(1, length, 1)[0]["prompt_per_second"]


SIDES = {
    "llama": Llama,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "llama-tuning": LlamaTuning,
    "peft-tuning": PeftTuning,
}


def main(side: str, path: str, dtype: str) -> None:
    """Answer requests until there are no more.

    Args:
        side: one of SIDES.
        path: the model's folder or file.
        dtype: float32, bfloat16, float16, int8 or int4.
    """
    from llama import parallel

    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        watch = cli.MemoryWatch(interval=0.005)
        worker = SIDES[side](path, dtype)
        while request := parallel.from_rank_0(lambda: json.loads(sys.stdin.readline() or "null")):
            method, arguments = request
            if method == "peak":
                value: Any = watch.peak / 1e6
                watch.status = Path(os.devnull)  # it ends: from now on nothing is to disturb
                if parallel.world_size() > 1:
                    value = max(parallel.gather_objects(value))
            else:
                value = getattr(worker, method)(**arguments)
            if parallel.rank() == 0:
                print(json.dumps(value), file=answers, flush=True)


if __name__ == "__main__":
    cli.run(main)
