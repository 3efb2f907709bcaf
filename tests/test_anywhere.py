"""What is written for transformers, llama.cpp and ourselves, read and run by each of them.

Start reading at assert_greedy(), which holds another program's text against ours, and at the
fixtures: written(), tiny models with three real tokenizers, and smollm2(), a real model. All that
takes about a minute on one core; the real model takes most of it.
"""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
import xllamacpp
from conftest import make_params, random_source, run_script
from random_model import RandomSource
from safetensors.torch import save_file
from test_smollm2 import GGUF
from test_vocabulary import SIZES, files_of, small_files, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import convert_model
from llama import parallel
from llama.checkpoint import convert as converting
from llama.checkpoint import hf
from llama.checkpoint.convert import bake, convert, open_any, vocabulary_in
from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.laid_out import LaidOutFile
from llama.checkpoint.params import context_len
from llama.checkpoint.weights import EMBEDDING, OUTPUT, Source
from llama.generation import LLaMA
from llama.model import Transformer
from llama.prompts import read_prompts
from llama.tokenizer import Tokenizer

LLAMA3 = {"use_scaled_rope": True, "rope_theta": 5e5}
SHAPES = {
    "heads = kv heads": {},
    "fewer kv heads": {"n_kv_heads": 2},
    "tied": {"n_kv_heads": 4},
    "scaled rope": LLAMA3 | {"n_kv_heads": 1, "context_len": 1000},
    "rope of another context": LLAMA3 | {"rope_original_len": 512, "rope_scaling_factor": 32.0},
    "linear rope": {"rope_linear_factor": 4.0},
    "wide heads": {"head_dim": 32, "norm_eps": 1e-6},
}
SHARDS = {torch.float32: (1, 4), torch.float16: (2, 1), torch.bfloat16: (4, 2)}  # before and after
CHAT = [{"role": "user", "content": "Name a river in Africa."}]


def tiny(files: dict, tied: bool = False, dtype=torch.float32, **changes) -> RandomSource:
    """A tiny random model with a tokenizer beside it."""
    source = random_source(make_params(**changes), dtype)
    source.files = files
    if tied:
        source.seeds[OUTPUT] = source.seeds[EMBEDDING]
    return source


def assert_equal(found: Source, expected: Source) -> None:
    """The same model, bit by bit."""

    def shape_of(args):
        sizes = vars(args) | {"context_len": context_len(args), "hidden_dim": args.hidden_dim}
        return {k: v for k, v in sizes.items() if k not in ("multiple_of", "ffn_dim_multiplier")}

    assert shape_of(found.args) == shape_of(expected.args)
    assert found.dtype == expected.dtype
    for name in expected.shapes:
        assert torch.equal(found.read(name), expected.read(name)), name


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
    rope = {} if name == "sentencepiece" else LLAMA3
    source = tiny(files_of(name), vocab_size=SIZES[name], n_kv_heads=4, **rope)
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
    assert records + [str(x.message) for x in recwarn] == []


@torch.inference_mode()
def test_transformers_computes_and_cuts_texts_as_we_do(written, no_warnings, monkeypatch, tmp_path):
    folder, source, *_ = written
    model = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    ours, theirs = Tokenizer(folder / "hf"), AutoTokenizer.from_pretrained(folder / "hf")
    original = Tokenizer(folder / "meta")
    for s in texts(600):
        ids = ours.encode(s, special_tokens=True)
        assert theirs(s)["input_ids"] == ids, s
        assert "<unk>" in s or original.encode(s, special_tokens=True) == ids, s
    ids = torch.tensor([ours.encode(texts(9)[8])])
    ours_model = loaded(source, original)
    torch.testing.assert_close(ours_model.model(ids), model(ids).logits, atol=1e-3, rtol=0)
    ends = GenerationConfig.from_pretrained(folder / "hf").eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == original.stop_ids
    monkeypatch.setattr(hf, "LONGEST_FILE", 1 << 18)
    source.files, files = {}, source.files
    convert(source, tmp_path / "cut", "hf")
    source.files = files
    assert len(list(tmp_path.glob("cut/model-*.safetensors"))) > 2
    parts = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").state_dict()
    assert all(torch.equal(parts[name], x) for name, x in model.state_dict().items())


def loaded(source: Source, tokenizer: Tokenizer, soft_prompt=None) -> LLaMA:
    """A generator in float32 from a model of any format."""
    parallel.setup()
    model = Transformer(source.args)
    model.load_state_dict({x: source.read(x).float() for x in source.shapes}, assign=True)
    return LLaMA(model.eval(), tokenizer, soft_prompt=soft_prompt)


