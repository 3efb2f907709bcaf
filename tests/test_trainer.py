"""n ranks learn what one learns; a run that was killed goes on from its last whole checkpoint.

Start reading at tune(), a run in this process, and tune_on_ranks(), one as a user starts it.
"""

import contextlib
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from conftest import (
    CODE,
    REPO,
    TOKENIZERS,
    command_of,
    edit_json,
    flags_of,
    hashes_of,
    make_ckpt,
    run_script,
)
from safetensors.torch import load_file, save_file

import ft_main
from llama import cli, files, parallel
from llama.tuning import data, trainer
from llama.tuning.adapter import CARD
from llama.tuning.methods import network_size
from llama.tuning.options import TuningOptions
from llama.tuning.run_folder import evaluations, newest_checkpoint

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
MODEL = {"vocab_size": VOCAB_SIZE, "n_kv_heads": 1}  # fewer than ranks
DATASET = REPO / "datasets" / "short_answers.json"
RUN = {  # what is learned on several numbers of ranks
    **{"max_steps": 10, "warmup_steps": 2, "batch_size": 4, "seed": 4},
    **{"save_steps": 5, "val_set_size": 8, "eval_steps": 5, "lr": 1e-5, "init": "text"},
    "lr_scheduler": "constant_with_warmup",  # which knows no end
}


def options_of(folder: Path, name: str, n: int = 1, **changes) -> dict:
    """Options of a short run on a tiny model, which is made where there is none yet."""
    if not (folder / f"ckpt{n}").exists():
        make_ckpt(folder / f"ckpt{n}", n=n, **MODEL)
    return {
        "ckpt_dir": str(folder / f"ckpt{n}"),
        "tokenizer_path": str(PATH),
        "dataset_path": str(DATASET),
        "output_dir": str(folder / name),
        **{"max_steps": 4, "batch_size": 2, "gradient_accumulation_steps": 2, "lr": 1e-3},
        **{"max_seq_len": 96, "num_virtual_tokens": 8, "save_steps": 2, "logging_steps": 1},
    } | changes


def tune(folder: Path, name: str, **changes) -> Path:
    """Train in this process; returns the output folder."""
    ft_main.main(TuningOptions(**options_of(folder, name, **changes)))
    return folder / name


def tune_on_ranks(folder: Path, name: str, n: int, **changes) -> subprocess.CompletedProcess:
    """Train as a user does, over n ranks."""
    return run_script("ft_main.py", *flags_of(**options_of(folder, name, n, **changes)), n=n)


def losses(folder: Path, key: str = "loss") -> list[tuple[int, float]]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(row["step"], row[key]) for row in history if key in row]


def assert_same_outcome(folder: Path, reference: Path) -> None:
    assert losses(folder) == losses(reference)
    assert torch.equal(prompt_of(folder), prompt_of(reference))


