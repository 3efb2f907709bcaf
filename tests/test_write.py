"""Any m shards into any n: exact to the bit, the same at every run, whole or not there."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import programs
import pytest
import torch
from conftest import make_ckpt, make_params, run_program, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import random_source

from llama import parallel
from llama.checkpoint.folder import Checkpoint, compare
from llama.checkpoint.weights import valid_shard_counts
from llama.checkpoint.write import plan, write_checkpoint
from llama.generation import load_model
from llama.model import ModelArgs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def models(draw) -> dict:
    """params.json of a small model that cuts into 4; KV heads = heads, fewer, or fewer than 4."""
    n_heads = draw(st.sampled_from([4, 8, 12]))
    n_kv_heads = draw(st.sampled_from([k for k in (1, 2, 4, 8, 12) if n_heads % k == 0]))
    return {
        "dim": n_heads * draw(st.sampled_from([2, 4, 6])),
        "n_layers": draw(st.integers(1, 2)),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": 12 * draw(st.integers(1, 9)),
        "multiple_of": draw(st.sampled_from([8, 12, 24])),
        "norm_eps": 1e-5,
    }


def cut_by_vocabulary(folder: Path) -> None:
    """Lay the embedding out as Meta's Llama 3 does; such folders have no manifest."""
    ckpt = Checkpoint(folder)
    embedding, n = ckpt.read("tok_embeddings.weight").clone(), ckpt.n
    for path, part in zip(ckpt.paths, embedding.chunk(n)):
        shard = torch.load(path, weights_only=True)
        torch.save(shard | {"tok_embeddings.weight": part.clone()}, path)
    (folder / "manifest.json").unlink()


