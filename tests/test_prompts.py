"""The prompts that the example scripts read, what they print, what is said of bad ones."""

import io
import json
import sys

import pytest
from conftest import TOKENIZERS, make_ckpt

from llama import LLaMA, parallel
from llama.cli import MemoryWatch
from llama.options import GenerationOptions, TunedGenerationOptions
from llama.output import Timing
from llama.prompts import SEPARATOR, complete, read_prompts, read_requests, report

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]


def test_without_a_file_the_six_known_prompts_run():
    prompts = read_prompts(None)
    assert len(prompts) == 6
    assert prompts[0] == "I believe the meaning of life is"


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("p.txt", "\ufeffone\r\n\n  two\x0bwords\u2028here\n", ["one", "  two\x0bwords\u2028here"]),
        ("p.jsonl", '{"prompt": "a\\nb"}\n\n"c"\n', ["a\nb", "c"]),
    ],
)
def test_a_file_has_a_prompt_a_line(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"\n \n", "no prompts in it"),
        ("p.txt", b"\xff\xfe\xff", "not UTF-8"),
        ("p.jsonl", b'"fine"\n{"prompt":', "line 2: not JSON"),
        ("p.jsonl", b'{"text": "x"}', 'line 1: no text "prompt"'),
        ("p.jsonl", b"7", 'line 1: no text "prompt"'),
    ],
)
def test_a_file_without_prompts_is_named(tmp_path, name, content, message):
    with pytest.raises(FileNotFoundError, match="no such prompts file"):
        read_prompts(str(tmp_path / name))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / name))


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    ckpt_dir = make_ckpt(tmp_path_factory.mktemp("prompts") / "ckpt", vocab_size=VOCAB_SIZE)
    return LLaMA.build(ckpt_dir, PATH, 40)


def completed(generator, capsys, **flags) -> tuple[str, str]:
    """What is printed on stdout and stderr for prompts from stdin or a file."""
    options = {"max_gen_len": 5, "temperature": 0, "max_seq_len": 40} | flags
    options = GenerationOptions(ckpt_dir="", tokenizer_path="", **options)
    complete(generator, read_requests(options), options)
    found = capsys.readouterr()
    return found.out, found.err


def test_a_prompt_that_is_too_long_is_named_and_the_others_run(generator, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("One\n" + "word " * 60 + "\nTwo two ")
    texts = [x.text for x in generator.generate(["One", "Two two "], 5, 0)]
    out, err = completed(generator, capsys, prompts_file=str(tmp_path / "p.txt"))
    assert out == f"One{texts[0]}{SEPARATOR}Two two {texts[1]}{SEPARATOR}"
    assert "left out: prompt 'word word" in err
    assert "no room to generate in max_seq_len 40" in err
    out, _ = completed(generator, capsys, prompts_file=str(tmp_path / "p.txt"), json=True)
    found = [json.loads(line) for line in out.splitlines()]  # in the prompts' order
    assert [x.get("text") for x in found] == [texts[0], None, texts[1]]
    assert "no room to generate" in found[1]["error"]
    with pytest.raises(ValueError, match="no prompt is left"):
        completed(generator, capsys, prompt="word " * 60)


def test_a_single_prompt_is_streamed_and_a_cut_is_told(generator, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 20))
    out, err = completed(generator, capsys, prompt="-", max_gen_len=30)
    output = generator.generate(["word " * 20], 30, 0)[0]
    assert out == "word " * 20 + output.text + SEPARATOR
    assert f"was cut short after {len(output.token)} tokens: --max_seq_len 40 is full" in err


def test_json_holds_what_generate_gives(generator, capsys):
    options = {"prompt": "One", "logprobs": 2, "echo": True, "n": 2}
    out, _ = completed(generator, capsys, json=True, **options)
    found = [json.loads(line) for line in out.splitlines()]
    output = generator.generate(["One"], 5, 0, logprobs=2, echo=True, n=2)[0]
    assert len(found) == 2
    assert found[0]["tokens"] == output.token
    assert found[0]["logprobs"] == output.logprobs
    assert found[0]["prompt_logprobs"] == output.prompt_logprobs
    assert found[0]["top_logprobs"][0] == {str(i): x for i, x in output.top_logprobs[0].items()}
    assert found[0]["timings"]["generated_tokens"] == 5


@pytest.mark.parametrize("content", ["{}", "[]", '{"messages": 3}', "not json", "\n"])
def test_a_file_of_messages_without_any_is_named(tmp_path, content):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"m\.jsonl"):
        read_requests(GenerationOptions(ckpt_dir="", messages_file=str(tmp_path / "m.jsonl")))


@pytest.mark.parametrize("name", ["prompts_file", "messages_file"])
@pytest.mark.parametrize(
    ("tuned", "own", "message"),
    [
        (True, {}, r'line 2: no "tuning_ckpt_path"; name one there, .* or give --tuning_ckpt_path'),
        (True, {"tuning_ckpt_path": 7}, "line 2: .* must be a path or null, not 7"),
        (True, {"tuning_ckpt_path": ""}, "line 2: .* must be a path or null, not ''"),
        (False, {"tuning_ckpt_path": "x"}, "line 2: .* tuned prompt: example_ft.py takes it"),
    ],
)
def test_a_row_whose_tuned_prompt_is_unclear_is_named(tmp_path, name, tuned, own, message):
    prompt = {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    rows = [prompt | {"tuning_ckpt_path": None}, prompt | own]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = TunedGenerationOptions if tuned else GenerationOptions
    flags = options(ckpt_dir="", **{name: str(tmp_path / "p.jsonl")})
    with pytest.raises(ValueError, match=message):
        read_requests(flags)
    with pytest.raises(ValueError, match=r'line 1: has a "tuning_ckpt_path": example_ft\.py'):
        read_prompts(tmp_path / "p.jsonl")  # for convert_model.py, which takes one for all
    (tmp_path / "p.jsonl").write_text(json.dumps(rows[0]))
    assert [request.adapter for request in read_requests(flags)] == [None]


def test_memory_of_cards_is_told_as_allocated_and_reserved(monkeypatch, capsys):
    parallel.setup()
    monkeypatch.setattr(parallel, "device_peaks", lambda: (5_000_000, 7_000_000))
    report(Timing(), MemoryWatch())
    assert "memory at most 5 MB by rank (allocated; reserved 7)\n" in capsys.readouterr().err
