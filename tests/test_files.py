"""Files appear whole or not at all; JSON and pickles are read without harm."""

import json

import pytest
import torch

from llama import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old"])
def test_a_file_takes_its_place_when_it_is_whole(tmp_path, before):
    path = tmp_path / "file"
    if before:
        path.write_text(before)
    with pytest.raises(FileNotFoundError), files.write_whole(path) as partial:
        (partial.write_text("half"), (tmp_path / "gone").read_text())
    assert names(tmp_path) == ["file"] * bool(before)
    with files.write_whole(path) as partial:
        partial.write_text("new")
        assert not before or path.read_text() == before
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\xff"], ids=len)
def test_what_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json: unreadable"):
        files.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps({"a": "b" * 100}))
    with pytest.raises(ValueError, match="longer than 50 bytes"):
        files.read_json(tmp_path / "x.json", 50)


def test_torchs_format_of_before_2020_is_refused_with_what_to_do(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"save it anew with torch\.save"):
        files.load_plain(tmp_path / "x")
