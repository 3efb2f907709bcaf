"""Prompts as tensors of embeddings, for programs that take those: vLLM's prompt_embeds."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama.checkpoint.weights import EMBEDDING, Source
from llama.checkpoint.write import write_files
from llama.files import naming_refusals, new_folder
from llama.tokenizer import Tokenizer


def write_embeds(
    source: Source, out_dir: str | Path, prompts: Sequence[str], prompt: torch.Tensor | None
) -> None:
    """Write each prompt as prompt-N.pt: a tensor (tokens, dim) in the model's dtype.

    The tuned prompt, if there is one, comes first, then BOS and the text; it is also written by
    itself. prompts.jsonl has the text and the file of each. Raises ValueError for a model without
    a tokenizer.
    """
    if not source.files:
        raise ValueError("the model has no tokenizer beside it: put it into its folder")
    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), source.files)
        tokenizer = Tokenizer(made)
    soft = torch.empty(0, source.args.dim) if prompt is None else prompt
    soft, lines = soft.to(source.dtype), []
    with new_folder(Path(out_dir).absolute()) as folder, naming_refusals(folder):
        for i, text in enumerate(prompts):
            rows = [source.read(EMBEDDING, 0, x, x + 1) for x in tokenizer.encode(text)]
            path = folder / f"prompt-{i:04}.pt"
            torch.save(torch.cat([soft, *(row.to(source.dtype) for row in rows)]), path)
            lines.append(json.dumps({"prompt": text, "file": path.name}, ensure_ascii=False))
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if prompt is not None:
            torch.save(soft, folder / "soft_prompt.pt")
            save_file({"soft_prompt": soft}, folder / "soft_prompt.safetensors")
