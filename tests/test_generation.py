"""What LLaMA.generate promises, on tiny random models with real tokenizers."""

import functools
import random
import re
import shlex
import weakref

import programs
import pytest
import torch
from conftest import (
    TOKENIZERS,
    edit_json,
    flags_of,
    hf_reference,
    make_ckpt,
    make_params,
    run_script,
)
from formats import tiny
from random_model import random_source
from test_gguf_tokenizer import mixed_text
from test_vocabulary import small_files
from transformers import AutoModelForCausalLM

from llama import LLaMA, Tuned, batch, generation
from llama.checkpoint.convert import convert
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.formats import open_any, open_pair
from llama.checkpoint.gguf import write_gguf
from llama.checkpoint.hf import write_hf
from llama.checkpoint.write import write_checkpoint
from llama.generation import PromptCache
from llama.tokenizer import Tokenizer

PROMPTS = ["Once", "The capital of France is", "a b c d e f g h i j k l m", "In short:\n1."]
MODELS = [(kind, n_kv_heads) for kind in TOKENIZERS for n_kv_heads in (8, 2)]


def build(tmp_path, kind="sentencepiece", n_kv_heads=2, **options):
    path, vocab_size = TOKENIZERS[kind]
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=vocab_size, n_kv_heads=n_kv_heads)
    return LLaMA.build(ckpt_dir, path, **({"max_seq_len": 64} | options))


@functools.cache
def of_hugging_face(kind, n_kv_heads):
    """What Hugging Face generates greedily after each prompt."""
    path, vocab_size = TOKENIZERS[kind]
    tokenizer, found = Tokenizer(path), []
    reference = hf_reference(vocab_size=vocab_size, n_kv_heads=n_kv_heads)
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        output = reference.generate(ids, eos_token_id=sorted(tokenizer.stop_ids), **options)
        new = output[0, ids.shape[1] :].tolist()
        found.append([token for token in new if token not in tokenizer.stop_ids])
    return found


@pytest.mark.parametrize(("kind", "n_kv_heads"), MODELS)
def test_greedy_equals_hugging_face(tmp_path, kind, n_kv_heads):
    llama = build(tmp_path, kind, n_kv_heads)
    outputs = [llama.generate([prompt], max_gen_len=16, temperature=0)[0] for prompt in PROMPTS]
    assert [output.token for output in outputs] == of_hugging_face(kind, n_kv_heads)


@pytest.fixture(scope="module")
def any_format(tmp_path_factory):
    """A model with its tokenizer in each format, and one of 8 bits, with what it becomes."""
    folder = tmp_path_factory.mktemp("any_format")
    source = tiny(small_files(), vocab_size=320, n_kv_heads=2, multiple_of=64)
    for to in ("meta", "hf", "gguf"):
        convert(source, folder / to, to, 2 if to == "meta" else 1)
    convert(source, folder / "q8", "gguf", dtype="q8_0")
    convert(open_any(folder / "q8"), folder / "q8-meta", "meta")
    return [(str(folder / name), None) for name in ("meta", "hf", "gguf", "q8", "q8-meta")]


@torch.inference_mode()
def assert_alike(models, found):
    """Each format gave what transformers reads out of its own."""
    tokenizer = Tokenizer(models[1][0])
    reference = AutoModelForCausalLM.from_pretrained(models[1][0]).eval()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
        new = reference.generate(ids, **options)[0, ids.shape[1] :].tolist()
        expected.append([token for token in new if token not in tokenizer.stop_ids])
    assert found[:3] == [expected] * 3
    assert found[3] == found[4] != expected


def test_every_format_gives_the_same_text_and_what_is_done_is_said(any_format, capsys):
    found = programs.generated_tokens(any_format, PROMPTS)[:-1]
    said = capsys.readouterr().err.splitlines()
    assert_alike(any_format, found)
    capsys.readouterr()
    # of the folder of 2 shards, and of those of the other formats
    assert [line.count("while loading") for line in said] == [1] * 4
    assert re.search(r"0 MB of quantised .* 1 MB of float32; --dtype bfloat16 takes half", said[3])
    command = shlex.split(said[3].split("that work next time: python ")[1])
    assert command[0] == "convert_model.py"
    assert run_script(*command).returncode == 0
    saved = command[command.index("--out_dir") + 1]
    again = programs.generated_tokens([(saved, None)], PROMPTS)
    assert again[0] == found[3]
    assert capsys.readouterr().err == ""


