"""What is written for transformers, llama.cpp and ourselves, read and run by each of them.

Start reading at the fixtures: written(), tiny models with three real tokenizers, and smollm2(), a
real model; and at assert_greedy() in others.py, which holds another program's text against ours.
All that takes some hundred seconds on one core, most of it for the real model.
"""

import logging
from pathlib import Path

import pytest
import torch
from formats import assert_equal, tiny
from others import ask, assert_greedy, llama_cpp, loaded, served, transformers_text
from test_smollm2 import GGUF
from test_template import conversations
from test_vocabulary import SIZES, files_of, small_files, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llama.checkpoint import convert as converting
from llama.checkpoint import hf
from llama.checkpoint.convert import bake, convert, vocabulary_in
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.formats import open_any
from llama.checkpoint.weights import EMBEDDING
from llama.generation import LLaMA
from llama.prompts import read_prompts
from llama.template import LLAMA2, LLAMA3, ChatTemplate
from llama.tokenizer import Tokenizer

SCALED = {"use_scaled_rope": True, "rope_theta": 5e5}
SHAPES = {
    "heads = kv heads": {},
    "fewer kv heads": {"n_kv_heads": 2},
    "tied": {"n_kv_heads": 4},
    "scaled rope": SCALED | {"n_kv_heads": 1, "context_len": 1000},
    "rope of another context": SCALED | {"rope_original_len": 512, "rope_scaling_factor": 32.0},
    "linear rope": {"rope_linear_factor": 4.0},
    "wide heads": {"head_dim": 32, "norm_eps": 1e-6},
}
SHARDS = {torch.float32: (1, 4), torch.float16: (2, 1), torch.bfloat16: (4, 2)}  # before and after
CHAT = [{"role": "user", "content": "Name a river in Africa."}]
TEMPLATES = {  # one that leaves BOS to the tokenizer, and one that brings it
    "sentencepiece": "{% for x in messages %}[INST] {{ x['content'] }} [/INST]{% endfor %}",
    "tiktoken": "{{ bos_token }}{% for x in messages %}{{ x['content'] }}<|eot_id|>{% endfor %}",
}


