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
    from llama.prompts import print_completions, read_prompts, report, with_special_tokens
    from llama.tuning.adapter import load_soft_prompt, warn_of_another_model

    memory = cli.MemoryWatch(interval=0.05)
    prompts = read_prompts(flags.prompts_file)
    generator = LLaMA.build(
        flags.ckpt_dir, flags.tokenizer_path, flags.max_seq_len, flags.max_batch_size, flags.dtype
    )
    generator.soft_prompt = load_soft_prompt(flags.tuning_ckpt_path, generator.model.args.dim)
    warn_of_another_model(flags.tuning_ckpt_path, generator.model)
    given = with_special_tokens(prompts, generator) if flags.special_tokens else prompts
    outputs = generator.generate(
        given, flags.max_gen_len, flags.temperature, flags.top_p, flags.seed
    )
    print_completions(prompts, outputs)
    report(generator.timing, memory)


if __name__ == "__main__":
    cli.run(main, TunedGenerationOptions)
