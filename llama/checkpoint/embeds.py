"""Prompts as tensors of embeddings, for programs that take those: vLLM's prompt_embeds."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama.checkpoint.laid_out import in_dtype
from llama.checkpoint.weights import EMBEDDING, Source, whole_sha256
from llama.checkpoint.write import write_files
from llama.files import naming_refusals, new_folder
from llama.tokenizer import Tokenizer


def write_embeds(
    source: Source, out_dir: str | Path, prompts: Sequence[str], prompt: torch.Tensor | None
) -> None:
    """Write each prompt as prompt-N.pt: a tensor (tokens, dim) in the model's dtype.

    The tuned prompt, if there is one, comes first, then BOS and the text; it is also written by
    itself. prompts.jsonl has the text and the file of each. Raises ValueError for a model without
    a tokenizer, with another model's, or with a tuned prompt in its vocabulary.
    """
    if not source.has_tokenizer:
        raise ValueError("the model has no tokenizer beside it: put it into its folder")
    if not prompts and prompt is None:
        raise ValueError("give --prompts_file, your prompts, or --tuning_ckpt_path, or both")
    if source.has_hashes:
        source.check_sha256(EMBEDDING, whole_sha256(source, EMBEDDING))
    tokenizer = Tokenizer(source.path, source.files)
    if tokenizer.n_words > source.args.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.n_words} tokens, the model {source.args.vocab_size}: "
            "put the model's own beside it"
        )
    if "<|soft_0|>" in tokenizer.special_tokens:
        raise ValueError("a tuned prompt is in this model's vocabulary: give the plain model")
    soft = torch.empty(0, source.args.dim) if prompt is None else prompt
    soft = in_dtype(soft, source.dtype, "the tuned prompt")
    with new_folder(Path(out_dir).absolute()) as folder:
        lines = []
        for i, text in enumerate(prompts):
            rows = [source.read(EMBEDDING, 0, x, x + 1) for x in tokenizer.encode(text)]
            tensor = torch.cat([soft, *(row.to(source.dtype) for row in rows)])
            path = folder / f"prompt-{i:04}.pt"
            with naming_refusals(path):
                torch.save(tensor, path)
            lines.append(json.dumps({"prompt": text, "file": path.name}, ensure_ascii=False) + "\n")
        write_files(folder, {"prompts.jsonl": "".join(lines).encode()})
        if prompt is not None:
            with naming_refusals(folder):
                torch.save(soft, folder / "soft_prompt.pt")
                save_file({"soft_prompt": soft}, folder / "soft_prompt.safetensors")