def sizes_of_passes(llama, monkeypatch) -> list[int]:
    """The number of tokens in each pass through the model from now on, pads too."""
    sizes, hidden_states = [], llama.model.hidden_states

    def watched(input_ids=None, inputs_embeds=None, **kwargs):
        sizes.append((input_ids if inputs_embeds is None else inputs_embeds).shape[:2].numel())
        return hidden_states(input_ids, inputs_embeds, **kwargs)

    monkeypatch.setattr(llama.model, "hidden_states", watched)
    return sizes


@pytest.mark.parametrize("virtual", [0, 7])
def test_prompts_are_read_a_chunk_at_a_time(tmp_path, monkeypatch, virtual):
    llama = build(tmp_path, max_batch_size=3)
    if virtual:
        llama.soft_prompt = torch.randn(virtual, llama.model.args.dim)
    prompts, options = ["a b c " * 6, *PROMPTS], {"max_gen_len": 4, "temperature": 0}
    whole = llama.generate(prompts, echo=True, **options)
    monkeypatch.setattr(batch, "CHUNK_TOKENS", 9)
    monkeypatch.setattr(batch, "CHUNK_POSITIONS", 2)
    sizes = sizes_of_passes(llama, monkeypatch)
    for echo in (True, False):
        chunked = llama.generate(prompts, echo=echo, **options)
        assert [output.token for output in chunked] == [output.token for output in whole]
        for output, expected in zip(chunked, whole) if echo else ():
            found, wanted = output.prompt_logprobs, expected.prompt_logprobs
            assert found[1:] == pytest.approx(wanted[1:], abs=1e-3)
    assert len(sizes) > 12
    assert max(sizes) <= 9


@pytest.mark.parametrize("sorted_batches", [8, 1])  # 1: longer prompts join shorter ones too
def test_a_row_that_ends_gives_its_place_to_the_next_prompt(tmp_path, monkeypatch, sorted_batches):
    monkeypatch.setattr(generation, "SORTED_BATCHES", sorted_batches)
    llama = build(tmp_path, max_batch_size=3)
    prompts = ["a b c " * 6, *PROMPTS, *(prompt * 2 for prompt in PROMPTS), PROMPTS[2] * 3]
    options = {"stop": ["d"], "repetition_penalty": 1.2, "logprobs": 1, "echo": True}
    alone = [llama.generate([prompt], 12, 0, **options)[0] for prompt in prompts]
    n_draws = [len(output.token) for output in alone]
    assert len(set(n_draws)) > 3  # they end at different times
    passes, caches = [], []

    def watched_step(batch):
        passes.append(("step", len(batch.rows), 1))
        return step(batch)

    def watched_add(batch, rows, *args):
        passes.append(("read", len(rows), max(len(row.ids) for row in rows)))
        return add(batch, rows, *args)

    step, add = generation.Batch.decode_one_token, generation.Batch.add
    monkeypatch.setattr(generation.Batch, "decode_one_token", watched_step)
    monkeypatch.setattr(generation.Batch, "add", watched_add)
    make = generation.KVCache
    monkeypatch.setattr(generation, "KVCache", lambda *x: (caches.append(x[1:]), make(*x))[1])
    outputs = llama.outputs(prompts, 12, 0, **options)
    together = [next(outputs)]
    assert len(passes) < 12 + len(prompts)  # it came before the others were done
    together += outputs
    for output, expected in zip(together, alone, strict=True):
        assert (output.text, output.token) == (expected.text, expected.token)
        assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert output.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=1e-3)
    longest = max(len(llama.tokenizer.encode(prompt)) for prompt in prompts)
    assert caches == [(3, longest + 12)]
    # A step for each token but the first, and none for a row that has ended.
    assert sum(n for kind, n, _ in passes if kind == "step") == sum(n_draws) - len(prompts)
    reads = [i for i, (kind, *_) in enumerate(passes) if kind == "read"]
    for i in range(reads[-1]):
        if passes[i][0] == passes[i + 1][0] == "step":
            assert passes[i][1] == 3  # no place is empty while prompts wait
    lens = [passes[i][2] for i in reads]
    assert (lens == sorted(lens, reverse=True)) == (sorted_batches == 8)


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