@pytest.mark.parametrize("dtype", SHARDS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_meta_to_another_format_and_back_is_bit_equal(tmp_path, name, dtype):
    source = tiny(small_files(), name == "tied", dtype, vocab_size=320, **SHAPES[name])
    before, after = SHARDS[dtype]
    convert(source, tmp_path / "0", "meta", before)
    for to in ("hf", "gguf"):
        convert(open_any(tmp_path / "0"), tmp_path / to, to)
        convert(open_any(tmp_path / to), tmp_path / f"{to}-meta", "meta", after)
        assert_equal(Checkpoint(tmp_path / f"{to}-meta"), source)


@pytest.fixture(scope="module", params=SIZES)
def written(request, tmp_path_factory):
    """A tiny model with a real tokenizer in each format, and with a prompt in it (baked-…)."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    rope = {} if name == "sentencepiece" else SCALED
    template = {} if name == "json" else {"chat_template.jinja": TEMPLATES[name].encode()}
    files, tied = files_of(name) | template, name == "json"
    source = tiny(files, tied, vocab_size=SIZES[name], n_kv_heads=4, **rope)
    vocabulary = vocabulary_in(source)
    with pytest.MonkeyPatch.context() as patch:  # what takes seconds is done once
        patch.setattr(converting, "vocabulary_in", lambda x: getattr(x, "vocabulary", vocabulary))
        prompt = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) / 2
        for form, model in {"": source, "baked-": bake(source, prompt)}.items():
            for to in ("meta", "hf", "gguf"):
                convert(model, folder / (form + to), to, 2 if to == "meta" else 1)
    return folder, source, prompt, model.prefix


def test_real_tokenizers_go_with_the_weights_and_come_back(written, tmp_path):
    folder, source, *_ = written
    for to in ("hf", "gguf"):
        convert(open_any(folder / to), tmp_path / to, "meta", 4)
        assert_equal(Checkpoint(tmp_path / to), source)
        back, original = Tokenizer(tmp_path / to), Tokenizer(folder / "meta")
        for s in texts(100):
            assert back.encode(s) == original.encode(s), s


@pytest.fixture
def no_warnings(recwarn):
    """Fail where transformers or Python warns."""
    records, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
    found = [str(x.message) for x in recwarn if x.category is not ResourceWarning]
    assert records + found == []  # those of resources come whenever Python clears up


@torch.inference_mode()
def test_transformers_computes_and_cuts_texts_as_we_do(written, no_warnings, monkeypatch, tmp_path):
    folder, source, *_ = written
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    ours, theirs = Tokenizer(folder / "hf"), AutoTokenizer.from_pretrained(folder / "hf")
    original = Tokenizer(folder / "meta")
    for s in texts(300):
        ids = ours.encode(s, special_tokens=True)
        assert theirs(s)["input_ids"] == ids, s
        # SentencePiece takes "<unk>" for text, a tokenizer.json for the token.
        assert "<unk>" in s or original.encode(s, special_tokens=True) == ids, s
    known = {"sentencepiece": LLAMA2, "tiktoken": LLAMA3, "json": ours.chat_template}
    source_of = next(known[name] for name in known if folder.name.startswith(name))
    template = ChatTemplate(source_of, ours)
    for messages in conversations(200):
        options = {"chat_template": template.source, "add_generation_prompt": True}
        ids = theirs.apply_chat_template(messages, return_dict=False, **options)
        assert template.ids(messages) == ids, messages
    ids = torch.tensor([ours.encode(texts(9)[8])])
    logits = loaded(source, original).model(ids)
    assert logits.std() > 1
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-3, rtol=0)
    ends = GenerationConfig.from_pretrained(folder / "hf").eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == original.stop_ids
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == source.tied
    monkeypatch.setattr(hf, "LONGEST_FILE", 1 << 18)
    hf.write_hf(source, tmp_path, source.dtype, None)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    parts = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(parts[name], x) for name, x in model.state_dict().items())


def test_llama_cpp_runs_tiny_models_as_we_do(written):
    folder, source, *_ = written
    prompts = read_prompts(None)[:2]
    generator = loaded(source, Tokenizer(folder / "meta"))
    assert_greedy(generator, prompts, llama_cpp(served(folder / "gguf", 2), prompts, 16), 16)


def test_a_tuned_prompt_is_the_same_in_every_program(written):
    folder, source, prompt, prefix = written
    texts = read_prompts(None)[:2]
    prompts = [prefix + x for x in texts]
    tuned = loaded(source, Tokenizer(folder / "meta"), prompt)
    baked = LLaMA.build(folder / "baked-meta", folder / "baked-meta")
    assert baked.model.args.vocab_size % 8 == 0  # as many shards as before
    expected = [x.token for x in tuned.generate(texts, 16, temperature=0)]
    assert_greedy(baked, prompts, expected, 16)
    server, theirs = served(folder / "baked-gguf", 2), folder / "baked-hf"
    assert_greedy(baked, prompts, llama_cpp(server, prompts, 16), 16)
    assert_greedy(baked, prompts, transformers_text(theirs, prompts, 16), 16)
    chat = AutoTokenizer.from_pretrained(theirs).apply_chat_template(CHAT, tokenize=False)
    asked = ask(server, "apply-template", messages=CHAT, add_generation_prompt=False)["prompt"]
    assert asked == chat
    assert chat.startswith(prefix)
    assert chat.count("<|begin_of_text|>") == prefix.count("<|begin_of_text|>")


def test_q8_0_keeps_the_digits_of_a_tuned_prompt(tmp_path):
    prompt = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    source = bake(tiny(small_files(), vocab_size=320, multiple_of=64), prompt)
    convert(source, tmp_path, "gguf", dtype="q8_0")
    assert open_any(tmp_path).read(EMBEDDING, 0, 320, 340).half().equal(prompt.half())


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 in three shards; with a prompt in it also for transformers and llama.cpp."""
    folder = tmp_path_factory.mktemp("smollm2")
    convert(open_any(GGUF), folder / "meta", "meta", 3)
    source = Checkpoint(folder / "meta")
    ids = Tokenizer(folder / "meta").encode("Answer like a cheerful pirate who loves the sea. " * 2)
    rows = torch.cat([source.read(EMBEDDING, 0, i, i + 1) for i in ids[:20]])
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    prompt = rows + 0.1 * rows.std() * noise
    baked = bake(source, prompt)
    convert(baked, folder / "baked-meta", "meta", 3)
    for to in ("hf", "gguf"):
        convert(baked, folder / f"baked-{to}", to)
    generator = LLaMA.build(folder / "baked-meta", folder / "baked-meta")
    return folder, source, prompt, baked.prefix, generator


def test_llama_cpp_goes_on_with_six_prompts_as_we_do(smollm2, tmp_path):
    """In float16; in float32 a prompt comes before them, below."""
    folder, source, *_ = smollm2
    convert(source, tmp_path, "gguf", dtype="float16")
    generator = loaded(open_any(tmp_path), Tokenizer(folder / "meta"))
    prompts = read_prompts(None)
    assert_greedy(generator, prompts, llama_cpp(served(tmp_path, 6), prompts, 12), 12)


@torch.inference_mode()
def test_q8_0_loses_less_than_a_hundredth(smollm2, tmp_path):
    folder, source, *_ = smollm2
    convert(source, tmp_path, "gguf", dtype="q8_0")
    assert len(llama_cpp(served(tmp_path), ["The sea is"], 4)[0]) == 4
    tokenizer = Tokenizer(folder / "meta")
    ids = torch.tensor([tokenizer.encode(Path("README.md").read_text())[:300]])
    losses = []
    for model in (source, open_any(tmp_path)):
        logits = loaded(model, tokenizer).model(ids)[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    assert abs((losses[1] - losses[0]).exp() - 1) < 0.01
    assert losses[0] != losses[1]


def test_smollm2_with_a_tuned_prompt_says_the_same_everywhere(smollm2, no_warnings):
    folder, source, prompt, prefix, baked = smollm2
    tuned = loaded(source, Tokenizer(folder / "meta"), prompt)
    plain = AutoTokenizer.from_pretrained(folder / "meta")
    theirs = AutoTokenizer.from_pretrained(folder / "baked-hf")
    options = {"tokenize": False, "add_generation_prompt": True}
    chat = plain.apply_chat_template(CHAT, **options)
    assert theirs.apply_chat_template(CHAT, **options) == prefix + chat
    raw = read_prompts(None)[:2]
    prompts = [prefix + x for x in [*raw, chat]]
    encoded = [tuned.tokenizer.encode(x, special_tokens=True) for x in [*raw, chat]]
    expected = tuned.generate(encoded, 16, temperature=0)
    assert_greedy(baked, prompts, [x.token for x in expected], 16)
    server = served(folder / "baked-gguf", 3)
    assert_greedy(baked, prompts, llama_cpp(server, prompts, 16), 16)
    assert_greedy(baked, prompts, transformers_text(folder / "baked-hf", prompts, 16), 16)
    assert ask(server, "apply-template", messages=CHAT)["prompt"] == prefix + chat
    said = ask(server, "v1/chat/completions", messages=CHAT, max_tokens=16, temperature=0)
    assert said["choices"][0]["message"]["content"].strip() == expected[2].text.strip()
    assert Checkpoint(folder / "baked-meta").args.vocab_size % 3 == 0


@torch.inference_mode()
def test_no_token_of_the_prompt_is_ever_sampled(smollm2):
    folder, source, _, prefix, baked = smollm2
    n = source.args.vocab_size
    # Behind a turn's end the model wants <|im_start|>, which is its BOS.
    prompts = [prefix + x for x in [*read_prompts(None)[:4], "<|im_start|>user\nHi<|im_end|>\n"]]
    encoded = [baked.tokenizer.encode(x, special_tokens=True) for x in prompts]
    outputs = baked.generate(encoded, 20, temperature=1, top_p=1, seed=0)
    for ids, output in zip(encoded, outputs):
        assert max(output.token) < n
        # Nor would one in 50,000 draws be one of them.
        probs = baked.model(torch.tensor([ids + output.token]))[0, len(ids) - 1 :].softmax(-1)
        assert probs[:, n:].sum(-1).mean() < 2e-5
    free = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}
    found = llama_cpp(served(folder / "baked-gguf", 5), prompts, 20, **free)
    assert sum(map(len, found)) > 75
    assert max(map(max, found)) < n
