"""What the scripts can be told: one dataclass a command line, checked when made, without torch."""

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama.cli import check_at_least

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("int8", "int4")


@dataclass
class SamplingParams:
    """How a continuation is drawn, when it ends, and which log-probabilities come with it.

    repetition_penalty, temperature, top_k, top_p and min_p are applied in this order, and mean what
    they mean in transformers. Raises ValueError, naming the flag, for what makes no sense.
    """

    max_gen_len: int = 256  # new tokens; 0 goes with echo alone
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # keep the likeliest tokens that sum to it
    seed: int | None = None  # makes sampling repeatable
    top_k: int = 0  # keep so many of the likeliest tokens; 0: all
    min_p: float = 0.0  # keep those at least so likely, of the likeliest one's probability
    repetition_penalty: float = 1.0  # above 1, tokens that have been are less likely
    stop: Sequence[str] = ()  # strings that end a continuation, and are not in it
    n: int = 1  # continuations of each prompt
    logprobs: int | None = None  # log-probabilities: of the chosen token, and of so many others
    echo: bool = False  # log-probabilities of the prompt's tokens

    @classmethod
    def of(cls, *args: Any, **params: Any) -> "SamplingParams":
        """Those that are given, changed by params, or else made of the arguments."""
        if args and isinstance(args[0], SamplingParams):
            return dataclasses.replace(*args, **params)
        return cls(*args, **params)

    def __post_init__(self) -> None:
        for name in ("max_gen_len", "top_k", "n", "logprobs", "seed"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value > 2**32):
                raise ValueError(f"--{name} must be a whole number, and no endless one: {value!r}")
        check_at_least(0 if self.echo else 1, max_gen_len=self.max_gen_len)
        check_at_least(0, top_k=self.top_k)
        check_at_least(1, n=self.n)
        if self.logprobs is not None:
            check_at_least(0, logprobs=self.logprobs)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"--min_p must be from 0 to 1, not {self.min_p}")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                "--repetition_penalty must be from 0.01 to 100 (1 changes nothing), not "
                f"{self.repetition_penalty}"
            )
        # torch's generator on a CPU takes no more
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be from 0 to 2**32 - 1, not {self.seed}")
        texts = self.stop if isinstance(self.stop, list | tuple) else [None]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"--stop must be strings of at least one character, not {self.stop!r}")


