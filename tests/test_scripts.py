"""The scripts as a user runs them: help, results on stdout, one clear message for a mistake."""

import pytest
import torch
from conftest import TOKENIZERS, make_ckpt, run_script

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]


def test_split_then_the_same_text_from_one_rank_and_two(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE, n_kv_heads=2)
    result = run_script("split_model.py", "--ckpt_dir", ckpt_dir, "--n", 2)
    assert result.returncode == 0, result.stderr
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe capital of France\n")
    options = ["--tokenizer_path", PATH, "--prompts_file", prompts, "--temperature", 0]
    options += ["--max_gen_len", 8]
    one = run_script("example.py", "--ckpt_dir", ckpt_dir, *options)
    two = run_script("example.py", "--ckpt_dir", f"{ckpt_dir}_fs2", *options, n=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    assert "Once upon a time" in one.stdout
    assert "tokens/s" in two.stderr


def test_any_valid_number_of_ranks_runs_any_number_of_shards(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", n=4, vocab_size=VOCAB_SIZE, n_kv_heads=2)
    options = ["--ckpt_dir", ckpt_dir, "--tokenizer_path", PATH, "--temperature", 0]
    options += ["--max_gen_len", 8]
    one, two = (run_script("example.py", *options, n=n) for n in (None, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    assert two.stderr.count("4 shards, cut for 2 ranks while loading") == 1
    assert f"python split_model.py --ckpt_dir {ckpt_dir} --n 2" in two.stderr


def test_an_invalid_number_of_ranks_is_said_once_with_the_valid_ones(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE)
    result = run_script("example.py", "--ckpt_dir", ckpt_dir, "--tokenizer_path", PATH, n=3)
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "with 3 ranks running, it does not cut into 3 shards" in result.stderr
    assert "Valid n: 1, 2, 4, 8" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokenizer_path", "nowhere"], "nowhere: no such tokenizer file"),
        (["--prompts_file", "/dev/null"], "prompts"),
        (["--temperature", "hot"], "--temperature wants float, not 'hot'"),
        (["--dtype", "int3"], "--dtype must be one of"),
        (["--max_seq_len", 4], "no room to generate"),
        (["--max_batch_size", 0], "--max_batch_size must be at least 1"),
    ],
)
def test_what_the_user_got_wrong_is_one_line(tmp_path, flags, message):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE)
    options = {"--ckpt_dir": ckpt_dir, "--tokenizer_path": PATH, flags[0]: flags[1]}
    result = run_script("example.py", *(part for item in options.items() for part in item))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def pickle_that_runs_code(folder):
    class RunsCode:
        def __reduce__(self):
            return (print, ("this code ran",))

    (folder / "manifest.json").unlink()
    torch.save(RunsCode(), folder / "fs_consolidated.00.pth")


@pytest.mark.parametrize(
    ("flags", "damage", "message"),
    [
        ({"--ckpt_dir": "none", "--n": 2}, None, "none: no such checkpoint folder"),
        ({"--n": 0}, None, "Valid n: 1, 2, 4, 8"),
        ({"--n": 3}, None, "Valid n: 1, 2, 4, 8"),
        ({"--n": 2, "--out_dir": "tests"}, None, "tests: already there and not empty"),
        ({"--n": 2, "--dtype": "int8"}, None, "--dtype must be one of"),
        ({"--n": 2}, pickle_that_runs_code, "could run code"),
        ({"--n": 2}, lambda f: (f / "params.json").unlink(), "convert_model.py"),
    ],
)
def test_a_bad_folder_or_n_is_one_line_and_leaves_nothing(tmp_path, flags, damage, message):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=512)
    if damage:
        damage(ckpt_dir)
    options = {"--ckpt_dir": ckpt_dir} | flags
    result = run_script("split_model.py", *(part for item in options.items() for part in item))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "this code ran" not in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
