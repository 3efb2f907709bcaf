"""Models of which only the shapes are there, and the memory that they take on a pretended card.

PYTHONPATH=.:benchmarks .venv/bin/python tests/pretended_models.py [words]

prints what takes the most, of those WORKS whose names have all of these words; and "table" as the
only word the README's table. Start reading at peak_of().
"""

import sys
import types
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from pretended_card import CARD, TOKEN, pretended
from random_model import LLAMA_2_7B as SEVEN_B

from llama.batch import Batch
from llama.checkpoint.weights import Source, cut_of
from llama.generation import LLaMA, load_model
from llama.model import Transformer
from llama.plan import Plan
from llama.tuning.model import add_soft_prompt, soft_prompt_of

EIGHT_B = SEVEN_B | {"n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
EIGHT_B |= {"ffn_dim_multiplier": 1.3}
MODELS = {
    "Llama 2 7B": SEVEN_B,
    "Llama 3 8B": EIGHT_B,
    "Llama 2 13B": SEVEN_B | {"dim": 5120, "n_layers": 40, "n_heads": 40},
    "Llama 2 70B": {
        **{"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "vocab_size": 32000},
        **{"multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    },
}
MAX_SEQ_LEN, VIRTUAL = 512, 32
END = 0  # the token that ends a text
# As much of a tokenizer as generation asks for.
TOKENIZER = types.SimpleNamespace(stop_ids=frozenset({END}), decode=lambda ids: "x" * len(ids))
transformers.logging.set_verbosity_error()


class Described(Source):
    """A checkpoint of which only the shapes are there."""

    def __init__(self, params: dict, dtype: torch.dtype = torch.float16) -> None:
        super().__init__("a model of no content", params, dtype)

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Rows or columns of a weight."""
        whole = torch.empty(self.shapes[name], dtype=self.dtype)
        return whole.narrow(dim, start, (whole.shape[dim] if stop is None else stop) - start)

    def part(self, name: str, rank: int, n: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What a rank holds of a weight, at once."""
        shape = cut_of(name, self.args, n).shape(self.shapes[name])
        return torch.empty(shape, dtype=self.dtype_of(name, dtype))

    def work_to_save(self, n: int, dtype: torch.dtype | None) -> str:
        """Nothing that is worth a message."""
        return ""


@dataclass(frozen=True)
class Work:
    """What a model in float16 does on the first of n cards: tuning, or generation from prompts."""

    params: dict
    n: int
    bsz: int
    prompt: int = 0  # tokens; 0: tuning on rows of MAX_SEQ_LEN
    checkpointing: bool = False


# with the most GB that a card may give for it at once: what is measured today, to be lowered
WORKS = {
    "7B, 2 cards, 8 prompts of 100": (Work(SEVEN_B, 2, 8, 100), 7.87),
    "7B, 2 cards, 8 prompts of 511": (Work(SEVEN_B, 2, 8, 511), 7.96),
    "7B, 4 cards, 32 prompts of 100": (Work(SEVEN_B, 4, 32, 100), 5.62),
    "7B, 4 cards, 32 prompts of 511": (Work(SEVEN_B, 4, 32, 511), 5.62),
    "Llama 3 8B, 2 cards, 32 prompts of 511": (Work(EIGHT_B, 2, 32, 511), 9.30),
    "7B, 4 cards, tuning 4 rows": (Work(SEVEN_B, 4, 4), 5.16),
    "7B, 4 cards, tuning 4 rows, checkpointing": (Work(SEVEN_B, 4, 4, checkpointing=True), 3.85),
}
LEAST_PLANNED = 0.998  # of what is then taken: what all tokens share is not counted


@dataclass
class Peak:
    """The most bytes that live on the card at once."""

    peak: int
    floor: int  # of weights and cache
    plan: Plan
    places: list[tuple[str, int]]  # at the peak, beside the weights; the most first


def plan_of(work: Work) -> Plan:
    """What llama/memory.py says of the work."""
    source, card, tuning = Described(work.params), torch.device("cuda"), not work.prompt
    plan = Plan(source, work.n, source.dtype, work.bsz, MAX_SEQ_LEN, card, tuning=tuning)
    more = {"gradient_checkpointing": work.checkpointing, "num_virtual_tokens": VIRTUAL}
    return replace(plan, **more) if tuning else plan


def peak_of(work: Work) -> Peak:
    """Do the work on a pretended card, which counts what lives on it."""
    source, plan = Described(work.params), plan_of(work)
    with pretended(0, work.n) as watcher:
        transformer = load_model(source, CARD)
        assert watcher.ledger.live - plan.weights < 1e6  # norms and such, in whole blocks
        watcher.ledger.restart()
        floor = watcher.ledger.live + plan.cache
        if plan.tuning:
            tune(transformer, work)
        else:
            generate(transformer, work)
    ledger = watcher.ledger
    return Peak(ledger.peak, floor, plan, ledger.at_peak.most_common())


def peak_from_few_layers(work: Work) -> int:
    """The bytes at the peak, from models of few layers, which are alike."""
    n, pair = work.params["n_layers"], (2, 4)
    few, more = (peak_of(replace(work, params=work.params | {"n_layers": x})).peak for x in pair)
    return few + (n - 2) * (more - few) // 2


def generate(transformer: Transformer, work: Work) -> None:
    """Read prompts of nearly one length; decode some tokens, and the last there is room for."""
    decode = Batch.decode_one_token

    def decode_and_skip(batch: Batch) -> torch.Tensor:
        for row in batch.rows if len(batch.rows[0].output.token) == 3 else ():
            row.output.token += [TOKEN] * (row.limit - 3 - 2)
        return decode(batch)

    llama = LLaMA(transformer, TOKENIZER, MAX_SEQ_LEN, work.bsz)
    prompts = [[1] * (work.prompt - i % 3) for i in range(work.bsz)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "decode_one_token", decode_and_skip)
        llama.generate(prompts, max_gen_len=MAX_SEQ_LEN)


def tune(transformer: Transformer, work: Work) -> None:
    """Two steps, as the Trainer makes them, on rows of which every token is learned."""
    transformer.gradient_checkpointing = work.checkpointing
    tuned = add_soft_prompt(transformer, VIRTUAL, [1, 2, 3], "nowhere")
    prompt = soft_prompt_of(tuned)
    optimizer = torch.optim.AdamW([prompt], fused=True)  # the Trainer's default
    shape = (work.bsz, MAX_SEQ_LEN - VIRTUAL)
    names = ("input_ids", "attention_mask", "labels")
    batch = {name: torch.ones(shape, dtype=torch.long, device=CARD) for name in names}
    for _ in range(2):
        tuned(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.step()
        optimizer.zero_grad()


def show_memory(*words: str) -> None:
    """Print the peaks of the WORKS that are meant, and what they consist of."""
    for name in [name for name in WORKS if all(word in name for word in words)]:
        work, most = WORKS[name]
        found = peak_of(work)
        above, planned = found.peak - found.floor, found.plan.total
        print(
            f"{name}: {found.peak / 1e9:.3f} GB, of which {found.floor / 1e9:.3f} are weights and "
            f"cache: {above / found.floor:.1%} above them, {above / 1e6:.0f} MB; planned are "
            f"{planned / 1e9:.3f}, and {most} allowed"
        )
        for place, size in found.places[:14]:
            if size >= 1e6:
                print(f"{size / 1e6:12.1f} MB  {place}")


def show_table() -> None:
    """Print the most GB on each of 1 to 8 cards: 8 prompts, 32 prompts, tuning on 4 rows."""
    counts = (1, 2, 4, 8)
    print("| |", *(f"{n} card{'s' * (n > 1)} |" for n in counts))
    print("|---" * (1 + len(counts)) + "|")
    for name, params in MODELS.items():
        cells = []
        for n in counts:
            works = (Work(params, n, 8, 511), Work(params, n, 32, 511), Work(params, n, 4))
            cells.append(" / ".join(f"{peak_from_few_layers(x) / 1e9:.1f}" for x in works))
        print(f"| {name} |", *(f"{cell} |" for cell in cells), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["table"]:
        show_table()
    else:
        show_memory(*sys.argv[1:])
