"""Any m shards into any n: exact to the bit, the same at every run, whole or not there."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import CODE, cut_by_vocabulary, hashes_of, make_ckpt, make_params, small_params
from formats import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_source

import split_model
from llama import files
from llama.checkpoint.folder import Checkpoint, compare
from llama.checkpoint.gguf import GGUFFile, write_gguf
from llama.checkpoint.weights import valid_shard_counts
from llama.checkpoint.write import write_checkpoint
from llama.model import ModelArgs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def source():
    return random_source(make_params(vocab_size=512, n_kv_heads=2))


def reshard(folder: Path, out: Path, n: int, dtype: torch.dtype | None = None) -> Path:
    write_checkpoint(Checkpoint(folder), out, n, dtype)
    return out


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_m_to_n_to_m_and_merging_are_bit_equal(choose):
    params, dtype = small_params(choose), choose.choice(DTYPES)
    counts = valid_shard_counts(ModelArgs.from_params(params))
    m, n = choose.choice(counts), choose.choice(counts)
    source = random_source(params, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(source, folder / "m", m)
        before = hashes_of(folder / "m")
        if choose.choice([False, True]):
            cut_by_vocabulary(folder / "m")
        reshard(folder / "m", folder / "n", n)
        reshard(folder / "n", folder / "m again", m)
        reshard(folder / "n", folder / "merged", 1)
        assert hashes_of(folder / "m again") == before  # shards, params.json and manifest
        merged, part = Checkpoint(folder / "merged"), Checkpoint(folder / "n")
        for weight in source.shapes:
            expected = source.read(weight)
            assert torch.equal(merged.read(weight), expected), weight
            assert merged.read(weight).dtype == dtype
            assert torch.equal(part.read(weight), expected), weight
        compare(Checkpoint(folder / "m"), part)
        assert merged.verify() == part.verify()


def test_more_than_a_hundred_shards_keep_their_order(tmp_path):
    params = {"dim": 256, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 256, "multiple_of": 128}
    one = make_ckpt(tmp_path / "1", n_layers=1, **params)
    many = Checkpoint(reshard(one, tmp_path / "128", 128))
    assert many.verify() == Checkpoint(one).verify()
    assert hashes_of(reshard(tmp_path / "128", tmp_path / "merged", 1)) == hashes_of(one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_converts_on_the_way(tmp_path, source, dtype):
    write_checkpoint(source, tmp_path / "1")
    converted = Checkpoint(reshard(tmp_path / "1", tmp_path / "2", 2, dtype))
    for name in source.shapes:
        assert torch.equal(converted.read(name), source.read(name).to(dtype))
    described = converted.manifest.weights["norm.weight"]["dtype"]
    assert described == str(dtype).removeprefix("torch.")
    converted.verify()


READS_PLAINLY = """
import json, sys, torch
path, name = sys.argv[1:]
mapped = torch.load(path, mmap=True, weights_only=True)
plain = torch.load(path, weights_only=True)
assert all(torch.equal(plain[key], mapped[key]) for key in plain)
print(json.dumps([torch.__version__, plain[name].tolist()]))
"""


def test_plain_torch_load_reads_what_we_write(tmp_path, source):
    # make test-oldest gives the interpreter of an environment with the oldest supported torch
    python = os.environ.get("OLDEST_TORCH_PYTHON", sys.executable)
    write_checkpoint(source, tmp_path / "ckpt", 2)
    path = tmp_path / "ckpt" / "fs_consolidated.01.pth"
    command = [python, "-c", READS_PLAINLY, str(path), "output.weight"]
    version, weight = json.loads(subprocess.check_output(command, text=True))
    print(f"read by torch {version}")
    assert weight == source.read("output.weight")[256:].tolist()


def test_a_failed_write_leaves_nothing_and_no_parent_folders(tmp_path, source, monkeypatch):
    read = source.read

    def failing(name, *rows):
        if name == "norm.weight":
            raise OSError("no space left")
        return read(name, *rows)

    monkeypatch.setattr(source, "read", failing)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(source, tmp_path / "new" / "nested" / "out", 2)
    assert list(tmp_path.iterdir()) == []


def hold(folder, held):
    with files.locked(folder, "taken"):
        held.set()
        time.sleep(60)


def test_a_folder_that_another_run_is_writing_is_left_to_it_until_that_ends(tmp_path, source):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "fs_consolidated.00.pth").write_bytes(b"half")
    held = FORK.Event()
    other_run = FORK.Process(target=hold, args=(partial, held))
    other_run.start()
    assert held.wait(30)
    with pytest.raises(ValueError, match="another run is writing it; wait"):
        write_checkpoint(source, tmp_path / "out")
    assert (partial / "fs_consolidated.00.pth").read_bytes() == b"half"
    other_run.kill()
    other_run.join()
    write_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_link_is_followed_or_replaced(tmp_path, source):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name, target in (("out", "empty"), (".other.partial", "mine")):
        (tmp_path / name).symlink_to(target)
    with pytest.raises(ValueError, match="out: a link or mount point"):
        write_checkpoint(source, tmp_path / "out")
    with pytest.raises(OSError, match=r"\.other\.partial: cannot be written"):
        write_checkpoint(source, tmp_path / "other")
    assert (tmp_path / "mine" / "precious").read_text() == "mine"


def test_a_disk_that_fails_while_it_writes_ends_the_work(tmp_path, source, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match=r"\.pth: cannot be written: Input/output error"):
        write_checkpoint(source, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []
    assert not any(str(tmp_path) in name for name in _open_files())


def _open_files():
    """List the names of the open files; those that others close meanwhile are left out."""
    names = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return names


def test_too_little_space_is_found_before_the_work_begins(tmp_path, source, monkeypatch):
    monkeypatch.setattr(source, "read", None)  # the work would begin here
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match="bytes needed, but only 1,000 are free"):
        write_checkpoint(source, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


def split_in_child(folder: Path) -> multiprocessing.Process:
    """Cut folder/ckpt into folder/out in another process."""
    child = FORK.Process(target=reshard, args=(folder / "ckpt", folder / "out", 4))
    child.start()
    return child


def test_thirty_kills_leave_no_folder_that_is_wrong_and_a_rerun_ends_well(tmp_path):
    make_ckpt(tmp_path / "ckpt", vocab_size=512, n_kv_heads=2, dim=256, n_layers=6)
    source = hashes_of(tmp_path / "ckpt")
    expected = hashes_of(reshard(tmp_path / "ckpt", tmp_path / "expected", 4))
    start = time.perf_counter()
    split_in_child(tmp_path).join()
    seconds = time.perf_counter() - start
    assert hashes_of(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    choose, killed, partial = random.Random(0), 0, 0
    while killed < 30:
        child = split_in_child(tmp_path)
        time.sleep(choose.uniform(0, seconds))
        child.kill()
        child.join()
        hit = child.exitcode == -signal.SIGKILL
        # The machine may be faster or slower by now: most kills are to hit, at any moment.
        seconds *= 1.05 if hit else 0.9
        killed += hit
        partial += (tmp_path / ".out.partial").exists()
        if (tmp_path / "out").exists():
            assert hashes_of(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
        if killed % 5 == 4:  # on what the kills have left
            reshard(tmp_path / "ckpt", tmp_path / "out", 4)
            assert hashes_of(tmp_path / "out") == expected
            assert not (tmp_path / ".out.partial").exists()
            shutil.rmtree(tmp_path / "out")
    assert partial > 15  # so most kills fell into the writing
    assert hashes_of(tmp_path / "ckpt") == source


def test_split_model_cuts_and_verifies(tmp_path, capsys):
    ckpt_dir = str(make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512))
    split_model.main(ckpt_dir, n=4, verify=True)
    assert "the same model, whole, cut in 2 and 4" in capsys.readouterr().out
    assert Checkpoint(f"{ckpt_dir}_fs4").n == 4
    split_model.main(ckpt_dir, verify=True)
    assert "whole: 2 shards" in capsys.readouterr().out
    other = str(make_ckpt(tmp_path / "other", vocab_size=512, norm_eps=1e-3))
    with pytest.raises(ValueError, match=r"different models \(norm_eps\)"):
        split_model.main(ckpt_dir, out_dir=other, verify=True)


def test_split_model_takes_any_format(tmp_path, capsys):
    path, said = tmp_path / "model.gguf", []
    write_gguf(random_source(make_params(vocab_size=512, multiple_of=64)), path, "q8_0", {})
    for flags in ({"n": 4, "dry_run": True}, {"n": 4, "verify": True}, {"verify": True}):
        split_model.main(str(path), **flags)
        said.append(capsys.readouterr())
    table, cut, checked = (x.out for x in said)
    assert "whole  in each of 1  of 4" in re.sub(" {3,}", "  ", table)
    assert f"{path} and {tmp_path}/model_fs4: the same model, whole, cut in 1 and 4" in cut
    assert "21 weights that fit together; a GGUF file has no hashes of them" in checked
    growth = f"{path}: 0 MB of quantised weights become 1 MB of float32; --dtype bfloat16 takes"
    assert [x.err.count(growth) for x in said] == [1, 1, 0]
    assert_equal(Checkpoint(tmp_path / "model_fs4"), GGUFFile(path))
    write_checkpoint(random_source(make_params(vocab_size=512, multiple_of=64)), tmp_path / "other")
    with pytest.raises(ValueError, match=r"model\.gguf and .*other: different contents"):
        split_model.main(str(path), out_dir=str(tmp_path / "other"), verify=True)


def remove_params(folder):
    (folder / "params.json").unlink()


def put_code_into_a_shard(folder):
    (folder / "manifest.json").unlink()
    (folder / "fs_consolidated.00.pth").write_bytes(CODE)


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        ({}, None, "--n is needed"),
        ({"ckpt_dir": "none", "n": 2}, None, "none: no such file or folder; give a"),
        *(({"n": n}, None, "Valid n: 1, 2, 4, 8") for n in (0, 3, 5, 16)),
        ({"n": 2, "out_dir": "ckpt"}, None, "ckpt: already there and not empty"),
        ({"n": 2, "out_dir": "ckpt/new"}, None, "ckpt/new: inside ckpt"),
        ({"n": 2, "dtype": "int8"}, None, "--dtype must be one of"),
        ({"n": 2}, put_code_into_a_shard, "could run code"),
        ({"n": 2}, remove_params, "copy the params.json here that came with them"),
    ],
)
def test_a_bad_folder_or_n_is_one_line_and_leaves_nothing(
    tmp_path, monkeypatch, capfd, options, damage, message
):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=512)
    if damage:
        damage(ckpt_dir)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        split_model.main(**({"ckpt_dir": "ckpt"} | options))
    assert "\n" not in str(error.value)
    assert "this code ran" not in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
