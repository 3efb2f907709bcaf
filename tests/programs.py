"""What tests run on several ranks: one function each, started by conftest.on_ranks.

Start reading at load(), which most of them call; main() runs the one that is named.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llama import LLaMA, Tuned, cli, parallel
from llama.cache import KVCache
from llama.checkpoint.formats import open_any
from llama.generation import load_model
from llama.options import GenerationOptions, SamplingParams
from llama.prompts import complete, read_prompts, read_requests, report
from llama.sampling import Sampler


def load(ckpt_dir: str | Path, dtype: torch.dtype | None = None):
    """This rank's part of a checkpoint of any format as a model."""
    return load_model(open_any(ckpt_dir), parallel.setup(), dtype)


@torch.inference_mode()
def logits(folders: list[str], ids: list) -> dict:
    """The logits of token ids by each of several models, which must be equal on all ranks.

    And the collectives of a step of the first model.
    """
    found, calls = [], None
    for folder in folders:
        model = load(folder)
        found.append(model(torch.tensor(ids)).tolist())
        calls = calls or collectives_of_a_step(model)
        assert all(other == found[-1] for other in parallel.gather_objects(found[-1]))
    return {"logits": found, "collectives": calls}


def collectives_of_a_step(model) -> list[str]:
    """The names of the collectives that generating one token calls."""
    calls, cache = [], KVCache(model, 1, 8)

    def counting(name, collective):
        return lambda *args, **kwargs: (calls.append(name), collective(*args, **kwargs))[1]

    for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce"):
        setattr(dist, name, counting(name, getattr(dist, name)))
    h = model.hidden_states(torch.tensor([[3]]), cache=cache, start_pos=[0])
    Sampler(SamplingParams(temperature=0), torch.Generator()).next_ids(
        model.gather_logits(h[:, -1])
    )
    return list(calls)


SAMPLING = {"max_gen_len": 12, "temperature": 0.9, "top_p": 0.9, "seed": 4, "top_k": 20}
SAMPLING |= {"min_p": 0.01, "repetition_penalty": 1.2, "stop": ["d"]}
MAX_BATCH_SIZE = 3  # less than there are prompts


def generated_tokens(models: list, prompts: list[str]) -> list:
    """What each of several models, of (folder, tokenizer), generates; the last one sampled too."""
    tokens = []
    for ckpt_dir, tokenizer_path in models:
        generator = LLaMA.build(ckpt_dir, tokenizer_path, max_batch_size=MAX_BATCH_SIZE)
        outputs = generator.generate(prompts, max_gen_len=16, temperature=0)
        tokens.append([output.token for output in outputs])
    sampled = generator.generate(prompts, **SAMPLING)
    return [*tokens, [output.token for output in sampled]]


def tuned_tokens(model: list, prompts: list[str]) -> list:
    """What a model, of (folder, tokenizer), generates with several soft prompts side by side."""
    generator = LLaMA.build(*model, max_batch_size=MAX_BATCH_SIZE)
    chance, dim = torch.Generator().manual_seed(3), generator.model.args.dim
    soft_prompts = [torch.randn(n, dim, generator=chance) / 2 for n in (7, 2)] + [None]
    tuned = [Tuned(prompt, soft) for prompt in prompts for soft in soft_prompts]
    return [output.token for output in generator.generate(tuned, max_gen_len=8, temperature=0)]


def smollm2(ckpt_dir: str, ids: list[int], out: str) -> list:
    """Save the logits of token ids; what is generated after the known prompts."""
    generator = LLaMA.build(ckpt_dir, ckpt_dir)
    with torch.inference_mode():
        found = generator.model(torch.tensor([ids]))
    if parallel.rank() == 0:
        torch.save(found, out)
    outputs = generator.generate(read_prompts(None), max_gen_len=20, temperature=0)
    return [output.token for output in outputs]


