"""What tests run on several ranks: one function each, started by conftest.on_ranks.

Start reading at logits(). Heavy imports stand inside the functions: each rank pays for its own.
"""

import json
import os
import signal
import time
from pathlib import Path


def load(ckpt_dir: str, dtype=None):
    """This rank's part of a checkpoint as a model."""
    from llama import parallel
    from llama.checkpoint.folder import Checkpoint
    from llama.generation import load_model

    return load_model(Checkpoint(ckpt_dir), parallel.setup(), dtype)


def logits(folders: list[str], ids: list) -> list:
    """The logits of token ids by each of several models, which must be equal on all ranks."""
    import torch

    from llama import parallel

    found = []
    for folder in folders:
        model = load(folder)
        with torch.inference_mode():
            found.append(model(torch.tensor(ids)))
        sums = parallel.gather_objects(found[-1].double().sum().item())
        assert len(set(sums)) == 1, sums
    return [logits.tolist() for logits in found]


def collectives_of_a_step(ckpt_dir: str) -> list[str]:
    """The names of the collectives that generating one token calls."""
    import torch
    import torch.distributed as dist

    from llama.generation import Sampling, sample_on_rank_0
    from llama.model import KVCache

    calls = []

    def counting(name, collective):
        def counted(*args, **kwargs):
            calls.append(name)
            return collective(*args, **kwargs)

        return counted

    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    model = load(ckpt_dir)
    cache = KVCache(model, 1, 8)
    calls.clear()
    with torch.inference_mode():
        h = model.hidden_states(torch.tensor([[3]]), cache=cache, start_pos=[0])
        sample_on_rank_0(model.gather_logits(h[:, -1]), Sampling(0, 1.0, torch.Generator()))
    return calls


def greedy_tokens(models: list, prompts: list[str], max_gen_len: int) -> list:
    """What each of several models, of (folder, tokenizer), generates."""
    from llama import LLaMA

    tokens = []
    for ckpt_dir, tokenizer_path in models:
        generator = LLaMA.build(ckpt_dir, tokenizer_path, max_seq_len=512)
        outputs = generator.generate(prompts, max_gen_len=max_gen_len, temperature=0)
        tokens.append([output.token for output in outputs])
    return tokens


def smollm2(ckpt_dir: str, ids: list[int], out: str) -> list:
    """Save the logits of token ids; what is generated after the known prompts."""
    import torch

    from llama import LLaMA, parallel
    from llama.prompts import read_prompts

    generator = LLaMA.build(ckpt_dir, ckpt_dir)
    with torch.inference_mode():
        found = generator.model(torch.tensor([ids]))
    if parallel.rank() == 0:
        torch.save(found, out)
    outputs = generator.generate(read_prompts(None), max_gen_len=64, temperature=0)
    return [output.token for output in outputs]


def peak_memory(ckpt_dir: str) -> list[int]:
    """The peak of each rank's memory while it loads, in bytes."""
    from llama.cli import MemoryWatch

    watch = MemoryWatch(interval=0.001)
    from llama import parallel

    model = load(ckpt_dir)
    assert model is not None
    return parallel.gather_objects(watch.peak)


def gradient(ckpt_dir: str, batch: dict, checkpointing: bool) -> dict:
    """The loss of a batch and the gradient of a prompt, which must be the same on every rank."""
    import torch

    from llama import parallel
    from llama.tuning.model import add_soft_prompt, soft_prompt_of

    model = load(ckpt_dir)
    model.gradient_checkpointing = checkpointing
    tuned = add_soft_prompt(model, 16, list(range(50, 66)), ckpt_dir)
    loss = tuned(**{name: torch.tensor(rows) for name, rows in batch.items()}).loss
    loss.backward()
    found = soft_prompt_of(tuned).grad.tolist()
    everywhere = parallel.gather_objects(found)
    assert all(other == found for other in everywhere)
    return {"loss": loss.item(), "gradient": found}


def join() -> None:
    """Join the group, and end without leaving it."""
    from llama import parallel

    parallel.setup()


def fail_alone(rank: int, error: str, before_setup: bool = False) -> None:
    """One rank fails; the others wait for it, or for nobody where there is no group yet."""
    import torch

    from llama import parallel

    if not before_setup:
        parallel.setup()
    if parallel.rank() == rank:
        if error == "too much memory":
            torch.empty(1 << 50)
        kinds = (ValueError, KeyError, MemoryError, torch.OutOfMemoryError)
        kind, _, message = error.partition(": ")
        raise {kind.__name__: kind for kind in kinds}[kind](message)
    parallel.setup()
    while True:
        torch.distributed.all_reduce(torch.ones(1))


def die_at_work(rank: int) -> None:
    """One rank is killed amid collectives."""
    import torch

    from llama import parallel

    parallel.setup()
    for step in range(10**6):
        if parallel.rank() == rank and step == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(1))


def pretend_one_card() -> None:
    """Set up where torch shows a single card."""
    import torch

    from llama import parallel

    torch.cuda.device_count = lambda: 1
    parallel.setup()


def sleep_when_ready() -> None:
    """Join the group, say so, and stay."""
    from llama import parallel

    parallel.setup()
    print("ready", flush=True)
    time.sleep(60)


def talk() -> list:
    """What the ranks tell each other."""
    from llama import cli, parallel

    parallel.setup()
    cli.say("once")
    return parallel.gather_objects(parallel.rank() * 10)


def watched_memory(path: str) -> list[int]:
    """How much the watched peak grows by reading a mapped file of 64 MB, and by holding as much."""
    import torch

    from llama.cli import MemoryWatch

    torch.save(torch.ones(16 << 20), path)
    watch, peaks = MemoryWatch(interval=0.001), []
    mapped = torch.load(path, mmap=True)
    for work in (torch.zeros_like, torch.sum, torch.clone):
        before, kept = watch.peak, work(mapped if work is not torch.zeros_like else mapped[:1])
        time.sleep(0.1)
        peaks.append(watch.peak - before)
        del kept
    return peaks[1:]


def main(name: str, values: str) -> None:
    """Run one of the functions above; rank 0 prints what it returns, as JSON."""
    result = globals()[name](**json.loads(Path(values).read_text()))
    from llama import parallel

    if parallel.rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    from llama import cli

    cli.run(main)
