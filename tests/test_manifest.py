"""Damage of every kind is named, and none of it is ever loaded."""

import hashlib
import json
import random
import shutil

import programs
import pytest
import torch
from conftest import TOKENIZERS, edit_json, edit_shard, flags_of, make_ckpt, run_script, shard_of

from llama.checkpoint.folder import Checkpoint, compare
from llama.checkpoint.write import tensor_ranges, write_checkpoint
from llama.files import bytes_of

MODEL = {"vocab_size": 512, "n_kv_heads": 2}


@pytest.fixture
def folder(tmp_path):
    return make_ckpt(tmp_path / "ckpt", n=4, **MODEL)


def verify(folder):
    Checkpoint(folder).verify()


def cut(folder):
    write_checkpoint(Checkpoint(folder), folder.with_name("out"))


@pytest.mark.parametrize("with_manifest", [True, False])
def test_every_truncation_is_named(folder, with_manifest):
    if not with_manifest:
        (folder / "manifest.json").unlink()
    choose = random.Random(0)
    for i in range(4):
        path = shard_of(folder, i)
        content = path.read_bytes()
        for length in [0, 1, len(content) - 1, *choose.sample(range(len(content)), 17)]:
            path.write_bytes(content[:length])
            for use in (verify, programs.load):
                with pytest.raises(ValueError, match=path.name):
                    use(folder)
        path.write_bytes(content)
    Checkpoint(folder).verify()


def test_every_flipped_byte_of_a_weight_is_named_and_others_change_nothing(folder):
    choose = random.Random(0)
    for i in range(4):
        path = shard_of(folder, i)
        content, ranges = path.read_bytes(), tensor_ranges(path)
        right = torch.load(path, weights_only=True)
        for place in [0, len(content) - 1, *choose.sample(range(len(content)), 28)]:
            damaged = bytearray(content)
            damaged[place] ^= 1 << choose.randrange(8)
            path.write_bytes(damaged)
            hit = [name for name, (a, b) in zip(right, ranges) if a <= place < b]
            message = f"{path.name}: {hit[0] if hit else ''}"
            for use in (verify, programs.load):
                try:
                    use(folder)
                except ValueError as error:
                    assert message in str(error)  # noqa: PT017 - outside weights, not each is one
                else:
                    assert not hit
                    for name, weight in Checkpoint(folder).shard(i).items():
                        assert torch.equal(weight, right[name])
        path.write_bytes(content)


def swap(folder):
    shard_of(folder, 0).rename(folder / "x")
    shard_of(folder, 1).rename(shard_of(folder, 0))
    (folder / "x").rename(shard_of(folder, 1))


def copy(i, j):
    return lambda folder: shutil.copy(shard_of(folder, i), shard_of(folder, j))


def change_one_weight(folder):
    path, content = shard_of(folder, 2), shard_of(folder, 2).read_bytes()
    weight = torch.load(path, weights_only=True)["layers.1.attention.wq.weight"]
    path.write_bytes(content.replace(bytes_of(weight), bytes_of(weight + 1)))


def params(**changes):
    return lambda folder: edit_json(folder / "params.json", **changes)


def manifest(**changes):
    return lambda folder: edit_json(folder / "manifest.json", **changes)


def text(content):
    return lambda folder: (folder / "manifest.json").write_text(content)


def norm(**changes):
    """Change what the manifest says of one weight; nothing takes it away."""

    def edit(folder):
        weights = json.loads((folder / "manifest.json").read_text())["weights"]
        described = weights.pop("norm.weight")
        new = {"norm.weight": described | changes} if changes else {}
        manifest(weights=weights | new)(folder)

    return edit


def lead_nowhere(folder):
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("gone")


