"""What check-gpu promises, as far as a CPU shows it: steps judged, reported, and seen to fail."""

import importlib.metadata
import json
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import check_gpu
import gpu_steps
import pytest
import torch
from check_gpu import (
    Check,
    Outcome,
    Step,
    add_shares,
    compare_losses,
    how_to_install,
    lines_of,
    missing,
    table_of,
)
from conftest import run_script
from random_model import random_source

import ft_main
from llama import cli, memory, parallel
from llama.tuning.options import TuningOptions


def run(folder, only):
    """Run some steps as check_gpu.py --tiny does: its exit code, and the steps in its report."""
    code = 0
    try:
        check_gpu.main(tiny=True, only=only, report=str(folder / "report.json"))
    except SystemExit as end:
        code = end.code
    report = json.loads((folder / "report.json").read_text())
    assert report["passed"] == (code == 0)
    return code, {step["step"]: step for step in report["steps"]}


def test_a_machine_without_a_card_is_told_so_in_one_line():
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = run_script("benchmarks/check_gpu.py", env=env | {"CUDA_VISIBLE_DEVICES": ""})
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"no card that torch \S+ can use: nothing to check\n", result.stderr)


def test_a_variant_that_differs_is_seen_in_the_report_and_by_the_exit_code(
    tmp_path, monkeypatch, capsys
):
    write_model = gpu_steps.write_model

    def write_both(path, std=0.5):
        """Write a model, and what a CPU computes: in int8 with another model's weights."""
        write_model(path, std)
        if path.name != "ckpt":  # the one that is tuned
            return
        gpu_steps.reference(path.parent)
        write_model(tmp_path / "ckpt", 0.4)
        gpu_steps.reference(tmp_path)
        found, wrong = (torch.load(x / gpu_steps.REFERENCE) for x in (path.parent, tmp_path))
        found |= {key: x for key, x in wrong.items() if key.startswith("int8")}
        torch.save(found, path.parent / gpu_steps.REFERENCE)

    monkeypatch.setattr(gpu_steps, "write_model", write_both)
    code, steps = run(tmp_path, "parity: 2")
    (step,) = steps.values()
    assert (code, step["step"], step["outcome"]) == (1, "parity: 2 ranks", "failed")
    assert re.fullmatch(
        r"int8: logits differ by [\d.]+, above 0.001; int8: \d+% of greedy tokens differ from the "
        "CPU's",
        step["error"],
    )
    assert f"error: {step['error']}" in step["log"]
    found = step["found"]
    assert found["ranks"] == 2
    assert found["variants"].keys() == gpu_steps.VARIANTS.keys()
    errors = {name: about["error"] for name, about in found["variants"].items()}
    assert 0 < errors["float32"] < 1e-4 < errors["float16"] < errors["bfloat16"] < 0.15
    assert errors["int4"] < 1e-4 < 0.1 < errors["int8"]
    table = capsys.readouterr().out
    assert "| parity: 2 ranks | failed  |" in table
    assert "| float32: logits differ by " in table


def test_a_killed_rank_ends_all(tmp_path):
    code, steps = run(tmp_path, "kill")
    (step,) = steps.values()
    assert (code, step["outcome"]) == (0, "passed"), step
    assert step["found"]["seconds_to_end"] < 30


def test_a_kill_that_is_not_noticed_fails(tmp_path):
    check = Check(tmp_path, 2, tiny=True)
    assert check.judge_kill("", "exit code 1") == ({}, "exit code 1")
    (tmp_path / "killed").write_text(str(time.time() - 1))
    assert check.judge_kill("Signal 9 (SIGKILL)", "exit code 1")[1] == ""
    twice = "error: a\nerror: b\nSignal 9 (SIGKILL)"
    assert "not told once" in check.judge_kill(twice, "exit code 1")[1]
    (tmp_path / "rank0").write_text(str(os.getpid()))
    assert check.judge_kill("Signal 9 (SIGKILL)", "a")[1] == (
        "it took 1 s after the kill, and left 1 ranks"
    )
    (tmp_path / "rank0").unlink()
    (tmp_path / "killed").write_text(str(time.time() - 90))
    assert "it took 90 s after the kill" in check.judge_kill("Signal 9 (SIGKILL)", "exit code 1")[1]


