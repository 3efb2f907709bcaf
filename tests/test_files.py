"""Files appear whole or not at all; JSON and pickles are read without harm."""

import json
import multiprocessing
import os

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


def test_what_a_killed_run_left_is_cleared(tmp_path):
    left = files.partial_name(tmp_path / "out")
    (left / "inside").mkdir(parents=True)
    with files.new_folder(tmp_path / "out") as folder:
        assert names(folder) == []
        (folder / "file").write_text("x")
    assert names(tmp_path) == ["out"]


def hold(folder, held, end):
    with files.locked(folder, "taken"):
        held.set()
        end.wait(30)


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    held, end = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, held, end))
    process.start()
    assert held.wait(30)
    with pytest.raises(ValueError, match="taken; wait"), files.locked(tmp_path, "taken"):
        pass
    process.kill()
    process.join()
    with files.locked(tmp_path, "taken"):
        pass


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


def test_a_refusal_of_the_system_names_the_file(tmp_path):
    refusal = pytest.raises(OSError, match=r"/x: cannot be written: No such file")
    with refusal, files.naming_refusals(tmp_path / "x"):
        os.stat(tmp_path / "gone")