def memory_to_load(folders: list[str]) -> list[int]:
    """How much the memory of any rank grows while it loads each of several models, in bytes."""
    parallel.setup()
    found = []
    for folder in folders:
        watch = cli.MemoryWatch(interval=0.001)
        time.sleep(0.1)
        before, model = watch.peak, load(folder)
        found.append(max(parallel.gather_objects(watch.peak - before)))
        del model
    return found


def gradient(ckpt_dir: str, batch: dict, checkpointing: bool) -> dict:
    """The loss of a batch and the gradient of a prompt, which must be the same on every rank."""
    from llama.tuning.model import add_soft_prompt, soft_prompt_of  # slow to import

    model = load(ckpt_dir)
    model.gradient_checkpointing = checkpointing
    tuned = add_soft_prompt(model, 16, list(range(50, 66)), ckpt_dir)
    loss = tuned(**{name: torch.tensor(rows) for name, rows in batch.items()}).loss
    loss.backward()
    found = soft_prompt_of(tuned).grad.tolist()
    assert all(other == found for other in parallel.gather_objects(found))
    return {"loss": loss.item(), "gradient": found}


def evaluated(**options) -> str:
    """What evaluate.py prints with these options."""
    from llama.tuning import evaluate  # slow to import
    from llama.tuning.options import EvaluationOptions

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluate.main(EvaluationOptions(**options))
    return printed.getvalue()


def replicas(ckpt_dir: str, tokenizer_path: str, runs: list[dict], generations: list) -> list[str]:
    """Tune and generate, by replicas of a model; what each generation prints, on this rank.

    runs: options of ft_main.py; with "copy", a checkpoint's folder that the run is to begin from.
    generations: options of example.py.
    """
    import ft_main
    from llama.tuning.options import TuningOptions

    printed = []
    for options in generations:
        common = {"ckpt_dir": ckpt_dir, "tokenizer_path": tokenizer_path}
        flags = GenerationOptions(**common, **options)
        requests = read_requests(flags)
        how = {"max_batch_size": flags.max_batch_size, "tensor_parallel": flags.tensor_parallel}
        generator = LLaMA.build(ckpt_dir, tokenizer_path, **how)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            complete(generator, requests, flags)
        report(generator.timing, cli.MemoryWatch())
        printed.append(out.getvalue())
    for options in runs:
        copied = options.pop("copy", None)
        if copied and parallel.rank() == 0:
            shutil.copytree(copied, Path(options["output_dir"], Path(copied).name))
        if copied:
            dist.barrier()
        with contextlib.redirect_stdout(io.StringIO()):
            ft_main.main(TuningOptions(**options))
    return printed


def all_of(calls: list) -> list:
    """Call several of these functions, each by its name and values; what they return."""
    return [globals()[name](**values) for name, values in calls]


def fail(rank: int, how: str) -> None:
    """One rank fails, before it joins the group or amid collectives; the others wait for it."""
    if parallel.rank() == rank and how == "before setup":
        raise ValueError("only I know")
    parallel.setup()
    for step in range(10**6):
        if parallel.rank() == rank and step == 50:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "aborted":
                os.abort()
            raise (ValueError if how == "damage" else KeyError)("only I know")
        dist.all_reduce(torch.ones(1))


def come_late() -> str:
    """Meet, where rank 1 takes longer than the others' patience."""
    parallel.setup()
    dist.barrier()  # or one that was slow to start would be waited for too
    parallel.PATIENCE = timedelta(seconds=1)
    if parallel.rank() == 1:
        time.sleep(2.5)
    parallel.meet("to wake up")
    return "met"


def sleep_when_ready() -> None:
    """Join the group, say so, and stay."""
    parallel.setup()
    os.write(1, b"ready\n")  # at once, as both do
    time.sleep(60)


def main(name: str, values: str) -> None:
    """Run one of the functions above; rank 0 prints what it returns, as JSON."""
    result = globals()[name](**json.loads(Path(values).read_text()))
    if parallel.rank() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
