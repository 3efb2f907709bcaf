"""No damage to a file leads to anything but what is right, or an error of one line.

Some attacks of each kind of victims.py, always the same ones; `make fuzz` makes others.
"""

import os
import time

import attacks
import pytest
from victims import KINDS, Kind, make_prompts

SLOW = (
    "shard",
    "directory",
    "pickle",
    "checklist",
    "adapter",
    "old adapter",
    "checkpoint",
    "options",
)
COUNTS = dict.fromkeys(KINDS, 200) | dict.fromkeys(SLOW, 100) | {"stranger": 8, "ranks": 1}


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Where the files of a failed attack are kept."""
    monkeypatch.setattr(attacks, "FAILED", tmp_path / "kept")
    return tmp_path / "kept"


@pytest.mark.parametrize("name", KINDS)
def test_an_attack_is_refused_or_changes_nothing(tmp_path, name):
    found = attacks.Attacks(name, tmp_path)
    found.run(range(COUNTS[name]))
    assert not found.faults
    assert found.counts.total() == COUNTS[name]
    assert found.counts["refused"] > COUNTS[name] / 4  # or the attacks are too weak


def fail(message: str) -> None:
    raise ValueError(message)


BAD_READERS = [  # what an attempt must be counted as, and what reading does in it
    ("traceback", lambda folder: {}["no such key"]),
    ("traceback", lambda folder: fail("names no file")),
    ("traceback", lambda folder: os.system("true")),
    ("memory", lambda folder: bytearray(attacks.MEMORY)),
    ("hang", lambda folder: time.sleep(9)),
    ("abort", lambda folder: os.abort()),
    ("changed", lambda folder: "something else"),
    ("refused", lambda folder: fail(f"{folder}: damaged")),
]


@pytest.mark.parametrize(("outcome", "read"), BAD_READERS)
def test_an_outcome_is_told_and_a_fault_kept(tmp_path, monkeypatch, kept, outcome, read):
    def read_damaged(folder):
        if (folder / "prompts.txt").read_bytes() == b"damaged":
            return read(folder)

    to_damaged = (lambda content, choose: b"damaged",)
    kind = Kind(make_prompts, "*.txt", to_damaged, read_damaged, voucher="prompts.txt")
    monkeypatch.setitem(KINDS, "bad", kind)
    monkeypatch.setattr(attacks, "HANG", 1)
    found = attacks.Attacks("bad", tmp_path)
    assert found.run(range(2)) == 2
    assert found.counts == {outcome: 2}
    if outcome != "refused":
        assert (kept / "bad-0" / "prompts.txt").read_bytes() == b"damaged"
        assert (kept / "bad-1" / "why.txt").read_text().startswith(outcome)
