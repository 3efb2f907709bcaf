"""A chat in a terminal, or by lines on stdin: rank 0 reads and writes, all ranks answer."""

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

from llama import parallel
from llama.chat import Chat
from llama.cli import counted, say, show
from llama.files import write_whole

HELP = """\
/help            this
/reset           forget the conversation
/save FILE       write it as a line of JSON
Ctrl-C           stop an answer
Ctrl-D           end"""
ESCAPES = r"\x1b(\[[0-9;]*[ -/]*[@-~]|O.|.)?"  # what keys without a character send


class Terminal:
    """Lines from a user who edits them, and Ctrl-C while an answer is written."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession  # here, as only a terminal needs it
        from prompt_toolkit.formatted_text import HTML

        self.session: PromptSession[str] = PromptSession(
            HTML("<ansigreen><b>&gt; </b></ansigreen>")  # without colour where NO_COLOR is set
        )
        self.typed = ""  # while an answer was written: the beginning of the next line

    def read(self) -> str | None:
        """A line; None is the end."""
        while True:
            typed, self.typed = self.typed, ""
            with contextlib.suppress(KeyboardInterrupt):  # takes back the line
                try:
                    return self.session.prompt(default=typed)
                except EOFError:
                    return None

    def ctrl_c(self) -> bool:
        """Whether Ctrl-C was typed while an answer was written. Keeps what else was typed."""
        file = sys.stdin.fileno()
        ready, _, _ = select.select([file], [], [], 0)
        text = os.read(file, 1 << 16).decode(errors="ignore") if ready else ""
        for character in re.sub(ESCAPES, "", text):
            if character in "\x7f\b":
                self.typed = self.typed[:-1]
            elif character.isprintable():
                self.typed += character
        return "\x03" in text


def talk(chat: Chat) -> None:
    """Read turns and print answers until the input ends."""
    here = parallel.rank() == 0 and sys.stdin is not None
    with contextlib.ExitStack() as stack:
        terminal = None
        if here and sys.stdin.isatty() and sys.stdout.isatty():
            stack.enter_context(keys_as_characters())
            terminal = Terminal()
            say("/help tells what else there is than to write a message")
        read = terminal.read if terminal else read_line
        while (line := parallel.from_rank_0(read)) is not None:
            command, _, argument = line.strip().partition(" ")
            if command.startswith("/"):
                _obey(chat, command, argument.strip())
            elif command:
                _answer(chat, line, terminal)


def _answer(chat: Chat, text: str, terminal: Terminal | None) -> None:
    dropped = chat.n_dropped
    try:
        pieces = chat.ask(text, terminal.ctrl_c if terminal else lambda: False)
    except ValueError as error:
        say(f"not sent: {error}")
        return
    for piece in pieces:
        show(piece)
    show("\n\n" if terminal else "\n")
    if chat.n_dropped > dropped:
        n = counted(chat.n_dropped - dropped, "turn")
        say(f"the context of {chat.generator.max_seq_len} tokens was full: the oldest {n} left out")
    if chat.output.finish_reason == "length":
        say("cut short: --max_gen_len or --max_seq_len is reached")


def _obey(chat: Chat, command: str, argument: str) -> None:
    if command == "/reset":
        chat.reset()
        say("forgotten")
    elif command == "/save" and argument:
        if parallel.rank() == 0:
            try:
                with write_whole(Path(argument)) as partial:
                    line = json.dumps({"messages": chat.messages}, ensure_ascii=False)
                    partial.write_text(f"{line}\n", encoding="utf-8")
                say(f"{argument}: {counted(len(chat.messages), 'message')}")
            except OSError as error:
                say(f"not saved: {error}")
    else:
        for line in HELP.splitlines():
            say(line)


def read_line() -> str | None:
    """A line of stdin, None at its end."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\n") if line else None


@contextlib.contextmanager
def keys_as_characters() -> Iterator[None]:
    """Have keys come one by one, not shown, and Ctrl-C as one of them.

    As a signal it would reach torchrun, and end all ranks. The terminal's mode is restored when
    this process ends, also where it is killed.
    """
    file = sys.stdin.fileno()
    before = subprocess.run(["stty", "-g"], stdin=file, capture_output=True, text=True).stdout
    # Its input ends with this process, however that ends.
    script = "trap '' INT TERM HUP; read _; stty \"$0\" <&2"
    keeper = subprocess.Popen(
        ["sh", "-c", script, before.strip()], stdin=subprocess.PIPE, stderr=file
    )
    mode = termios.tcgetattr(file)
    mode[3] &= ~(termios.ICANON | termios.ECHO)
    mode[6][termios.VINTR] = b"\0"
    termios.tcsetattr(file, termios.TCSADRAIN, mode)
    try:
        yield
    finally:
        keeper.communicate()