def reshard(folder: Path, out: Path, n: int, dtype: torch.dtype | None = None) -> Path:
    write_checkpoint(Checkpoint(folder), out, n, dtype)
    return out


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@settings(max_examples=40, deadline=None)
@given(models(), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_m_to_n_to_m_and_merging_are_bit_equal(params, dtype, by_vocabulary, data):
    counts = valid_shard_counts(ModelArgs.from_params(params))
    m, n = (data.draw(st.sampled_from(counts)) for _ in range(2))
    source = random_source(params, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(source, folder / "m", m)
        before = file_hashes(folder / "m")
        if by_vocabulary:
            cut_by_vocabulary(folder / "m")
        reshard(folder / "m", folder / "n", n)
        reshard(folder / "n", folder / "m again", m)
        reshard(folder / "n", folder / "merged", 1)
        assert file_hashes(folder / "m again") == before  # shards, params.json and manifest
        merged, part = Checkpoint(folder / "merged"), Checkpoint(folder / "n")
        for weight in source.shapes:
            expected = source.read(weight)
            assert torch.equal(merged.read(weight), expected), weight
            assert merged.read(weight).dtype == dtype
            assert torch.equal(part.read(weight), expected), weight
        compare(Checkpoint(folder / "m"), part)
        assert merged.verify() == part.verify()


def test_one_to_four_is_one_to_two_to_four(tmp_path):
    one = make_ckpt(tmp_path / "1", vocab_size=512, n_kv_heads=2)
    direct = reshard(one, tmp_path / "4", 4)
    by_way = reshard(reshard(one, tmp_path / "2", 2), tmp_path / "4 again", 4)
    again = reshard(one, tmp_path / "4 once more", 4)
    assert file_hashes(by_way) == file_hashes(direct) == file_hashes(again)


def test_more_than_a_hundred_shards_keep_their_order(tmp_path):
    params = {"dim": 256, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 256, "multiple_of": 128}
    one = make_ckpt(tmp_path / "1", n_layers=1, **params)
    many = Checkpoint(reshard(one, tmp_path / "128", 128))
    assert many.verify() == Checkpoint(one).verify()
    assert file_hashes(reshard(tmp_path / "128", tmp_path / "merged", 1)) == file_hashes(one)


@pytest.mark.parametrize("n", [2, 4])
@settings(max_examples=2, deadline=None, derandomize=True)
@given(st.lists(models(), min_size=8, max_size=8), st.randoms(use_true_random=False))
def test_n_ranks_on_any_number_of_shards_give_the_logits_of_one(n, cases, choose):
    with tempfile.TemporaryDirectory() as name:
        folders = []
        for i, params in enumerate(cases):
            counts = valid_shard_counts(ModelArgs.from_params(params))
            m = n if i % 2 else choose.choice(counts)  # ready cut, or cut while loading
            folders.append(f"{name}/{i}")
            write_checkpoint(random_source(params), folders[-1], m)
            if m > 1 and choose.random() < 0.5:
                cut_by_vocabulary(Path(folders[-1]))
        ids = torch.arange(12).view(2, 6)
        result = run_program(Path(name), n, programs.logits, folders=folders, ids=ids.tolist())
        assert result.returncode == 0, result.stderr[-3000:]
        for folder, found in zip(folders, json.loads(result.stdout)):
            model = load_model(Checkpoint(folder), parallel.setup())
            with torch.inference_mode():
                torch.testing.assert_close(torch.tensor(found), model(ids), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_converts_on_the_way(tmp_path, dtype):
    source = random_source(make_params(vocab_size=512))
    write_checkpoint(source, tmp_path / "1")
    converted = Checkpoint(reshard(tmp_path / "1", tmp_path / "2", 2, dtype))
    for name in source.shapes:
        assert torch.equal(converted.read(name), source.read(name).to(dtype))
    assert json.loads((tmp_path / "2" / "manifest.json").read_text())["weights"]["norm.weight"][
        "dtype"
    ] == str(dtype).removeprefix("torch.")
    converted.verify()


def test_kv_heads_are_repeated_on_neighbouring_shards(tmp_path):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", n=4, vocab_size=512, n_kv_heads=2))
    wk = [ckpt.shard(i)["layers.0.attention.wk.weight"] for i in range(4)]
    assert torch.equal(wk[0], wk[1])
    assert torch.equal(wk[2], wk[3])
    assert not torch.equal(wk[0], wk[2])


READS_PLAINLY = """
import json, sys, torch
path, name = sys.argv[1:]
mapped = torch.load(path, mmap=True, weights_only=True)
plain = torch.load(path, weights_only=True)
assert all(torch.equal(plain[key], mapped[key]) for key in plain)
print(json.dumps([torch.__version__, plain[name].tolist()]))
"""


def test_plain_torch_load_reads_what_we_write(tmp_path):
    # make test-oldest gives the interpreter of an environment with the oldest supported torch
    python = os.environ.get("OLDEST_TORCH_PYTHON", sys.executable)
    path = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512) / "fs_consolidated.01.pth"
    command = [python, "-c", READS_PLAINLY, str(path), "output.weight"]
    version, weight = json.loads(subprocess.check_output(command, text=True))
    print(f"read by torch {version}")
    expected = random_source(make_params(vocab_size=512)).read("output.weight")[256:]
    assert weight == expected.tolist()


def test_invalid_n_lists_the_valid_ones_and_leaves_nothing(tmp_path):
    source = random_source(make_params(vocab_size=512, n_kv_heads=2))
    for n in (0, 3, 5, 16):
        with pytest.raises(ValueError, match="Valid n: 1, 2, 4, 8"):
            write_checkpoint(source, tmp_path / "out", n)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_written_to(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_checkpoint(random_source(make_params(vocab_size=512)), tmp_path, 1)


def test_a_failed_write_leaves_nothing_and_no_parent_folders(tmp_path):
    source = random_source(make_params(vocab_size=512))
    read = source.read

    def failing(name, *rows):
        if name == "norm.weight":
            raise OSError("no space left")
        return read(name, *rows)

    source.read = failing
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(source, tmp_path / "new" / "nested" / "out", 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_run_is_writing_is_left_to_it(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "fs_consolidated.00.pth").write_bytes(b"half")
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    source = random_source(make_params(vocab_size=512))
    with pytest.raises(ValueError, match="another run is writing it"):
        write_checkpoint(source, tmp_path / "out")
    assert (partial / "fs_consolidated.00.pth").read_bytes() == b"half"
    os.close(lock)
    write_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_link_is_followed_or_replaced(tmp_path):
    source = random_source(make_params(vocab_size=512))
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


def test_a_disk_that_fails_while_it_writes_ends_the_work(tmp_path, monkeypatch):
    def failing(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"\.pth: cannot be written: Input/output error"):
        write_checkpoint(random_source(make_params(vocab_size=512)), tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_too_little_space_is_found_before_the_work_begins(tmp_path, monkeypatch):
    source = random_source(make_params(vocab_size=512))
    source.read = None  # the work would begin here
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match="bytes needed, but only 1,000 are free"):
        write_checkpoint(source, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


def split_in_child(folder: Path) -> int:
    """Cut folder/ckpt into folder/out in another process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        reshard(folder / "ckpt", folder / "out", 4)
    finally:
        os._exit(0)


def test_fifty_kills_leave_no_folder_that_is_wrong_and_a_rerun_ends_well(tmp_path):
    make_ckpt(tmp_path / "ckpt", vocab_size=512, n_kv_heads=2, dim=512, n_layers=6)
    source = file_hashes(tmp_path / "ckpt")
    expected = file_hashes(reshard(tmp_path / "ckpt", tmp_path / "expected", 4))
    start = time.perf_counter()
    os.waitpid(split_in_child(tmp_path), 0)
    seconds = time.perf_counter() - start
    assert file_hashes(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "out")
    choose, killed, partial = random.Random(0), 0, 0
    for i in range(50):
        pid = split_in_child(tmp_path)
        time.sleep(choose.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
        partial += (tmp_path / ".out.partial").exists()
        if (tmp_path / "out").exists():
            assert file_hashes(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
        if i % 5 == 4:  # on what the kills have left
            reshard(tmp_path / "ckpt", tmp_path / "out", 4)
            assert file_hashes(tmp_path / "out") == expected
            assert not (tmp_path / ".out.partial").exists()
            shutil.rmtree(tmp_path / "out")
    assert killed > 25
    assert partial > 25  # so most kills fell into the writing
    assert file_hashes(tmp_path / "ckpt") == source


def test_the_plan_counts_what_is_written(tmp_path):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512, n_kv_heads=2))
    table = plan(ckpt, 4, torch.bfloat16, max_seq_len=100, max_batch_size=3)
    written = Checkpoint(reshard(tmp_path / "ckpt", tmp_path / "4", 4, torch.bfloat16))
    size = sum(weight.nbytes for weight in written.shard(0).values())
    assert f"4 shards of {size:,} bytes" in table
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines()}
    assert " ".join(rows["attention.wk"][1:]) == "2 16 x 64 8 x 64 8 x 64 2,048"
    cache = 2 * 2 * 3 * 100 * 8 * 2  # layers, keys and values, rows, tokens, a KV head, bytes
    assert f"needs {(size + cache) / 1e9:.2f} GB" in table


def test_split_model_plans_cuts_and_verifies(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512)
    flags = ["--ckpt_dir", ckpt_dir]
    planned = run_script("split_model.py", *flags, "--n", 4, "--dry_run")
    assert planned.returncode == 0, planned.stderr
    assert "feed_forward.w2" in planned.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    cut = run_script("split_model.py", *flags, "--n", 4, "--verify")
    assert cut.returncode == 0, cut.stderr
    assert "the same model, whole, cut in 2 and 4" in cut.stdout
    again = run_script("split_model.py", *flags, "--verify")
    assert "whole: 2 shards" in again.stdout
    make_ckpt(tmp_path / "other", vocab_size=512, norm_eps=1e-3)
    other = run_script("split_model.py", *flags, "--out_dir", tmp_path / "other", "--verify")
    assert other.returncode == 1
    assert "different models (norm_eps)" in other.stderr
    inside = run_script("split_model.py", *flags, "--n", 4, "--out_dir", ckpt_dir / "new")
    assert "inside" in inside.stderr
    assert run_script("split_model.py", *flags).stderr.startswith("error: --n is needed")