def test_a_seed_makes_sampling_repeatable_and_the_coldest_temperature_is_greedy(tmp_path):
    llama = build(tmp_path)
    options = {"max_gen_len": 12, "temperature": 1.0, "top_p": 0.9}
    first = llama.generate(PROMPTS, seed=1, **options)
    assert first == llama.generate(PROMPTS, seed=1, **options)
    assert first != llama.generate(PROMPTS, seed=2, **options)
    greedy = llama.generate(PROMPTS, max_gen_len=12, temperature=0)
    for temperature in (1e-40, 1e-50):  # float32 takes the second for 0
        cold = llama.generate(PROMPTS, max_gen_len=12, temperature=temperature, top_p=1.0)
        assert cold == greedy


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["wq", "wk", "wv", "wo"])
def test_logits_that_are_no_numbers_are_an_error(tmp_path, name, value, temperature):
    llama = build(tmp_path)
    layer = getattr(llama.model.layers[1].attention, name)
    layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
    layer.weight[3, 5] = value
    message = (
        r"prompt 3 \('a b.*'\), token 1: the model's logits are NaN or infinite.*--dtype bfloat16"
    )
    with pytest.raises(ValueError, match=message):
        llama.generate(PROMPTS, temperature=temperature)


def test_a_stream_gives_what_generate_gives(tmp_path):
    llama = build(tmp_path, max_batch_size=50)
    chance = random.Random(2)
    prompts = [mixed_text(chance) for _ in range(340)]  # Chinese, emoji, code, …
    prompts = [x for x in prompts if 0 < len(llama.tokenizer.encode(x)) < 50][:200]
    assert len(prompts) == 200
    outputs = llama.generate(prompts, 12, 0, stop=["e", "一"])
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    for prompt, output in zip(prompts, outputs):
        stream = llama.stream(prompt, 12, 0, stop=["e", "一"])
        assert "".join(stream) == output.text
        assert stream.output == output
        assert "e" not in output.text


def test_log_probabilities_are_hugging_faces(tmp_path):
    llama = build(tmp_path, max_seq_len=400)
    reference = hf_reference(vocab_size=32000, n_kv_heads=2)
    texts = [*PROMPTS, PROMPTS[2] * 12]
    outputs = llama.generate(texts, 8, 0, logprobs=3, echo=True)
    for prompt, output in zip(texts, outputs):
        ids = llama.tokenizer.encode(prompt)
        with torch.inference_mode():
            logits = reference(torch.tensor([ids + output.token])).logits[0]
        expected = logits.log_softmax(-1)
        chosen = expected[:-1].gather(1, torch.tensor([ids + output.token]).T[1:])[:, 0].tolist()
        assert output.prompt_logprobs[0] is None
        found = output.prompt_logprobs[1:] + output.logprobs
        assert found == pytest.approx(chosen, abs=1e-3)
        for row, top in zip(expected[len(ids) - 1 : -1], output.top_logprobs):
            values, best = row.topk(3)
            assert list(top) == best.tolist()
            assert list(top.values()) == pytest.approx(values.tolist(), abs=1e-3)
    only = llama.generate(texts, 0, echo=True)
    assert [output.token for output in only] == [[]] * len(texts)
    assert [output.prompt_logprobs for output in only] == [x.prompt_logprobs for x in outputs]


def test_log_probabilities_behind_a_tuned_prompt_are_those_behind_its_tokens(tmp_path):
    llama = build(tmp_path)
    expected = llama.generate([[5, 6, 7, 8]], 0, echo=True)[0].prompt_logprobs[2:]
    alone = llama.generate([[5, 6]], 4, 0)[0].token
    llama.soft_prompt = llama.model.tok_embeddings(torch.tensor([5, 6]))
    found = llama.generate([[7, 8]], 0, echo=True)[0].prompt_logprobs
    assert found == pytest.approx(expected, abs=1e-4)
    assert llama.generate([[]], 4, 0)[0].token == alone  # the tuned prompt and nothing behind it


def soft_prompts(llama, *lens) -> list:
    """Random soft prompts of so many tokens, about as large as embeddings."""
    chance = torch.Generator().manual_seed(3)
    dim = llama.model.args.dim
    return [torch.randn(n, dim, generator=chance) / 2 if n else None for n in lens]