def prompt_of(folder: Path) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on 1 and 2 ranks: the folder they are in, and what the two said."""
    folder = tmp_path_factory.mktemp("runs")
    tune(folder, "out1", **RUN)
    before = hashes_of(make_ckpt(folder / "ckpt2", n=2, **MODEL))
    result = tune_on_ranks(folder, "out2", 2, **RUN)
    assert result.returncode == 0, result.stderr[-3000:]
    assert hashes_of(folder / "ckpt2") == before
    return folder, result.stderr


def test_two_ranks_learn_what_one_learns(runs):
    """That four get the same gradient is in test_ranks.py."""
    one, two = (runs[0] / f"out{n}" for n in (1, 2))
    expected = losses(one) + losses(one, "eval_loss")
    assert len(losses(one)) == 10
    evaluations = [loss for _, loss in losses(one, "eval_loss")]
    assert evaluations[0] > evaluations[-1]  # before and after
    found = losses(two) + losses(two, "eval_loss")
    assert [step for step, _ in found] == [step for step, _ in expected]
    values = [torch.tensor([loss for _, loss in run]) for run in (found, expected)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)
    torch.testing.assert_close(prompt_of(two), prompt_of(one), rtol=0, atol=1e-6)


def test_rank_0_alone_speaks_and_writes_what_is_needed_and_no_base_weights(runs):
    folder, said = runs
    lines = [line for line in said.splitlines() if line.startswith(f"{DATASET}: ")]
    rows = "rows of instructions (instruction, output, perhaps input), in Alpaca's template"
    assert lines[0] == f"{DATASET}: {rows}"
    assert lines[1].startswith(f"{DATASET}: 207 rows, of which 129 are cut at the end of")
    assert lines[2].startswith(f"{DATASET}: batches of rows of like length: ")
    assert len(lines) == 3
    assert said.count("step 5 of 10: loss") == 1
    for name in ("adapter_config.json", "loss.png", "trainer_state.json", "checkpoint-10", CARD):
        assert (folder / "out2" / name).exists(), name
    held = {path.name: path.stat().st_size for path in (folder / "out2/checkpoint-5").iterdir()}
    tensors = {f"{name}.safetensors" for name in ("adapter_model", "trained", "optimizer", "best")}
    assert held.keys() >= {*tensors, "run.json"}
    n_trained = 8 * 64 + network_size("residual", 64)
    assert held.pop("optimizer.safetensors") < 8 * n_trained + 10_000
    assert held.pop("trained.safetensors") < 4 * n_trained + 10_000
    assert sum(held.values()) < 20_000


def end_at(step: int, folder: Path, number: int, **changes) -> tuple[int, str]:
    """Send a signal to rank 1 of a run on two ranks at a step; its exit code and what it said."""
    command = command_of("ft_main.py", *flags_of(**options_of(folder, "ended", 2, **changes)), n=2)
    agent = subprocess.Popen(command, cwd=REPO, text=True, stderr=subprocess.PIPE)
    for line in agent.stderr:
        if line.startswith(f"step {step} "):
            ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            os.kill(int(ranks[1]), number)
            break
    began = time.monotonic()
    message = agent.communicate(timeout=60)[1]
    assert time.monotonic() - began < 30
    return agent.returncode, message


def test_a_rank_that_is_stopped_or_killed_ends_the_run_and_what_was_saved_resumes(runs):
    folder, reference, out = runs[0], runs[0] / "out2", runs[0] / "ended"
    endless = RUN | {"max_steps": 10**6}
    code, message = end_at(2, folder, signal.SIGTERM, **endless)
    (saved,) = out.glob("checkpoint-*")
    step = int(saved.name.removeprefix("checkpoint-"))
    assert code == 1  # torchrun's
    assert message.count("exitcode  : 143") == 2, message
    assert f"{out}: stopped at step {step} of 1000000; the same command with --resume" in message
    assert 2 <= step < 5  # before the first that --save_steps asks for

    code, message = end_at(7, folder, signal.SIGKILL, **endless, resume=True)
    assert code == 1
    # Only torchrun is sure to say why: it may end rank 0 before that can.
    assert message.count("Signal 9 (SIGKILL)") == 1
    assert message.count("error: ") == message.count("error: another rank ended") <= 1
    assert (out / "checkpoint-5").is_dir()
    assert not (out / "adapter_config.json").exists()

    resumed = tune_on_ranks(folder, "ended", 2, resume=True, **RUN)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert_same_outcome(out, reference)
    assert samples(out) == samples(reference)  # none twice


def samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_every_evaluation_shows_loss_perplexity_and_three_answers(runs):
    folder, said = runs
    found = samples(folder / "out2")
    assert [line["step"] for line in found] == [0, 0, 0, 5, 5, 5, 10, 10, 10]
    assert len({line["prompt"] for line in found}) == 3
    rows = {row["output"] for row in json.loads(DATASET.read_text())}
    for line, shown in zip(found, re.findall(r"(?m)^step (\d+), sample: .*Response: -> ", said)):
        assert line["step"] == int(shown)
        assert any(row.startswith(line["expected"]) for row in rows)
        assert line["prompt"].endswith("\n\n### Response:")
        assert line["answer"]
    history = json.loads((folder / "out2" / "trainer_state.json").read_text())["log_history"]
    for row in evaluations(history):
        assert row["eval_perplexity"] == math.exp(row["eval_loss"])
        numbers = f"eval_loss {row['eval_loss']:.4g}, eval_perplexity {row['eval_perplexity']:.4g}"
        assert f"step {row['step']} of 10: {numbers}" in said
    assert all(row["tokens_per_second"] > 0 for row in history if "loss" in row)
    assert re.search(r"(?m)^trained 10 steps on [\d,]+ tokens, [\d,]+ a second; memory at", said)


def test_the_best_prompt_is_kept_through_a_resume_and_a_run_without_better_ones_ends(
    tmp_path, capfd
):
    """With a rate so small that nothing changes, the prompt before tuning stays the best."""
    options = {"lr": 1e-30, "val_set_size": 2, "eval_steps": 1, "patience": 2, "max_steps": 9}
    out = tune(tmp_path, "out", **options)
    assert [step for step, _ in losses(out, "eval_loss")] == [0, 1, 2]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    said = capfd.readouterr().err
    assert "step 2: no better evaluation in 2: ends here (--patience)\n" in said
    assert "best at step 0: eval_loss" in said
    start = load_file(out / "checkpoint-2" / "best.safetensors")["prompt_embeddings"]
    edited = start + 1  # so that it is seen which prompt is taken, this or the last
    save_file({"prompt_embeddings": edited}, out / "checkpoint-2" / "best.safetensors")
    hashes = hashes_of(out / "checkpoint-2")
    del hashes["run.json"]
    edit_json(out / "checkpoint-2" / "run.json", files=hashes)
    tune(tmp_path, "out", **options, resume=True)
    assert [step for step, _ in losses(out, "eval_loss")] == [0, 1, 2]
    tune(tmp_path, "out", **options | {"patience": 3}, resume=True)
    assert [step for step, _ in losses(out, "eval_loss")] == [0, 1, 2, 3]
    assert torch.equal(prompt_of(out), edited)


@pytest.mark.parametrize(
    ("during", "call", "step", "predicted"),
    [
        ("prediction_step", 1, 0, 1),  # before the first step
        ("training_step", 3, 2, 2),  # in a step behind which an evaluation is due
        ("prediction_step", 3, 2, 3),  # in that
    ],
)
def test_a_signal_saves_a_checkpoint_first_and_a_resumed_run_differs_in_nothing(
    evaluated, monkeypatch, during, call, step, predicted
):
    (folder, reference), calls = evaluated, Counter()
    handler = signal.getsignal(signal.SIGINT)

    def counted(name):
        before = getattr(trainer.PromptTrainer, name)

        def method(self, *args, **kwargs):
            calls[name] += 1
            if name == during and calls[name] == call:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # as a terminal and torchrun do
            return before(self, *args, **kwargs)

        return method

    name = f"{during}{call}"
    with monkeypatch.context() as patch:
        for method in ("training_step", "prediction_step"):
            patch.setattr(trainer.PromptTrainer, method, counted(method))
        message = rf"stopped at step {step} of 4; the same .* goes on"
        with pytest.raises(cli.Stopped, match=message) as end:
            tune(folder, name, **EVALUATED)
    assert end.value.code == 130
    assert calls["prediction_step"] == predicted
    assert signal.getsignal(signal.SIGINT) == handler
    assert (folder / name / f"checkpoint-{step}").is_dir() == (step > 0)
    out = tune(folder, name, **EVALUATED, resume=True)
    assert_same_outcome(out, reference)
    assert losses(out, "eval_loss") == losses(reference, "eval_loss")
    assert samples(out) == samples(reference)


EVALUATED = {"val_set_size": 4, "eval_steps": 2, "save_steps": 9, "batch_size": 2}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run of four steps with evaluations before, in the middle and behind."""
    folder = tmp_path_factory.mktemp("evaluated")
    return folder, tune(folder, "out", **EVALUATED)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny model with the output of a run of four steps."""
    folder = tmp_path_factory.mktemp("tuned")
    return folder, tune(folder, "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"in use: holds adapter_config\.json.*; choose another folder, or --resume"),
        (
            {"resume": True, "num_virtual_tokens": 9},
            "begun with other settings: --num_virtual_tokens 8, not 9; .*Give those it was",
        ),
        ({"resume": True, "ckpt_dir": "other"}, "settings: norm_eps 1e-05, not 0.001. Give"),
        (
            {"resume": True, "batch_size": 3, "seed": 1},
            r"--batch_size 2, not 3; --seed 0, not 1 .--batch_size times the replicas.\. Give",
        ),
        (
            {"resume": True, "dtype": "bfloat16"},
            "settings: dtype torch.float32, not torch.bfloat16. Give",
        ),
        ({"resume": True, "template": "none"}, "settings: the tokens of its rows .--template, "),
        ({"resume": True, "dataset_path": "others.json"}, "settings: the dataset. Give"),
        ({"output_dir": "new5", "columns": "question=output"}, "no column 'question', which --col"),
        ({"output_dir": "new2", "dataset_path": "none.json"}, "none.json"),
        ({"output_dir": "new3", "max_seq_len": 20}, "no row fits into the 12 tokens"),
        ({"output_dir": "new4", "lr": 1e38, "warmup_steps": 0}, "NaN or infinite; lower --lr"),
    ],
)
def test_a_bad_request_is_named_and_leaves_a_run_alone(tuned, monkeypatch, changes, message):
    folder, out = tuned
    before = hashes_of(out / "checkpoint-4")
    monkeypatch.chdir(folder)
    if "ckpt_dir" in changes:
        make_ckpt(folder / "other", **MODEL, norm_eps=1e-3)
    if changes.get("dataset_path") == "others.json":
        Path("others.json").write_text(json.dumps(json.loads(DATASET.read_text())[1:]))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tune(folder, "out", **changes)
    assert hashes_of(out / "checkpoint-4") == before


def test_ranks_that_would_go_on_from_different_checkpoints_say_so(tuned, monkeypatch):
    folder, _ = tuned
    gather = parallel.gather_objects

    def with_another(value: object) -> list:
        found = isinstance(value, tuple) and isinstance(value[0], str)
        return gather(value) + [("checkpoint-2", "of another run")] * found

    monkeypatch.setattr(parallel, "gather_objects", with_another)
    with pytest.raises(ValueError, match="the ranks found different checkpoints to go on from"):
        tune(folder, "out", resume=True)


CHANGED = "its step or files are not those that run.json lists"
DAMAGE = [  # a file of a checkpoint, what it is made to hold (None: it goes), why that is no use
    ("optimizer.safetensors", b"PK", CHANGED),
    ("trainer_state.json", b"{", CHANGED),
    ("adapter_model.safetensors", None, CHANGED),
    ("scaler.pt", CODE, CHANGED),
    ("run.json", None, "run.json: unreadable"),
    ("run.json", b'{"files": {', "run.json: unreadable"),
    ("run.json", b"[]", "run.json: unreadable"),
    ("run.json", b'{"files": [3]}', CHANGED),
]


@pytest.mark.parametrize(("name", "content", "reason"), DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    tuned, tmp_path, capfd, name, content, reason
):
    out = shutil.copytree(tuned[1], tmp_path / "out")
    (out / "checkpoint-best").mkdir()
    (out / "checkpoint-9-bak").mkdir()
    assert newest_checkpoint(out) == out / "checkpoint-4"
    damaged = out / "checkpoint-4" / name
    damaged.unlink(missing_ok=True)
    if content is not None:
        damaged.write_bytes(content)
    assert newest_checkpoint(out) == out / "checkpoint-2"
    said, message = capfd.readouterr()
    assert said == ""  # no code ran
    assert message.startswith(f"{damaged.parent}: passed over")
    assert reason in message
    assert message.count("\n") == 1
    (out / "checkpoint-2" / "run.json").unlink()
    assert newest_checkpoint(out) is None


def state(**changes):
    return lambda folder: edit_json(folder / "trainer_state.json", **changes)


def optimizer(**changes):
    def edit(folder):
        path = folder / "optimizer.safetensors"
        save_file(load_file(path) | changes, path)

    return edit


def prompt_of_another_length(folder):
    path, name = folder / "trained.safetensors", "embedding.parametrizations.weight.original"
    found = load_file(path)
    save_file(found | {name: found[name][:3].clone()}, path)


FOREIGN = [  # what is made of a checkpoint, its hashes put right
    (state(global_step=10**9), "trainer_state.json: not the state"),
    (state(global_step="4"), "trainer_state.json: not the state"),
    (state(log_history=[[]]), "trainer_state.json: not the state"),
    (state(log_history=[{"step": 10**400}]), "trainer_state.json: not the state"),
    (state(surprise=1), "trainer_state.json: not the state"),
    (optimizer(rng=torch.zeros(5056, dtype=torch.uint8)), "optimizer.safetensors: damaged"),
    (optimizer(rng=torch.zeros(7)), "optimizer.safetensors: damaged"),
    (optimizer(**{"0.exp_avg": torch.zeros(9, 9)}), "of another prompt, method or optimizer"),
    (optimizer(**{"0.exp_avg": torch.full((8, 64), torch.nan)}), "holds NaN"),
    (optimizer(**{"0.step": torch.tensor(3.0)}), "not of step 4"),
    (lambda folder: (folder / "optimizer.safetensors").write_bytes(CODE), "damaged"),
    (prompt_of_another_length, "trained.safetensors: of another prompt, method or optimizer"),
]


@pytest.mark.parametrize(("change", "message"), FOREIGN)
def test_what_a_stranger_made_of_a_checkpoint_is_named(tuned, tmp_path, capfd, change, message):
    out = shutil.copytree(tuned[1], tmp_path / "out")
    checkpoint = out / "checkpoint-4"
    change(checkpoint)
    hashes = hashes_of(checkpoint)
    del hashes["run.json"]
    edit_json(checkpoint / "run.json", files=hashes)
    options = options_of(tuned[0], "out", max_steps=6, resume=True) | {"output_dir": str(out)}
    with pytest.raises(ValueError, match=message):
        ft_main.main(TuningOptions(**options))
    assert "this code ran" not in capfd.readouterr().out


def test_a_second_run_in_a_folder_is_told_at_once(tmp_path):
    with (
        files.reserved(tmp_path / "out"),
        pytest.raises(ValueError, match="out: another run writes in it; wait for that one to end"),
    ):
        tune(tmp_path, "out", dataset_path="none")


@contextlib.contextmanager
def full_disk(size: int):
    """Let no file of a run grow beyond a size, which the system refuses as it does on a full disk.

    The tokens are written elsewhere, and before.
    """
    limits, tokenize = resource.getrlimit(resource.RLIMIT_FSIZE), data.tokenize_dataset

    def tokenize_then_limit(*args, **options):
        made = tokenize(*args, **options)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        return made

    try:
        with mock.patch.object(data, "tokenize_dataset", tokenize_then_limit):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_at_a_checkpoint_is_one_line_and_room_is_all_it_takes(tmp_path, tuned):
    make_ckpt(tmp_path / "ckpt1", **MODEL)
    message = r"checkpoint-2.*cannot be written: .* bytes free"
    with full_disk(6000), pytest.raises(OSError, match=message) as error:
        tune(tmp_path, "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()  # nothing was saved before
    assert_same_outcome(tune(tmp_path, "out"), tuned[1])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "trainer_state.json", "loss.png"])
def test_a_disk_that_is_full_at_the_end_is_one_line_and_the_run_resumes(tmp_path, tuned, name):
    out = shutil.copytree(tuned[1], tmp_path / "out")
    make_ckpt(tmp_path / "ckpt1", **MODEL)
    (out / ".adapter.partial").mkdir()  # as a run leaves it that is killed here
    room = (out / name).stat().st_size - 1
    with full_disk(room), pytest.raises(OSError, match=r"out: cannot be written: .* free") as error:
        tune(tmp_path, "out", resume=True)
    assert "\n" not in str(error.value)
    assert_same_outcome(tune(tmp_path, "out", resume=True), tuned[1])
    assert not list(out.glob(".*"))


def test_a_finished_run_resumes_to_what_it_was_and_can_be_extended(tuned):
    folder, out = tuned
    again = shutil.copytree(out, folder / "again")
    (again / "adapter_model.safetensors").unlink()
    tune(folder, "again", save_steps=1, resume=True)
    assert_same_outcome(again, out)
    tune(folder, "again", max_steps=6, save_steps=1, resume=True)
    assert [step for step, _ in losses(again)] == [1, 2, 3, 4, 5, 6]
    assert (again / "checkpoint-5").is_dir()  # as asked now, not as the first run was


def test_a_checkpoint_is_replaced_by_a_run_that_is_trained_beyond_it_again(tuned):
    folder, out = tuned
    again = shutil.copytree(out, folder / "replaced")
    (again / "checkpoint-4" / "optimizer.safetensors").unlink()
    tune(folder, "replaced", resume=True)
    assert newest_checkpoint(again) == again / "checkpoint-4"
    assert_same_outcome(again, out)
    assert not [path for path in again.iterdir() if path.name[0] == "."]


def test_a_run_that_came_to_nothing_leaves_its_folder_usable(tmp_path):
    with pytest.raises(ValueError, match="--val_set_size 1000 cannot be taken out of"):
        tune(tmp_path, "out", val_set_size=1000)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / ".checkpoint-2.partial").mkdir()  # as a run leaves it that is killed
    assert (tune(tmp_path, "out") / "adapter_config.json").is_file()


def test_without_the_package_datasets_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", ModuleType("datasets"))  # as our folder looks
    monkeypatch.delitem(sys.modules, "llama.tuning.rows")
    with pytest.raises(ImportError, match="pip install datasets"):
        importlib.import_module("llama.tuning.rows")


def test_epochs_with_evaluation_resume_bit_equal(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(json.loads(DATASET.read_text())[:45]))
    options = {"max_steps": -1, "num_epochs": 2.0, "gradient_accumulation_steps": 4}
    options |= {"batch_size": 4, "val_set_size": 7, "eval_steps": 3, "dataset_path": str(rows)}
    reference = tune(tmp_path, "whole", **options)
    assert losses(reference)[-1][0] == 6  # 38 rows are 3 steps a pass, the last one of 6 rows
    out = tmp_path / "out"
    shutil.copytree(reference / "checkpoint-4", out / "checkpoint-4")
    tune(tmp_path, "out", resume=True, **options)
    assert_same_outcome(out, reference)
    assert losses(out, "eval_loss") == losses(reference, "eval_loss")