def test_a_step_ends_at_its_limit(tmp_path):
    (tmp_path / "script.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    step = Step("slow", (tmp_path / "script.py",), lambda _, fault: ({}, fault), limit=0.5)
    found = step.run(tmp_path / "log")
    assert (found.outcome, found.error) == ("failed", "took longer than 0 s")
    assert found.seconds < 30


def test_why_a_program_ended_is_the_first_line_that_says_so():
    said = "[rank1]: RuntimeError: of torch\nerror: ours\nmore\nerror: second"
    assert check_gpu.why(said) == "ours"
    assert check_gpu.why(said[: said.index("error: ours")]) == "RuntimeError: of torch"
    assert check_gpu.why("nothing of it") == ""


def test_tuning_is_judged_by_the_losses_of_the_cpu(tmp_path, monkeypatch):
    judged = {}
    changes = {"tuning: checkpointing": {"lr": 1e-3}}  # as if it learned otherwise
    for step in Check(tmp_path, 1, tiny=True).steps():
        if step.name in ("tuning: CPU", "tuning: checkpointing", "tuning: resumed"):
            monkeypatch.setattr(sys, "argv", list(map(str, step.command)))
            flags = cli.parse_flags(TuningOptions) | changes.get(step.name, {})
            options = TuningOptions(**flags)
            ft_main.main(options)  # in this process, which has read the libraries
            judged[step.name] = step.judge("", "")
            assert options.gradient_checkpointing == (step.name == "tuning: checkpointing")
            assert options.resume == (step.name == "tuning: resumed")
    found, error = judged["tuning: CPU"]
    assert (list(found["losses"]), error) == ([1, 2, 3, 4, 5, 6], "")
    assert judged["tuning: resumed"] == judged["tuning: CPU"]
    assert re.fullmatch(
        r"losses differ by 0.0\d+, above 0.0001", judged["tuning: checkpointing"][1]
    )
    assert "not [1]" in compare_losses({}, {1: 2.0})[1]
    assert "differ by nan" in compare_losses({1: math.nan}, {1: 2.0})[1]


@pytest.fixture(scope="module")
def roofline():
    return gpu_steps.roofline(tiny=True)


def speed_of(folder):
    gpu_steps.write_model(folder / "ckpt")
    return gpu_steps.Speed("tiny", folder)


def test_speed_is_set_beside_the_roofline_and_memory_beside_the_plan(
    tmp_path, monkeypatch, roofline
):
    gb = 10**9
    monkeypatch.setattr(parallel, "device_peaks", lambda: (gb, 2 * gb))
    found = speed_of(tmp_path).run()
    faults, measures = found.pop("faults"), found["measures"]
    assert list(measures) == [
        *("decode, batch 1", "decode, batch 2", "prefill, 1 × 48", "prefill, 2 × 48"),
        "tuning, 4 × 48",
    ]
    assert len(faults) == len(measures)  # for so much was not planned
    assert faults[0].startswith("decode, batch 1: 1,000,000,000 bytes were allocated, and 2,")
    add_shares(found, roofline)
    decode, tuning = measures["decode, batch 2"], measures["tuning, 4 × 48"]
    assert decode["seconds"] == pytest.approx(2 / decode["rate"])
    assert decode["share"] == pytest.approx(decode["bytes"] / roofline["copy"] / decode["seconds"])
    flop = tuning["flop"] * tuning["rate"]
    assert tuning["share"] == pytest.approx(flop / roofline["bfloat16"])
    # all weights but the embedding, as a step of one token reads them
    shapes = random_source(gpu_steps.SMALL).shapes.items()
    sizes = [math.prod(shape) for name, shape in shapes if "embeddings" not in name]
    assert decode["bytes"] == 2 * sum(sizes)
    lines = [*lines_of(roofline), *lines_of(found)]
    assert lines[0].startswith("copy ")
    assert re.search(r"^decode, batch 1: .* of the bare copy, 1.00 GB allocated, ", lines[1])
    assert lines[-1].startswith("tuning, 4 × 48: ")


def test_what_does_not_fit_is_left_out_and_said(tmp_path, monkeypatch):
    speed = speed_of(tmp_path)
    speed.free = memory.Free(speed.free.device, math.inf)
    least = gpu_steps.Plan(speed.source, 1, speed.dtype, 1, 13, speed.device).total
    speed.free = memory.Free(least * 1.01, math.inf)
    monkeypatch.setattr(gpu_steps, "ROUNDS", 1)
    measures = speed.run()["measures"]
    assert "rate" in measures["decode, batch 1"]
    assert measures["tuning, 4 × 48"] == {"left_out": "needs 0.0 GB, 0.0 are free"}
    speed.free = memory.Free(0, 0)
    assert speed.run()["left_out"] == "needs 0.0 GB, 0.0 are free"


def test_one_table_holds_all_steps(monkeypatch):
    card = SimpleNamespace(name="Card", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (7 * 10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda i, j: i != j)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 5))
    environment = gpu_steps.environment() | {"driver": "580.1"}
    assert [card["reaches"] for card in environment["cards"]] == [[1], [0]]
    outcomes = [
        Outcome("environment", seconds=2.4, found=environment),
        Outcome("speed: 7B", "left out", 1.0, "needs 14.0 GB, 8.0 are free"),
        Outcome("kill of a rank", "failed", 3.0, "a | b", {"seconds_to_end": 2}),
    ]
    rows = [line.split("|")[1:-1] for line in table_of(outcomes).splitlines()]
    assert {len(row) for row in rows} == {4}
    cells = [[cell.strip() for cell in row] for row in rows[2:]]
    assert cells[0] == ["environment", "passed", "2", "Card, 8.0 GB, reaches [1]"]
    assert cells[3][3].endswith("driver 580.1, nccl 2.27.5")
    assert cells[-3:] == [
        ["speed: 7B", "left out", "1", "needs 14.0 GB, 8.0 are free"],
        ["kill of a rank", "failed", "3", "a / b"],
        ["", "", "", "all ended 2 s after it"],
    ]


def test_what_a_bare_machine_lacks_is_named_with_what_that_needs(monkeypatch):
    assert missing() == []
    lacking = {"fairscale", "fire", "termcolor", "datasets", "dill"}
    monkeypatch.setattr(check_gpu, "installed", lambda name: name not in lacking)
    assert missing() == ["fire", "fairscale", "datasets", "termcolor", "dill"]
    message = how_to_install(missing())
    assert message.count("\n") == 0
    assert "-w wheels fire fairscale datasets termcolor dill. Then here" in message
    # with neither of those that are named, beside torch and transformers, nothing is left out
    monkeypatch.setattr(check_gpu, "installed", lambda name: name in ("torch", "transformers"))
    named = {plain(name) for name in missing()}
    assert needed_by(*named) <= named | needed_by("torch", "transformers")


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed_by(*names):
    """All packages that these need, and those, on every machine."""
    found, waiting = set(), list(map(plain, names))
    for name in waiting:  # which grows meanwhile
        if name not in found:
            found.add(name)
            needs = importlib.metadata.requires(name) or []
            waiting += [plain(re.match(r"[\w.-]+", x)[0]) for x in needs if ";" not in x]
    return found
