"""What the example scripts share: prompts in, completions and what they took out."""

import dataclasses
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llama import parallel
from llama.cli import MemoryWatch, counted, progress_bar, say, show, shown
from llama.files import check_text, parse_json, read_lines
from llama.generation import LLaMA
from llama.options import GenerationOptions, TunedGenerationOptions
from llama.output import Output, Prompt, Timing, Tuned
from llama.template import ChatTemplate, check_messages

SEPARATOR = "\n\n==================================\n\n"  # printed behind each completion
EXAMPLES = Path(__file__).with_name("example_prompts.jsonl")
QUESTIONS = Path(__file__).with_name("example_questions.jsonl")
LONGEST_STDIN = 1 << 24  # characters
ADAPTER = "tuning_ckpt_path"  # in a row of a file: the tuned prompt before it; null is none


@dataclass
class Request:
    """A prompt to be continued, and how it is shown."""

    given: dict  # as in the file: {"prompt": …} or {"messages": […]}, perhaps with an ADAPTER
    where: str  # that is, for messages
    adapter: Path | None = None  # of the tuned prompt to go before it
    soft_prompt: Tensor | None = None  # what that file holds
    template: ChatTemplate | None = None  # that it was trained with, for the prompt
    text: str = ""  # to print before the continuation
    prompt: Prompt = field(default_factory=list)  # what the generator takes
    error: str = ""  # why it cannot be continued


def read_requests(flags: GenerationOptions, examples: Path | None = None) -> list[Request]:
    """The prompts that the flags name, or those of a file of examples; none for a chat.

    Raises FileNotFoundError, and ValueError with the file and the line's number.
    """
    if flags.chat:
        parallel.setup(flags.tensor_parallel)
        if parallel.n_replicas() > 1:
            raise ValueError(
                f"--chat with {parallel.n_replicas()} replicas: one conversation has use for one; "
                f"run torchrun with --nproc_per_node {flags.tensor_parallel}, or leave out "
                "--tensor_parallel"
            )
        return []
    if flags.messages_file is not None:
        requests = _read(Path(flags.messages_file), "messages")
    elif flags.prompt is None:
        path = examples or EXAMPLES if flags.prompts_file is None else flags.prompts_file
        requests = _read(Path(path), "prompt")
    else:
        prompt = flags.prompt
        if prompt == "-":
            parallel.setup(flags.tensor_parallel)  # rank 0 alone reads
            prompt = parallel.from_rank_0(read_stdin)
        prompt = check_text("--prompt", "prompt", prompt)
        requests = [Request({"prompt": prompt}, "--prompt")]
    for request in requests:
        request.adapter = _adapter_of(request, flags)
    return requests


def _adapter_of(request: Request, flags: GenerationOptions) -> Path | None:
    """Where the tuned prompt is that goes before a request: its own, else --tuning_ckpt_path's."""
    where, given = request.where, request.given
    if not isinstance(flags, TunedGenerationOptions):
        if given.get(ADAPTER) is not None:
            raise ValueError(f'{where}: "{ADAPTER}" names a tuned prompt: example_ft.py takes it')
        return None
    path = given.get(ADAPTER, flags.tuning_ckpt_path)
    if path is None and ADAPTER not in given:
        raise ValueError(
            f'{where}: no "{ADAPTER}"; name one there, or null for none, or give '
            "--tuning_ckpt_path for all rows that name none"
        )
    if path is not None and (not isinstance(path, str) or not path):
        raise ValueError(f'{where}: "{ADAPTER}" must be a path or null, not {path!r:.80}')
    return None if path is None else Path(path)


def read_stdin() -> str:
    """What comes on stdin, without the line end that echo puts behind it."""
    text = sys.stdin.read(LONGEST_STDIN) if sys.stdin is not None else ""
    return text.removesuffix("\n")


