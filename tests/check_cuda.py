"""What can be said of the path on GPUs without one: on a pretended card, with the real code.

make check-cuda                                    runs all of it
PYTHONPATH=. .venv/bin/python tests/check_cuda.py  shows the memory that known models take

It says nothing of numbers and speed, nor of what a real driver, nccl or kernel refuses.
"""

import dataclasses
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from pretended_card import CARD, TOKEN, Described, Letters, pretended

from llama.batch import Batch
from llama.generation import LLaMA, load_model
from llama.memory import Plan
from llama.model import Transformer
from llama.tuning.model import add_soft_prompt, soft_prompt_of

SEVEN_B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000, "multiple_of": 256}
EIGHT_B = SEVEN_B | {"n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024}
EIGHT_B |= {"ffn_dim_multiplier": 1.3}
MAX_SEQ_LEN, VIRTUAL = 512, 32
transformers.logging.set_verbosity_error()


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
    "7B, 2 cards, 8 prompts of 100": (Work(SEVEN_B, 2, 8, 100), 7.89),
    "7B, 2 cards, 8 prompts of 511": (Work(SEVEN_B, 2, 8, 511), 7.99),
    "7B, 4 cards, 32 prompts of 100": (Work(SEVEN_B, 4, 32, 100), 5.64),
    "7B, 4 cards, 32 prompts of 511": (Work(SEVEN_B, 4, 32, 511), 5.64),
    "Llama 3 8B, 2 cards, 32 prompts of 511": (Work(EIGHT_B, 2, 32, 511), 9.31),
    "7B, 4 cards, tuning 4 rows": (Work(SEVEN_B, 4, 4), 6.24),
    "7B, 4 cards, tuning 4 rows, checkpointing": (Work(SEVEN_B, 4, 4, checkpointing=True), 4.08),
}
LEAST_PLANNED = 0.998  # of what is then taken: what all tokens share is not counted


@dataclass
class Peak:
    """The most bytes that live on the card at once."""

    peak: int
    floor: int  # of weights and cache
    plan: Plan  # what llama/memory.py says of the same work
    places: list[tuple[str, int]]  # at the peak, beside the weights; the most first


def peak_of(work: Work) -> Peak:
    """Do the work on a pretended card, which counts what lives on it."""
    source = Described(work.params)
    card, tuning = torch.device("cuda"), not work.prompt
    plan = Plan(source, work.n, source.dtype, work.bsz, MAX_SEQ_LEN, card, tuning=tuning)
    if tuning:
        more = {"gradient_checkpointing": work.checkpointing, "num_virtual_tokens": VIRTUAL}
        plan = dataclasses.replace(plan, **more)
    with pretended(0, work.n) as watcher:
        model = load_model(source, CARD)
        assert watcher.ledger.live - plan.weights < 1e6  # norms and such, in whole blocks
        watcher.ledger.restart()
        floor = watcher.ledger.live + plan.cache
        if tuning:
            tune(model, work)
        else:
            generate(model, work)
    ledger = watcher.ledger
    return Peak(ledger.peak, floor, plan, ledger.at_peak.most_common())


def generate(model: Transformer, work: Work) -> None:
    """Read prompts of nearly one length; decode some tokens, and the last there is room for."""
    decode = Batch.decode_one_token

    def decode_and_skip(batch: Batch) -> torch.Tensor:
        for row in batch.rows if len(batch.rows[0].output.token) == 3 else ():
            row.output.token += [TOKEN] * (row.limit - 3 - 2)
        return decode(batch)

    llama = LLaMA(model, Letters(), MAX_SEQ_LEN, work.bsz)
    prompts = [[1] * (work.prompt - i % 3) for i in range(work.bsz)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "decode_one_token", decode_and_skip)
        llama.generate(prompts, max_gen_len=MAX_SEQ_LEN)


def tune(model: Transformer, work: Work) -> None:
    """Two steps, as the Trainer makes them, on rows of which every token is learned."""
    model.gradient_checkpointing = work.checkpointing
    tuned = add_soft_prompt(model, VIRTUAL, [1, 2, 3], "nowhere")
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


@pytest.mark.parametrize("name", WORKS)
def test_known_models_take_no_more_memory_than_said(name):
    work, most = WORKS[name]
    found = peak_of(work)
    assert found.peak <= most * 1e9
    assert found.plan.total >= LEAST_PLANNED * found.peak


def show_memory() -> None:
    """Print the peaks of all WORKS, and what they consist of."""
    for name, (work, most) in WORKS.items():
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(show_memory())
