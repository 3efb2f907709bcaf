"""What the example scripts share: the prompts, and completions shown with their timings."""

import json
import time
from pathlib import Path

from llama import parallel
from llama.generation import LLaMA, check_sampling

SEPARATOR = "\n\n==================================\n\n"  # printed behind each completion
PROMPTS = [
    # For these, the model should simply go on with the text:
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that ",
    "Building a website can be done in 10 simple steps:\n",
    # For these, it should go on with the pattern that the examples set:
    """Tweet: "My phone was dead before lunch again."
Sentiment: Negative
###
Tweet: "Three friends came to help me move, and brought cake!"
Sentiment: Positive
###
Tweet: "The meeting has been moved to room 12."
Sentiment: Neutral
###
Tweet: "This song has been in my head all day and I love it"
Sentiment:""",
    """Translate English to French:

cheese => fromage

good morning => bonjour

the red house => la maison rouge

thank you =>""",
    # Alpaca's template, as instruction-tuned models and tuned prompts expect it:
    """Below is an instruction that describes a task. Write a response that appropriately \
completes the request.

### Instruction:
Give three tips for staying healthy.

### Response:""",
]


def read_prompts(path: str | None) -> list[str]:
    """The prompts of a text file, one a line, or of a .jsonl file ({"prompt": …} or a string).

    None gives the examples above. Raises FileNotFoundError, and ValueError with the line's number.
    """
    if path is None:
        return PROMPTS
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such prompts file")
    try:
        # Not splitlines(), which also cuts at characters that a prompt may hold.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    if Path(path).suffix != ".jsonl":
        prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    else:
        prompts = [_parse(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one a line")
    return prompts


def _parse(path: str, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
    prompt = row.get("prompt") if isinstance(row, dict) else row
    if not isinstance(prompt, str):
        raise ValueError(f'{path}, line {number}: neither a string nor an object with "prompt"')
    return prompt


def complete(
    prompts_file: str | None, sampling: dict, tuning_ckpt_path: str | None = None, **build: object
) -> None:
    """Build a generator, continue the prompts, print them on stdout and what it took on stderr.

    sampling: what LLaMA.generate takes beside the prompts; build: what LLaMA.build takes.
    """
    if tuning_ckpt_path is not None:
        # here, for PEFT and the Trainer take seconds to import
        from llama.prompt_tuning import load_soft_prompt, warn_of_another_model

    start = time.perf_counter()
    memory = parallel.MemoryWatch(interval=0.05)
    prompts = read_prompts(prompts_file)
    check_sampling(**sampling)
    generator = LLaMA.build(**build)
    if tuning_ckpt_path is not None:
        generator.soft_prompt = load_soft_prompt(tuning_ckpt_path, generator.model.args.dim)
        warn_of_another_model(tuning_ckpt_path, generator.model)
    load_seconds = time.perf_counter() - start
    outputs = generator.generate(prompts, **sampling)
    if parallel.rank() == 0:
        for prompt, output in zip(prompts, outputs):
            print(prompt + output.text, end=SEPARATOR, flush=True)
    timing = generator.timing
    peaks = parallel.gather_objects(memory.device_peak())
    parallel.say(
        f"loaded in {load_seconds:.1f} s; "
        f"prompts {timing.prompt_tokens} tokens, "
        f"{timing.prompt_tokens / timing.prompt_seconds:.1f} tokens/s; "
        f"generated {timing.generated_tokens} tokens, "
        f"{timing.generated_tokens / timing.generated_seconds:.1f} tokens/s; "
        f"peak memory by rank: {', '.join(f'{peak / 1e6:.0f} MB' for peak in peaks)}"
    )