DAMAGE = {
    "swapped": (swap, "00.pth: .* is damaged.*it is what fs_consolidated.01.pth should hold"),
    "duplicated over": (copy(0, 3), "03.pth: .* is damaged.*what fs_consolidated.00.pth should"),
    "one too many": (copy(3, 4), "holds 5 shards, but manifest.json lists 4"),
    "last deleted": (lambda f: shard_of(f, 3).unlink(), "holds 3 shards, but manifest.json lists"),
    "first deleted": (lambda f: shard_of(f, 0).unlink(), "00.pth: missing"),
    "another model's": (change_one_weight, r"02.pth: layers.1.attention.wq.* damaged"),
    "dim": (params(dim=128), "params.json"),
    "heads": (params(n_heads=4), "params.json"),
    "kv heads": (params(n_kv_heads=4), "params.json"),
    "layers": (params(n_layers=1), "params.json"),
    "vocabulary": (params(vocab_size=256), "params.json"),
    "rope_theta": (params(rope_theta=5e5), "rope_theta 500000.0, not 10000.0 as .*manifest.json"),
    "norm_eps": (params(norm_eps=1e-3), "norm_eps 0.001, not 1e-05"),
    "manifest not JSON": (text("{"), "manifest.json: unread"),
    "manifest a list": (text("[1]"), "manifest.json: unread"),
    "manifest of tomorrow": (manifest(format=3), "format 3, but this program knows 2"),
    "manifest of yesterday": (manifest(format=1), "remove the file, and cut"),
    "manifest without shards": (manifest(shards={}), "lists 0"),
    "manifest without weights": (manifest(weights=None), "manifest.json: unread"),
    "manifest without params": (manifest(params=[]), "manifest.json: unread"),
    "manifest of another dtype": (norm(dtype="float16"), "does not describe"),
    "manifest without a weight": (norm(), "does not describe the weights"),
    "manifest that leads nowhere": (lead_nowhere, "manifest.json: unreadable .*No such file"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_neither_verifying_nor_loading_nor_cutting_takes_damage(folder, damage, message):
    damage(folder)
    for use in (verify, programs.load, cut):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            use(folder)
    assert not folder.with_name("out").exists()


def test_a_manifest_that_contradicts_itself_is_named(folder):
    norm(sha256="0" * 64)(folder)
    for use in (verify, cut):
        with pytest.raises(ValueError, match=r"contradicts itself: .* parts of norm\.weight"):
            use(folder)


def test_metas_checklist_is_verified(folder):
    names = ["params.json", *(shard_of(folder, i).name for i in range(4))]
    lines = [f"{hashlib.md5((folder / name).read_bytes()).hexdigest()}  {name}" for name in names]
    (folder / "checklist.chk").write_text("\n".join(lines))
    (folder / "manifest.json").unlink()
    Checkpoint(folder).verify()
    assert Checkpoint(folder).what_was_verified().endswith("weights as in checklist.chk")
    damaged = bytearray(shard_of(folder, 2).read_bytes())
    damaged[-100] ^= 1
    shard_of(folder, 2).write_bytes(damaged)
    (folder / "checklist.chk").write_text("\n".join([*lines, "0" * 32 + "  gone.txt"]))
    with pytest.raises(ValueError, match=r"02.pth: its MD5 .*gone.txt: missing") as caught:
        Checkpoint(folder).verify()
    assert "01.pth" not in str(caught.value)


def test_without_a_manifest_copies_that_differ_are_named(folder):
    (folder / "manifest.json").unlink()
    content = torch.load(shard_of(folder, 3), weights_only=True)
    # KV heads are in shards 2 and 3
    for name, first in (("norm.weight", "00"), ("layers.0.attention.wk.weight", "02")):
        torch.save(content | {name: content[name] + 1}, shard_of(folder, 3))
        with pytest.raises(ValueError, match=rf"03.pth: {name} differs from the copy in .*{first}"):
            Checkpoint(folder).verify()


def test_the_tokenizers_files_may_go_but_not_change(folder):
    (folder / "tokenizer.json").write_text('{"a": 1}')
    cut(folder)
    out = folder.with_name("out")
    assert Checkpoint(out).manifest.files.keys() == {"tokenizer.json"}
    (out / "tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not the file that manifest\.json"):
        Checkpoint(out)
    (out / "tokenizer.json").unlink()
    Checkpoint(out).verify()


def test_a_shard_that_is_written_into_while_in_use_is_named(folder):
    ckpt, path = Checkpoint(folder), shard_of(folder, 2)
    content = path.read_bytes()
    path.rename(folder / "old")
    path.write_bytes(content)  # replaced: what is mapped stays
    ckpt.check_unchanged()
    ckpt = Checkpoint(folder)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"02\.pth: written into while it was in use"):
        ckpt.check_unchanged()


def test_two_folders_that_differ_are_named(folder, tmp_path):
    def changed(name, change):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        (copy / "manifest.json").unlink()
        change(copy)
        return Checkpoint(copy)

    def other_weight(copy):
        weight = Checkpoint(copy).shard(1)["output.weight"]
        edit_shard(shard_of(copy, 1), **{"output.weight": weight * 2})

    with pytest.raises(ValueError, match=r"different contents of output\.weight"):
        compare(Checkpoint(folder), changed("weight", other_weight))
    with pytest.raises(ValueError, match=r"different models \(rope_theta\)"):
        compare(Checkpoint(folder), changed("params", params(rope_theta=1e6)))
    write_checkpoint(Checkpoint(folder), tmp_path / "half", 2, torch.float16)
    compare(Checkpoint(folder), Checkpoint(tmp_path / "half"))
    with pytest.raises(ValueError, match="different contents"):
        compare(changed("again", other_weight), Checkpoint(tmp_path / "half"))


def test_two_ranks_make_no_text_of_damage_that_one_of_them_reads(tmp_path):
    path, vocab_size = TOKENIZERS["sentencepiece"]
    folder = make_ckpt(tmp_path / "ckpt", n=4, vocab_size=vocab_size, n_kv_heads=2)
    content = bytearray(shard_of(folder, 3).read_bytes())
    content[-100_000] ^= 1  # within output.weight, which only one rank checks
    shard_of(folder, 3).write_bytes(content)
    result = run_script("example.py", *flags_of(ckpt_dir=folder, tokenizer_path=path), n=2)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert f"{shard_of(folder, 3)}: output.weight is damaged" in result.stderr
