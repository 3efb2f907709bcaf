"""Open a checkpoint, whatever its format."""

from pathlib import Path

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.weights import Source
from llama.cli import first_few

ACCEPTED = (
    "a .gguf file, a folder with one, a Hugging Face folder (config.json and safetensors) or a "
    "folder in Meta's format (params.json and consolidated.*.pth or fs_consolidated.*.pth)"
)


def open_any(path: str | Path) -> Source:
    """Open a GGUF file or the folder of one, a Hugging Face folder, or one in Meta's format.

    A folder in several formats is taken in Meta's, else in Hugging Face's. Raises
    FileNotFoundError if nothing is there, ValueError if it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give {ACCEPTED}")
    inside = {end: sorted(path.glob(f"*{end}")) for end in (".pth", ".safetensors", ".gguf")}
    config, params = ((path / name).is_file() for name in ("config.json", "params.json"))
    # Each format is imported when it is met: gguf's library alone takes 0.2 s.
    if path.is_file() or (inside[".gguf"] and not inside[".pth"] and not inside[".safetensors"]):
        from llama.checkpoint.gguf import GGUFFile

        files = inside[".gguf"] or [path]
        if len(files) > 1:
            names = first_few([file.name for file in files])
            raise ValueError(f"{path}: {len(files)} .gguf files in it ({names}); give one of them")
        return GGUFFile(files[0])
    if config and not (params and inside[".pth"]):
        from llama.checkpoint.hf import HFFolder

        return HFFolder(path)
    if params or inside[".pth"]:
        return Checkpoint(path)
    raise ValueError(f"{path}: no config.json, params.json or .gguf file in it; give {ACCEPTED}")
