"""What the scripts can be told: one dataclass a command line, checked when made, without torch."""

import inspect
from dataclasses import dataclass

from llama.cli import check_at_least

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GenerationOptions:
    """Continue the example prompts, or your own, with a LLaMA split over the ranks of this run.

    Completions go to stdout, timings to stderr.

    Args:
        ckpt_dir: folder with params.json and shards, best one a rank (see split_model.py).
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or the folder it is in.
        prompts_file: your prompts, one a line; or a .jsonl file of {"prompt": "..."} lines.
        special_tokens: take names of special tokens in prompts, as <|eot_id|>, for these tokens.
        max_gen_len: the most tokens to generate after a prompt.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_p: sample among the likeliest tokens that sum to this probability.
        seed: makes sampling repeatable.
        max_seq_len: the most tokens of prompt and continuation, and of a tuned prompt, together.
        max_batch_size: prompts to run at once; more than that run in several batches.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
    """

    ckpt_dir: str
    tokenizer_path: str
    prompts_file: str | None = None
    special_tokens: bool = False
    max_gen_len: int = 256
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None
    max_seq_len: int = 512
    max_batch_size: int = 32
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_sampling(self.max_gen_len, self.temperature, self.top_p, self.seed)
        check_at_least(1, max_seq_len=self.max_seq_len, max_batch_size=self.max_batch_size)
        check_dtype(self.dtype)


@dataclass(kw_only=True)
class TunedGenerationOptions(GenerationOptions):
    tuning_ckpt_path: str

    __doc__ = (
        inspect.cleandoc(GenerationOptions.__doc__ or "")  # Python 3.13 has it without indentation
        + "\n    tuning_ckpt_path: what ft_main.py or PEFT saved, to go before every prompt: a\n"
        "        folder, or a .safetensors, .bin or .pth file.\n"
    )


def check_sampling(max_gen_len: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Raise ValueError, naming the flag, for what LLaMA.generate cannot take."""
    check_at_least(1, max_gen_len=max_gen_len)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 (greedy) or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {top_p}")
    if seed is not None and not 0 <= seed < 2**32:  # torch's generator on a CPU takes no more
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, not {seed}")


def check_dtype(dtype: str | None) -> None:
    """Raise ValueError for a --dtype that no checkpoint can have."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
