"""Other programs that run what we write, transformers and llama.cpp, and our own beside them.

Start reading at assert_greedy(), which holds another program's text against ours.
"""

import itertools
import json
import urllib.request
from pathlib import Path

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama import parallel
from llama.checkpoint.weights import Source
from llama.generation import LLaMA
from llama.model import Transformer
from llama.tokenizer import Tokenizer


def loaded(source: Source, tokenizer: Tokenizer, soft_prompt=None) -> LLaMA:
    """A generator in float32 from a model of any format."""
    parallel.setup()
    model = Transformer(source.args)
    model.load_state_dict({x: source.read(x).float() for x in source.shapes}, assign=True)
    return LLaMA(model.eval(), tokenizer, soft_prompt=soft_prompt)


def served(folder: Path, slots: int = 1) -> xllamacpp.Server:
    """llama.cpp with the GGUF file of a folder."""
    params = xllamacpp.CommonParams()
    params.model.path = str(next(folder.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup, params.port = 512 * slots, slots, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # By default it calculates attention in float16, which moves logits of tiny models by 0.01.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def ask(server: xllamacpp.Server, route: str, **body) -> dict | list:
    data = json.dumps(body).encode()
    with urllib.request.urlopen(f"{server.listening_address}/{route}", data) as answer:
        return json.load(answer)


def llama_cpp(server: xllamacpp.Server, prompts: list[str], n: int, **options) -> list[list[int]]:
    """The ids with which llama.cpp goes on, greedily if nothing else is said."""
    options = {"temperature": 0, "n_predict": n, "return_tokens": True} | options
    answers = ask(server, "completion", prompt=prompts, **options)
    answers = answers if isinstance(answers, list) else [answers]
    return [x["tokens"] for x in sorted(answers, key=lambda x: x["index"])]


@torch.inference_mode()
def transformers_text(folder: Path, prompts: list[str], n: int) -> list[list[int]]:
    """The ids with which transformers goes on, greedily."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**given, max_new_tokens=n, do_sample=False)
        found.append(out[0, given["input_ids"].shape[1] :].tolist())
    return found


@torch.inference_mode()
def assert_greedy(generator: LLaMA, prompts: list[str], found: list[list[int]], n: int) -> None:
    """Another program's ids are ours, up to where our two best are as good as equal."""
    encoded = [generator.tokenizer.encode(x, special_tokens=True) for x in prompts]
    outputs = generator.generate(encoded, n, temperature=0)
    assert len(found) == len(outputs)
    for ids, output, theirs in zip(encoded, outputs, found):
        theirs = [x for x in theirs if x not in generator.tokenizer.stop_ids]
        if theirs != output.token:
            pairs = itertools.takewhile(lambda x: x[0] == x[1], zip(theirs, output.token))
            same = len(list(pairs))
            logits = generator.model(torch.tensor([ids + output.token[:same]]))[0, -1]
            best, second = logits.topk(2).values.tolist()
            assert best - second < 1e-2, (same, theirs, output.token)
