"""Damage of every kind is named, and none of it is ever loaded."""

import hashlib
import json
import os
import random
import shutil
import struct
import tracemalloc
import zipfile

import pytest
import torch
from conftest import TOKENIZERS, make_ckpt, run_script

from llama import parallel
from llama.checkpoint.folder import Checkpoint, compare
from llama.checkpoint.write import tensor_ranges, write_checkpoint
from llama.files import bytes_of
from llama.generation import load_model

MODEL = {"vocab_size": 512, "n_kv_heads": 2}


def assert_refused(folder, message):
    """Verifying, loading on another number of ranks, and cutting all refuse the folder."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Checkpoint(folder).verify()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(Checkpoint(folder), parallel.setup())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_checkpoint(Checkpoint(folder), folder.with_name("out"), 1)
    assert not folder.with_name("out").exists()


@pytest.fixture
def folder(tmp_path):
    return make_ckpt(tmp_path / "ckpt", n=4, **MODEL)


def shard(folder, i):
    return folder / f"fs_consolidated.{i:02d}.pth"


def test_a_whole_folder_is_verified_and_its_hashes_do_not_depend_on_n(folder, tmp_path):
    hashes = Checkpoint(folder).verify()
    other = Checkpoint(make_ckpt(tmp_path / "2", n=2, **MODEL))
    assert other.verify() == hashes
    assert {name: weight["sha256"] for name, weight in other.manifest.weights.items()} == hashes
    (tmp_path / "2" / "manifest.json").unlink()
    assert Checkpoint(tmp_path / "2").verify() == hashes
    compare(Checkpoint(folder), Checkpoint(tmp_path / "2"))


@pytest.mark.parametrize("with_manifest", [True, False])
def test_every_truncation_is_named(folder, with_manifest):
    if not with_manifest:
        (folder / "manifest.json").unlink()
    choose = random.Random(0)
    for i in range(4):
        content = shard(folder, i).read_bytes()
        for length in [0, 1, len(content) - 1, *choose.sample(range(len(content)), 17)]:
            shard(folder, i).write_bytes(content[:length])
            with pytest.raises(ValueError, match=shard(folder, i).name):
                Checkpoint(folder).verify()
            with pytest.raises(ValueError, match=shard(folder, i).name):
                load_model(Checkpoint(folder), parallel.setup())
        shard(folder, i).write_bytes(content)
    Checkpoint(folder).verify()


def test_every_flipped_byte_of_a_weight_is_named_and_others_change_nothing(folder):
    choose = random.Random(0)
    whole = Checkpoint(folder)
    for i in range(4):
        content = shard(folder, i).read_bytes()
        ranges = tensor_ranges(shard(folder, i))
        names = list(torch.load(shard(folder, i), weights_only=True))
        for place in [0, len(content) - 1, *choose.sample(range(len(content)), 28)]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << choose.randrange(8)
            shard(folder, i).write_bytes(damaged)
            hit = [name for name, (a, b) in zip(names, ranges) if a <= place < b]
            message = f"{shard(folder, i).name}: {hit[0] if hit else ''}"
            for use in (Checkpoint.verify, lambda ckpt: load_model(ckpt, parallel.setup())):
                try:
                    ckpt = Checkpoint(folder)
                    use(ckpt)
                except ValueError as error:
                    assert message in str(error)  # noqa: PT017 - outside weights, not each is one
                else:
                    assert not hit
                    for name in names:
                        assert torch.equal(ckpt.shard(i)[name], whole.shard(i)[name])
        shard(folder, i).write_bytes(content)


def swap(folder):
    os.rename(shard(folder, 0), folder / "x")
    os.rename(shard(folder, 1), shard(folder, 0))
    os.rename(folder / "x", shard(folder, 1))


def add_one(folder):
    shutil.copy(shard(folder, 3), shard(folder, 4))


def take_from_another_model(folder):
    other = make_ckpt(folder.with_name("other"), n=4, **MODEL)
    weights = torch.load(shard(other, 2), weights_only=True)
    data = bytes_of(weights["layers.1.attention.wq.weight"] + 1)
    start, _ = tensor_ranges(shard(folder, 2))[list(weights).index("layers.1.attention.wq.weight")]
    content = bytearray(shard(folder, 2).read_bytes())
    content[start : start + len(data)] = data
    shard(folder, 2).write_bytes(content)


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def params(**changes):
    return edit("params.json", **changes)


def edit_weight(name, **changes):
    def change(folder):
        content = json.loads((folder / "manifest.json").read_text())
        content["weights"][name] |= changes
        (folder / "manifest.json").write_text(json.dumps(content))

    return change


def forget_a_weight(folder):
    content = json.loads((folder / "manifest.json").read_text())
    del content["weights"]["norm.weight"]
    (folder / "manifest.json").write_text(json.dumps(content))


DAMAGE = {
    "swapped": (swap, "00.pth: .* is damaged.*it is what fs_consolidated.01.pth should hold"),
    "duplicated over": (
        lambda f: shutil.copy(shard(f, 0), shard(f, 3)),
        "03.pth: .* is damaged.*what fs_consolidated.00.pth should",
    ),
    "one too many": (add_one, "holds 5 shards, but manifest.json lists 4"),
    "last deleted": (lambda f: shard(f, 3).unlink(), "holds 3 shards, but manifest.json lists 4"),
    "first deleted": (lambda f: shard(f, 0).unlink(), "00.pth: missing"),
    "another model's": (
        take_from_another_model,
        r"02.pth: layers.1.attention.wq.* damaged",
    ),
    "dim": (params(dim=128), "params.json"),
    "heads": (params(n_heads=4), "params.json"),
    "kv heads": (params(n_kv_heads=4), "params.json"),
    "layers": (params(n_layers=1), "params.json"),
    "vocabulary": (params(vocab_size=256), "params.json"),
    "rope_theta": (params(rope_theta=5e5), "rope_theta 500000.0, not 10000.0 as .*manifest.json"),
    "norm_eps": (params(norm_eps=1e-3), "norm_eps 0.001, not 1e-05"),
    "manifest not JSON": (lambda f: (f / "manifest.json").write_text("{"), "manifest.json: unread"),
    "manifest a list": (lambda f: (f / "manifest.json").write_text("[1]"), "manifest.json: unread"),
    "manifest of tomorrow": (edit("manifest.json", format=3), "format 3, but this program knows 2"),
    "manifest of yesterday": (
        edit("manifest.json", format=1),
        "remove the file, and cut",
    ),
    "manifest without shards": (edit("manifest.json", shards={}), "lists 0"),
    "manifest of another dtype": (edit_weight("norm.weight", dtype="float16"), "does not describe"),
    "manifest without weights": (edit("manifest.json", weights=None), "manifest.json: unread"),
    "manifest without params": (edit("manifest.json", params=[]), "manifest.json: unread"),
    "manifest that leads nowhere": (
        lambda f: [(f / "manifest.json").unlink(), (f / "manifest.json").symlink_to("gone")],
        "manifest.json: unreadable .*No such file",
    ),
    "manifest without a weight": (forget_a_weight, "does not describe the weights"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    assert_refused(folder, message)


def test_a_manifest_that_contradicts_itself_is_named(folder):
    edit_weight("layers.0.ffn_norm.weight", sha256="0" * 64)(folder)
    message = "contradicts itself: the shards' parts of layers.0.ffn_norm.weight"
    with pytest.raises(ValueError, match=message):
        Checkpoint(folder).verify()
    with pytest.raises(ValueError, match=message):
        write_checkpoint(Checkpoint(folder), folder.with_name("out"))


def test_metas_checklist_is_verified(folder):
    names = ["params.json", *(shard(folder, i).name for i in range(4))]
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (folder / "checklist.chk").write_text("\n".join(lines))
    (folder / "manifest.json").unlink()
    Checkpoint(folder).verify()
    assert Checkpoint(folder).what_was_verified().endswith("weights as in checklist.chk")
    damaged = bytearray(shard(folder, 2).read_bytes())
    damaged[-100] ^= 1
    shard(folder, 2).write_bytes(damaged)
    (folder / "checklist.chk").write_text("\n".join([*lines, "0" * 32 + "  gone.txt"]))
    with pytest.raises(ValueError, match=r"02.pth: its MD5 .*gone.txt: missing") as caught:
        Checkpoint(folder).verify()
    assert "01.pth" not in str(caught.value)


def test_without_a_manifest_copies_that_differ_are_named(folder):
    (folder / "manifest.json").unlink()
    for name in ("norm.weight", "layers.0.attention.wk.weight"):  # KV heads: shards 2 and 3
        content = torch.load(shard(folder, 3), weights_only=True)
        torch.save(content | {name: content[name] + 1}, shard(folder, 3))
        first = "00" if name == "norm.weight" else "02"
        with pytest.raises(ValueError, match=rf"03.pth: {name} differs from the copy in .*{first}"):
            Checkpoint(folder).verify()
        torch.save(content, shard(folder, 3))


def test_two_folders_that_differ_are_named(folder, tmp_path):
    def changed(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "manifest.json").unlink()
        change(copy)
        return Checkpoint(copy)

    def other_weight(copy):
        content = torch.load(shard(copy, 1), weights_only=True)
        torch.save(content | {"output.weight": content["output.weight"] * 2}, shard(copy, 1))

    with pytest.raises(ValueError, match=r"different contents of output\.weight"):
        compare(Checkpoint(folder), changed("weight", other_weight))
    with pytest.raises(ValueError, match=r"different models \(rope_theta\)"):
        compare(Checkpoint(folder), changed("params", params(rope_theta=1e6)))
    write_checkpoint(Checkpoint(folder), tmp_path / "half", 2, torch.float16)
    compare(Checkpoint(folder), Checkpoint(tmp_path / "half"))
    with pytest.raises(ValueError, match="different contents"):
        compare(changed("again", other_weight), Checkpoint(tmp_path / "half"))


def bytearray_of(count):
    """A pickle that asks for memory, and is within what torch's weights_only=True allows."""
    return b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", count) + b"\x85R."


