"""The house stays as it is drawn: which file may import which, and how long files may be."""

import ast
import re

import pytest
from conftest import REPO, run_script

# From the ground up: a file imports only files that stand before it, so no way leads back.
GROUND = [
    "quantize",
    "intrinsics",
    "kernels",
    "step",
    "layers",
    "parallel",
    "cli",
    "options",
    "files",
    "cache",
    "model",
    "decoder",
    "offload",
    "tokenizer",
    "template",
    "text_stream",
]
CHECKPOINT = ["params", "weights", "manifest", "folder", "laid_out", "quantized"]
CHECKPOINT += ["write", "hf"]
CHECKPOINT += [
    "gguf_tokenizer",
    "tokenizer_words",
    "vocabulary",
    "gguf_blocks",
    "gguf",
    "formats",
    "modelfile",
]
CHECKPOINT += ["baked", "convert", "embeds"]
GENERATION = [
    "sampling",
    "output",
    "batch",
    "plan",
    "memory",
    "generation",
    "prompts",
    "chat",
    "terminal",
]
TUNING = ["options", "adapter", "rows", "templates", "data", "methods", "model"]
TUNING += ["run_folder", "card", "samples", "progress", "trainer", "evaluate"]
ORDER = [*GROUND, *(f"checkpoint.{name}" for name in CHECKPOINT), *GENERATION]
ORDER += [f"tuning.{name}" for name in TUNING]
# And these know nothing of each other, though one stands before the other.
STRANGERS = [
    ("model", ("files", "cli", "options")),  # the model knows nothing of files or text
    ("layers", ("files", "cli", "options")),
    ("checkpoint", ("layers", "generation", "prompts")),  # weights, not modules
    ("tuning", ("generation", "prompts")),
]
SCRIPTS = {"tuning.evaluate"}  # which bring the rooms together, as ft_main.py does
PACKAGE = REPO / "llama"


def imports_of(name: str) -> set[str]:
    """The files of llama that a file imports, by their names in ORDER."""
    path = PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {module.removeprefix("llama.") for module in modules} & set(ORDER)


def test_every_file_has_its_place():
    found = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    assert {".".join(path.parts) for path in found if path.name != "__init__"} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_below_it(name):
    below = set(ORDER[: ORDER.index(name)])
    assert imports_of(name) <= below
    for room, unknown in STRANGERS:
        if name not in SCRIPTS and (name == room or name.startswith(f"{room}.")):
            assert not imports_of(name) & set(unknown)


def test_files_can_be_read_in_one_sitting():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
    for path in REPO.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 120, path


def test_all_there_is_to_install_is_named():
    call = ast.parse((REPO / "setup.py").read_text(encoding="utf-8")).body[-1].value
    named = {x.arg: x.value for x in call.keywords}
    lists = ("packages", "py_modules", "package_data")
    packages, scripts, data = (ast.literal_eval(named[name]) for name in lists)
    folders = {path.parent.relative_to(REPO) for path in PACKAGE.rglob("*.py")}
    assert set(packages) == {".".join(folder.parts) for folder in folders}
    assert {*scripts, "setup"} == {path.stem for path in REPO.glob("*.py")}
    others = {path.name for path in PACKAGE.rglob("*") if path.is_file() and ".py" not in path.name}
    assert data == {"llama": sorted(others)}


def test_every_weight_is_listed_once():
    """No file but the table names the twelve kinds of weight."""
    for path in PACKAGE.rglob("*.py"):
        if path.name != "weights.py":
            assert not re.search(r"attention\.w[qkvo]|q_proj|attn_q", path.read_text()), path


def test_an_adapter_is_read_without_transformers_and_help_without_torch(tmp_path):
    checks = (  # one after the other in one process
        ("import llama.options, llama.tuning.options", {"torch"}),
        ("import llama.generation, llama.tuning.adapter", {"transformers", "peft"}),
    )
    lines = [f"{code}; assert not {unwanted} & sys.modules.keys()" for code, unwanted in checks]
    (tmp_path / "script.py").write_text("\n".join(["import sys", *lines]))
    result = run_script(tmp_path / "script.py")
    assert result.returncode == 0, result.stderr
