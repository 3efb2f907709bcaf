"""What the example scripts share: prompts in, completions and what they took out."""

from collections.abc import Sequence
from pathlib import Path

from llama import parallel
from llama.cli import MemoryWatch, say
from llama.files import check_text, parse_json, read_lines
from llama.generation import LLaMA, Output, Timing

SEPARATOR = "\n\n==================================\n\n"  # printed behind each completion
EXAMPLES = Path(__file__).with_name("example_prompts.jsonl")


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a text file, one a line, or of a .jsonl file ({"prompt": …} or a string).

    None reads the example prompts. Raises FileNotFoundError, and ValueError with the line's number.
    """
    file = EXAMPLES if path is None else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such prompts file")
    prompts = []
    for where, line in read_lines(file):
        prompt = parse_json(where, line) if file.suffix == ".jsonl" else line
        prompt = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        prompts.append(check_text(where, "prompt", prompt))
    if not prompts:
        raise ValueError(f"{file}: no prompts in it; write one a line")
    return prompts


def with_special_tokens(prompts: Sequence[str], generator: LLaMA) -> list[list[int]]:
    """The token ids of prompts in which names of special tokens stand for these tokens."""
    return [generator.tokenizer.encode(prompt, special_tokens=True) for prompt in prompts]


def print_completions(prompts: Sequence[str], outputs: Sequence[Output]) -> None:
    """Print each prompt with its continuation on stdout, on rank 0."""
    if parallel.rank() == 0:
        for prompt, output in zip(prompts, outputs):
            print(prompt + output.text, end=SEPARATOR, flush=True)


def report(timing: Timing, memory: MemoryWatch) -> None:
    """Say on stderr what a run took: seconds, tokens a second, and each rank's peak memory."""
    peaks = parallel.gather_objects(parallel.device_peak() or memory.peak)
    say(
        f"loaded in {timing.load_seconds:.1f} s; "
        f"prompts {timing.prompt_tokens} tokens, "
        f"{timing.prompt_tokens / timing.prompt_seconds:.1f} tokens/s; "
        f"generated {timing.generated_tokens} tokens, "
        f"{timing.generated_tokens / timing.generated_seconds:.1f} tokens/s; "
        f"peak memory by rank: {', '.join(f'{peak / 1e6:.0f} MB' for peak in peaks)}"
    )
