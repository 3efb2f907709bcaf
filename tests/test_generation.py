"""What LLaMA.generate promises, on tiny random models with real tokenizers."""

import programs
import pytest
import torch
from conftest import TOKENIZERS, hf_model, make_ckpt, make_params
from random_model import random_source

from llama import LLaMA

PROMPTS = ["Once", "The capital of France is", "a b c d e f g h i j k l m", "In short:\n1."]


def build(tmp_path, kind="sentencepiece", n_kv_heads=2, **options):
    path, vocab_size = TOKENIZERS[kind]
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=vocab_size, n_kv_heads=n_kv_heads)
    return LLaMA.build(ckpt_dir, path, **({"max_seq_len": 64} | options))


@pytest.mark.parametrize("n_kv_heads", [8, 2])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_greedy_equals_hugging_face(tmp_path, kind, n_kv_heads):
    llama = build(tmp_path, kind, n_kv_heads)
    stop_ids = sorted(llama.tokenizer.stop_ids)
    params = make_params(vocab_size=TOKENIZERS[kind][1], n_kv_heads=n_kv_heads)
    reference = hf_model(random_source(params))
    for prompt in PROMPTS:
        ids = torch.tensor([llama.tokenizer.encode(prompt)])
        expected = reference.generate(
            ids, do_sample=False, max_new_tokens=16, eos_token_id=stop_ids, pad_token_id=0
        )[0, ids.shape[1] :].tolist()
        (output,) = llama.generate([prompt], max_gen_len=16, temperature=0)
        assert output.token == [token for token in expected if token not in stop_ids]


@pytest.mark.parametrize("n", [2, 4])
def test_greedy_on_ranks_equals_one_rank(tmp_path, on_ranks, n):
    models, expected = [], []
    for path, vocab_size in TOKENIZERS.values():
        for n_kv_heads in (8, 2):
            ckpt_dir = tmp_path / f"{vocab_size}_{n_kv_heads}"
            make_ckpt(ckpt_dir, n=n, vocab_size=vocab_size, n_kv_heads=n_kv_heads)
            models.append((str(ckpt_dir), str(path)))
            alone = LLaMA.build(ckpt_dir, path, max_seq_len=64)  # held to Hugging Face above
            outputs = alone.generate(PROMPTS, max_gen_len=16, temperature=0)
            expected.append([output.token for output in outputs])
    found = on_ranks(n, programs.greedy_tokens, models=models, prompts=PROMPTS, max_gen_len=16)
    assert found == expected


@pytest.mark.parametrize("max_batch_size", [32, 3])
def test_rows_of_a_mixed_batch_equal_each_alone(tmp_path, max_batch_size):
    llama = build(tmp_path, max_batch_size=max_batch_size)
    prompts = PROMPTS + [prompt * 2 for prompt in PROMPTS]
    together = llama.generate(prompts, max_gen_len=12, temperature=0)
    alone = [llama.generate([prompt], max_gen_len=12, temperature=0)[0] for prompt in prompts]
    assert together == alone


def test_what_the_cache_held_before_is_never_seen(tmp_path, monkeypatch):
    llama = build(tmp_path)
    prompts = [PROMPTS[0], PROMPTS[2] * 3]  # of very different lengths
    expected = llama.generate(prompts, max_gen_len=12, temperature=0)
    allocate = torch.empty

    def poisoned(*args, **kwargs):  # memory that is handed out again may hold NaN anywhere
        memory = allocate(*args, **kwargs)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)
    assert llama.generate(prompts, max_gen_len=12, temperature=0) == expected


def test_each_row_stops_at_its_own_end(tmp_path):
    llama = build(tmp_path)
    free = llama.generate(PROMPTS, max_gen_len=12, temperature=0)
    ending = free[0].token[5]
    llama.tokenizer.stop_ids = frozenset({ending})
    stopped = llama.generate(PROMPTS, max_gen_len=12, temperature=0)
    for before, after in zip(free, stopped):
        end = before.token.index(ending) if ending in before.token else len(before.token)
        assert after.token == before.token[:end]


def test_a_seed_makes_sampling_repeatable(tmp_path):
    llama = build(tmp_path)
    options = {"max_gen_len": 12, "temperature": 1.0, "top_p": 0.9}
    first = llama.generate(PROMPTS, seed=1, **options)
    assert first == llama.generate(PROMPTS, seed=1, **options)
    assert first != llama.generate(PROMPTS, seed=2, **options)


def test_the_coldest_temperature_is_greedy(tmp_path):
    llama = build(tmp_path)
    greedy = llama.generate(PROMPTS, max_gen_len=12, temperature=0)
    assert llama.generate(PROMPTS, max_gen_len=12, temperature=1e-40, top_p=1.0) == greedy


@pytest.mark.parametrize(("m", "n"), [(2, 2), (1, 2), (2, 1)])
def test_a_rank_loads_in_the_memory_of_its_share(tmp_path, on_ranks, m, n):
    size = {"dim": 1024, "n_layers": 3, "multiple_of": 256, "vocab_size": 32000}  # 416 MB
    ckpt_dir = make_ckpt(tmp_path / "ckpt", n=m, **size)
    share = sum(path.stat().st_size for path in ckpt_dir.glob("*.pth")) / n
    peaks = on_ranks(n, programs.peak_memory, ckpt_dir=str(ckpt_dir))
    # Mapped, or copied once where the cut takes rows apart; importing torch alone takes 150 MB.
    assert max(peaks) < (0 if m == n else share) + 300e6


def test_max_seq_len_is_used_to_the_last_position(tmp_path):
    llama = build(tmp_path, max_seq_len=20)
    llama.tokenizer.stop_ids = frozenset()
    (output,) = llama.generate(["Once upon a time"], max_gen_len=99, temperature=0)
    assert len(llama.tokenizer.encode("Once upon a time")) + len(output.token) == 20


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        (["ok", "word " * 80], {}, "prompt 2 .* no room"),
        (["ok"], {"temperature": -1}, "temperature"),
        (["ok"], {"top_p": 0}, "top_p"),
        (["ok"], {"max_gen_len": 0}, "max_gen_len"),
        (["ok"], {"seed": -1}, "seed"),
        (["ok"], {"seed": 2**63}, "seed"),
        (["ok"], {"temperature": float("inf")}, "temperature"),
    ],
)
def test_bad_requests_are_named(tmp_path, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path).generate(prompts, **options)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=512)
    with pytest.raises(ValueError, match=r"a vocabulary of 32000, but the model .* has 512"):
        LLaMA.build(ckpt_dir, TOKENIZERS["sentencepiece"][0])
