"""Adapters go in and out of PEFT unchanged; what is no tuned prompt is named and runs no code."""

import json

import peft
import programs
import pytest
import torch
from conftest import TOKENIZERS, RunsCode, flags_of, hf_reference, make_ckpt, run_script, saved
from formats import tiny
from safetensors.torch import save_file

import example_ft
from llama import LLaMA
from llama.checkpoint.convert import convert
from llama.checkpoint.formats import open_any
from llama.checkpoint.gguf import write_gguf
from llama.options import TunedGenerationOptions
from llama.prompts import SEPARATOR
from llama.template import ChatTemplate
from llama.tuning import adapter
from llama.tuning.adapter import (
    base_model_facts,
    load_soft_prompt,
    save_adapter,
    warn_of_another_model,
)
from llama.tuning.model import add_soft_prompt, soft_prompt_of

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
MODEL = {"vocab_size": VOCAB_SIZE, "n_kv_heads": 2}
DIM = 64
KEY = "prompt_embeddings"
TEXTS = ["Once", "The capital of France is", "a b c d e f g"]


def test_our_adapter_gives_our_logits_in_plain_peft(tmp_path):
    model = programs.load(make_ckpt(tmp_path / "ckpt", **MODEL))
    tuned = add_soft_prompt(model, 8, [5, 6, 7], "ckpt")
    save_adapter(tuned, tmp_path)
    soft = load_soft_prompt(tmp_path, DIM)
    assert torch.equal(soft, soft_prompt_of(tuned).detach())
    reference = peft.PeftModel.from_pretrained(hf_reference(**MODEL), tmp_path)
    ids = torch.randint(VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        embeds = torch.cat((soft.expand(2, -1, -1), model.tok_embeddings(ids)), dim=1)
        logits = model(inputs_embeds=embeds)
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-3, rtol=0)
    names = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"ckpt"}  # nothing else is left


def test_an_adapter_of_plain_peft_gives_the_same_text_here(tmp_path):
    torch.manual_seed(0)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    reference = peft.get_peft_model(hf_reference(**MODEL), config)
    reference.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    llama = LLaMA.build(make_ckpt(tmp_path / "one", **MODEL), PATH)
    llama.soft_prompt = load_soft_prompt(tmp_path / "adapter", DIM)
    outputs = llama.generate(TEXTS, max_gen_len=12, temperature=0)
    prompt, base = soft_prompt_of(reference), reference.get_base_model()
    for text, output in zip(TEXTS, outputs):
        ids, new = llama.tokenizer.encode(text), []
        with torch.inference_mode():
            while len(new) < 12 and 2 not in new:
                embeds = torch.cat((prompt, base.get_input_embeddings()(torch.tensor(ids + new))))
                new.append(base(inputs_embeds=embeds[None]).logits[0, -1].argmax().item())
        assert output.token == [token for token in new if token != 2]
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    flags = {"ckpt_dir": make_ckpt(tmp_path / "two", n=2, **MODEL), "tokenizer_path": PATH}
    flags |= {"tuning_ckpt_path": tmp_path / "adapter", "prompts_file": tmp_path / "prompts.txt"}
    flags |= {"temperature": 0, "max_gen_len": 12}
    result = run_script("example_ft.py", *flags_of(**flags), n=2)
    assert result.returncode == 0, result.stderr[-3000:]
    found = result.stdout.split(SEPARATOR)
    assert found == [*(text + output.text for text, output in zip(TEXTS, outputs)), ""]


