"""Ranks as one: over several agents, in one voice, and down together when one fails."""

import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, TOKENIZERS, make_ckpt, run_script

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]


def run_code(tmp_path, code, n=2):
    script = tmp_path / "script.py"
    script.write_text(f"import os, torch\nfrom llama import parallel\n{code}\nparallel.run(main)\n")
    start = time.perf_counter()
    result = run_script(script, n=n)
    return result, time.perf_counter() - start


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


def test_a_rank_that_fails_alone_says_so_and_all_end(tmp_path):
    result, seconds = run_code(
        tmp_path,
        """
def main():
    parallel.setup()
    if parallel.rank() == 1:
        raise ValueError("shard 1 is damaged")
    while True:
        torch.distributed.all_reduce(torch.ones(1))
""",
    )
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "error: shard 1 is damaged" in result.stderr
    assert seconds < 20  # start-up included


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_run_with_one_message(tmp_path, killed):
    result, seconds = run_code(
        tmp_path,
        f"""
def main():
    parallel.setup()
    for step in range(10**6):
        if parallel.rank() == {killed} and step == 50:
            os.kill(os.getpid(), {signal.SIGKILL.value})
        torch.distributed.all_reduce(torch.ones(1))
""",
    )
    assert result.returncode == 1
    assert result.stderr.count("error: another rank ended") <= 1
    assert "Signal 9 (SIGKILL)" in result.stderr  # torchrun's own report names the rank
    assert seconds < 20


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("torch.empty(1 << 50)", "error: out of memory"),
        ("raise torch.OutOfMemoryError('CUDA out of memory. Tried')", "error: out of memory (CUDA"),
        ("raise MemoryError()", "error: out of memory"),
        ("raise KeyError('a fault of ours')", "KeyError: 'a fault of ours'"),
    ],
)
def test_a_rank_out_of_memory_or_at_fault_takes_all_down_and_says_why(tmp_path, failure, message):
    result, seconds = run_code(
        tmp_path,
        f"""
def main():
    parallel.setup()
    if parallel.rank() == 1:
        {failure}
    torch.distributed.all_reduce(torch.ones(1))
""",
    )
    assert result.returncode == 1
    assert result.stderr.count(message) == 1
    assert seconds < 20


def test_fewer_cards_than_ranks_is_said_before_a_rank_takes_one(tmp_path):
    result, _ = run_code(
        tmp_path,
        """
torch.cuda.device_count = lambda: 1
def main():
    parallel.setup()
""",
    )
    assert result.returncode == 1
    assert result.stderr.count("error: this machine shows 1 cards, but 2 ranks") == 1


def test_a_lone_rank_is_heard_before_the_group_is_made(tmp_path):
    result, seconds = run_code(
        tmp_path,
        """
def main():
    if parallel.rank() == 1:
        raise ValueError("only rank 1 knows")
    parallel.setup()
""",
    )
    assert result.returncode == 1
    assert result.stderr.count("error: only rank 1 knows") == 1
    assert seconds < 20


def test_no_rank_outlives_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom llama import parallel\nparallel.setup()\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script)]
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


def test_results_of_every_rank_are_gathered_in_order(tmp_path):
    result, _ = run_code(
        tmp_path,
        """
def main():
    parallel.setup()
    values = parallel.gather_objects(parallel.rank() * 10)
    first = parallel.from_rank_0(f"from {parallel.rank()}")
    assert (values, first) == ([0, 10], "from 0"), (values, first)
    parallel.say("once")
""",
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("once") == 1


def test_a_program_that_does_not_leave_the_group_ends_well(on_ranks):
    for _ in range(2):
        assert on_ranks(2, "from llama import parallel\nparallel.setup()") is None


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path):
    ckpt_dir = make_ckpt(tmp_path / "ckpt", vocab_size=VOCAB_SIZE)

    def limit():  # as a full disk does, it refuses to let a file grow
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = run_script("split_model.py", "--ckpt_dir", ckpt_dir, "--n", 2, preexec_fn=limit)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_memory_watch_sees_memory_and_no_mapped_file(tmp_path):
    result, _ = run_code(
        tmp_path,
        f"""
import time
def main():
    torch.save(torch.ones(16 << 20), {str(tmp_path / "mapped.pth")!r})
    watch = parallel.MemoryWatch(interval=0.001)
    time.sleep(0.1)
    before = watch.peak
    torch.load({str(tmp_path / "mapped.pth")!r}, mmap=True).sum()
    time.sleep(0.1)
    assert watch.peak - before < 16 << 20
    held = torch.ones(16 << 20)
    time.sleep(0.1)
    assert watch.peak - before > held.nbytes * 0.9
""",
        n=None,
    )
    assert result.returncode == 0, result.stderr