def read_prompts(path: str | Path | None) -> list[str]:
    """The prompts of a text file, one a line, or of a .jsonl file ({"prompt": …} or a string).

    None reads the example prompts. Raises FileNotFoundError, and ValueError with the line's number.
    """
    requests = _read(EXAMPLES if path is None else Path(path), "prompt")
    for request in requests:
        if ADAPTER in request.given:
            raise ValueError(f'{request.where}: has a "{ADAPTER}": example_ft.py takes it')
    return [request.given["prompt"] for request in requests]


def _read(path: Path, name: str) -> list[Request]:
    """The rows of a file. name: the key of what they hold, prompt or messages; else it is a row."""
    found, messages = [], name == "messages"
    for where, row in _lines(path, "messages" if messages else "prompts", messages):
        row = row if isinstance(row, dict) else {name: row}
        own = row.get(name)
        own = check_messages(where, own) if messages else check_text(where, name, own)
        named = {ADAPTER: row[ADAPTER]} if ADAPTER in row else {}
        found.append(Request({name: own} | named, where))
    return found


def _lines(path: Path, what: str, always_json: bool) -> Iterator[tuple[str, object]]:
    """What each line of a file holds, and where it stands; ValueError if there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such {what} file")
    lines = list(read_lines(path))
    if not lines:
        raise ValueError(f"{path}: no {what} in it; write one a line")
    for where, line in lines:
        is_json = always_json or path.suffix == ".jsonl"
        yield where, parse_json(where, line) if is_json else line


def complete(generator: LLaMA, requests: list[Request], flags: GenerationOptions) -> None:
    """Continue the requests, and print each as soon as it is done, a single one while it comes.

    Those without a template are left as they are; with --instruct they get the tokenizer's.
    """
    untrained, template = [x for x in requests if x.template is None], None
    if len(untrained) < len(requests) and flags.special_tokens:
        raise ValueError("--special_tokens is for prompts as they are: give --raw too")
    if untrained and (flags.instruct or flags.messages_file is not None):
        template = template_of(generator)
    elif untrained and generator.tokenizer.chat_template is not None:
        say("this model has a chat template; prompts are sent without it (--instruct uses it)")
    for request in requests:
        _make_ready(request, generator, flags, request.template or template)
    ready = [request.prompt for request in requests if not request.error]
    if not ready:
        raise ValueError("no prompt is left to continue")
    if flags.json or len(requests) > 1 or flags.n > 1:
        outputs = _by_replicas(generator, ready, flags)
        with TokenBar(generator.timing):
            for request in requests:
                # One that is left out has one line too, so that all are in the prompts' order.
                for _ in range(1 if request.error else flags.n):
                    _print(request, None if request.error else next(outputs), flags)
    elif parallel.replica() == 0:  # the others wait in report()
        stream = generator.stream(ready[0], **flags.sampling())
        show(requests[0].text)
        for piece in stream:
            show(piece)
        show(SEPARATOR)
        _tell_if_cut(requests[0], stream.output, flags)


def _by_replicas(generator: LLaMA, prompts: list, flags: GenerationOptions) -> Iterator[Output]:
    """Give the outputs of prompts, in their order, on every rank; replicas share the prompts."""
    share, params = parallel.own_share(), flags.sampling()
    if params["seed"] is not None:  # each draws other numbers, and in every run the same
        params["seed"] = (params["seed"] + parallel.replica()) % 2**32
    own = generator.outputs(prompts[share], **params) if prompts[share] else iter(())
    places = [i * flags.n + j for i in range(len(prompts))[share] for j in range(flags.n)]
    made = ((place, dataclasses.asdict(output)) for place, output in zip(places, own))
    for found in parallel.merged(len(prompts) * flags.n, made):
        yield Output(**found | {"timing": Timing(**found["timing"])})


def template_of(generator: LLaMA) -> ChatTemplate:
    """The template of a model's tokenizer; says so if it is only that of models like it."""
    template = ChatTemplate.of(generator.tokenizer)
    if template.name:
        say(f"the tokenizer has no chat template; taking that of {template.name}")
    return template