@pytest.fixture
def tuned_rows(tmp_path):
    """Two adapters, with and without a template, another model's, and flags for rows of them."""
    ckpt_dir, chance = make_ckpt(tmp_path / "ckpt", **MODEL), torch.Generator().manual_seed(2)
    for name, n in (("long", 30), ("short", 4)):
        (tmp_path / name).mkdir()
        prompt = {KEY: torch.randn(n, DIM, generator=chance)}
        save_file(prompt, tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "long" / "chat_template.jinja").write_text("Q: {{ messages[0].content }} A:")
    (tmp_path / "short" / "base_model.json").write_text('{"dim": 8}')

    def flags(rows: list[dict], **options) -> TunedGenerationOptions:
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        options = {"temperature": 0, "max_gen_len": 8, "json": True} | options
        given = {"ckpt_dir": str(ckpt_dir), "tokenizer_path": str(PATH)} | options
        return TunedGenerationOptions(**given, prompts_file=str(tmp_path / "rows.jsonl"))

    return flags


def test_rows_of_one_file_have_the_adapters_that_they_name(
    tuned_rows, tmp_path, monkeypatch, capsys
):
    long, short = str(tmp_path / "long"), str(tmp_path / "short")
    named = [{"tuning_ckpt_path": x} for x in (long, short + "/", None, short)] + [{}]
    rows = [{"prompt": text} | own for text in TEXTS for own in named]
    loaded, load = [], adapter.load_soft_prompt
    monkeypatch.setattr(adapter, "load_soft_prompt", lambda *x: (loaded.append(x), load(*x))[1])
    example_ft.main(tuned_rows(rows, tuning_ckpt_path=short))
    assert len(loaded) == 2
    said = capsys.readouterr()
    assert said.err.count("trained on another model") == 1
    found = [json.loads(line) for line in said.out.splitlines()]
    llama = LLaMA.build(tmp_path / "ckpt", PATH)
    template = ChatTemplate("Q: {{ messages[0].content }} A:", llama.tokenizer)
    for row, given in zip(found, rows, strict=True):
        assert row.items() >= given.items()
        path = given.get("tuning_ckpt_path", short)
        llama.soft_prompt = path and load_soft_prompt(path, DIM)
        prompt = given["prompt"]
        prompt = template.ids([{"content": prompt}]) if path == long else prompt
        assert row["tokens"] == llama.generate([prompt], 8, 0)[0].token
    capsys.readouterr()
    example_ft.main(tuned_rows(rows[:1], json=False))  # a single one is streamed
    assert capsys.readouterr().out == f"user: Once\n\nassistant: {found[0]['text']}{SEPARATOR}"


@pytest.mark.parametrize("kind", ["missing", "other dim", "text"])
def test_a_row_with_a_bad_adapter_is_named_before_the_model_is_loaded(
    tuned_rows, tmp_path, monkeypatch, kind
):
    content, message = BAD_ADAPTERS[kind]
    path = tmp_path / "bad"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(LLaMA, "build", None)
    good = str(tmp_path / "long")
    rows = [{"prompt": "x", "tuning_ckpt_path": x} for x in (good, str(path))]
    with pytest.raises((ValueError, FileNotFoundError), match=rf"rows.jsonl, line 2: .*{message}"):
        example_ft.main(tuned_rows(rows))


def test_cached_generation_with_a_prompt_equals_uncached_up_to_the_last_position(tmp_path):
    llama = LLaMA.build(make_ckpt(tmp_path / "ckpt", **MODEL), PATH, max_seq_len=24)
    llama.soft_prompt = torch.randn(7, DIM, generator=torch.Generator().manual_seed(0))
    llama.tokenizer.stop_ids = frozenset()
    together = llama.generate(TEXTS, max_gen_len=99, temperature=0)
    for prompt, output in zip(TEXTS, together):
        assert llama.generate([prompt], max_gen_len=99, temperature=0) == [output]
        ids = llama.tokenizer.encode(prompt)
        assert 7 + len(ids) + len(output.token) == 24
        sequence = torch.tensor([ids + output.token])
        with torch.inference_mode():
            embeds = torch.cat((llama.soft_prompt[None], llama.model.tok_embeddings(sequence)), 1)
            choices = llama.model(inputs_embeds=embeds)[0].argmax(-1).tolist()
        assert choices[7 + len(ids) - 1 : -1] == output.token


