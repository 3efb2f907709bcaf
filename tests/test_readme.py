"""READMEs and docs: commands run, links lead somewhere, both languages say the same."""

import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO
from formats import byte_level_vocabulary, tiny

from llama import cli
from llama.checkpoint.convert import convert
from llama.checkpoint.gguf_tokenizer import tokenizer_files
from llama.checkpoint.write import write_checkpoint
from llama.options import GenerationOptions, TunedGenerationOptions
from llama.template import CHATML
from llama.tuning.options import EvaluationOptions, TuningOptions

PAGES = ("README.md", "docs/generate.md", "docs/tune.md", "docs/run-anywhere.md")
CHINESE = {page: page.replace(".md", ".zh-CN.md") for page in PAGES}
LONGEST = 250  # lines of a README

# What a command gets on top of the README's own flags, to be short on a tiny model.
SHORTER = {
    "example.py": ["--max_gen_len", "4"],
    "example_ft.py": ["--max_gen_len", "4"],
    "ft_main.py": ["--max_steps", "2", "--batch_size", "2"],
}
# What two machines have of their own, and one does not.
HERE = {"192.168.0.10": "127.0.0.1", "eth0": "lo"}
# Of these, only what they name is looked up.
NOT_RUN = ("make", "pip", ".", "cd", "git", "llama-cli", "llama-completion", "ollama", "vllm")


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each code block of a page."""
    text = (REPO / page).read_text(encoding="utf-8")
    return re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", text)


def commands(page: str) -> list[list[str]]:
    """The commands of a page as words, comments left out: blocks of sh, and lines after a $."""
    found = []
    for language, text in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            prompted = line.startswith("$ ")
            if language == "sh" or prompted:
                found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return [words for words in found if words]


def programs(page: str) -> list[str]:
    """The Python programs of a page, without comments."""
    found = [text for language, text in blocks(page) if language == "python"]
    return [re.sub(r"(?m) *#.*$", "", text) for text in found]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder in which the paths of the README exist: the project, with tiny random models."""
    for path in REPO.glob("[!.]*"):
        if path.name not in ("ckpts", "saved", "out"):
            (tmp_path / path.name).symlink_to(path)
    vocabulary = byte_level_vocabulary(748) | {"tokenizer.chat_template": CHATML}
    sizes = {"n_heads": 12, "dim": 96, "multiple_of": 96, "vocab_size": 768}
    source = tiny(tokenizer_files(vocabulary, 768), **sizes)
    write_checkpoint(source, tmp_path / "ckpts/7B")
    write_checkpoint(source, tmp_path / "ckpts/SmolLM2-135M-Instruct_fs3", 3)
    convert(source, tmp_path / "gguf", "gguf")
    (found,) = (tmp_path / "gguf").glob("*.gguf")
    found.rename(tmp_path / "model.gguf")
    (tmp_path / "prompts.txt").write_text("What is rain?\nName a river.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(words: list[str], env: dict[str, str], folder: Path) -> subprocess.Popen:
    """Start a command of the README as it stands, but for what SHORTER adds."""
    words += SHORTER.get(next(word for word in words if word.endswith(".py")), [])
    if words[0] == "torchrun":
        # A run of one machine takes a port that is free, as other tests may be running.
        free = [] if "--nnodes" in words else ["--rdzv_backend", "c10d"]
        free += ["--rdzv_endpoint", "localhost:0"] if free else []
        words[:1] = [sys.executable, "-m", "torch.distributed.run", *free]
    else:
        words[0] = sys.executable
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=folder, env=env, text=True, **pipes)


def check(words: list[str]) -> None:
    """Look up what a command names that is not run: make's targets, pip's files."""
    targets = re.findall(r"(?m)^([a-z-]+):", (REPO / "Makefile").read_text())
    if words[0] == "make":
        assert set(words[1:]) <= set(targets), words
    for word in words:
        assert not word.endswith(".txt") or (REPO / word).is_file(), words


def test_every_command_of_the_readme_runs(project):
    # As pip alone installs us, without what makes generating faster; and ranks start sooner so.
    (project / "without").mkdir()
    (project / "without" / "numba.py").write_text("raise ImportError('not installed')")
    env = os.environ | {"PYTHONPATH": f"{REPO}:{project / 'without'}"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = HERE | {"29500": str(free.getsockname()[1])}
    of_machines = []  # commands that run at the same time
    for words in commands("README.md"):
        for there, instead in here.items():
            words = [word.replace(there, instead) for word in words]
        print(shlex.join(words))
        if words[0] == "export":
            env |= dict(word.split("=") for word in words[1:])
        elif words[0] in NOT_RUN:
            check(words)
        else:
            assert words[0] in ("python", "torchrun"), words
            of_machines.append(start(words, env, project))
            n_machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
            if len(of_machines) == n_machines:
                said = [process.communicate(timeout=120)[0] for process in of_machines]
                assert [process.returncode for process in of_machines] == [0] * n_machines, said
                of_machines = []
    assert not of_machines

    # in this process; what it loads is there now
    names: dict = {}
    for page in ("README.md", "docs/generate.md"):
        for program in programs(page):
            exec(program, names)


OPTIONS = {
    "example.py": GenerationOptions,
    "example_ft.py": TunedGenerationOptions,
    "ft_main.py": TuningOptions,
    "llama.tuning.evaluate": EvaluationOptions,
}


@pytest.mark.parametrize("page", [*PAGES[1:], "docs/architecture.md"])
def test_flags_in_the_docs_exist(page, monkeypatch):
    for words in commands(page):
        script = next((word for word in words if word.endswith(".py") or word in OPTIONS), None)
        if words[0] not in NOT_RUN and script:
            words = words[words.index(script) :]
            shell = words.index(">") if ">" in words else len(words)
            monkeypatch.setattr(sys, "argv", words[:shell])
            main = OPTIONS.get(script) or importlib.import_module(Path(script).stem).main
            flags = cli.parse_flags(main)
            if script in OPTIONS:
                main(**flags)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands_messages_and_links(page):
    assert commands(page) == commands(CHINESE[page])
    assert programs(page) == programs(CHINESE[page])
    messages = [
        re.findall(r"`((?:error|left out|not sent): [^`]+)`", (REPO / name).read_text())
        for name in (page, CHINESE[page])
    ]
    assert messages[0] == messages[1]


def test_a_readme_is_short():
    for page in (PAGES[0], CHINESE[PAGES[0]]):
        assert len((REPO / page).read_text(encoding="utf-8").splitlines()) <= LONGEST, page


def test_every_file_of_the_package_has_a_line():
    page = (REPO / "docs/architecture.md").read_text(encoding="utf-8")
    for path in (REPO / "llama").rglob("*.*"):
        if "__" not in str(path.relative_to(REPO)):
            assert f"`{path.name}`" in page, path


def test_links_lead_somewhere():
    for page in [*REPO.glob("*.md"), *REPO.glob("*/*.md")]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            target = link.partition("#")[0]
            assert "://" in link or (page.parent / target).exists(), f"{page}: {link}"