def served(folder: Path, slots: int = 1) -> xllamacpp.Server:
    """llama.cpp with the GGUF file of a folder."""
    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup, params.port = 512 * slots, slots, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def ask(server: xllamacpp.Server, route: str, **body) -> dict | list:
    data = json.dumps(body).encode()
    with urllib.request.urlopen(f"{server.listening_address}/{route}", data) as answer:
        return json.load(answer)


def llama_cpp(server: xllamacpp.Server, prompts: list[str], n: int, **options) -> list[list[int]]:
    """The ids with which llama.cpp goes on, greedily if nothing else is said."""
    options = {"temperature": 0, "n_predict": n, "return_tokens": True} | options
    answers = ask(server, "completion", prompt=prompts, **options)
    answers = answers if isinstance(answers, list) else [answers]
    return [x["tokens"] for x in sorted(answers, key=lambda x: x["index"])]


@torch.inference_mode()
def transformers_text(folder: Path, prompts: list[str], n: int) -> list[list[int]]:
    """The ids with which transformers goes on, greedily."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=n, do_sample=False)
        found.append(out[0, given["input_ids"].shape[1] :].tolist())
    return found


@torch.inference_mode()
def assert_greedy(generator: LLaMA, prompts: list[str], found: list[list[int]], n: int) -> None:
    """Another program's ids are ours, up to where our two best are as good as equal."""
    encoded = [generator.tokenizer.encode(x, special_tokens=True) for x in prompts]
    outputs = generator.generate(encoded, n, temperature=0)
    assert len(found) == len(outputs)
    for ids, output, theirs in zip(encoded, outputs, found):
        theirs = [x for x in theirs if x not in generator.tokenizer.stop_ids]
        if theirs != output.token:
            same = len(os.path.commonprefix([theirs, output.token]))
            logits = generator.model(torch.tensor([ids + output.token[:same]]))[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second < 1e-2, (same, theirs, output.token)


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
    assert_greedy(baked, prompts, llama_cpp(served(folder / "baked-gguf", 2), prompts, 16), 16)
    assert_greedy(baked, prompts, transformers_text(folder / "baked-hf", prompts, 16), 16)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 in three shards and as a GGUF file; with a prompt in it also as a folder for HF."""
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


@pytest.mark.parametrize(("dtype", "n"), [("float32", 48), ("float16", 24)])
def test_llama_cpp_goes_on_with_six_prompts_as_we_do(smollm2, tmp_path, dtype, n):
    folder, source, *_ = smollm2
    convert(source, tmp_path, "gguf", dtype=dtype)
    generator = loaded(open_any(tmp_path), Tokenizer(folder / "meta"))
    prompts = read_prompts(None)
    assert_greedy(generator, prompts, llama_cpp(served(tmp_path, 6), prompts, n), n)


@torch.inference_mode()
def test_q8_0_loses_less_than_a_hundredth(smollm2, tmp_path):
    folder, source, *_ = smollm2
    convert(source, tmp_path, "gguf", dtype="q8_0")
    assert len(llama_cpp(served(tmp_path), ["The sea is"], 4)[0]) == 4
    tokenizer = Tokenizer(folder / "meta")
    ids = torch.tensor([tokenizer.encode(Path("README.md").read_text())[:1000]])
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
    expected = tuned.generate(encoded, 24, temperature=0)
    assert_greedy(baked, prompts, [x.token for x in expected], 24)
    server = served(folder / "baked-gguf", 3)
    assert_greedy(baked, prompts, llama_cpp(server, prompts, 24), 24)
    assert_greedy(baked, prompts, transformers_text(folder / "baked-hf", prompts, 24), 24)
    assert ask(server, "apply-template", messages=CHAT)["prompt"] == prefix + chat
    said = ask(server, "v1/chat/completions", messages=CHAT, max_tokens=24, temperature=0)
    assert said["choices"][0]["message"]["content"].strip() == expected[2].text.strip()
    assert Checkpoint(folder / "baked-meta").args.vocab_size % 3 == 0


def test_no_token_of_the_prompt_is_ever_sampled(smollm2):
    folder, source, _, prefix, baked = smollm2
    n = source.args.vocab_size
    # Behind a turn's end the model wants <|im_start|>, which is its BOS.
    prompts = [prefix + x for x in [*read_prompts(None)[:4], "<|im_start|>user\nHi<|im_end|>\n"]]
    encoded = [baked.tokenizer.encode(x, special_tokens=True) for x in prompts]
    outputs = baked.generate(encoded * 9, 50, temperature=1, top_p=1, seed=0)
    ids = [i for x in outputs for i in x.token]
    assert len(ids) > 2000
    assert max(ids) < n
    free = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0}
    found = llama_cpp(served(folder / "baked-gguf", 5), prompts, 60, **free)
    assert sum(map(len, found)) > 200
    assert max(map(max, found)) < n


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A folder in Meta's format with a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "m"
    convert(tiny(small_files(), vocab_size=320), folder, "meta")
    return folder


def adapter(folder: Path, dim: int = 64, kind: str = "PROMPT_TUNING") -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"prompt_embeddings": torch.ones(4, dim)}, folder / "adapter_model.safetensors")
    return str(folder)


BAD = {
    "unknown target": ({"to": "onnx"}, "--to must be one of meta, hf, gguf, prompt_embeds"),
    "shards of a GGUF file": ({"to": "gguf", "n": 2}, "--n goes with --to meta alone"),
    "q8_0 for transformers": ({"to": "hf", "dtype": "q8_0"}, "--dtype must be one of float32"),
    "other dim": ({"to": "hf", "adapter": {"dim": 32}}, "the model's dim is 64"),
    "LoRA": ({"to": "gguf", "adapter": {"kind": "LORA"}}, "'LORA'; only prompt tuning fits"),
    "baked twice": ({"to": "gguf", "twice": True, "adapter": {}}, "in this model already"),
    "no tokenizer": ({"to": "gguf", "without": True}, "no tokenizer beside it"),
    "no tokenizer for the prompt": ({"without": True, "adapter": {}}, "no tokenizer beside it"),
    "in use": ({"to": "hf", "used": True}, "already there and not empty"),
    "rows for q8_0": ({"to": "gguf", "dtype": "q8_0", "dim": 48}, "a multiple of 32"),
    "too large for float16": ({"to": "hf", "dtype": "float16", "std": 1e5}, "too large for"),
    "too large in GGUF": ({"to": "gguf", "dtype": "float16", "std": 1e5}, "too large for"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_one_error_and_leaves_nothing(tmp_path, model_dir, name, capsys):
    given, message = BAD[name]
    given, ckpt, out = dict(given), model_dir, tmp_path / "out"
    if given.keys() & {"dim", "std", "without"}:
        source = tiny({} if given.pop("without", 0) else small_files(), vocab_size=320)
        source = tiny(source.files, vocab_size=320, dim=given.pop("dim", 64))
        source.std, ckpt = given.pop("std", 0.5), tmp_path / "ckpt"
        convert(source, ckpt, "meta")
    if "adapter" in given:
        given["tuning_ckpt_path"] = adapter(tmp_path / "adapter", **given.pop("adapter"))
    if given.pop("twice", False):
        options = {"tuning_ckpt_path": given["tuning_ckpt_path"], "to": "meta"}
        ckpt = tmp_path / "ckpt"
        convert_model.main(str(model_dir), str(ckpt), **options)
    if given.pop("used", False):
        out.mkdir()
        (out / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        convert_model.main(str(ckpt), str(out), **given)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    if name in ("unknown target", "too large in GGUF"):  # as a user sees it
        flags = [f"--{key}={value}" for key, value in given.items()]
        result = run_script("convert_model.py", "--from", ckpt, "--out_dir", out, *flags)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_kill_leaves_no_folder_that_is_wrong_and_a_rerun_ends_well(tmp_path, model_dir, to):
    def killed_at(write: int) -> None:
        left, really = [write], LaidOutFile.write

        def dying(*args):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            really(*args)

        LaidOutFile.write = dying
        convert(open_any(model_dir), tmp_path / "out", to)

    for write in (1, 5, 20):
        child = multiprocessing.get_context("fork").Process(target=killed_at, args=[write])
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert [x.name for x in tmp_path.iterdir()] == [".out.partial"]
    convert(open_any(model_dir), tmp_path / "out", to)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert_equal(open_any(tmp_path / "out"), open_any(model_dir))


MEASURED = """
import sys
from llama.checkpoint.convert import convert, open_any
from llama.cli import MemoryWatch
watch = MemoryWatch()
watch.join(0.1)
before = watch.peak
for to in ("hf", "gguf"):
    convert(open_any(sys.argv[1] + "/ckpt"), sys.argv[1] + "/" + to, to)
print(watch.peak - before)
"""


def test_writing_580_mb_takes_a_few_tens_of_them_in_memory(tmp_path):
    sizes = {"dim": 1024, "n_layers": 10, "n_heads": 16, "multiple_of": 256, "vocab_size": 8192}
    convert(tiny(small_files(), **sizes), tmp_path / "ckpt", "meta")
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sum(x.stat().st_size for x in tmp_path.glob("gguf/*.gguf")) > 570e6
    assert int(result.stdout) < 300e6
