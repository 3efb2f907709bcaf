"""Checkpoints of any format, opened by what they hold."""

import shutil

import pytest
from conftest import make_ckpt
from formats import save_hf, write_gguf

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.formats import open_any
from llama.checkpoint.gguf import GGUFFile
from llama.checkpoint.hf import HFFolder


def test_each_format_is_told_by_its_content(tmp_path):
    save_hf(tmp_path / "hf")
    make_ckpt(tmp_path / "meta", vocab_size=96)
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder/m.gguf")
    write_gguf(tmp_path / "any_name")
    assert type(open_any(tmp_path / "hf")) is HFFolder
    assert type(open_any(str(tmp_path / "meta"))) is Checkpoint
    assert type(open_any(tmp_path / "folder")) is GGUFFile
    assert type(open_any(tmp_path / "any_name")) is GGUFFile
    for name in ("folder", "meta"):  # where a folder has more, shards come first, and config.json
        shutil.copy(tmp_path / "hf/config.json", tmp_path / name)
    assert type(open_any(tmp_path / "meta")) is Checkpoint
    assert type(open_any(tmp_path / "folder")) is GGUFFile  # last, as it has nothing to configure


def test_what_is_accepted_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder; give a"):
        open_any(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no config.json, params.json or .gguf file in it; give"):
        open_any(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.gguf: not a GGUF file"):
        open_any(tmp_path / "a.gguf")
    write_gguf(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"whole: with 3 ranks running, .* Valid n: 1, 2, 4, 8$"):
        next(open_any(tmp_path / "whole").load(0, 3))
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ValueError, match=r"2 .gguf files in it \(a.gguf, b.gguf\); give one of them"
    ):
        open_any(tmp_path)
