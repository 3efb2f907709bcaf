"""A folder that is no checkpoint is named, not loaded."""

import pickle

import pytest
import torch
from conftest import RunsCode, edit_json, edit_shard, make_ckpt, saved, shard_of

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.write import write_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Two shards without a manifest, as in the folders that come from elsewhere."""
    folder = make_ckpt(tmp_path / "ckpt", n=2, dtype=torch.bfloat16, vocab_size=512)
    (folder / "manifest.json").unlink()
    return folder


def params(**changes):
    return lambda folder: edit_json(folder / "params.json", **changes)


def norm(weight):
    return lambda folder: edit_shard(shard_of(folder, 1), **{"norm.weight": weight})


def last(folder):
    return shard_of(folder, 1)


BAD = {
    "no params.json": (lambda f: (f / "params.json").unlink(), "params.json"),
    "params.json not JSON": (lambda f: (f / "params.json").write_text("{dim"), "unreadable"),
    "other dim": (params(dim=128), "tok_embeddings.weight has shape .512, 32., expected .512, 64."),
    "other layers": (params(n_layers=3), "layers.2.attention.wq.weight is missing"),
    "absurd layers": (params(n_layers=10**9), "n_layers"),
    "no FFN": (params(ffn_dim_multiplier=1e-9), "leaves no FFN"),
    "other files beside": (
        lambda f: last(f).rename(f / "fs_consolidated.copy.pth"),
        r"00.pth: .*expected \(512, 64\)",
    ),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.pth")], "no shards"),
    "first shard gone": (lambda f: shard_of(f, 0).unlink(), "00.pth: missing"),
    "last shard gone": (lambda f: last(f).unlink(), r"00.pth: .*expected \(512, 64\)"),
    "truncated": (lambda f: last(f).write_bytes(last(f).read_bytes()[:20_000]), "damaged"),
    "text": (lambda f: last(f).write_text("hello"), "not a file of torch.save"),
    "empty": (lambda f: last(f).write_bytes(b""), "not a file of torch.save"),
    "pickle": (lambda f: last(f).write_bytes(pickle.dumps(RunsCode())), "not a file of torch.save"),
    "pickle in zip": (lambda f: last(f).write_bytes(saved(RunsCode())), "could run code"),
    "unknown": (lambda f: edit_shard(last(f), extra=torch.ones(2)), "extra is unexpected"),
    "missing": (norm(None), "norm.weight is missing"),
    "misshapen": (norm(torch.ones(3)), r"norm.weight has shape \(3,\)"),
    "integers": (norm(torch.ones(64, dtype=torch.long)), "int64"),
    "another dtype": (norm(torch.ones(64)), "norm.weight is torch.float32, but torch.bfloat16 in"),
    "without content": (norm(torch.ones(64, device="meta")), r"more than tensors \(torch\._utils"),
    "sparse": (norm(torch.ones(64).to_sparse()), r"01.pth: .*more than tensors \(torch\._utils"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_folders_are_named(folder, tmp_path, capfd, damage, message):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_checkpoint(Checkpoint(folder), tmp_path / "out", 1)
    assert "this code ran" not in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_a_mixture_of_dtypes_is_widened_and_never_narrowed(folder, tmp_path):
    fine = torch.rand(64)
    for i in range(2):
        edit_shard(shard_of(folder, i), **{"norm.weight": fine})
    before = {name: Checkpoint(folder).read(name) for name in ("norm.weight", "output.weight")}
    write_checkpoint(Checkpoint(folder), tmp_path / "out", 1)
    out = Checkpoint(tmp_path / "out")
    assert out.dtype == torch.float32
    for name, weight in before.items():
        assert torch.equal(out.read(name), weight.float())


def test_names_out_of_a_file_cannot_write_to_the_terminal(folder):
    names = ["evil\nerror: all fine\x1b[31m", "long" * 100_000, "c", "d", "e"]
    edit_shard(last(folder), **{name: torch.ones(1) for name in names})
    with pytest.raises(ValueError, match="unexpected") as caught:
        Checkpoint(folder).verify()
    assert str(caught.value).isprintable()
    assert str(caught.value).endswith("and 1 more")
    assert len(str(caught.value)) < 1000


def test_surplus_rope_freqs_are_ignored(folder):
    once_a_layer = "layers.0.attention.inner_attention.rope.freqs"  # as Llama 1 has them
    surplus = {name: torch.ones(4) for name in ("rope.freqs", once_a_layer)}
    edit_shard(last(folder), **surplus)
    assert not surplus.keys() & Checkpoint(folder).shard(1).keys()


def test_weights_that_share_one_storage_are_read(tmp_path):
    path = shard_of(make_ckpt(tmp_path / "ckpt", vocab_size=512), 0)
    (tmp_path / "ckpt" / "manifest.json").unlink()
    weights = torch.load(path, weights_only=True)
    weights["output.weight"] = weights["tok_embeddings.weight"]  # tied, saved once
    torch.save(weights, path)
    write_checkpoint(Checkpoint(tmp_path / "ckpt"), tmp_path / "split", 2)
    split = Checkpoint(tmp_path / "split")
    assert torch.equal(split.read("output.weight"), weights["tok_embeddings.weight"])