@pytest.mark.parametrize("key", [KEY, "embedding.weight"])
def test_old_files_are_read(tmp_path, key):
    prompt = torch.randn(3, DIM)
    torch.save({key: prompt}, tmp_path / "adapter_model.bin")
    for path in (tmp_path, tmp_path / "adapter_model.bin"):
        assert torch.equal(load_soft_prompt(path, DIM), prompt)
    save_file({key: prompt}, tmp_path / "adapter_model.safetensors")
    assert torch.equal(load_soft_prompt(tmp_path / "adapter_model.safetensors", DIM), prompt)


BAD_ADAPTERS = {  # a file, or a folder of one file, or nothing
    "missing": (None, "no such adapter"),
    "empty folder": ({}, "no such adapter .adapter_model.safetensors or"),
    "other dim": (saved({KEY: torch.ones(3, 8)}), "dim is 64"),
    "vector": (saved({KEY: torch.ones(64)}), "shape"),
    "other keys": (saved({"lora_A": torch.ones(3, 64)}), "no tuned prompt"),
    "NaN": (saved({KEY: torch.full((3, 64), torch.nan)}), "NaN or infinite"),
    "no floats": (saved({KEY: torch.ones(3, 64, dtype=torch.complex64)}), "complex64, which no"),
    "tiny floats": (saved({KEY: torch.ones(3, 64).to(torch.float8_e5m2)}), "more than tensors"),
    "huge floats": (
        saved({KEY: torch.full((3, 64), 1e300, dtype=torch.float64)}),
        "NaN or infinite",
    ),
    "more than it has": (saved({KEY: torch.ones(1, 64).expand(1 << 30, 64)}), "no tensor of the"),
    "code": (saved({KEY: RunsCode()}), "more than tensors"),
    "memory": (b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x7f\x85R.", "present format, or damaged"),
    "text": (b"hello", "damaged"),
    "no tensors": (saved([1, 2]), "a dict of names and tensors"),
    "damaged": ({"adapter_model.safetensors": b"\xff" * 100}, "damaged"),
    "LoRA": ({"adapter_config.json": b'{"peft_type": "LORA"}'}, "type 'LORA'"),
}


@pytest.mark.parametrize(("content", "message"), BAD_ADAPTERS.values(), ids=BAD_ADAPTERS)
def test_what_is_no_tuned_prompt_is_named(tmp_path, capfd, content, message):
    path = tmp_path / "adapter"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()
        for name, of_file in content.items():
            (path / name).write_bytes(of_file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_soft_prompt(path, DIM)
    assert str(error.value).count(str(path)) == 1
    assert "this code ran" not in capfd.readouterr().out


def test_an_adapter_of_another_model_is_used_with_a_warning(tmp_path, capsys):
    model = programs.load(make_ckpt(tmp_path / "ckpt", **MODEL))
    save_adapter(add_soft_prompt(model, 8, [5], "ckpt"), tmp_path)
    warn_of_another_model(tmp_path, model)
    warn_of_another_model(tmp_path, programs.load(tmp_path / "ckpt", torch.bfloat16))
    assert capsys.readouterr().err == ""
    other = programs.load(make_ckpt(tmp_path / "other", **MODEL, norm_eps=1e-2))
    warn_of_another_model(tmp_path, other)
    assert "trained on another model (it differs in norm_eps)" in capsys.readouterr().err


def test_a_model_is_known_again_in_every_format(tmp_path):
    source = tiny({}, vocab_size=320, n_kv_heads=2, ffn_dim_multiplier=1.3)
    for to in ("meta", "hf"):
        convert(source, tmp_path / to, to)
    write_gguf(source, tmp_path / "gguf", "float32", {})
    for to in ("meta", "hf", "gguf"):
        for model in (open_any(tmp_path / to), programs.load(tmp_path / to)):
            assert base_model_facts(model) == base_model_facts(source), to
