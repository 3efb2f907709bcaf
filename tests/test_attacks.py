"""No damage to a file leads to anything but what is right, or an error of one line.

Some attacks of each kind of victims.py, always the same ones; `make fuzz` makes others.
"""

import os
import time

import attacks
import pytest
from conftest import REPO, run_script
from victims import KINDS, Kind, make_prompts

PATHS = os.environ | {"PYTHONPATH": f"{REPO}:{REPO / 'benchmarks'}"}


def test_an_attack_is_refused_or_changes_nothing():
    # Not in this process: a fork has none of the threads that other tests have left in it.
    result = run_script("tests/attacks.py", "--seed", 0, timeout=280, env=PATHS)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {line[:16].strip(): line[16:].split() for line in result.stdout.splitlines()}
    for name, kind in KINDS.items():
        refused, read = (int(number) for number in rows[name][:2])
        assert refused + read == kind.tries
        assert refused > kind.tries / 4, f"{name}: the attacks are too weak"


def fail(message: str) -> None:
    raise ValueError(message)


BAD_READERS = [  # what an attempt must be counted as, and what reading does in it
    ("traceback", lambda folder: {}["no such key"]),
    ("traceback", lambda folder: fail("names no file")),
    ("traceback", lambda folder: os.system("true")),
    ("memory", lambda folder: bytearray(4 * attacks.MEMORY)),
    ("hang", lambda folder: time.sleep(9)),
    ("abort", lambda folder: os.abort()),
    ("changed", lambda folder: "something else"),
    ("refused", lambda folder: fail(f"{folder}: damaged")),
]


@pytest.mark.parametrize(("outcome", "read"), BAD_READERS)
def test_an_outcome_is_told_and_a_fault_kept(tmp_path, monkeypatch, outcome, read):
    kept = tmp_path / "kept"
    monkeypatch.setattr(attacks, "FAILED", kept)

    def read_damaged(folder):
        if (folder / "prompts.txt").read_bytes() == b"damaged":
            return read(folder)

    to_damaged = (lambda content, choose: b"damaged",)
    kind = Kind(make_prompts, "*.txt", to_damaged, read_damaged, voucher="prompts.txt")
    monkeypatch.setitem(KINDS, "bad", kind)
    monkeypatch.setattr(attacks, "HANG", 2)
    found = attacks.Attacks("bad", tmp_path)
    assert found.run(range(2)) == 2
    assert found.counts == {outcome: 2}
    if outcome != "refused":
        assert (kept / "bad-0" / "prompts.txt").read_bytes() == b"damaged"
        assert (kept / "bad-1" / "why.txt").read_text().startswith(outcome)
