r"""Prompt tuning of a model split over the ranks of a run.

torchrun --nproc_per_node 4 ft_main.py --ckpt_dir ckpts/7B_fs4 \
    --tokenizer_path ckpts/7B_fs4 --dataset_path datasets/short_answers.json \
    --output_dir saved/alpaca

python ft_main.py --help shows all options.
"""

import contextlib
from pathlib import Path

from llama import cli
from llama.tuning.options import TuningOptions


def main(flags: TuningOptions) -> None:
    """Train a soft prompt and save it as a PEFT adapter, in a folder that no other run uses."""
    # here and not above, so that --help need not wait for torch
    from llama import parallel
    from llama.files import reserved

    out = Path(flags.output_dir)
    with reserved(out) if parallel.rank() == 0 else contextlib.nullcontext():
        tune(flags, out)


def tune(flags: TuningOptions, out: Path) -> None:
    """Load model and rows, train, save."""
    from llama import parallel

    memory = cli.MemoryWatch(interval=0.05)
    if parallel.rank() == 0:
        flags.check_packages()
    device = parallel.setup(flags.tensor_parallel)  # before libraries that ask for cards
    import torch
    import transformers

    from llama.checkpoint.formats import open_pair
    from llama.checkpoint.weights import parse_dtype
    from llama.generation import LLaMA, load_model
    from llama.memory import check_tuning
    from llama.plan import Plan
    from llama.tuning.data import column, init_ids, split_dataset, tokenize_dataset
    from llama.tuning.methods import network_size
    from llama.tuning.model import add_soft_prompt
    from llama.tuning.run_folder import where_to_begin
    from llama.tuning.samples import LONGEST_SAMPLE, Samples
    from llama.tuning.trainer import PromptTrainer

    checkpoint = where_to_begin(out, flags.resume)
    ckpt, tokenizer = open_pair(flags.ckpt_dir, flags.tokenizer_path, flags.quantize)
    data = tokenize_dataset(
        flags.dataset_path,
        tokenizer,
        flags.max_seq_len,
        flags.num_virtual_tokens,
        template=flags.template,
        columns=flags.columns,
        train_on_inputs=flags.train_on_inputs,
    )
    train_rows, eval_rows = split_dataset(data.rows, flags.val_set_size, flags.seed)

    dtype = parse_dtype(flags.dtype)
    plan = Plan(
        ckpt,
        parallel.model_size(),
        dtype or ckpt.dtype,
        flags.batch_size,
        flags.max_seq_len,
        device,
        ckpt.quantize,
        flags.offload,
        tuning=True,
        gradient_checkpointing=flags.gradient_checkpointing,
        num_virtual_tokens=flags.num_virtual_tokens,
        network=network_size(flags.method, ckpt.args.dim),
    )
    lengths, n_learned = column(train_rows, "length"), column(train_rows, "n_learned")
    recompute_ffn = check_tuning(plan, lengths, n_learned)
    transformer = load_model(ckpt, device, dtype, flags.offload)
    transformer.recompute_ffn = recompute_ffn
    transformer.gradient_checkpointing = flags.gradient_checkpointing
    parallel.hide_ranks()
    transformers.logging.set_verbosity_error()  # it warns of hidden ranks
    transformers.set_seed(flags.seed)
    model = add_soft_prompt(
        transformer,
        flags.num_virtual_tokens,
        init_ids(flags, tokenizer, train_rows),
        flags.ckpt_dir,
        flags.method,
        flags.init,
    )

    def answer(prompts: list[list[int]], prompt: torch.Tensor) -> list[str]:
        bsz = flags.batch_size  # no more at once than in training, so that memory suffices
        llama = LLaMA(transformer, tokenizer, flags.max_seq_len, bsz, prompt, ckpt=ckpt)
        return [x.text for x in llama.generate(prompts, LONGEST_SAMPLE, temperature=0)]

    samples = Samples(eval_rows, tokenizer, answer) if eval_rows is not None else None
    trainer = PromptTrainer(model, flags, data, train_rows, eval_rows, tokenizer.pad_id, samples)
    trainer.run(checkpoint)
    ckpt.check_unchanged()
    trainer.save(out)
    cli.say(f"{trainer.progress.summary()}; {parallel.memory_peaks(memory.peak)}")
    if parallel.rank() == 0:
        given = f" --tokenizer_path {flags.tokenizer_path}" if flags.tokenizer_path else ""
        print(
            f"{out}: generate with it: torchrun --nproc_per_node {parallel.model_size()} "
            f"example_ft.py --ckpt_dir {flags.ckpt_dir}{given} --tuning_ckpt_path {out}"
        )


if __name__ == "__main__":
    cli.run(main, TuningOptions)
