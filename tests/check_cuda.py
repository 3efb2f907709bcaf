"""What can be said of the path on GPUs without one: on a pretended card, with the real code.

make check-cuda runs it, in a process of its own, since it adds a device to torch. What it cannot
tell: numbers, speed, and what a real driver, nccl or kernel refuses.
"""

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_script
from pretended_card import CARD, TOKEN, Driver, Watcher, pretended, rank_of_run
from pretended_models import (
    END,
    LEAST_PLANNED,
    TOKENIZER,
    WORKS,
    Described,
    peak_from_few_layers,
    plan_of,
)
from torch import Tensor

from llama import layers, model, parallel
from llama.batch import Batch
from llama.cache import KVCache
from llama.checkpoint.quantized import quantized
from llama.generation import LLaMA, load_model
from llama.model import Transformer
from llama.output import Tuned
from llama.tuning.data import collate, own_rows
from llama.tuning.model import add_soft_prompt, encoder_of
from llama.tuning.options import TuningOptions
from llama.tuning.trainer import training_arguments

TINY = {"dim": 256, "n_layers": 2, "n_heads": 8, "vocab_size": 256, "multiple_of": 256}
SOFT_PROMPT = torch.zeros(5, TINY["dim"])  # on the CPU, as it is loaded
WAITS_A_STEP = 2  # of the host for the card: the token that comes, and where the next is to go


# -- setup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_rank", "ranks", "cards", "visible", "after"),
    [
        (0, 1, 4, None, "0"),
        (3, 4, 4, None, "3"),
        (1, 2, 8, None, "1"),
        (1, 2, 4, "2,3", "3"),
        (1, 3, 4, "3,0,1", "0"),
        (0, 1, 4, "2,-1,3", "2"),
        (1, 2, 4, "GPU-3,GPU-1", "GPU-1"),
    ],
)
@pytest.mark.parametrize("node", [0, 1])
def test_a_rank_takes_the_card_of_its_own_and_sees_no_other(
    local_rank, ranks, cards, visible, after, node
):
    variables = {"LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": ranks, "LLAMA_TIMEOUT_HOURS": 2}
    variables |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    rank, world = node * ranks + local_rank, (1 + node) * ranks
    with rank_of_run(rank, world, Driver(cards), **variables) as found:
        assert found.device == torch.device("cuda:0") == found.bound_to
        assert found.visible == after
        assert (found.backend, found.timeout) == ("nccl", timedelta(hours=2))
        assert found.card_in_use == 0  # before nccl connects


def test_where_the_driver_was_asked_before_a_rank_still_takes_its_own_card():
    with rank_of_run(3, 4, Driver(4), read_before=True) as found:
        assert found.device == torch.device("cuda:3") == found.bound_to


@pytest.mark.parametrize(("cards", "visible"), [(0, None), (4, ""), (4, "-1"), (4, "1,1")])
def test_without_cards_ranks_work_on_the_cpu(cards, visible):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with rank_of_run(1, 2, Driver(cards), others="no card (another)", **variables) as found:
        assert (found.device.type, found.backend, found.bound_to) == ("cpu", "gloo", None)


OLD = "The NVIDIA driver on your system is too old (found version 11040).\nmore"


