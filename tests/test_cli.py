"""The command line: flags by their types, help, mistakes in one line, memory watched."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import REPO, run_script
from tqdm import tqdm

from llama import cli

SCRIPTS = ["split_model.py", "convert_model.py", "example.py", "example_ft.py", "ft_main.py"]


def script(ckpt_dir: str, from_: str = "x", n: int | None = None, top_p: float = 0.5,
           verify: bool = False, stop: list[str] = ()) -> None:  # fmt: skip
    """Do nothing.

    Args:
        ckpt_dir: a folder.
    """


def raising(error: Exception):
    def fail() -> None:
        raise error

    return fail


def parse(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    return cli.parse_flags(script)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--ckpt_dir", "a"], {}),
        (["--ckpt_dir=a", "--n=3"], {"n": 3}),
        (["--ckpt-dir", "a", "--from", "1.10"], {"from_": "1.10"}),
        (["--ckpt_dir", "a", "--from", "one, two"], {"from_": "one, two"}),
        (["--ckpt_dir", "a", "--from="], {"from_": ""}),
        (["--ckpt_dir", "a", "--from", "-"], {"from_": "-"}),
        (["--ckpt_dir", "a", "--top_p", "1"], {"top_p": 1.0}),
        (["--ckpt_dir", "a", "--top_p", "-1e-3"], {"top_p": -1e-3}),
        (["--ckpt_dir", "a", "--stop", "b", "--stop=c d"], {"stop": ["b", "c d"]}),
        (["--verify", "--ckpt_dir", "a"], {"verify": True}),
        (["--verify", "False", "--ckpt_dir", "a"], {"verify": False}),
    ],
)
def test_flags_are_taken_by_their_types(monkeypatch, arguments, given):
    assert parse(monkeypatch, *arguments) == {"ckpt_dir": "a"} | given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ckpt_dir is needed"),
        (["--ckptdir", "a"], "no flag --ckptdir; did you mean --ckpt_dir?"),
        (["--ckpt_dir", "a", "word"], "no flag word; see --help"),
        (["--ckpt_dir"], "--ckpt_dir needs a value"),
        (["--ckpt_dir", "--verify"], "--ckpt_dir needs a value"),
        (["--ckpt_dir", "a", "--n", "x"], "--n wants int, not 'x'"),
        (["--ckpt_dir", "a", "--n", "1.5"], "--n wants int, not '1.5'"),
        (["--ckpt_dir", "a", "--top_p", "hot"], "--top_p wants float, not 'hot'"),
        (["--ckpt_dir", "a", "--verify=maybe"], "--verify wants bool, not 'maybe'"),
    ],
)
def test_a_mistake_in_the_flags_is_named(monkeypatch, arguments, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        parse(monkeypatch, *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_reads_well_and_neither_it_nor_a_mistyped_flag_imports_torch(tmp_path, name):
    for package in ("torch", "transformers", "fairscale"):
        (tmp_path / f"{package}.py").write_text("raise ImportError('it takes seconds')")
    without = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPO}"}
    shown = run_script(name, "--help", env=without)
    mistyped = run_script(name, "--ckptdir", "x", env=without)
    assert shown.returncode == 0
    assert "--dtype=DTYPE" in shown.stdout
    assert "float32, bfloat16 or float16" in shown.stdout  # what it means, not its name alone
    for unwanted in ("FIRE", "POSITIONAL", "Optional", ", --"):
        assert unwanted not in shown.stdout
    assert "from_" not in shown.stdout.lower()
    assert shown.stderr == ""
    assert mistyped.returncode == 1
    assert mistyped.stderr.startswith("error: no flag --ckptdir")
    assert mistyped.stderr.count("\n") == 1


def test_a_mistyped_flag_is_answered_once_on_several_ranks():
    result = run_script("example.py", "--ckptdir", "x", "--tokenizer_path", "y", n=2)
    assert result.returncode == 1
    assert result.stderr.count("error: no flag --ckptdir") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: Path("/none/x").read_text(), "error: [Errno 2] No such file or directory"),
        (lambda: torch.empty(1 << 50), "error: out of memory ("),
        (lambda: [0] * (1 << 60), "error: out of memory (in Python)"),
        (
            raising(ValueError("a\x1b[2Jb\nc\udc80" + "x" * 10**7 + "end")),
            r"error: a\x1b[2Jb\nc\udc80x",
        ),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), "error: out of memory (CUDA"),
        (
            raising(RuntimeError("[gloo/pair.cc:550] Connection closed by peer [::1]:9")),
            "error: another rank ended before its time",
        ),
    ],
)
def test_what_the_machine_cannot_give_is_one_line(monkeypatch, capfd, fail, message):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    pid = os.fork()  # since a script that fails ends its process
    if not pid:
        try:
            cli.run(fail)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    said, error = capfd.readouterr()
    assert said == ""
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert len(error) < 2100


@pytest.mark.parametrize(
    ("torch_does", "environment", "code", "message"),
    [
        ("raise KeyboardInterrupt", {}, 130, "interrupted\n"),
        # torchrun was killed before: nothing else would end the rank
        ("pass", {"RANK": "0", "_PARENT": "0"}, 1, ""),
    ],
)
def test_a_script_ends_while_torch_is_imported(tmp_path, torch_does, environment, code, message):
    (tmp_path / "torch.py").write_text(torch_does)
    lines = ["import os", "from llama import cli", "cli.run(lambda: print(1))"]
    lines.insert(2, "cli._PARENT = int(os.environ.get('_PARENT', cli._PARENT))")
    (tmp_path / "script.py").write_text("\n".join(lines))
    paths = {"PYTHONPATH": f"{tmp_path}:{REPO}"}
    result = run_script(tmp_path / "script.py", env=os.environ | paths | environment)
    assert (result.returncode, result.stderr, result.stdout) == (code, message, "")


def test_a_process_that_is_stopped_does_not_run_out_of_time(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nfrom llama import cli, parallel\n"
        "if not (child := os.fork()):\n"
        "    with cli.time_limit(2, 'too late'):\n        [time.sleep(0.25) for _ in range(4)]\n"
        "    os._exit(0)\n"
        "time.sleep(0.5)\nos.kill(child, signal.SIGSTOP)\ntime.sleep(3)\n"
        "os.kill(child, signal.SIGCONT)\nprint(os.waitpid(child, 0)[1])\n"
    )
    assert run_script(tmp_path / "script.py").stdout == "0\n"


def test_memory_watch_ends_with_what_refers_to_it():
    before = set(threading.enumerate())
    watch = cli.MemoryWatch()
    (thread,) = set(threading.enumerate()) - before
    while not watch.peak:
        time.sleep(0.01)
    assert thread.is_alive()
    del watch
    thread.join(30)
    assert not thread.is_alive()


def test_a_forked_child_that_is_killed_holds_no_bar_of_its_parents():  # by conftest.py
    cli.progress_bar("working").close()  # which makes the lock that children would share
    pid = os.fork()
    if not pid:
        try:
            tqdm.get_lock().acquire()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    bar = threading.Thread(target=cli.progress_bar, args=["working"], daemon=True)
    bar.start()
    bar.join(30)
    assert not bar.is_alive()


def test_memory_watch_sees_memory_and_no_mapped_file(tmp_path):
    torch.save(torch.ones(16 << 20), tmp_path / "x.pth")  # 64 MB
    # In a process of its own: what other tests have left is freed or swapped out at any time.
    (tmp_path / "script.py").write_text(
        "import sys, time, torch\n"
        "from llama.cli import MemoryWatch\n"
        "mapped = torch.load(sys.argv[1], mmap=True)\n"
        "watch = MemoryWatch(interval=0.001)\n"
        "for work in (torch.sum, torch.clone):\n"
        "    time.sleep(0.5)\n"
        "    before, kept = watch.peak, work(mapped)\n"
        "    time.sleep(0.5)\n"
        "    print(watch.peak - before)\n"
    )
    result = run_script(tmp_path / "script.py", tmp_path / "x.pth")
    mapped, copied = map(int, result.stdout.split())
    assert mapped < 16 << 20
    assert copied > (64 << 20) * 0.9
