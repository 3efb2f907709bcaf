"""What check_gpu.py has done in processes of their own: a function each, run by main().

Each returns what it found, for JSON. Where there is no card, all of it runs on the CPU.
"""

import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import machine
from random_model import LLAMA_2_7B, RandomSource, random_source
from reshard import TOKENIZER
from sides import Llama, prompt_of, seconds, tuning_step

from llama import LLaMA, Tokenizer, cli, parallel
from llama.cache import KVCache
from llama.checkpoint.weights import EMBEDDING, OUTPUT, cut_of
from llama.checkpoint.write import write_checkpoint
from llama.files import load_plain, write_whole
from llama.generation import load_model
from llama.memory import ROOM, Free
from llama.model import Transformer
from llama.options import dtype_name
from llama.plan import Plan

# It cuts for 1, 2, 4 and 8 cards, quantised too.
SMALL = {"dim": 128, "n_layers": 3, "n_heads": 8, "n_kv_heads": 2, "head_dim": 32}
SMALL |= {"vocab_size": 576, "multiple_of": 256, "norm_eps": 1e-5}
REFERENCE = "reference.pt"
# How a model is loaded on the card; with whose logits by the CPU, in float32, it is compared; and
# how much they may differ: the norm of the difference over that of the CPU's. Between CPUs it was
# 2e-6 in float32, 0.07 in bfloat16 and 0.01 in float16, since such weights make attention sharp.
# TF32 is as float16; a wrong position or mask makes it about 1.
VARIANTS: dict[str, tuple[dict, str, float]] = {
    "float32": ({"dtype": "float32"}, "float32", 1e-3),
    "bfloat16": ({"dtype": "bfloat16"}, "float32", 0.15),
    "float16": ({"dtype": "float16"}, "float32", 0.03),
    "int8": ({"quantize": "int8"}, "int8", 1e-3),
    "int4": ({"quantize": "int4"}, "int4", 1e-3),
    "offload": ({"offload": 2}, "float32", 1e-3),
}
LOOSE = ("bfloat16", "float16")  # in which greedy texts may differ
SIZES = {
    "1B": {
        **{"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256},
        **{"ffn_dim_multiplier": 1.5, "multiple_of": 256, "rope_theta": 500000.0},
    },
    "7B": LLAMA_2_7B,
    "tiny": SMALL,
}
VIRTUAL = 32
MOST_MEMORY = 1.1  # of what the plan says may be allocated
ROUNDS = 5


def environment() -> dict:
    """The cards of this machine, and what drives them."""
    found, n = machine(), torch.cuda.device_count()
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cards": []}
    found["float32"] = torch.get_float32_matmul_precision()  # "highest" is without TF32
    for i in range(n):
        card, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        about = {"name": card.name, "capability": f"{card.major}.{card.minor}"}
        about |= {"processors": card.multi_processor_count, "bytes": total, "free": free}
        about["reaches"] = [
            j for j in range(n) if i != j and torch.cuda.can_device_access_peer(i, j)
        ]
        found["cards"].append(about)
    if n:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout
        found["driver"] = said.split("\n")[0].strip()
    return found


def rate(amount: float, work: Callable[[], object], times: int) -> float:
    """How much a second, of work that does so much: the median of rounds of several times."""
    seconds(work)  # to warm up
    taken = [seconds(lambda: [work() for _ in range(times)]) for _ in range(ROUNDS)]
    return times * amount / statistics.median(taken)


def roofline(tiny: bool) -> dict:
    """Bytes read and written a second by a copy on the device, and FLOP a second of products."""
    device = parallel.setup()
    n_bytes, size = (1 << 20, 128) if tiny else (1 << 29, 8192)
    buffers = torch.randint(255, (2, n_bytes), dtype=torch.uint8, device=device)
    found = {"copy": rate(2 * n_bytes, lambda: buffers[1].copy_(buffers[0]), 10)}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b, product = torch.randn(3, size, size, device=device).to(dtype)
        found[dtype_name(dtype)] = rate(
            2 * size**3, functools.partial(torch.mm, a, b, out=product), 3
        )
    return found


def write_model(folder: Path, std: float = 0.5) -> None:
    """Write the small model, with a tokenizer."""
    source = random_source(SMALL, std=std)
    source.files = {"tokenizer.model": TOKENIZER}
    write_checkpoint(source, folder)


def answers(ckpt_dir: str | Path, **flags: object) -> dict[str, torch.Tensor]:
    """What a model computes: logits (2, 48, vocab_size) of every kind of pass, and greedy tokens.

    A prompt read in two chunks, then steps of one token, at last with the second row behind.
    """
    generator = LLaMA.build(ckpt_dir, max_seq_len=128, max_batch_size=3, **flags)  # type: ignore[arg-type]
    generator.tokenizer.stop_ids = frozenset()
    model, device = generator.model, generator.device
    ids = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(1)).to(device)
    cache, found = KVCache(model, 2, 48), []
    passes = [([0, 0], 20), ([20, 20], 12), *(([i, i], 1) for i in range(32, 40))]
    passes += [([i, i - 4], 1) for i in range(40, 48)]
    with torch.inference_mode():
        for starts, n in passes:
            tokens = torch.stack([row[at : at + n] for row, at in zip(ids, starts)])
            h = model.hidden_states(tokens, cache=cache, start_pos=starts)
            found.append(model.gather_logits(h))
    prompts = [prompt_of(n) for n in (5, 70, 9, 6)]  # one more than run together
    outputs = generator.generate(prompts, 24, temperature=0)
    tokens = torch.tensor([output.token for output in outputs])
    return {"logits": torch.cat(found, 1).cpu(), "tokens": tokens}


