"""The memory plan counts what is allocated; what does not fit is refused with what does."""

import inspect
import re

import pytest
import torch
from conftest import make_ckpt, make_params
from formats import write_gguf
from gguf import GGMLQuantizationType as Kind
from random_model import random_source

import split_model
from llama import LLaMA, memory, parallel
from llama.cache import KVCache
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.gguf import GGUFFile
from llama.checkpoint.quantized import quantized
from llama.generation import load_model
from llama.memory import Free, check_generation, check_tuning, ways_to_fit
from llama.plan import Plan, weight_bytes
from llama.tuning.options import TuningOptions

CPU, CARD = torch.device("cpu"), torch.device("cuda")
SIZES = {"vocab_size": 512, "n_kv_heads": 2}


def plan_of(source, n=1, dtype=torch.float32, bsz=4, seqlen=64, device=CPU, **more) -> Plan:
    return Plan(source, n, dtype, bsz, seqlen, device, **more)


def large(device: torch.device = CARD, **more) -> Plan:
    """A model as wide as 7B's, of which nothing is read."""
    sizes = {"dim": 4096, "n_layers": 4, "n_heads": 32, "multiple_of": 256}
    source = random_source(make_params(**sizes), torch.float16)
    return plan_of(source, 1, torch.float16, 32, 512, device, **more)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_every_rank_are_counted_apart_from_mapped_files(tmp_path, shards, dtype):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", shards, **SIZES))
    for n in (1, 2, 4):
        plan = plan_of(ckpt, n, dtype)
        for rank in range(n):
            parts = {name: ckpt.part(name, rank, n, dtype) for name in ckpt.shapes}
            files = {x.untyped_storage().data_ptr() for i in range(shards)
                     for x in ckpt.shard(i).values()}  # fmt: skip
            own = [x.nbytes for x in parts.values() if x.untyped_storage().data_ptr() not in files]
            assert plan.weights == sum(own)
            assert plan.weights + plan.mapped == sum(x.nbytes for x in parts.values())


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])  # groups of 64, and those of the file
def test_quantised_weights_are_counted_as_they_lie(tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", Kind[kind], dim=256, multiple_of=256, n_kv_heads=4)
    source = quantized(GGUFFile(tmp_path / "m.gguf"), "int8")
    for n in (1, 2):
        plan = plan_of(source, n, quantize="int8")
        parts = [source.part(name, 0, n, torch.float32) for name in source.shapes]
        assert plan.weights + plan.mapped == sum(part.nbytes for part in parts)
    assert plan.numbers == "int8 and float32"


def test_cache_and_quantised_weights_are_counted(tmp_path):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", **SIZES))
    model = load_model(ckpt, parallel.setup())
    cache = KVCache(model, 3, 100)
    assert plan_of(ckpt, bsz=3, seqlen=100).cache == sum(x.nbytes for x in cache.layers)
    w1 = "layers.0.feed_forward.w1.weight"
    assert weight_bytes(w1, (8, 64), torch.bfloat16, "int8") == 8 * (64 + 2)
    assert weight_bytes(w1, (8, 96), torch.bfloat16, "int8") == 8 * 3 * (32 + 2)
    assert weight_bytes(w1, (8, 64), torch.bfloat16, "int4") == 8 * 2 * 19
    assert weight_bytes("output.weight", (8, 64), torch.bfloat16, "int4") == 8 * (64 + 2)
    assert weight_bytes("norm.weight", (64,), torch.bfloat16, "int4") == 64 * 2
    with pytest.raises(ValueError, match=r"w1.weight has 48 inputs a rank, which groups of 32 do"):
        weight_bytes(w1, (8, 48), torch.bfloat16, "int8")


def peak_of(work) -> int:
    """The most bytes that torch's CPU allocator gave out at once while something ran."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kept", ["nothing", "attention", "all"])
def test_activations_are_what_a_step_of_tuning_allocates(tmp_path, kept):
    from llama.tuning.model import add_soft_prompt

    sizes = SIZES | {"dim": 128, "multiple_of": 384}
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", **sizes))
    transformer = load_model(ckpt, parallel.setup())
    recompute = {"gradient_checkpointing": kept == "nothing", "recompute_ffn": kept != "all"}
    vars(transformer).update(recompute)
    model = add_soft_prompt(transformer, 8, None, "")
    ids = torch.ones(8, 120, dtype=torch.long)
    step = lambda: model(input_ids=ids, attention_mask=ids, labels=ids).loss.backward()  # noqa: E731
    step()
    tuning = {"tuning": True, "num_virtual_tokens": 8}
    plan = plan_of(ckpt, 1, torch.float32, 8, 128, **tuning, **recompute)
    assert plan.activations == pytest.approx(peak_of(step), rel=0.05)


def test_activations_are_what_a_prefill_allocates(tmp_path):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", **(SIZES | {"dim": 128})))
    model = load_model(ckpt, parallel.setup())

    @torch.inference_mode()
    def prefill() -> None:
        ids, cache = torch.ones(8, 200, dtype=torch.long), KVCache(model, 8, 200)
        model.hidden_states(inputs_embeds=model.tok_embeddings(ids), cache=cache)

    plan = plan_of(ckpt, bsz=8, seqlen=200)
    assert plan.cache + plan.activations == pytest.approx(peak_of(prefill), rel=0.05)


@pytest.mark.parametrize("vocab_size", [64, 4096])
def test_activations_are_what_a_loss_alone_allocates(tmp_path, vocab_size):
    from llama.tuning.model import add_soft_prompt

    sizes = SIZES | {"dim": 128, "multiple_of": 384, "vocab_size": vocab_size}
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", **sizes))
    model = add_soft_prompt(load_model(ckpt, parallel.setup()), 8, None, "")
    ids = torch.ones(8, 120, dtype=torch.long)
    loss = torch.inference_mode()(lambda: model(input_ids=ids, attention_mask=ids, labels=ids).loss)
    loss()
    plan = plan_of(ckpt, bsz=8, seqlen=128, num_virtual_tokens=8, learned=120)
    assert plan.activations == pytest.approx(peak_of(loss), rel=0.05)


TUNED = {"tuning": True, "num_virtual_tokens": TuningOptions.num_virtual_tokens}
LOSS = {"learned": 100}


@pytest.mark.parametrize(
    "plan", [large(), large(CPU), large(**TUNED), large(CPU, **TUNED), large(CPU, **LOSS)]
)
def test_what_is_said_to_fit_fits_and_the_next_larger_does_not(plan):
    free = Free(plan.total * 0.8, 10**12)
    fields = {"batch_size": "bsz", "max_batch_size": "bsz", "max_seq_len": "seqlen"}
    fields |= {"offload": "offload"}
    ways = ways_to_fit(plan, free.holds)
    found = [(fields[x], int(value)) for x, value in re.findall(r"--(\w+) (\d+)", " ".join(ways))]
    assert {"bsz", "seqlen"} <= {field for field, _ in found}
    for field, value in found:
        assert free.holds(plan.but(**{field: value}))
        assert not free.holds(plan.but(**{field: value + (-1 if field == "offload" else 1)}))


def test_generation_is_refused_only_where_not_even_one_prompt_fits(monkeypatch, capsys):
    parallel.setup()
    plan = large()
    least, said = plan.but(bsz=1, seqlen=16), []
    for free in (least.total * 0.9, least.total, plan.total):
        monkeypatch.setattr(Free, "now", lambda _, free=free: Free(free, 10**12))
        for chosen in (False, True):
            try:
                check_generation(plan, chosen)
            except ValueError as error:
                said.append(str(error))
            said.append(capsys.readouterr().err)
    refused, _, again, _, silent, note, *rest = said
    assert refused == again
    assert refused.startswith("random weights: the weights and one short prompt in float16 need ")
    assert "what fits: --quantize int8" in refused
    assert [silent, *rest] == ["", "", ""]
    assert note.startswith("random weights: 32 prompts of 512 tokens at once in float16 need ")
    assert note.count("\n") == 1


def test_the_defaults_which_nobody_chose_are_those_of_build():
    parameters = inspect.signature(LLaMA.build).parameters
    names = ("max_seq_len", "max_batch_size")
    assert tuple(parameters[name].default for name in names) == memory.DEFAULTS


def test_tuning_is_refused_where_its_longest_rows_cannot_be_trained_on(monkeypatch):
    parallel.setup()
    plan = large(CPU, tuning=True, num_virtual_tokens=32).but(bsz=8, seqlen=512)
    rows = [68] * 6, [20] * 6  # their tokens, and how many of them are learned
    asked = plan.but(bsz=6, seqlen=100, learned=20)
    monkeypatch.setattr(Free, "now", lambda _: Free(asked.total - 1, 0))
    assert check_tuning(plan, *rows)  # as sure as the plan is exact; FFNs are recomputed
    monkeypatch.setattr(Free, "now", lambda _: Free(asked.total / 1.06, 0))
    with pytest.raises(
        ValueError, match=r"batches of 6 rows of 100 tokens .*; what fits: .*--quantize "
    ):
        check_tuning(plan, *rows)
    roomy = memory.ROOM * asked.but(recompute_ffn=False).total
    for free, recompute_ffn in ((roomy - 1, True), (roomy, False)):
        monkeypatch.setattr(Free, "now", lambda _, free=free: Free(free, 0))
        assert check_tuning(plan, *rows) == recompute_ffn


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_machine_and_control_groups_leave(tmp_path, version):
    name, tree, total = ("4:memory", "memory", "total_") if version == 1 else ("0:", "", "")
    limit, used = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
    group = tmp_path / "sys/fs/cgroup" / tree / "outer"
    files = {
        tmp_path / "proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:  8000 kB\n",
        tmp_path / "proc/self/cgroup": f"{name}:/outer/inner\n7:cpu:/outer\n",
        group / f"memory.{limit}": "5000000\n",
        group / f"memory.{used}": "4000000\n",
        group / "memory.stat": f"{total}inactive_file 500000\n{total}active_file 250000\n",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory.free_host_memory(tmp_path) == 5000000 - 4000000 + 750000
    (group / f"memory.{limit}").write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert memory.free_host_memory(tmp_path) == 8000 * 1024


def test_dry_run_shows_what_is_written_and_what_generation_and_tuning_need(tmp_path, capsys):
    path = make_ckpt(tmp_path / "ckpt", n=2, **SIZES)
    size = {"max_seq_len": 1000, "max_batch_size": 30}
    split_model.main(str(path), n=4, dtype="bfloat16", dry_run=True, **size)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert " ".join(rows["attention.wk"][1:]) == "2 16 x 64 8 x 64 8 x 64 2,048"
    plan = plan_of(Checkpoint(path), 4, torch.bfloat16, 30, 1000)
    assert f"4 shards of {plan.weights + plan.mapped:,} bytes" in "\n".join(lines)
    tuning = plan.but(**TUNED)
    plans = (plan, tuning, tuning.but(gradient_checkpointing=True))
    for name, values in {
        "KV cache": [x.cache for x in plans],
        "activations": [x.activations for x in plans],
        "in all": [x.total + x.mapped for x in plans],
    }.items():
        assert rows[name][-3:] == [f"{value / 1e6:,.0f}" for value in values]
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
