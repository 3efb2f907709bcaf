"""A folder that is no checkpoint is named, not loaded."""

import json
import pickle

import pytest
import torch
from conftest import make_ckpt

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.write import write_checkpoint


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
    "other dim": (
        edit_params(dim=128),
        "tok_embeddings.weight has shape .512, 32., expected .512, 64.",
    ),
    "other layers": (edit_params(n_layers=3), "layers.2.attention.wq.weight is missing"),
    "absurd layers": (edit_params(n_layers=10**9), "n_layers"),
    "no FFN": (edit_params(ffn_dim_multiplier=1e-9), "leaves no FFN"),
    "other files beside": (
        lambda f: [last(f).rename(f / "fs_consolidated.copy.pth")],
        r"00.pth: .*has shape \(512, 32\), expected \(512, 64\)",
    ),
    "no shards": (lambda f: [p.unlink() for p in f.glob("*.pth")], "no shards"),
    "first shard gone": (lambda f: (f / "fs_consolidated.00.pth").unlink(), "00.pth: missing"),
    "last shard gone": (lambda f: last(f).unlink(), r"00.pth: .*has shape \(512, 32\), expected"),
    "truncated": (truncate, "damaged"),
    "text": (lambda f: last(f).write_text("hello"), "not a file of torch.save"),
    "empty": (lambda f: last(f).write_bytes(b""), "not a file of torch.save"),
    "pickle": (lambda f: last(f).write_bytes(pickle.dumps(RunsCode())), "not a file of torch.save"),
    "pickle in zip": (lambda f: torch.save(RunsCode(), last(f)), "could run code"),
    "unknown": (edit_shard(lambda s: s.update(extra=torch.ones(2))), "extra is unexpected"),
    "missing": (edit_shard(lambda s: s.pop("norm.weight")), "norm.weight is missing"),
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
    (folder / "manifest.json").unlink()  # as in the folders that come from elsewhere
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_checkpoint(Checkpoint(folder), tmp_path / "out", 1)
    assert "this code ran" not in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


META = {
    "tensors without content": lambda s: s.update({"norm.weight": s["norm.weight"].to("meta")}),
    "sparse": lambda s: s.update({"norm.weight": s["norm.weight"].to_sparse()}),
}


@pytest.mark.parametrize("change", META.values(), ids=META)
def test_only_plain_tensors_are_read(tmp_path, change):
    folder = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512)
    (folder / "manifest.json").unlink()
    edit_shard(change)(folder)
    with pytest.raises(ValueError, match=r"01.pth: .*more than tensors \(torch\._utils"):
        Checkpoint(folder).verify()


def test_a_mixture_of_dtypes_is_widened_and_never_narrowed(tmp_path):
    folder = make_ckpt(tmp_path / "ckpt", n=2, dtype=torch.bfloat16, vocab_size=512)
    (folder / "manifest.json").unlink()
    fine = torch.rand(64)
    for path in folder.glob("*.pth"):
        torch.save(torch.load(path) | {"norm.weight": fine}, path)
    before = {name: Checkpoint(folder).read(name) for name in ("norm.weight", "output.weight")}
    write_checkpoint(Checkpoint(folder), tmp_path / "out", 1)
    out = Checkpoint(tmp_path / "out")
    assert out.dtype == torch.float32
    for name, weight in before.items():
        assert torch.equal(out.read(name), weight.float())
    edit_shard(lambda s: s.update({"norm.weight": fine.bfloat16()}))(folder)
    with pytest.raises(ValueError, match=r"norm.weight is torch.bfloat16, but torch.float32 in"):
        Checkpoint(folder).verify()


def test_names_out_of_a_file_cannot_write_to_the_terminal(tmp_path):
    folder = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512)
    (folder / "manifest.json").unlink()
    names = ["evil\nerror: all fine\x1b[31m", "long" * 100_000]
    edit_shard(lambda s: s.update({name: torch.ones(1) for name in names}))(folder)
    with pytest.raises(ValueError, match="unexpected") as caught:
        Checkpoint(folder).verify()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_surplus_rope_freqs_are_ignored(tmp_path):
    folder = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=512)
    (folder / "manifest.json").unlink()
    once_a_layer = "layers.0.attention.inner_attention.rope.freqs"  # as Llama 1 has them
    surplus = {name: torch.ones(4) for name in ("rope.freqs", once_a_layer)}
    edit_shard(lambda s: s.update(surplus))(folder)
    assert not surplus.keys() & Checkpoint(folder).shard(1).keys()


def test_weights_that_share_one_storage_are_read(tmp_path):
    folder = make_ckpt(tmp_path / "ckpt", vocab_size=512)
    (folder / "manifest.json").unlink()
    path = folder / "fs_consolidated.00.pth"
    shard = torch.load(path, weights_only=True)
    shard["output.weight"] = shard["tok_embeddings.weight"]  # tied, saved once
    torch.save(shard, path)
    write_checkpoint(Checkpoint(folder), tmp_path / "split", 2)
    split = Checkpoint(tmp_path / "split")
    assert torch.equal(split.read("output.weight"), shard["tok_embeddings.weight"])