def _make_ready(
    request: Request, generator: LLaMA, flags: GenerationOptions, template: ChatTemplate | None
) -> None:
    """Fill in a request's prompt and text, or its error: it is too long, or fits no template."""
    messages, text = request.given.get("messages"), request.given.get("prompt", "")
    try:
        if template is not None:
            if messages is None:
                messages = [{"role": "system", "content": flags.system}] if flags.system else []
                messages = [*messages, {"role": "user", "content": text}]
            ids = template.ids(messages)
            turns = [f"{message['role']}: {message['content']}" for message in messages]
            request.text = "\n\n".join([*turns, "assistant: "])
        else:
            ids = generator.tokenizer.encode(text, special_tokens=flags.special_tokens)
            request.text = text
        request.prompt = Tuned(ids, request.soft_prompt)
        generator.check_fits(request.prompt, flags.max_gen_len)
    except ValueError as error:
        request.error = f"{_name(request)}: {error}"
        say(f"left out: {request.error}")


def _name(request: Request) -> str:
    given = request.given
    text = given["prompt"] if "prompt" in given else given["messages"][-1]["content"]
    return f"prompt '{shown(text, 40)}'"


def _print(request: Request, output: Output | None, flags: GenerationOptions) -> None:
    """Print a completion, or with --json one line of it or of the request's error."""
    if output is None:
        if flags.json:
            _print_json(request.given | {"error": request.error})
        return
    if not flags.json:
        show(request.text + output.text + SEPARATOR)
        _tell_if_cut(request, output, flags)
        return
    found: dict[str, Any] = {
        "text": output.text,
        "tokens": output.token,
        "finish_reason": output.finish_reason,
    }
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        if (value := getattr(output, name)) is not None:
            found[name] = value
    timings = dataclasses.asdict(output.timing)
    del timings["load_seconds"]
    found["timings"] = {name: round(value, 6) for name, value in timings.items()}
    _print_json(request.given | found)


def _print_json(found: dict) -> None:
    show(json.dumps(found, ensure_ascii=False) + "\n")


def _tell_if_cut(request: Request, output: Output, flags: GenerationOptions) -> None:
    n = len(output.token)
    if output.finish_reason == "length" and n < flags.max_gen_len:
        say(
            f"{_name(request)} was cut short after {counted(n, 'token')}: --max_seq_len "
            f"{flags.max_seq_len} is full"
        )


class TokenBar(threading.Thread):
    """The tokens generated so far, and their rate, on a terminal."""

    def __init__(self, timing: Timing) -> None:
        super().__init__(daemon=True)
        self.timing, self.ended = timing, threading.Event()
        self.bar = progress_bar("generating", unit=" tokens")

    def run(self) -> None:
        while not self.ended.wait(0.2):
            self.bar.update(self.timing.generated_tokens - self.bar.n)

    def __enter__(self) -> "TokenBar":
        if not self.bar.disable:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.bar.close()


def report(timing: Timing, memory: MemoryWatch) -> None:
    """Say on stderr what a run took: seconds, tokens a second, and each rank's peak memory.

    Replicas work at the same time: their tokens are added up, and the slowest one's seconds count.
    """
    if parallel.n_replicas() > 1:
        timings = parallel.gather_objects(timing)[:: parallel.model_size()]
        of_all: Any = {name: [getattr(x, name) for x in timings] for name in vars(timing)}
        timing = Timing(**{x: (sum if "tokens" in x else max)(of_all[x]) for x in of_all})

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens} tokens, {tokens / seconds:.1f} a second" if tokens else "nothing"

    say(
        f"loaded in {timing.load_seconds:.1f} s; "
        f"read {rate(timing.prompt_tokens, timing.prompt_seconds)}; "
        f"wrote {rate(timing.generated_tokens, timing.generated_seconds)}; "
        f"{parallel.memory_peaks(memory.peak)}"
    )
