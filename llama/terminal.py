"""A chat in a terminal, or by lines on stdin: rank 0 reads and writes, all ranks answer."""

import contextlib
import json
import os
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

from llama import parallel
from llama.chat import Chat
from llama.cli import counted, say
from llama.files import write_whole

HELP = """/help            this
/reset           forget the conversation
/save FILE       write it, as --messages_file has them
Ctrl-C           stop an answer
Ctrl-D           end"""


def talk(chat: Chat) -> None:
    """Read turns and print answers until the input ends."""
    here = parallel.rank() == 0
    in_terminal = here and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    with restored_terminal() if in_terminal else contextlib.nullcontext():
        read = terminal_reader() if in_terminal else read_line
        if in_terminal:
            say("/help tells what else there is than to write a message")
        while (line := parallel.from_rank_0(read)) is not None:
            command, _, argument = line.strip().partition(" ")
            if command.startswith("/"):
                _obey(chat, command, argument.strip())
            elif command:
                _answer(chat, line, in_terminal)


def _answer(chat: Chat, text: str, in_terminal: bool) -> None:
    dropped = chat.n_dropped
    with watched_for_ctrl_c() if in_terminal else contextlib.nullcontext(lambda: False) as stop:
        try:
            pieces = chat.ask(text, stop)
        except ValueError as error:
            say(f"not sent: {error}")
            return
        for piece in pieces:
            _show(piece, in_terminal)
    _show("\n\n" if in_terminal else "\n", in_terminal)
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
        say(HELP)


def _show(text: str, in_terminal: bool) -> None:
    if parallel.rank() == 0:
        if in_terminal:  # which would obey what a model writes
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        print(text, end="", flush=True)


def read_line() -> str | None:
    """A line of stdin, None at its end."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\n") if line else None


def terminal_reader() -> Callable[[], str | None]:
    """A function that lets the user edit a line, with a history; None is the end."""
    from prompt_toolkit import PromptSession  # here, as only a terminal needs it
    from prompt_toolkit.formatted_text import HTML

    session: PromptSession = PromptSession()

    def read() -> str | None:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # takes back the line
                try:
                    return session.prompt(HTML("<ansigreen><b>&gt; </b></ansigreen>"))
                except EOFError:
                    return None

    return read


@contextlib.contextmanager
def watched_for_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C was typed, which then interrupts nothing.

    As a signal it would reach torchrun, and end all ranks.
    """
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    mode = termios.tcgetattr(terminal)
    mode[3] &= ~(termios.ICANON | termios.ECHO)  # give each character at once
    mode[6][termios.VINTR] = b"\0"  # no character is a signal

    def typed() -> bool:
        ready, _, _ = select.select([terminal], [], [], 0)
        return bool(ready) and b"\x03" in os.read(terminal, 1024)

    termios.tcsetattr(terminal, termios.TCSADRAIN, mode)
    try:
        yield typed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


@contextlib.contextmanager
def restored_terminal() -> Iterator[None]:
    """Have the terminal's mode restored when this process ends, also where it is killed."""
    mode = subprocess.run(["stty", "-g"], capture_output=True, text=True).stdout.strip()
    # Its input ends with this process, however that ends.
    script = "trap '' INT TERM HUP; read _; stty \"$0\" <&2"
    keeper = subprocess.Popen(
        ["sh", "-c", script, mode], stdin=subprocess.PIPE, stderr=sys.stdin.fileno()
    )
    try:
        yield
    finally:
        keeper.stdin.close()
        keeper.wait()