def reference(folder: Path) -> dict:
    """Keep what the CPU computes, in float32."""
    found = {}
    for name in dict.fromkeys(of for _, of, _ in VARIANTS.values()):
        computed = answers(folder / "ckpt", **VARIANTS[name][0])
        found |= {f"{name}.{key}": x for key, x in computed.items()}
    with write_whole(folder / REFERENCE) as partial:
        torch.save(found, partial)
    return {}


def parity(folder: Path) -> dict:
    """Compare what these ranks compute, in each variant, with what the CPU did."""
    expected = load_plain(folder / REFERENCE)
    found: dict = {"ranks": parallel.world_size(), "variants": {}, "faults": []}
    for name, (flags, of, most) in VARIANTS.items():
        computed, logits = answers(folder / "ckpt", **flags), expected[f"{of}.logits"]
        error = float((computed["logits"] - logits).norm() / logits.norm())
        same = float((computed["tokens"] == expected[f"{of}.tokens"]).float().mean())
        found["variants"][name] = {"error": error, "most": most, "same_tokens": same}
        if not error <= most:  # and not >, which is false for NaN
            found["faults"].append(f"{name}: logits differ by {error:.2g}, above {most:g}")
        if same < 1 and name not in LOOSE:
            found["faults"].append(f"{name}: {1 - same:.0%} of greedy tokens differ from the CPU's")
    return found