@pytest.mark.parametrize("max_batch_size", [3, 32])
def test_each_row_of_a_batch_has_its_own_soft_prompt_and_gives_what_it_gives_alone(
    tmp_path, max_batch_size
):
    llama = build(tmp_path, max_batch_size=max_batch_size)
    long, short, one, none = soft_prompts(llama, 44, 7, 1, 0)
    # The first two are read apart: pads behind the long one would run over the cache's end.
    texts = [("Once", long), ("a b c d e " * 4, none), ([], short), *zip(PROMPTS, [one, none] * 2)]
    texts += [(prompt, soft) for prompt in PROMPTS for soft in (short, long)]
    options = {"max_gen_len": 4, "temperature": 0, "logprobs": 1, "echo": True}
    alone = []
    for text, llama.soft_prompt in texts:
        alone += llama.generate([text], **options)
    llama.soft_prompt = long  # which none of those takes
    together = llama.generate([Tuned(*pair) for pair in texts], **options)
    assert [output.token for output in together] == [output.token for output in alone]
    for output, expected, (_, soft) in zip(together, alone, texts):
        assert output.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        first = soft is None  # has nothing before it
        found, wanted = output.prompt_logprobs, expected.prompt_logprobs
        assert found[first:] == pytest.approx(wanted[first:], abs=1e-3)
        assert found[:first] == [None] * first
    assert llama.generate(["Once"], **options)[0].token == alone[0].token
    assert "".join(llama.stream(Tuned("Once", short), 4, 0)) == alone[7].text
    assert len({output.text for output in alone[7:9]}) == 2  # or soft prompts change nothing


def test_a_soft_prompt_is_read_once_and_let_go_with_its_last_row(tmp_path, monkeypatch):
    llama = build(tmp_path, max_batch_size=3)
    first, second = soft_prompts(llama, 32, 7)
    sizes, caches, make = sizes_of_passes(llama, monkeypatch), [], batch.KVCache

    def noted(*args):
        caches.append(weakref.ref(cache := make(*args)))
        return cache

    monkeypatch.setattr(batch, "KVCache", noted)
    ids = [5] * 6
    prompts = [Tuned([*ids, 7], first)] * 9 + [Tuned(ids, second)] * 3
    outputs = llama.outputs(prompts, 1, 0, n=2)
    for _ in range(18 + 1):
        next(outputs)
    assert [cache() is None for cache in caches] == [True, False]
    assert len(list(outputs)) == 5
    assert sum(sizes) == 32 + 18 * 7 + 7 + 6 * 6
    assert [cache() is None for cache in caches] == [True, True]


def test_several_continuations_of_a_prompt_stand_side_by_side(tmp_path):
    llama = build(tmp_path, max_batch_size=4)
    outputs = llama.generate(PROMPTS, 6, 1.0, 1.0, seed=3, n=3)
    assert len(outputs) == 3 * len(PROMPTS)
    assert len({output.text for output in outputs[:3]}) == 3
    greedy = llama.generate(PROMPTS, 6, 0)
    assert llama.generate(PROMPTS, 6, 0, n=2) == [x for x in greedy for _ in range(2)]


def test_a_kept_cache_is_read_on_and_changes_nothing(tmp_path):
    llama = build(tmp_path)
    llama.soft_prompt = llama.model.tok_embeddings(torch.tensor([5, 6, 7]))
    cache = PromptCache(llama)
    first = llama.tokenizer.encode("The capital")
    answer = llama.stream(first, 6, 0, cache=cache)
    assert list(answer)
    read = llama.timing.prompt_tokens
    second = first + answer.output.token + llama.tokenizer.encode(" of France", bos=False)
    again = llama.stream(second, 6, 0, cache=cache)
    assert "".join(again) == llama.generate([second], 6, 0)[0].text
    new = len(second) - len(first) - len(answer.output.token) + 1  # its last token was not fed
    assert llama.timing.prompt_tokens == read + new + len(second)
    other = llama.stream(first, 6, 0, cache=cache)  # it is the beginning of what was read
    assert list(other)
    assert other.output == answer.output


def test_an_interrupted_stream_ends_with_what_it_has(tmp_path):
    llama = build(tmp_path)
    pieces: list[str] = []
    stream = llama.stream(PROMPTS[2], 30, 0, interrupted=lambda: len(pieces) >= 3)
    for piece in stream:
        pieces.append(piece)
    assert stream.output.finish_reason == "interrupted"
    assert 3 <= len(stream.output.token) < 30
    assert "".join(pieces) == stream.output.text


def test_logits_that_are_no_numbers_end_all_ranks_with_one_line(tmp_path):
    source = random_source(make_params(), torch.float16, std=1e4)  # its sums overflow
    write_checkpoint(source, tmp_path / "ckpt", 2)
    flags = flags_of(ckpt_dir=tmp_path / "ckpt", tokenizer_path=TOKENIZERS["sentencepiece"][0])
    result = run_script("example.py", *flags, n=2)
    assert (result.returncode, result.stdout) == (1, "")
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"prompt \d \('", errors[0])
    assert "--dtype bfloat16" in errors[0]