@pytest.mark.parametrize(
    ("driver", "others", "variables", "message"),
    [
        (Driver(0), "a card (b)", {}, r"rank 0: a card \(b\); rank 1: no card \([^,]*\)\. "),
        (Driver(2), "no card (b)", {}, r"rank 0: no card \(b\); rank 1: a card \("),
        (
            *(Driver(4), "a card (b)", {"CUDA_VISIBLE_DEVICES": ""}),
            r"rank 1: no card \(.*, CUDA_VISIBLE_DEVICES=\)\. Give every machine as many",
        ),
        (Driver(1), "a card (b)", {}, "shows 1 card, but 2 ranks .* --nproc_per_node 1, or hide"),
        (
            *(Driver(4), "a card (b)", {"CUDA_VISIBLE_DEVICES": "3,9"}),
            "this machine shows 1 card, but 2 ranks want one each",
        ),
        (
            *(Driver(2, OLD), "a card (b)", {}),
            r"torch cannot use card 1 of 2: The NVIDIA driver .* too old \(found .*\)\.; nv",
        ),
    ],
)
def test_cards_that_are_missing_are_told_in_one_line(driver, others, variables, message):
    with (
        pytest.raises(ValueError, match=message) as caught,
        rank_of_run(1, 2, driver, others=others, **variables),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_nothing_asks_for_cards_before_a_rank_has_its_own(tmp_path):
    result = run_script("tests/before_setup.py", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert not found["asked"], "\n".join(found["asked"])
    assert found["imported"] == []


def test_the_trainer_sees_one_card_and_one_process(tmp_path):
    from accelerate.state import AcceleratorState, PartialState

    flags = {"ckpt_dir": "nowhere", "dataset_path": "nowhere", "output_dir": str(tmp_path)}
    for read_before, expected in ((False, ("cuda:0", 1, 1)), (True, ("cuda:0", 4, 1))):
        with rank_of_run(3, 4, Driver(4), read_before) as found:
            parallel.hide_ranks()
            made = training_arguments(TuningOptions(**flags), 8, True, found.device)
            # with 4 cards PromptTrainer refuses to work
            assert (str(made.device), made.n_gpu, made.world_size) == expected
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()


# -- generation ----------------------------------------------------------------------------------


def check(watcher: Watcher, n_layers: int, attended: int = 1) -> None:
    """Raise AssertionError for what makes a card slow; attended: passes that share a mask."""
    # PEFT makes its part of masks and labels on the CPU.
    off_card = {key for key in watcher.off_card if not key[1].startswith("peft/")}
    assert not off_card, f"computed on the CPU: {off_card}"
    kinds = {(what, place) for what, place in watcher.waits if what in ("from the card", "index")}
    assert not kinds, f"goes through the CPU: {kinds}"
    assert "math" not in watcher.kernels, f"attention by plain matrices: {watcher.kernels}"
    uses = set(watcher.masks.values())
    assert uses <= {n_layers * attended}, f"a mask is made for each layer: {watcher.masks}"


def on_all_ranks(n: int, work: Callable[..., list], *args: object) -> None:
    """Do the work as each of n ranks, one after the other; what they call must be the same."""
    first, *others = [work(rank, n, *args) for rank in range(n)]
    for rank, calls in enumerate(others, 1):
        pairs = itertools.zip_longest(first, calls)
        differ = [f"{a} on rank 0, {b} on rank {rank}" for a, b in pairs if a != b]
        assert not differ, f"collectives in another order: {differ[0]}"


@contextlib.contextmanager
def generator(
    rank: int,
    n: int,
    dtype: torch.dtype = torch.float16,
    n_kv_heads: int = 2,
    quantize: str | None = None,
    offload: int = 0,
) -> Iterator[tuple[Watcher, LLaMA]]:
    """A generator as a rank, and what watches it; in the end checked."""
    source = quantized(Described(TINY | {"n_kv_heads": n_kv_heads}, dtype), quantize)
    with pretended(rank, n) as watcher:
        transformer = load_model(source, CARD, dtype, offload)
        for name, tensor in transformer.state_dict().items():
            assert tensor.device == CARD, name
        watcher.restart()
        yield watcher, LLaMA(transformer, TOKENIZER, max_seq_len=2048, max_batch_size=2)
        check(watcher, TINY["n_layers"])


def decode(rank: int, n: int, *how: object) -> list:
    """Generate as a rank, each step with few waits; its collectives."""
    with generator(rank, n, *how) as (watcher, llama):
        for temperature in (0.0, 0.8):
            for waits in waits_of_steps(watcher, llama, temperature):
                assert waits.total() <= WAITS_A_STEP, f"a step waits for the card: {waits}"
        assert watcher.masks  # or nothing is known of them
    return watcher.collectives


def generate_in_other_ways(rank: int, n: int, *how: object) -> list:
    """Generate as a rank from prompts of all kinds; its collectives."""
    with generator(rank, n, *how) as (watcher, llama):
        # the second of the first two ends, and the third takes its place, then the last
        watcher.tokens = [TOKEN, TOKEN, TOKEN, END, *[TOKEN] * 4, END, END]
        penalised = {"repetition_penalty": 1.2, "top_k": 9, "min_p": 0.1}
        prompts = [[1] * length for length in (9, 8, 7, 5)]
        outputs = llama.generate(prompts, max_gen_len=4, **penalised)
        assert [len(output.token) for output in outputs] == [4, 1, 2, 0]
        llama.soft_prompt = SOFT_PROMPT
        llama.generate([[1] * 1200] * 2, max_gen_len=2)  # of one length, read in two chunks
        llama.generate([[1] * 4], max_gen_len=2, logprobs=2, echo=True)
        mixed = [Tuned([1] * 4, soft) for soft in (SOFT_PROMPT, SOFT_PROMPT[:2], None)]
        llama.generate(mixed, max_gen_len=2, logprobs=2, echo=True)
        with torch.no_grad():
            for padding, left in ((None, False), ("right", False), ("left", True)):
                ids, watcher.padded_left = torch.ones((2, 9), dtype=int, device=CARD), left
                logits = llama.model(ids, attention_mask=ids if padding else None)
                assert (logits.device, logits.dtype) == (CARD, torch.float32)
                assert logits.shape == (2, 9, TINY["vocab_size"])
    return watcher.collectives


def waits_of_steps(watcher: Watcher, llama: LLaMA, temperature: float) -> list[Counter]:
    """What the host waits for from each step to the next, of rows of several lengths."""
    starts, decode_one_token = [], Batch.decode_one_token

    def noted(batch: Batch) -> torch.Tensor:
        starts.append(Counter(watcher.waits))
        return decode_one_token(batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "decode_one_token", noted)
        llama.generate([[1] * 3, [1] * 7], max_gen_len=4, temperature=temperature, seed=1)
    return [after - before for before, after in itertools.pairwise(starts)]


@pytest.mark.parametrize(
    ("n", "dtype", "n_kv_heads", "quantize", "offload"),
    [
        (1, torch.float16, 2, None, 0),
        (1, torch.bfloat16, 8, "int8", 0),
        (1, torch.float32, 2, None, 2),
        (2, torch.float16, 8, "int4", 1),
        (2, torch.bfloat16, 2, None, 0),
        (2, torch.float32, 8, None, 0),
        (4, torch.float16, 2, None, 0),  # fewer KV heads than ranks
    ],
)
def test_generation_stays_on_the_card(n, dtype, n_kv_heads, quantize, offload):
    on_all_ranks(n, decode, dtype, n_kv_heads, quantize, offload)
    if quantize is None:  # else products alone are others
        on_all_ranks(n, generate_in_other_ways, dtype, n_kv_heads, None, offload)


# What may go wrong, put into the real code.


def logits_on_cpu(patch: pytest.MonkeyPatch) -> None:
    real = Batch.decode_one_token
    patch.setattr(Batch, "decode_one_token", lambda batch: real(batch).cpu())


def number_read(patch: pytest.MonkeyPatch) -> None:
    real = Transformer.gather_logits
    patch.setattr(Transformer, "gather_logits", lambda *x: real(*x) + real(*x).max().item())


def starts_on_cpu(patch: pytest.MonkeyPatch) -> None:
    real = KVCache.advance
    patch.setattr(KVCache, "advance", lambda self, at, n, _: real(self, at, n, torch.tensor(at)))


def ids_before_logits_on_rank_1(patch: pytest.MonkeyPatch) -> None:
    real = Transformer.gather_logits

    def gather_logits(self: Transformer, h: torch.Tensor) -> torch.Tensor:
        if parallel.rank() == 1:
            dist.broadcast(torch.empty(len(h), dtype=torch.long, device=h.device), src=0)
        return real(self, h)

    patch.setattr(Transformer, "gather_logits", gather_logits)


def sum_of_columns(patch: pytest.MonkeyPatch) -> None:
    real = layers.sum_over_ranks
    patch.setattr(layers, "sum_over_ranks", lambda x: real(x.mT).mT)


def ids_of_16_bits(patch: pytest.MonkeyPatch) -> None:
    real = dist.broadcast
    patch.setattr(dist, "broadcast", lambda ids, **of: real(ids.short(), **of))


def mask_with_groups(patch: pytest.MonkeyPatch) -> None:
    def attend(xq: Tensor, xk: Tensor, xv: Tensor, mask: Tensor | None) -> Tensor:
        turned = (x.transpose(1, 2) for x in (xq, xk, xv))
        attention = F.scaled_dot_product_attention
        return attention(*turned, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    patch.setattr(model, "attend", attend)


def mask_of_each_layer(patch: pytest.MonkeyPatch) -> None:
    real = model.attend
    patch.setattr(model, "attend", lambda *x: real(*x[:3], None if x[3] is None else x[3].clone()))


@pytest.mark.parametrize(
    ("n", "put_in", "message"),
    [
        (1, logits_on_cpu, "computed on the CPU: "),
        (2, logits_on_cpu, "nccl: c10d.broadcast_.default at .* is given a tensor on cpu"),
        (1, number_read, "a step waits for the card: "),
        (1, starts_on_cpu, "Expected all tensors to be on the same device"),
        (2, ids_before_logits_on_rank_1, "collectives in another order: "),
        (2, sum_of_columns, "nccl: .* not contiguous"),
        (2, ids_of_16_bits, "nccl: .* torch.int16"),
        (1, mask_with_groups, "attention by plain matrices"),
        (1, mask_of_each_layer, "a mask is made for each layer"),
    ],
)
def test_what_would_go_wrong_on_cards_is_found(monkeypatch, n, put_in, message):
    put_in(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        on_all_ranks(n, decode)


# -- tuning --------------------------------------------------------------------------------------


def tune_in_all_ways(
    rank: int,
    n: int,
    dtype: torch.dtype,
    n_kv_heads: int,
    recomputed: str,
    split: int | None = None,
) -> list:
    """Tune as a rank, the Trainer's own steps; its collectives."""
    source = Described(TINY | {"n_kv_heads": n_kv_heads}, dtype)
    with pretended(rank, n, split) as watcher:
        transformer = load_model(source, CARD)
        transformer.gradient_checkpointing = recomputed == "layers"
        transformer.recompute_ffn = recomputed == "FFNs"
        method = "residual" if split else "prompt"  # sums the gradients of matrices too
        tuned = add_soft_prompt(transformer, 4, [1, 2, 3], "nowhere", method)
        prompt = next(encoder_of(tuned).parameters())
        optimizer = torch.optim.AdamW([prompt], fused=True)  # the Trainer's default
        ids = [torch.ones(length, dtype=torch.int32) for length in (9, 6)]
        rows = [{"input_ids": x, "labels": x} for x in ids]
        batch = {name: x.to(CARD) for name, x in collate(rows, 0).items()}
        watcher.restart()
        # two batches of one step, of numbers of tokens that are given or not
        for watcher.padded_left, count in ((False, None), (True, torch.tensor(5, device=CARD))):
            loss = tuned(**own_rows(batch)[0], num_items_in_batch=count).loss
            assert (loss.device, loss.dtype) == (CARD, torch.float32)
            loss.backward()
        torch.nn.utils.clip_grad_norm_([prompt], 1.0)
        optimizer.step()
        state = [prompt.grad, *optimizer.state[prompt].values()]
        assert {(x.device, x.dtype) for x in state} == {(CARD, torch.float32)}
        check(watcher, TINY["n_layers"], 1 + transformer.gradient_checkpointing)
        learning = watcher.collectives
        watcher.restart()
        with torch.no_grad():
            assert tuned(**batch).loss.device == CARD
        check(watcher, TINY["n_layers"])
        return learning + watcher.collectives


@pytest.mark.parametrize(
    ("n", "dtype", "n_kv_heads", "recomputed", "split"),
    [
        (1, torch.bfloat16, 2, "nothing", None),
        (2, torch.float16, 2, "FFNs", None),
        (2, torch.float16, 2, "FFNs", 1),
        (2, torch.float32, 8, "layers", None),
        (4, torch.float16, 2, "layers", None),
        (4, torch.float16, 2, "layers", 2),
        (4, torch.bfloat16, 8, "FFNs", None),
    ],
)
def test_tuning_stays_on_the_card(n, dtype, n_kv_heads, recomputed, split):
    on_all_ranks(n, tune_in_all_ways, dtype, n_kv_heads, recomputed, split)


# -- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKS)
def test_known_models_take_no_more_memory_than_said(name):
    work, most = WORKS[name]
    peak = peak_from_few_layers(work)
    assert peak <= most * 1e9
    assert plan_of(work).total >= LEAST_PLANNED * peak