@dataclass(kw_only=True)
class GenerationOptions(SamplingParams):
    """Continue the example prompts, or your own, with a LLaMA split over the ranks of this run.

    Completions go to stdout, timings to stderr.

    Args:
        ckpt_dir: a folder in Meta's format, best with one shard a rank (see split_model.py), a
            Hugging Face folder, or a .gguf file; the last two are converted while loading.
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or the folder it is in; by
            default what ckpt_dir holds.
        prompt: a prompt; - takes what comes on stdin.
        prompts_file: your prompts, one a line; or a .jsonl file of {"prompt": "..."} lines.
        messages_file: conversations to answer, a .jsonl file of {"messages": [...]} lines as in
            OpenAI's API, each of which ends with the user's message.
        chat: talk with the model, in a terminal or by lines on stdin.
        instruct: take each prompt for a user's message in the model's chat template.
        system: the system message of --chat and --instruct.
        special_tokens: take names of special tokens in prompts, as <|eot_id|>, for these tokens.
        json: print one JSON object a prompt: its text, tokens, finish_reason and timings.
        max_gen_len: the most tokens to generate after a prompt.
        temperature: 0 always takes the likeliest token; higher is more varied.
        top_p: sample among the likeliest tokens that sum to this probability.
        seed: makes sampling repeatable.
        top_k: sample among so many of the likeliest tokens; 0 among all.
        min_p: sample among tokens at least so likely, as a part of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that have been less likely.
        stop: a string that ends a continuation, and is not in it; may be given several times.
        n: continuations of each prompt.
        logprobs: with --json: log-probabilities, of each token and of so many of the likeliest.
        echo: with --json: log-probabilities of the prompt's own tokens.
        max_seq_len: the most tokens of prompt and continuation, and of a tuned prompt, together;
            by default 512, in a chat what the model was made for, up to 4096.
        max_batch_size: prompts to run at once; the next one starts where one ends.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
        quantize: int8 or int4: hold the matrices in 8 or 4 bits, rounded while they are loaded;
            by default as the checkpoint has them.
        offload: layers whose weights stay in host memory, and come to the card when needed.
        tensor_parallel: ranks that the model is split over; by default all. With fewer, the ranks
            hold several replicas of it, which share the prompts.
    """

    ckpt_dir: str
    tokenizer_path: str | None = None
    prompt: str | None = None
    prompts_file: str | None = None
    messages_file: str | None = None
    chat: bool = False
    instruct: bool = False
    system: str | None = None
    special_tokens: bool = False
    json: bool = False
    stop: list[str] = dataclasses.field(default_factory=list)
    max_seq_len: int | None = None
    max_batch_size: int = 32
    dtype: str | None = None
    quantize: str | None = None
    offload: int = 0
    tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, max_batch_size=self.max_batch_size)
        check_at_least(0, offload=self.offload)
        if self.max_seq_len is None and not self.chat:
            self.max_seq_len = 512
        check_max_seq_len(self.max_seq_len)
        check_dtype(self.dtype)
        check_quantize(self.quantize)
        inputs = ("prompt", "prompts_file", "messages_file", "chat")
        given = [f"--{name}" for name in inputs if getattr(self, name) not in (None, False)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        if self.chat:
            self._check_chat()
        if self.messages_file is not None and (self.instruct or self.special_tokens):
            raise ValueError(
                "--messages_file: its messages are in a template already; leave out --instruct "
                "and --special_tokens"
            )
        if self.instruct and self.special_tokens:
            raise ValueError("--instruct and --special_tokens: give one of them")
        if self.system is not None and not (self.chat or self.instruct):
            raise ValueError("--system goes with --chat or --instruct")
        if (self.logprobs is not None or self.echo) and not self.json:
            raise ValueError("--logprobs and --echo go with --json, which shows them")

    def _check_chat(self) -> None:
        others = ("instruct", "special_tokens", "json")
        for name in [name for name in others if getattr(self, name)] + ["n"] * (self.n > 1):
            raise ValueError(f"--{name} does not go with --chat")

    def sampling(self) -> dict:
        """The options that LLaMA.generate takes, by their names."""
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        return {name: getattr(self, name) for name in names}


@dataclass(kw_only=True)
class TunedGenerationOptions(GenerationOptions):
    tuning_ckpt_path: str | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tuning_ckpt_path is None and not (self.prompts_file or self.messages_file):
            raise ValueError(
                "--tuning_ckpt_path is needed, but where each row of --prompts_file or "
                "--messages_file names one"
            )

    __doc__ = (
        inspect.cleandoc(GenerationOptions.__doc__ or "")  # Python 3.13 has it without indentation
        + "\n    tuning_ckpt_path: what ft_main.py or PEFT saved, to go before every prompt: a\n"
        "        folder, or a .safetensors, .bin or .pth file. A row of a .jsonl file may name\n"
        "        another as its tuning_ckpt_path; null is none.\n"
        "    raw: leave prompts as they are; else they are put into the template that the tuned\n"
        "        prompt was trained with.\n"
    )


def dtype_name(dtype: object) -> str:
    """What --dtype calls a torch dtype."""
    return str(dtype).removeprefix("torch.")


def dtype_flag(dtype: object) -> list[str]:
    """--dtype in a command; nothing for None."""
    return ["--dtype", dtype_name(dtype)] if dtype else []


def check_quantize(quantize: str | None) -> None:
    """Raise ValueError for a --quantize that is unknown."""
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(
            f"--quantize must be one of {', '.join(QUANTIZATIONS)}, not {quantize!r:.40}"
        )


def check_max_seq_len(max_seq_len: int | None) -> None:
    """Raise ValueError for a --max_seq_len that no cache can have."""
    if max_seq_len is not None and not 1 <= max_seq_len < 2**31:
        raise ValueError(f"--max_seq_len must be from 1 to 2**31 - 1, not {max_seq_len}")


def check_dtype(dtype: str | None) -> None:
    """Raise ValueError for a --dtype that no checkpoint can have."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
