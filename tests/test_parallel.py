"""Ranks over several agents, what they tell each other, and how all end when one fails."""

import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
import torch
import torch.distributed as dist
from conftest import (
    REPO,
    TOKENIZERS,
    command_of,
    flags_of,
    make_ckpt,
    run_program,
    run_script,
    shard_of,
)
from fairscale.nn.model_parallel import initialize as mpu

from llama import LLaMA, parallel
from llama.prompts import SEPARATOR, read_prompts

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
MODEL = {"vocab_size": VOCAB_SIZE, "n_kv_heads": 2}


def test_two_agents_of_one_process_each_are_two_ranks(tmp_path):
    folders = [make_ckpt(tmp_path / f"machine_{i}", n=2, **MODEL) for i in range(2)]
    for i, folder in enumerate(folders):  # each has its own rank's shard alone
        shard_of(folder, 1 - i).unlink()
    with pytest.raises(ValueError, match=r"holds 1 shard, but manifest\.json lists 2"):
        LLaMA.build(folders[0], PATH)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = []
    for i in range(2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1"]
        torchrun += flags_of(nnodes=2, node_rank=i, master_addr="127.0.0.1", master_port=port)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        flags = flags_of(ckpt_dir=folders[i], tokenizer_path=PATH, temperature=0, max_gen_len=8)
        command = [*torchrun, "example.py", *flags]
        agents.append(subprocess.Popen(command, cwd=REPO, text=True, **pipes))
    prompts = read_prompts(None)
    alone = LLaMA.build(make_ckpt(tmp_path / "whole", **MODEL), PATH)
    outputs = alone.generate(prompts, max_gen_len=8, temperature=0)
    (first, errors), (second, _) = (agent.communicate(timeout=120) for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], errors
    # each agent's only rank has LOCAL_RANK 0
    texts = [prompt + output.text + SEPARATOR for prompt, output in zip(prompts, outputs)]
    assert (first, second) == ("".join(texts), "")


@pytest.mark.parametrize(
    ("rank", "how", "message"),
    [
        (1, "damage", "error: only I know"),
        (1, "before setup", "error: only I know"),
        (1, "a fault of ours", "KeyError: 'only I know'"),
        (0, "killed", "Signal 9 (SIGKILL)"),  # in torchrun's words
        (1, "aborted", "Signal 6 (SIGABRT)"),  # as by nccl's watchdog
    ],
)
def test_when_ranks_fail_one_says_why_and_all_end(tmp_path, rank, how, message):
    """Where all meet the same error is in test_cli.py and test_scripts.py, a killed rank 1 in
    test_trainer.py."""
    start = time.perf_counter()
    result = run_program(tmp_path, 2, programs.fail, rank=rank, how=how)
    assert time.perf_counter() - start < 60  # start-up included, on a busy machine
    assert result.returncode == 1
    assert result.stderr.count(message) == 1
    assert result.stderr.count("error: ") <= 1
    assert result.stdout == ""


@pytest.mark.parametrize("given", ["x", "0", "nan", "1e9"])
def test_a_timeout_that_is_none_is_told(monkeypatch, given):
    monkeypatch.setenv("LLAMA_TIMEOUT_HOURS", given)
    with pytest.raises(ValueError, match=f"LLAMA_TIMEOUT_HOURS={given}: a number of hours"):
        parallel._timeout()


def test_a_network_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    parallel._check_network()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth9")
    with pytest.raises(ValueError, match=r"=lo,eth9: .* has no such network; .* are .*\blo\b"):
        parallel._check_network()


def test_a_rank_that_waits_says_for_whom(tmp_path):
    result = run_program(tmp_path, 3, programs.come_late)
    assert (result.returncode, result.stdout) == (0, '"met"\n')
    assert result.stderr.count(": waiting for rank 1 to wake up") == 1
    assert "waiting for rank 2 to wake up" not in result.stderr


def test_peaks_of_a_card_are_what_was_allocated_and_what_was_reserved(monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(parallel, "_device", card)
    for name, value in (("max_memory_allocated", 5), ("max_memory_reserved", 7)):
        monkeypatch.setattr(torch.cuda, name, lambda of, value=value: value if of == card else 0)
    assert parallel.device_peaks() == (5, 7)


def test_ranks_are_connected_once():
    parallel.setup()
    assert mpu.get_model_parallel_group() is dist.group.WORLD


def test_no_rank_outlives_torchrun(tmp_path):
    (tmp_path / "values").write_text("{}")
    flags = flags_of(name="sleep_when_ready", values=tmp_path / "values")
    command = command_of("tests/programs.py", *flags, n=2)
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


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing_behind(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE)

    def limit():  # as a full disk does, it refuses to let a file grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = run_script("split_model.py", "--ckpt_dir", ckpt_dir, "--n", 2, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
