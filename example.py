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
    from llama.prompts import print_completions, read_prompts, report, with_special_tokens

    memory = cli.MemoryWatch(interval=0.05)
    prompts = read_prompts(flags.prompts_file)
    generator = LLaMA.build(
        flags.ckpt_dir, flags.tokenizer_path, flags.max_seq_len, flags.max_batch_size, flags.dtype
    )
    given = with_special_tokens(prompts, generator) if flags.special_tokens else prompts
    outputs = generator.generate(
        given, flags.max_gen_len, flags.temperature, flags.top_p, flags.seed
    )
    print_completions(prompts, outputs)
    report(generator.timing, memory)


if __name__ == "__main__":
    cli.run(main, GenerationOptions)
