"""Open a checkpoint of any format."""

from pathlib import Path

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.gguf import GGUFFile
from llama.checkpoint.hf import CONFIG, HFFolder
from llama.checkpoint.weights import Source

ACCEPTED = (
    "give a .gguf file, a folder with one, a Hugging Face folder (config.json and safetensors) "
    "or a folder in Meta's format (params.json)"
)


def open_any(path: str | Path) -> Source:
    """Open a GGUF file or the folder of one, a Hugging Face folder, or one in Meta's format.

    Raises FileNotFoundError if nothing is there, ValueError if it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; {ACCEPTED}")
    if path.is_file():
        return GGUFFile(path)
    if (path / CONFIG).is_file():
        return HFFolder(path)
    if (path / "params.json").is_file():
        return Checkpoint(path)
    inside = sorted(path.glob("*.gguf"))
    if len(inside) != 1:
        found = f"no config.json, no params.json and {len(inside)} .gguf files"
        raise ValueError(f"{path}: {found} in it; {ACCEPTED}")
    return GGUFFile(inside[0])
