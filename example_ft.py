r"""Generate with a tuned prompt in front, over the ranks of a run.

torchrun --nproc_per_node 4 example_ft.py --ckpt_dir ckpts/7B_fs4 \
    --tuning_ckpt_path saved/alpaca --tokenizer_path ckpts/7B_fs4
"""

from llama import cli
from llama.options import TunedGenerationOptions


def main(flags: TunedGenerationOptions) -> None:
    """Do as example.py does, with the tuned prompt in front of every prompt."""
    # here and not above, so that --help need not wait for torch
    from llama import LLaMA
    from llama.chat import Chat
    from llama.prompts import QUESTIONS, complete, read_requests, report, template_of
    from llama.template import ChatTemplate
    from llama.terminal import talk
    from llama.tuning.adapter import chat_template_beside, load_soft_prompt, warn_of_another_model

    memory = cli.MemoryWatch(interval=0.05)
    requests = read_requests(flags, QUESTIONS)
    generator = LLaMA.build(
        *(flags.ckpt_dir, flags.tokenizer_path, flags.max_seq_len, flags.max_batch_size),
        *(flags.dtype, flags.quantize, flags.offload, flags.tensor_parallel),
    )
    generator.soft_prompt = load_soft_prompt(flags.tuning_ckpt_path, generator.model.args.dim)
    warn_of_another_model(flags.tuning_ckpt_path, generator.model)
    trained_with = None if flags.raw else chat_template_beside(flags.tuning_ckpt_path)
    template = ChatTemplate(trained_with, generator.tokenizer) if trained_with else None
    if flags.chat:
        talk(Chat(generator, template or template_of(generator), flags.system, **flags.sampling()))
    else:
        complete(generator, requests, flags, template)
    report(generator.timing, memory)


if __name__ == "__main__":
    cli.run(main, TunedGenerationOptions)
