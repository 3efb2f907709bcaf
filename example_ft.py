r"""Generate with tuned prompts in front, over the ranks of a run.

torchrun --nproc_per_node 4 example_ft.py --ckpt_dir ckpts/7B_fs4 \
    --tuning_ckpt_path saved/alpaca --tokenizer_path ckpts/7B_fs4
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llama import cli
from llama.options import TunedGenerationOptions

if TYPE_CHECKING:
    from torch import Tensor

    from llama.prompts import Request


def main(flags: TunedGenerationOptions) -> None:
    """Do as example.py does, with a tuned prompt in front of each prompt."""
    # here and not above, so that --help need not wait for torch
    from llama import LLaMA, parallel
    from llama.chat import Chat
    from llama.prompts import QUESTIONS, complete, read_requests, report, template_of
    from llama.template import ChatTemplate
    from llama.terminal import talk
    from llama.tuning.adapter import warn_of_another_model

    memory = cli.MemoryWatch(interval=0.05)
    requests = read_requests(flags, QUESTIONS)
    parallel.setup(flags.tensor_parallel)  # so that of ranks that fail one speaks
    adapters = load_adapters(flags, requests)
    generator = LLaMA.build(
        *(flags.ckpt_dir, flags.tokenizer_path, flags.max_seq_len, flags.max_batch_size),
        *(flags.dtype, flags.quantize, flags.offload, flags.tensor_parallel),
    )
    templates = {}
    for path, (_, trained_with) in adapters.items():
        warn_of_another_model(path, generator.model)
        if trained_with:
            templates[path] = ChatTemplate(trained_with, generator.tokenizer)
    if flags.chat:
        [path] = adapters
        generator.soft_prompt = adapters[path][0]
        template = templates.get(path) or template_of(generator)
        talk(Chat(generator, template, flags.system, **flags.sampling()))
    else:
        for request in requests:
            if request.adapter:
                request.soft_prompt = adapters[request.adapter][0]
                request.template = templates.get(request.adapter)
        complete(generator, requests, flags)
    report(generator.timing, memory)


def load_adapters(
    flags: TunedGenerationOptions, requests: "list[Request]"
) -> "dict[Path, tuple[Tensor, str | None]]":
    """Load the tuned prompts that are named, each with the template that it was trained with.

    The template is None where none lies beside it, and with --raw. Raises FileNotFoundError or
    ValueError, with the file and line of what names it.
    """
    from llama.checkpoint.formats import open_any
    from llama.tuning.adapter import chat_template_beside, load_soft_prompt

    default = flags.tuning_ckpt_path
    named = {} if default is None else {Path(default): ""}
    for request in requests:
        if request.adapter:
            named.setdefault(request.adapter, f"{request.where}: ")
    found, dim = {}, open_any(flags.ckpt_dir).args.dim
    for path, where in named.items():
        try:
            soft_prompt = load_soft_prompt(path, dim)
            found[path] = soft_prompt, None if flags.raw else chat_template_beside(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{where}{error}") from None
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
    return found


if __name__ == "__main__":
    cli.run(main, TunedGenerationOptions)
