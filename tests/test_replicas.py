"""Replicas of a model, each split over some of the ranks, give together what one gives.

Start reading at on_replicas(): all that so many ranks do, which start once.
"""

import json
from pathlib import Path

import programs
import pytest
import torch
from conftest import make_ckpt, run_program, shard_of
from test_trainer import MODEL, PATH, RUN, assert_same_outcome, losses, options_of, prompt_of, tune

import ft_main
from llama import LLaMA, parallel
from llama.checkpoint.folder import Checkpoint
from llama.options import GenerationOptions
from llama.prompts import read_requests
from llama.tuning.options import TuningOptions

PROMPTS = ["One", "Two words", "Three more words", "a " * 600, "Five", "Six"]  # one is too long
GREEDY = {"temperature": 0.0, "max_gen_len": 8, "max_batch_size": 2, "n": 2, "json": True}
SAMPLED = GREEDY | {"temperature": 1.0, "seed": 2**32 - 1, "n": 1}
SINGLE = {"temperature": 0.0, "max_gen_len": 8, "prompt": "One"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, rows of which the last batch has one, prompts, and what one rank learns."""
    folder = tmp_path_factory.mktemp("replicas")
    rows = [{"instruction": f"Say {i}", "output": f"{i} " * (1 + i % 7)} for i in range(26)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, PROMPTS)))
    (folder / "twice.jsonl").write_text('"Twice"\n"Twice"\n')
    tune(folder, "one", **run_of(folder, 4))
    return folder


def run_of(folder: Path, batch_size: int) -> dict:
    """Two passes over 17 rows in batches of 4, of all replicas together, and 9 to evaluate."""
    rows = {"dataset_path": str(folder / "rows.json"), "val_set_size": 9, "init": "rows"}
    return RUN | rows | {"batch_size": batch_size, "gradient_accumulation_steps": 1}


def on_replicas(folder: Path, n: int, tensor_parallel: int) -> list[str]:
    """Tune, go on from a checkpoint of the same run and from one rank's, and generate."""
    name, split = f"{n}_{tensor_parallel}", {"tensor_parallel": tensor_parallel}
    run = run_of(folder, 4 * tensor_parallel // n) | split
    runs = [options_of(folder, name, **run)]
    for source in (name, "one"):
        options = options_of(folder, f"{name}_from_{source}", **run, resume=True)
        runs.append(options | {"copy": str(folder / source / "checkpoint-5")})
    file, twice = ({"prompts_file": str(folder / f"{x}.jsonl")} for x in ("prompts", "twice"))
    generations = [GREEDY | file, SAMPLED | twice, SAMPLED | twice, SINGLE]
    generations = [options | split for options in generations]
    given = {"ckpt_dir": str(folder / "ckpt1"), "tokenizer_path": str(PATH)}
    result = run_program(folder, n, programs.replicas, runs=runs, generations=generations, **given)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stderr.count("loaded in") == len(generations)
    assert result.stderr.count("left out: prompt") == 1
    return json.loads(result.stdout)


@pytest.fixture(scope="module", params=[(2, 1), (4, 2)], ids=["2 data", "2 data x 2 tensor"])
def replicas(folder, request):
    """The name of a run by two replicas, and what they printed of prompts."""
    n, tensor_parallel = request.param
    return f"{n}_{tensor_parallel}", on_replicas(folder, n, tensor_parallel)


def test_replicas_learn_what_one_rank_learns_from_the_same_batches(folder, replicas):
    expected, name = folder / "one", replicas[0]
    assert [step for step, _ in losses(expected)] == list(range(1, 11))
    for found in (folder / name, folder / f"{name}_from_one"):
        for key in ("loss", "eval_loss"):
            assert dict(losses(found, key)) == pytest.approx(dict(losses(expected, key)), rel=1e-4)
        torch.testing.assert_close(prompt_of(found), prompt_of(expected), rtol=0, atol=1e-6)


def test_replicas_that_were_stopped_go_on_to_the_same_end(folder, replicas):
    name = replicas[0]
    assert_same_outcome(folder / f"{name}_from_{name}", folder / name)


def printed_by_one(folder: Path, options: dict) -> str:
    """What one rank prints of prompts."""
    given = {"ckpt_dir": str(folder / "ckpt1"), "tokenizer_path": str(PATH)}
    return programs.replicas(**given, runs=[], generations=[options])[0]


def texts(printed: str) -> list[tuple]:
    """Prompt and text of each line of JSON; None for a prompt that was left out."""
    rows = [json.loads(line) for line in printed.splitlines()]
    return [(row["prompt"], row.get("text")) for row in rows]


def test_replicas_share_the_prompts_and_print_in_their_order_what_one_prints(folder, replicas):
    greedy, sampled, again, single = replicas[1]
    file = {"prompts_file": str(folder / "prompts.jsonl")}
    assert texts(greedy) == texts(printed_by_one(folder, GREEDY | file))
    assert single == printed_by_one(folder, SINGLE)
    assert texts(sampled) == texts(again)
    assert len(set(texts(sampled))) == 2  # of the same prompt, by two replicas


def test_a_shard_is_hashed_by_one_of_the_ranks_of_a_machine_that_read_it(tmp_path, monkeypatch):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", **MODEL)
    content = bytearray(shard_of(ckpt_dir, 0).read_bytes())
    content[len(content) // 2] ^= 1
    shard_of(ckpt_dir, 0).write_bytes(content)
    parallel.setup()
    monkeypatch.setenv("LOCAL_RANK", "1")
    Checkpoint(ckpt_dir).check_share(0, 1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="is damaged"):
        Checkpoint(ckpt_dir).check_share(0, 1)


@pytest.mark.parametrize("tensor_parallel", [2, 0, -1])
def test_ranks_that_do_not_divide_are_told_before_anything_is_read(tmp_path, tensor_parallel):
    message = f"--tensor_parallel {tensor_parallel}: the number of ranks of this run, 1, does not"
    with pytest.raises(ValueError, match=message):
        LLaMA.build("none", "none", tensor_parallel=tensor_parallel)
    paths = dict.fromkeys(("ckpt_dir", "tokenizer_path", "dataset_path"), "none")
    options = {"output_dir": str(tmp_path / "out"), "tensor_parallel": tensor_parallel}
    with pytest.raises(ValueError, match=message):
        ft_main.main(TuningOptions(**paths, **options))


def test_a_chat_is_refused_by_replicas(monkeypatch):
    parallel.setup()
    monkeypatch.setattr(parallel, "n_replicas", lambda: 2)
    with pytest.raises(ValueError, match="--chat with 2 replicas: one conversation has use for"):
        read_requests(GenerationOptions(ckpt_dir="none", chat=True, tensor_parallel=1))