def test_a_few_bytes_cannot_ask_for_gigabytes(folder):
    (folder / "manifest.json").unlink()
    with zipfile.ZipFile(shard(folder, 0), "w") as archive:
        archive.writestr("fs_consolidated.00/data.pkl", bytearray_of(2_000_000_000))
        archive.writestr("fs_consolidated.00/version", "3\n")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"00.pth: .*more than tensors \(builtins bytearray\)"):
        Checkpoint(folder)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("n", [2, 4])
def test_no_number_of_ranks_makes_text_of_damage(tmp_path, n):
    path, vocab_size = TOKENIZERS["sentencepiece"]
    folder = make_ckpt(tmp_path / "ckpt", n=4, vocab_size=vocab_size, n_kv_heads=2)
    content = bytearray(shard(folder, 3).read_bytes())
    content[-100_000] ^= 1  # within output.weight, which only one rank checks
    shard(folder, 3).write_bytes(content)
    flags = ["--ckpt_dir", folder, "--tokenizer_path", path]
    result = run_script("example.py", *flags, n=n)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert f"{shard(folder, 3)}: output.weight is damaged" in result.stderr


@pytest.mark.parametrize(
    ("kind", "count"),
    [("params.json", 4000), ("manifest.json", 2000), ("shard", 3000), ("verified", 1000)],
)
def test_mutated_files_are_an_error_or_right(tmp_path, kind, count):
    folder = make_ckpt(tmp_path / "ckpt", n=2, dim=16, n_layers=1, n_heads=4, vocab_size=32)
    if kind in ("params.json", "shard"):  # or every change is noticed at once
        (folder / "manifest.json").unlink()
    result = run_script("tests/mutate.py", folder, kind, count, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.splitlines()[-1]) > count / 2