def kill(folder: Path) -> None:
    """Generate until rank 1 is killed, which notes when; each rank notes its process id."""
    (folder / f"rank{parallel.rank()}").write_text(str(os.getpid()))
    generator = LLaMA.build(folder / "ckpt")
    generator.tokenizer.stop_ids = frozenset()

    def end() -> None:
        (folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if parallel.rank() == 1:
        threading.Timer(1, end).start()
    while True:
        generator.generate([prompt_of(8)], 400, temperature=0)


class OnDevice(RandomSource):
    """Random weights, made on the device when a rank asks for its part: nothing is read."""

    def __init__(self, params: dict, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(params, dtype, std=0.02)
        self.device = device

    def part(self, name: str, rank: int, n: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What rank of n ranks holds of the weight."""
        shape = cut_of(name, self.args, n).shape(self.shapes[name])
        part = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return part.normal_(float(len(shape) == 1), self.std)

    def work_to_save(self, n: int, dtype: torch.dtype | None) -> str:
        """No work that could be saved."""
        return ""


def flop_of(source: RandomSource, bsz: int, seqlen: int, n_logits: int) -> tuple[int, int]:
    """FLOP of a forward pass over whole sequences: of products with weights, and of attention."""
    args, once = source.args, (EMBEDDING, OUTPUT)
    sizes = {name: shape for name, shape in source.shapes.items() if len(shape) == 2}
    matrices = sum(a * b for name, (a, b) in sizes.items() if name not in once)
    products = 2 * (bsz * seqlen * matrices + n_logits * args.vocab_size * args.dim)
    return products, 2 * args.n_layers * args.q_dim * bsz * seqlen**2  # half is masked


class Speed:
    """Speed and peak memory of a model of random weights of one of SIZES."""

    def __init__(self, size: str, folder: Path) -> None:
        self.device, self.tiny = parallel.setup(), size == "tiny"
        self.on_card = self.device.type == "cuda"
        fast = not self.on_card or torch.cuda.get_device_capability(self.device) >= (8, 0)
        self.dtype = torch.bfloat16 if fast else torch.float16
        self.source = OnDevice(SIZES[size] | {"norm_eps": 1e-5}, self.dtype, self.device)
        self.tokenizer = Tokenizer(folder / "ckpt" / "tokenizer.model")
        self.tokenizer.n_rows = self.source.args.vocab_size
        self.tokenizer.stop_ids = frozenset()
        self.free = Free.now(self.device)  # before anything is there
        self.found: dict = {"dtype": dtype_name(self.dtype), "measures": {}, "faults": []}

    def run(self) -> dict:
        """Measure all that fits on the card.

        Of each measure: seconds of a pass; its bytes or FLOP, to compare with the roofline; peaks
        of allocated and reserved memory, and what the plan says.
        """
        steps, prompt, rows, length = (4, 8, 2, 48) if self.tiny else (64, 16, 8, 512)
        plan = Plan(self.source, 1, self.dtype, 1, prompt + steps + 1, self.device)
        if not self.free.holds(plan):
            return self.found | {"left_out": self.shortage(plan)}
        model, side = load_model(self.source, self.device), Llama("", dtype_name(self.dtype))
        side.generator = LLaMA(model, self.tokenizer, 2 * length, rows)
        n_bytes = sum(x.nbytes for name, x in model.state_dict().items() if name != EMBEDDING)
        for bsz in (1, rows):
            work = functools.partial(side.decode, bsz, prompt, steps)
            name, about = f"decode, batch {bsz}", {"unit": "tokens/s", "bytes": n_bytes}
            self.measure(name, plan.but(bsz=bsz), work, bsz, about)
        for bsz in (1, rows):
            work = functools.partial(side.prefill, length, bsz)
            flop = sum(flop_of(self.source, bsz, length, bsz))
            name, about = f"prefill, {bsz} × {length}", {"unit": "tokens/s", "flop": flop}
            self.measure(name, plan.but(bsz=bsz, seqlen=length + 1), work, bsz * length, about)
        self.tune(plan.but(bsz=4, seqlen=length), model)
        return self.found

    def tune(self, plan: Plan, model: Transformer) -> None:
        """Measure steps of prompt tuning, with half of each text learned."""
        from llama.tuning.model import add_soft_prompt  # slow to import

        text = plan.seqlen - VIRTUAL
        learned = text - text // 2
        products, attention = flop_of(self.source, plan.bsz, plan.seqlen, plan.bsz * learned)
        # Backward, to the input alone, takes as much as forward; attention's twice as much.
        about = {"unit": "steps/s", "flop": 2 * products + 3 * attention}
        plan = plan.but(tuning=True, num_virtual_tokens=VIRTUAL, learned=learned)
        # as ft_main.py does
        model.recompute_ffn = not self.free.holds(plan.but(recompute_ffn=False), ROOM)
        plan = plan.but(recompute_ffn=model.recompute_ffn)
        tuned = add_soft_prompt(model, VIRTUAL, None, "random weights")
        step = tuning_step(tuned, self.source.args.vocab_size, plan.bsz, text)
        name = f"tuning, {plan.bsz} × {plan.seqlen}"
        self.measure(name, plan, lambda: 1 / seconds(step), 1, about)

    def measure(
        self, name: str, plan: Plan, work: Callable[[], float], per_pass: int, about: dict
    ) -> None:
        """Do work, which says how much a second it did, again and again; how much a pass does."""
        if not self.free.holds(plan):
            self.found["measures"][name] = {"left_out": self.shortage(plan)}
            return
        work()  # to warm up
        if self.on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        rates = [work() for _ in range(ROUNDS)]
        allocated, reserved = parallel.device_peaks()
        about |= {"rate": statistics.median(rates), "rates": rates}
        about |= {"seconds": per_pass / about["rate"], "planned": plan.total}
        about |= {"allocated": allocated, "reserved": reserved}
        self.found["measures"][name] = about
        if allocated > MOST_MEMORY * plan.total:
            more = f"{allocated:,} bytes were allocated, and {plan.total:,} planned"
            self.found["faults"].append(f"{name}: {more}")

    def shortage(self, plan: Plan) -> str:
        """What a plan needs, and what there is."""
        return f"needs {plan.total / 1e9:.1f} GB, {self.free.device / 1e9:.1f} are free"


def main(step: str, folder: str, result: str, tiny: bool = False, size: str = "") -> None:
    """Run one of the functions above on the ranks that there are; rank 0 writes what it found.

    Args:
        step: its name.
        folder: where the model is, and the CPU's answers.
        result: the file to write.
        tiny: take sizes for a CPU.
        size: one of SIZES.
    """
    path = Path(folder)
    works = {"environment": environment, "roofline": lambda: roofline(tiny)}
    works |= {"reference": lambda: reference(path), "parity": lambda: parity(path)}
    works |= {"kill": lambda: kill(path), "speed": lambda: Speed(size, path).run()}
    found = works[step]()
    faults = found.pop("faults", [])
    if parallel.rank() == 0:
        Path(result).write_text(json.dumps(found))
    if faults:
        raise ValueError("; ".join(faults))


if __name__ == "__main__":
    cli.run(main)
