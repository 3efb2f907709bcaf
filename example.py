r"""Generate with a model split over the ranks of a run.

torchrun --nproc_per_node 4 example.py --ckpt_dir ckpts/7B_fs4 \
    --tokenizer_path ckpts/tokenizer.model
"""

from llama import parallel
from llama.demo import complete


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    prompts_file: str | None = None,
    max_gen_len: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int | None = None,
    max_seq_len: int = 512,
    max_batch_size: int = 32,
    dtype: str | None = None,
) -> None:
    """Continue the example prompts, or your own, with a LLaMA split over the ranks of this run.

    Completions go to stdout, timings to stderr.

    Args:
        ckpt_dir: folder with params.json and shards, best one a rank (see split_model.py).
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or the folder it is in.
        prompts_file: your prompts, one a line; or a .jsonl file of {"prompt": "..."} lines.
        max_gen_len: the most tokens to generate after a prompt.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_p: sample among the likeliest tokens that sum to this probability.
        seed: makes sampling repeatable.
        max_seq_len: the most tokens of prompt and continuation together.
        max_batch_size: prompts to run at once; more than that run in several batches.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
    """
    complete(
        prompts_file,
        {"max_gen_len": max_gen_len, "temperature": temperature, "top_p": top_p, "seed": seed},
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        dtype=dtype,
    )


if __name__ == "__main__":
    parallel.run(main)
