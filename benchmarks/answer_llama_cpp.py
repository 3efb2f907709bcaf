"""Generate in llama.cpp from a GGUF file, and print as example.py and example_ft.py do.

python benchmarks/answer_llama_cpp.py --gguf out/NAME --prompts_file prompts.jsonl

llama.cpp comes from PyPI: pip install xllamacpp -c constraints.txt
"""

from pathlib import Path

import numpy as np

from llama import cli


def main(
    gguf: str,
    prompts_file: str | None = None,
    instruct: bool = False,
    max_gen_len: int = 80,
    n: int = 1,
) -> None:
    """Print each prompt with what llama.cpp writes after it, greedily.

    Where a tuned prompt is in the file's vocabulary, it goes in front of each; it is not printed.

    Args:
        gguf: a .gguf file, or a folder with one.
        prompts_file: your prompts, as example.py reads them; names of special tokens are tokens.
        instruct: take each prompt for a user's message in the file's chat template.
        max_gen_len: generate at most this many tokens.
        n: how many threads to run on.
    """
    from llama.checkpoint.gguf import read_header
    from llama.checkpoint.modelfile import render
    from llama.prompts import SEPARATOR, read_prompts

    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError("no llama.cpp: pip install xllamacpp -c constraints.txt") from error
    prompts = read_prompts(prompts_file)
    found = sorted(Path(gguf).glob("*.gguf")) if Path(gguf).is_dir() else [Path(gguf)]
    if len(found) != 1:
        raise ValueError(f"{gguf}: {len(found)} .gguf files in it; give the path of one")
    metadata, _ = read_header(memoryview(np.memmap(found[0], mode="r")))
    texts = [metadata.get("llama.soft_prompt.prefix", "") + prompt for prompt in prompts]
    if instruct:
        template = metadata["tokenizer.chat_template"]
        users = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [render(template, messages, metadata) for messages in users]
        prompts = [f"user: {prompt}\n\nassistant: " for prompt in prompts]

    params = xllamacpp.CommonParams()
    params.model.path = str(found[0])
    params.n_parallel, params.warmup, params.port, params.verbosity = 1, False, 0, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = n
    # No text has more tokens than bytes.
    params.n_ctx = max(len(text.encode()) for text in texts) + max_gen_len
    # The cache that float32 models have here; llama.cpp's own is float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    for prompt, text in zip(prompts, texts):
        answer = server.handle_completions(
            {"prompt": text, "n_predict": max_gen_len, "temperature": 0}
        )
        print(prompt + answer["choices"][0]["text"], end=SEPARATOR, flush=True)


if __name__ == "__main__":
    cli.run(main)
