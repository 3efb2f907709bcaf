"""In a terminal each script shows how far it is, and leaves results and messages alone there.

Start reading at in_terminal(), a command as a user runs it, and screen(), what is then to be seen.
"""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from conftest import REPO, TOKENIZERS, command_of, flags_of, make_ckpt

from llama import cli

PATH, VOCAB_SIZE = TOKENIZERS["sentencepiece"]
BARS = {  # what each script shows
    "split_model.py": ["writing"],
    "convert_model.py": ["writing", "verifying"],
    "ft_main.py": ["making tokens", "checking", "loading", "tuning", "evaluating"],
    "example.py": ["checking", "loading"],
    "example_ft.py": ["checking", "loading"],
}
RESULTS = dict.fromkeys(BARS, "/") | {"example.py": "one", "example_ft.py": "user: one"}


def terminal(columns: int = 100) -> tuple[int, int]:
    """A terminal of so many columns: the user's end, and the program's."""
    user, program = pty.openpty()
    fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24 * (columns > 0), columns, 0, 0))
    return user, program


def read_all(user: int) -> str:
    """All that was written to a terminal, until nobody has it open any more."""
    written = b""
    try:
        while data := os.read(user, 1 << 16):
            written += data
    except OSError:  # as Linux says the end
        os.close(user)
    return written.decode()


def in_terminal(command: list[str]) -> str:
    """Run a command in a terminal; what it writes there."""
    user, program = terminal()
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        command, cwd=REPO, env=environment, stdin=program, stdout=program, stderr=program
    )
    os.close(program)
    written = read_all(user)
    assert process.wait() == 0, written
    return written


def screen(written: str) -> list[str]:
    """The lines to be seen at last of what was written."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9]*[A-Z]|[^\x1b]", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        else:
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, str]:
    """What each script writes to a terminal."""
    folder = tmp_path_factory.mktemp("terminal")
    ckpt, cut = make_ckpt(folder / "ckpt", vocab_size=VOCAB_SIZE), folder / "cut"
    prompts = folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    convert = {"from": cut, "out_dir": folder / "hf", "to": "hf", "verify": True}
    pair = {"ckpt_dir": cut, "tokenizer_path": PATH}
    tune = pair | {"output_dir": folder / "out", "max_steps": 2, "batch_size": 1}
    tune |= {"dataset_path": REPO / "datasets" / "short_answers.json"}
    tune |= {"val_set_size": 4, "logging_steps": 1}
    generate = pair | {"prompts_file": prompts, "max_gen_len": 4}
    runs = [
        ("split_model.py", None, {"ckpt_dir": ckpt, "n": 2, "out_dir": cut}),
        ("convert_model.py", None, convert),
        ("ft_main.py", 2, tune),
        ("example.py", None, generate),
        ("example_ft.py", None, generate | {"tuning_ckpt_path": folder / "out"}),
    ]
    return {
        script: in_terminal(command_of(script, *flags_of(**flags), n=n))
        for script, n, flags in runs
    }


@pytest.mark.parametrize("script", BARS)
def test_every_script_shows_how_far_it_is_and_takes_that_away(written, script):
    drawn = re.findall(r"([\w ]+): +\d+%\|[^|]*\| \S+/\S+ \[[\d:]+<[\d:?]+,", written[script])
    # of rows that are read one at a time nobody knows how many come
    drawn += re.findall(r"([\w ]+): \d+row \[[\d:]+,", written[script])
    assert set(drawn) >= set(BARS[script])
    seen = screen(written[script])
    assert not [line for line in seen if "%|" in line]
    assert any(line.startswith(RESULTS[script]) for line in seen)


def test_the_losses_of_tuning_stay_above_its_bar_and_rank_0_alone_shows_them(written):
    seen = "\n".join(screen(written["ft_main.py"]))
    assert re.findall(r"(?m)^step (\d) of 2: loss \d", seen) == ["1", "2"]
    assert re.findall(r"(?m)^step (\d) of 2: eval_loss \d", seen) == ["0", "2"]
    # at first, below the first loss, and below each of three sample answers
    assert written["ft_main.py"].count("tuning:   0%") == 5


def test_a_terminal_without_a_size_shows_bars_too(monkeypatch):
    user, program = terminal(columns=0)
    with open(program, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with cli.progress_bar("working", 2, "step") as bar:
            bar.update(2)
    assert "working:   0%|" in read_all(user)


@pytest.mark.parametrize("end", [ValueError("no such thing"), KeyboardInterrupt()])
def test_a_failure_leaves_no_bar_behind(end):
    def fail() -> None:
        bar = cli.progress_bar("working", 3)  # which nobody closes, as of a rank that goes on
        bar.update()
        cli.say("one is done")
        raise end

    user, program = terminal()
    pid = os.fork()  # since a script that fails ends its process
    if not pid:
        try:
            sys.argv, sys.stderr = ["script.py"], os.fdopen(program, "w")
            cli.run(fail)
        finally:
            os._exit(2)
    os.close(program)
    written = read_all(user)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (1, 130)
    assert "working:   0%|" in written
    ending = f"error: {end}" if isinstance(end, ValueError) else "interrupted"
    assert screen(written) == ["one is done", ending, ""]
