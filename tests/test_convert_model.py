"""convert_model.py: bad input, kills in the middle of writing, memory.

Start reading at BAD: a model, flags, and what the one line of the error then says.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flags_of, run_script
from formats import assert_equal, tiny
from safetensors.torch import save_file
from test_vocabulary import small_files

import convert_model
from llama.checkpoint.convert import bake, convert
from llama.checkpoint.formats import open_any
from llama.checkpoint.laid_out import LaidOutFile


def save_prompt(folder: Path, dim: int, kind: str) -> None:
    """An adapter of 4 virtual tokens."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    save_file({"prompt_embeddings": torch.ones(4, dim)}, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder of models and adapters."""
    folder = tmp_path_factory.mktemp("given")
    usual, large = (tiny(small_files(), vocab_size=320) for _ in range(2))
    large.std = 1e5
    models = {"usual": usual, "large numbers": large, "no tokenizer": tiny({}, vocab_size=320)}
    models["dim 48"] = tiny(small_files(), vocab_size=320, dim=48)
    models["tuned"] = bake(usual, torch.ones(4, 64))
    for name, source in models.items():
        convert(source, folder / name, "meta")
    save_prompt(folder / "prompt", 64, "PROMPT_TUNING")
    save_prompt(folder / "prompt of dim 32", 32, "PROMPT_TUNING")
    save_prompt(folder / "LoRA", 64, "LORA")
    return folder


BAD = [
    ("usual", {"to": "onnx"}, "--to must be one of meta, hf, gguf, prompt_embeds, not 'onnx'"),
    ("usual", {"to": "gguf", "n": 2}, "--n goes with --to meta alone"),
    ("usual", {"to": "hf", "dtype": "q8_0"}, "--dtype must be one of float32"),
    ("usual", {"to": "hf", "tuning_ckpt_path": "prompt of dim 32"}, "the model's dim is 64"),
    ("usual", {"to": "gguf", "tuning_ckpt_path": "LoRA"}, "'LORA'; only prompt tuning fits"),
    ("usual", {"to": "gguf", "tuning_ckpt_path": "nowhere"}, "no such adapter"),
    ("tuned", {"to": "hf", "tuning_ckpt_path": "prompt"}, "in this model already"),
    ("no tokenizer", {"to": "gguf"}, "no tokenizer beside it"),
    ("no tokenizer", {"to": "meta", "tuning_ckpt_path": "prompt"}, "no tokenizer beside it"),
    ("no tokenizer", {"to": "prompt_embeds"}, "no tokenizer beside it"),
    ("usual", {"to": "hf", "out_dir": "usual"}, "usual: already there and not empty"),
    ("usual", {"to": "gguf", "out_dir": "usual"}, "usual: already there and not empty"),
    ("dim 48", {"to": "gguf", "dtype": "q8_0"}, "a multiple of 32"),
    ("large numbers", {"to": "meta", "dtype": "float16"}, "too large for torch.float16"),
    ("large numbers", {"to": "hf", "dtype": "float16"}, "too large for torch.float16"),
    ("large numbers", {"to": "gguf", "dtype": "float16"}, "too large for torch.float16"),
    ("nowhere", {"to": "gguf"}, "no such file or folder"),
]


@pytest.mark.parametrize(("model", "flags", "message"), BAD)
def test_what_cannot_be_is_one_error_and_leaves_nothing(given, model, flags, message):
    paths = {"out_dir": "out"} | {x: y for x, y in flags.items() if x.endswith(("dir", "path"))}
    flags = flags | {x: str(given / y) for x, y in paths.items()}
    before = sorted(given.rglob("*"))
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        convert_model.main(str(given / model), **flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(given.rglob("*")) == before


@pytest.mark.parametrize(("model", "flags", "message"), [BAD[0], BAD[-2]])
def test_on_the_command_line_the_error_is_one_line(given, model, flags, message):
    before = sorted(given.rglob("*"))
    folders = ["--from", given / model, "--out_dir", given / "out"]
    result = run_script("convert_model.py", *folders, *flags_of(**flags))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(given.rglob("*")) == before


def die_at(write: int, source: Path, out_dir: Path, to: str) -> None:
    """Convert, but be killed at a write."""
    left, really = iter(range(write)), LaidOutFile.write

    def dying(*args):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        really(*args)

    LaidOutFile.write = dying
    convert(open_any(source), out_dir, to)


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_a_kill_leaves_no_folder_that_is_wrong_and_a_rerun_ends_well(tmp_path, given, to):
    source, out_dir = given / "usual", tmp_path / "out"
    for write in (0, 5, 20):
        child = multiprocessing.get_context("fork").Process(
            target=die_at, args=(write, source, out_dir, to)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert [x.name for x in tmp_path.iterdir()] == [".out.partial"]
    convert(open_any(source), out_dir, to)
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert_equal(open_any(out_dir), open_any(source))


MEASURED = """
import sys, time
from llama.checkpoint.convert import convert
from llama.checkpoint.formats import open_any
from llama.cli import MemoryWatch
watch = MemoryWatch()
time.sleep(0.1)
before = watch.peak
for to in ("hf", "gguf"):
    convert(open_any(sys.argv[1] + "/ckpt"), sys.argv[1] + "/" + to, to)
print(watch.peak - before)
"""


def test_580_mb_are_written_in_less_than_300_mb_of_memory(tmp_path):  # about 10 s
    sizes = {"dim": 1024, "n_layers": 10, "n_heads": 16, "multiple_of": 256, "vocab_size": 8192}
    convert(tiny(small_files(), **sizes), tmp_path / "ckpt", "meta")
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert sum(x.stat().st_size for x in tmp_path.glob("gguf/*.gguf")) > 570e6
    assert int(result.stdout) < 300e6
