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

    @contextlib.contextmanager
    def watched_for_ctrl_c(self) -> Iterator[Callable[[], bool]]:
        """Give a function that tells whether Ctrl-C was typed, which then interrupts nothing.

        As a signal it would reach torchrun, and end all ranks.
        """
        file = sys.stdin.fileno()
        before, mode = termios.tcgetattr(file), termios.tcgetattr(file)
        mode[3] &= ~(termios.ICANON | termios.ECHO)  # give each character at once
        mode[6][termios.VINTR] = b"\0"  # no character is a signal

        def typed() -> bool:
            ready, _, _ = select.select([file], [], [], 0)
            text = os.read(file, 1024).decode(errors="ignore") if ready else ""
            self.typed += "".join(filter(str.isprintable, text))
            return "\x03" in text

        termios.tcsetattr(file, termios.TCSADRAIN, mode)
        try:
            yield typed
        finally:
            termios.tcsetattr(file, termios.TCSADRAIN, before)


def talk(chat: Chat) -> None:
    """Read turns and print answers until the input ends."""
    here = parallel.rank() == 0 and sys.stdin is not None
    with contextlib.ExitStack() as stack:
        terminal = None
        if here and sys.stdin.isatty() and sys.stdout.isatty():
            stack.enter_context(restored_terminal())
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
    never = contextlib.nullcontext(lambda: False)
    with terminal.watched_for_ctrl_c() if terminal else never as stop:
        try:
            pieces = chat.ask(text, stop)
        except ValueError as error:
            say(f"not sent: {error}")
            return
        for piece in pieces:
            _show(piece, terminal)
    _show("\n\n" if terminal else "\n", terminal)
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


def _show(text: str, terminal: Terminal | None) -> None:
    if parallel.rank() == 0:
        if terminal:  # which would obey what a model writes
            text = "".join(c for c in text if c.isprintable() or c in "\n\t")
        print(text, end="", flush=True)


def read_line() -> str | None:
    """A line of stdin, None at its end."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    return line.rstrip("\n") if line else None


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
        keeper.communicate()