def test_a_rank_loads_in_the_memory_of_its_share(tmp_path, on_ranks):
    size = {"dim": 1024, "n_layers": 3, "multiple_of": 256, "vocab_size": 32000}  # 416 MB
    one, two = (str(make_ckpt(tmp_path / f"{n}", n, **size)) for n in (1, 2))
    whole = sum(path.stat().st_size for path in (tmp_path / "1").glob("*.pth"))
    write_gguf(Checkpoint(one), tmp_path / "q8.gguf", "q8_0", {})
    (tmp_path / "hf").mkdir()
    write_hf(Checkpoint(one), tmp_path / "hf", torch.float32, None)
    others = [str(tmp_path / name) for name in ("q8.gguf", "hf")]
    mapped, half, *cut = on_ranks(2, programs.memory_to_load, folders=[two, one, *others])
    assert mapped < 150e6
    assert max(cut) < whole / 2 + 60e6  # of no other weight more than some rows: one has 131 MB
    # Copied once where the cut takes rows apart.
    assert half < whole / 2 + 150e6
    assert programs.memory_to_load([two])[0] < whole + 150e6


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ("hello", {}, r"must be a list: generate\(\[prompt\]\)"),
        ([[5, 32000]], {}, "token id 32000 is outside"),
        ([[]], {}, "no token to start from"),
        (["ok", "word " * 80], {}, "prompt 2 .* no room"),
        (["ok", Tuned("word " * 40, torch.ones(30, 64))], {}, "2 .* tuned prompt 30, .* no room"),
        ([Tuned("ok", torch.ones(3, 8))], {}, r"\(num_virtual_tokens, 64\), not \(3, 8\)"),
        ([Tuned([], None)], {}, "no token to start from"),
        (["ok"], {"top_p": 0}, "top_p"),  # see test_options.py
    ],
)
def test_bad_requests_are_named(tmp_path, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path).generate(prompts, **options)


@pytest.mark.parametrize("vocab_size", [512, 31992, 32328])
def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, vocab_size):
    path, n_words = TOKENIZERS["sentencepiece"]
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=vocab_size, n_layers=1)
    with pytest.raises(ValueError, match=f"of {n_words}, but the model .* has {vocab_size};"):
        open_pair(ckpt_dir, path)


def test_rows_without_a_token_become_no_text(tmp_path):
    path, n_words = TOKENIZERS["sentencepiece"]
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=n_words + 256, n_layers=1)
    _, tokenizer = open_pair(ckpt_dir, path)
    hello = tokenizer.encode("Hello")
    assert tokenizer.decode([*hello, n_words + 255]) == "Hello"
    with pytest.raises(ValueError, match="outside this vocabulary"):
        tokenizer.decode([n_words + 256])


def test_the_checkpoints_own_tokenizer_and_ends_are_taken(tmp_path):
    convert(tiny(small_files(), vocab_size=640), tmp_path / "hf", "hf")  # many more rows
    edit_json(tmp_path / "hf/generation_config.json", eos_token_id=[7])
    tokenizer = open_pair(tmp_path / "hf")[1]
    assert (tokenizer.n_words, tokenizer.n_rows) == (320, 640)
    assert tokenizer.stop_ids > {7}
    for name in tokenizer.files:
        (tmp_path / "hf" / name).unlink()
    with pytest.raises(ValueError, match=r"hf: no tokenizer in it; give .*--tokenizer_path PATH$"):
        open_pair(tmp_path / "hf")


def test_a_length_beyond_the_models_own_is_told(tmp_path, capsys):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", context_len=64)
    for max_seq_len, taken, told in ((None, 64, 0), (64, 64, 0), (65, 65, 1)):
        llama = LLaMA.build(ckpt_dir, TOKENIZERS["sentencepiece"][0], max_seq_len)
        assert llama.max_seq_len == taken
        said = capsys.readouterr().err
        assert said.count(f"--max_seq_len 65: {ckpt_dir} was made for 64 tokens at most") == told
    for wrong in (0, 2**31):
        with pytest.raises(ValueError, match="--max_seq_len must be from 1"):
            LLaMA.build(ckpt_dir, TOKENIZERS["sentencepiece"][0], wrong)
