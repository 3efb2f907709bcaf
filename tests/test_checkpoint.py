"""Splitting and merging are exact, and a folder that is no checkpoint is named, not loaded."""

import json
import pickle

import pytest
import torch
from conftest import make_ckpt, make_params
from random_model import random_source

from llama.checkpoint import Checkpoint, write_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_kv_heads", [8, 2])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_merge_of_split_is_bit_equal(tmp_path, n, n_kv_heads, dtype):
    source = random_source(make_params(vocab_size=512, n_kv_heads=n_kv_heads), dtype)
    write_checkpoint(source, tmp_path / "split", n)
    write_checkpoint(Checkpoint(tmp_path / "split").source(), tmp_path / "merged", 1)
    merged = Checkpoint(tmp_path / "merged")
    assert merged.shapes == source.shapes
    for name in source.shapes:
        assert torch.equal(merged.read(name), source.read(name)), name


def test_kv_heads_are_repeated_on_neighbouring_shards(tmp_path):
    ckpt = Checkpoint(make_ckpt(tmp_path / "ckpt", n=4, vocab_size=512, n_kv_heads=2))
    wk = [ckpt.shard(i)["layers.0.attention.wk.weight"] for i in range(4)]
    assert torch.equal(wk[0], wk[1])
    assert torch.equal(wk[2], wk[3])
    assert not torch.equal(wk[0], wk[2])


def test_plain_torch_load_reads_what_we_write(tmp_path):
    path = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512) / "fs_consolidated.01.pth"
    for mmap in (False, True):
        shard = torch.load(path, mmap=mmap, weights_only=True)
        expected = random_source(make_params(vocab_size=512)).read("output.weight")[256:]
        assert torch.equal(shard["output.weight"], expected)


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


def test_a_failed_write_leaves_nothing(tmp_path):
    source = random_source(make_params(vocab_size=512))
    read = source.read

    def failing(name):
        if name == "norm.weight":
            raise OSError("no space left")
        return read(name)

    source.read = failing
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(source, tmp_path / "out", 2)
    assert list(tmp_path.iterdir()) == []


class RunsCode:
    def __reduce__(self):
        return (print, ("this code ran",))


def edit_params(**changes):
    def edit(folder):
        path = folder / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_shard(change):
    def edit(folder):
        path = folder / "fs_consolidated.01.pth"
        shard = torch.load(path, weights_only=True)
        change(shard)
        torch.save(shard, path)

    return edit


def last(folder):
    return folder / "fs_consolidated.01.pth"


def truncate(folder):
    content = last(folder).read_bytes()
    last(folder).write_bytes(content[: len(content) * 2 // 3])


BAD = {
    "no params.json": (lambda f: (f / "params.json").unlink(), "params.json"),
    "params.json not JSON": (lambda f: (f / "params.json").write_text("{dim"), "unreadable"),
    "other dim": (edit_params(dim=128), "params.json wants"),
    "other layers": (edit_params(n_layers=3), "missing weights layers.2"),
    "absurd layers": (edit_params(n_layers=10**9), "n_layers"),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.pth")], "no shards"),
    "first shard gone": (lambda f: (f / "fs_consolidated.00.pth").unlink(), "00.pth: missing"),
    "last shard gone": (lambda f: last(f).unlink(), "shard missing"),
    "truncated": (truncate, "damaged"),
    "text": (lambda f: last(f).write_text("hello"), "not a checkpoint"),
    "empty": (lambda f: last(f).write_bytes(b""), "not a checkpoint"),
    "pickle": (lambda f: last(f).write_bytes(pickle.dumps(RunsCode())), "not a checkpoint"),
    "pickle in zip": (lambda f: torch.save(RunsCode(), last(f)), "could run code"),
    "unknown": (edit_shard(lambda s: s.update(extra=torch.ones(2))), "unknown extra"),
    "missing": (edit_shard(lambda s: s.pop("norm.weight")), "missing weights norm.weight"),
    "misshapen": (
        edit_shard(lambda s: s.update({"norm.weight": torch.ones(3)})),
        r"norm.weight has shape \(3,\)",
    ),
    "integers": (
        edit_shard(lambda s: s.update({"norm.weight": s["norm.weight"].long()})),
        "int64",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_folders_are_named(tmp_path, capfd, damage, message):
    folder = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512)
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_checkpoint(Checkpoint(folder).source(), tmp_path / "out", 1)
    assert "this code ran" not in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_surplus_rope_freqs_are_ignored(tmp_path):
    folder = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512)
    edit_shard(lambda s: s.update({"rope.freqs": torch.ones(4)}))(folder)
    assert "rope.freqs" not in Checkpoint(folder).shard(1)
