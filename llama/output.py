"""What is continued and what comes out: prompts, outputs, streams, and how long they took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from llama.cache import KVCache
from llama.text_stream import TextStream

Text = str | Sequence[int]  # or token ids, taken as they are


@dataclass
class Tuned:
    """A prompt with a soft prompt of its own in front, (num_virtual_tokens, dim); None: with none.

    What several prompts have in front, as one and the same tensor, is read once for all of them.
    """

    prompt: Text
    soft_prompt: Tensor | None


Prompt = Text | Tuned


@dataclass
class Timing:
    """What loading and generating have taken so far on this rank."""

    load_seconds: float = 0.0
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generated_seconds: float = 0.0


@dataclass
class Output:
    """What was generated after one prompt: the continuation alone.

    Log-probabilities are those of the model itself, before any option of sampling, in nats.
    """

    text: str = ""  # without the stop string that ended it
    token: list[int] = field(default_factory=list)  # without the id that ended it
    finish_reason: str = "length"  # or stop (an id or a string), or interrupted
    logprobs: list[float] | None = None  # of each token
    top_logprobs: list[dict[int, float]] | None = None  # of the likeliest ids in its place
    prompt_logprobs: list[float | None] | None = None  # of each id of the prompt; None: no context
    timing: Timing = field(default_factory=Timing, compare=False)  # its own


@dataclass
class Stream(Iterator[str]):
    """Pieces of a continuation as they come, of whole characters. Read them on every rank alike."""

    output: Output  # what has come so far
    pieces: Iterator[str]

    def __next__(self) -> str:
        return next(self.pieces)


@dataclass
class Prefix:
    """A soft prompt, and what the model computes of it: once for all rows that it stands before."""

    soft_prompt: Tensor  # (num_virtual_tokens, dim)
    # Its keys and values, of one row, and the states (dim,) of its last token; None: not read yet.
    read: tuple[KVCache, Tensor] | None = None


@dataclass
class Row:
    """A prompt, and its continuation while it grows."""

    name: str  # for messages
    ids: list[int]
    limit: int  # of new tokens
    text: TextStream
    output: Output
    prefix: Prefix | None = None  # given up once it is in the row: the last row frees its memory
    virtual: int = 0  # tokens of it
    done: bool = False
    began: float = 0.0  # seconds on parallel.now()'s clock, when its prompt had been read
    logprobs: list[float] = field(default_factory=list)  # for the output, where asked for
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
