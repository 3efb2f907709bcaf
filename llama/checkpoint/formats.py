"""Open a checkpoint, whatever its format, and its tokenizer."""

from pathlib import Path

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.quantized import quantized
from llama.checkpoint.weights import Source
from llama.cli import first_few
from llama.tokenizer import Tokenizer

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


def open_pair(
    ckpt_dir: str | Path, tokenizer_path: str | Path | None = None, quantize: str | None = None
) -> tuple[Source, Tokenizer]:
    """A checkpoint of any format, not yet read, and its tokenizer: None takes what it holds.

    quantize: int8 or int4, in which its matrices are then read; None leaves them as they are.
    The ids that the checkpoint names as ends are among the tokenizer's stop_ids. Raises ValueError
    where the two do not belong together by the size of their vocabularies.
    """
    ckpt = quantized(open_any(ckpt_dir), quantize)
    own = tokenizer_path is None
    if own and not ckpt.has_tokenizer:
        raise ValueError(
            f"{ckpt_dir}: no tokenizer in it; give the one that came with the model, a "
            "tokenizer.model or tokenizer.json: --tokenizer_path PATH"
        )
    tokenizer = (
        Tokenizer(ckpt.path, ckpt.files) if tokenizer_path is None else Tokenizer(tokenizer_path)
    )
    n_words, n_rows = tokenizer.n_words, ckpt.args.vocab_size
    # Models fill their rows up to a multiple of 64, 128 or 256, large vocabularies of more. What is
    # further off is another model's, as Llama 2's 32,000 tokens beside Mistral's 32,768 rows; of
    # the tokenizer that a checkpoint holds itself that need not be guessed.
    if not (n_words <= n_rows if own else 0 <= n_rows - n_words <= max(256, n_rows // 100)):
        raise ValueError(
            f"{tokenizer.model_path}: a vocabulary of {n_words}, but the model in "
            f"{ckpt_dir} has {n_rows}; give the tokenizer that came with it"
        )
    tokenizer.n_rows = n_rows
    tokenizer.stop_ids |= ckpt.stop_ids
    return ckpt, tokenizer
