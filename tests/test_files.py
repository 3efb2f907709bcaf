"""Files appear whole or not at all; JSON and pickles are read without harm."""

import json
import struct
import zipfile

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


# Within what torch's weights_only=True allows: two gigabytes.
MEMORY = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2_000_000_000) + b"\x85R."


def archive(path, *records):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records:
            file.writestr(name, content)
    return path.read_bytes()


def test_the_pickle_that_torch_finds_is_the_one_that_is_checked(tmp_path):
    path = tmp_path / "x.pth"
    innocent = b"\x80\x02}."  # an empty dict
    version = ("x/version", "3\n")
    archive(path, ("x/Data.pkl", MEMORY), version)  # torch knows no case
    with pytest.raises(ValueError, match=r"more than tensors \(builtins bytearray\)"):
        files.load_plain(path)
    # Python's reader goes by where a directory ends, torch's by where it is said to begin.
    hostile = archive(path, ("x/data.pkl", MEMORY), version)
    decoy = archive(path, ("x/data.pkl", innocent), version)
    start, end = hostile.index(b"PK\1\2"), hostile.index(b"PK\5\6")
    begin = decoy.index(b"PK\1\2")
    tail = bytearray(decoy[begin:])
    place = tail.index(b"PK\5\6") + 12
    tail[place : place + 8] = struct.pack("<II", end - start, start)
    path.write_bytes(hostile[:end] + decoy[:begin] + tail)
    with pytest.raises(ValueError, match="present format, or damaged"):
        files.load_plain(path)


def test_a_tensor_of_more_numbers_than_it_has_bytes_is_refused(tmp_path):
    torch.save({"x": torch.ones(1).expand(1 << 36)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x is no tensor of the bytes it has"):
        files.load_plain(tmp_path / "x.pth")


def test_a_text_has_an_end():
    with pytest.raises(ValueError, match=r'line 3: "prompt" has 1,048,577 characters'):
        files.check_text("p.txt, line 3", "prompt", "x" * (files.LONGEST_TEXT + 1))


def test_a_reserved_folder_is_for_one_run_and_goes_if_it_stays_empty(tmp_path):
    folder = tmp_path / "new" / "out"
    with files.reserved(folder):
        with pytest.raises(ValueError, match=r"out: another run writes in it; wait"):
            files.reserved(folder).__enter__()
        assert folder.is_dir()
    assert not folder.exists()
    with files.reserved(folder):
        (folder / "x").write_text("x")
    assert (folder / "x").exists()


def test_torchs_format_of_before_2020_is_refused_with_what_to_do(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"save it anew with torch\.save"):
        files.load_plain(tmp_path / "x")
