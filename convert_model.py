"""Turn a Llama of any format into any other, tokenizer included, with a tuned prompt if you like.

python convert_model.py --from model.gguf --out_dir ckpts/NAME
python convert_model.py --from ckpts/NAME --out_dir out/NAME --to gguf --tuning_ckpt_path saved/NAME
"""

import shlex

from llama import cli


def main(
    from_: str,
    out_dir: str,
    to: str = "meta",
    n: int = 1,
    dtype: str | None = None,
    quantize: str | None = None,
    tuning_ckpt_path: str | None = None,
    prompts_file: str | None = None,
    consolidated: bool = False,
    verify: bool = False,
) -> None:
    """Turn a GGUF file, a Hugging Face folder or a folder in Meta's format into another format.

    Args:
        from_: a .gguf file or a folder with one, a Hugging Face folder, or one in Meta's format.
        out_dir: folder to write; it receives the tokenizer too.
        to: meta, hf (Hugging Face), gguf (llama.cpp), or prompt_embeds (prompts as tensors, as vLLM
            takes them: those of prompts_file, what tuning_ckpt_path names in front).
        n: how many shards to write, in Meta's format.
        dtype: float32, bfloat16 or float16, for gguf also q8_0; by default what the source holds
            (quantised: float32).
        quantize: int8 or int4: write the matrices in 8 or 4 bits, in Meta's format.
        tuning_ckpt_path: a tuned prompt, to become new tokens of the model's vocabulary.
        prompts_file: for prompt_embeds: your prompts, as example.py reads them.
        consolidated: name shards in Meta's format consolidated.00.pth, as Meta does.
        verify: read again what was written, and compare it with the source.
    """
    # here and not above, so that --help need not wait for torch
    from llama import parallel
    from llama.checkpoint.convert import (
        bake,
        check_floats,
        check_target,
        convert,
        verify_written,
    )
    from llama.checkpoint.embeds import write_embeds
    from llama.checkpoint.formats import open_any
    from llama.checkpoint.quantized import quantized
    from llama.checkpoint.weights import valid_shard_counts
    from llama.prompts import read_prompts
    from llama.tuning.adapter import (
        chat_template_beside,
        load_soft_prompt,
        warn_of_another_model,
    )

    if parallel.rank():  # one process does it, also where torchrun started several
        return
    check_target(to, n, dtype, quantize, consolidated, prompts_file, verify)
    source, prompt = open_any(from_), None
    check_floats(source)
    if tuning_ckpt_path is not None:
        prompt = load_soft_prompt(tuning_ckpt_path, source.args.dim)
        warn_of_another_model(tuning_ckpt_path, source)
    if to == "prompt_embeds":
        prompts = read_prompts(prompts_file) if prompts_file else []
        write_embeds(source, out_dir, prompts, prompt)
        print(f"{out_dir}: prompts.jsonl names the file of each prompt: a tensor (tokens, dim)")
        return
    baked = None
    if prompt is not None and tuning_ckpt_path is not None:
        source = baked = bake(source, prompt, chat_template_beside(tuning_ckpt_path))
    source = quantized(source, quantize)
    convert(source, out_dir, to, n, dtype, consolidated)
    if verify:
        verify_written(source, out_dir)
    print(f"{out_dir}: {cli.counted(n, 'shard') if to == 'meta' else 'written'}"
          f"{', and read again: as it should be' * verify}")  # fmt: skip
    counts, out = ", ".join(map(str, valid_shard_counts(source.args))), shlex.quote(out_dir)
    without = " --tokenizer_path …" * (not source.has_tokenizer)
    special_tokens = "" if prompt is None else " --special_tokens"
    commands = {
        "meta": f"generate: torchrun --nproc_per_node {n} example.py --ckpt_dir {out}"
        f"{without}{special_tokens}\nfor N cards, N among {counts}: "
        f"python split_model.py --ckpt_dir {out} --n N",
        "hf": f"transformers: AutoModelForCausalLM.from_pretrained({out_dir!r}), and AutoTokenizer",
        "gguf": f"llama.cpp: llama-cli --model {out}/*.gguf\n"
        f"Ollama: ollama create NAME --file {out}/Modelfile",
    }
    print(commands[to])
    if baked is not None:
        if "tokenizer.chat_template" in baked.vocabulary:
            print("chats begin with the tuned prompt by themselves")
        print(f"put this in front of raw prompts: {baked.prefix}")


if __name__ == "__main__":
    cli.run(main)
