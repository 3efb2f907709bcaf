r"""Generate with a model split over the ranks of a run.

torchrun --nproc_per_node 4 example.py --ckpt_dir ckpts/7B_fs4 \
    --tokenizer_path ckpts/7B_fs4
"""

from llama import cli
from llama.options import GenerationOptions


def main(flags: GenerationOptions) -> None:
    """Build a generator on every rank, let it continue the prompts, and print what comes out."""
    # here and not above, so that --help need not wait for torch
    from llama import LLaMA
    from llama.chat import Chat
    from llama.prompts import complete, read_requests, report, template_of
    from llama.terminal import talk

    memory = cli.MemoryWatch(interval=0.05)
    requests = read_requests(flags)
    generator = LLaMA.build(
        *(flags.ckpt_dir, flags.tokenizer_path, flags.max_seq_len, flags.max_batch_size),
        *(flags.dtype, flags.quantize, flags.offload, flags.tensor_parallel),
    )
    if flags.chat:
        talk(Chat(generator, template_of(generator), flags.system, **flags.sampling()))
    else:
        complete(generator, requests, flags)
    report(generator.timing, memory)


if __name__ == "__main__":
    cli.run(main, GenerationOptions)
