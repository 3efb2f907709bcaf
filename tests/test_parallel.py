"""Ranks over several agents, what they tell each other, and how all end when one fails."""

import json
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
from conftest import REPO, TOKENIZERS, make_ckpt, run_program, run_script

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]


def test_two_agents_of_one_process_each_are_two_ranks(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", n=2, vocab_size=VOCAB_SIZE, n_kv_heads=2)
    whole = make_ckpt(tmp_path / "whole", vocab_size=VOCAB_SIZE, n_kv_heads=2)
    options = ["--tokenizer_path", PATH, "--temperature", 0, "--max_gen_len", 8]
    alone = run_script("example.py", "--ckpt_dir", whole, *options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    options.insert(0, ckpt_dir)
    agents = [
        subprocess.Popen(
            [*torchrun, "--node_rank", str(i), "example.py", "--ckpt_dir", *map(str, options)],
            cwd=REPO,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    (first, errors), (second, _) = (agent.communicate(timeout=120) for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert alone.returncode == 0, alone.stderr
    assert first == alone.stdout  # each agent's only rank has LOCAL_RANK 0
    assert second == ""


def timed(tmp_path, program, **values):
    start = time.perf_counter()
    result = run_program(tmp_path, 2, program, **values)
    return result, time.perf_counter() - start


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ValueError: shard 1 is damaged", "error: shard 1 is damaged"),
        ("too much memory", "error: out of memory"),
        ("OutOfMemoryError: CUDA out of memory. Tried", "error: out of memory (CUDA"),
        ("MemoryError: ", "error: out of memory"),
        ("KeyError: a fault of ours", "KeyError: 'a fault of ours'"),
    ],
)
def test_a_rank_that_fails_alone_says_so_and_all_end(tmp_path, error, message):
    result, seconds = timed(tmp_path, programs.fail_alone, rank=1, error=error)
    assert result.returncode == 1
    assert result.stderr.count(message) == 1
    assert seconds < 20  # start-up included


def test_a_lone_rank_is_heard_before_the_group_is_made(tmp_path):
    result, seconds = timed(
        tmp_path, programs.fail_alone, rank=1, error="ValueError: only I know", before_setup=True
    )
    assert result.returncode == 1
    assert result.stderr.count("error: only I know") == 1
    assert seconds < 20


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_message(tmp_path, killed):
    result, seconds = timed(tmp_path, programs.die_at_work, rank=killed)
    assert result.returncode == 1
    assert result.stderr.count("error: another rank ended") <= 1
    assert "Signal 9 (SIGKILL)" in result.stderr  # torchrun's own report names the rank
    assert seconds < 20


def test_fewer_cards_than_ranks_is_said_before_a_rank_takes_one(tmp_path):
    result, _ = timed(tmp_path, programs.pretend_one_card)
    assert result.returncode == 1
    assert result.stderr.count("error: this machine shows 1 cards, but 2 ranks") == 1


def test_no_rank_outlives_torchrun(tmp_path):
    (tmp_path / "values").write_text("{}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "tests/programs.py"]
    command += ["--name", "sleep_when_ready", "--values", str(tmp_path / "values")]
    agent = subprocess.Popen(command, cwd=REPO, text=True, stdout=subprocess.PIPE)
    assert [agent.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(children) == 2
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/exe").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_tell_each_other_and_rank_0_the_user(tmp_path):
    result, _ = timed(tmp_path, programs.talk)
    assert json.loads(result.stdout) == [0, 10]
    assert result.stderr.count("once") == 1


def test_a_program_that_does_not_leave_the_group_ends_well(on_ranks):
    for _ in range(2):
        assert on_ranks(2, programs.join) is None


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE)

    def limit():  # as a full disk does, it refuses to let a file grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = run_script("split_model.py", "--ckpt_dir", ckpt_dir, "--n", 2, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
