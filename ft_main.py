r"""Prompt tuning of a model split over the ranks of a run.

torchrun --nproc_per_node 4 ft_main.py --ckpt_dir ckpts/7B_fs4 \
    --tokenizer_path ckpts/tokenizer.model --dataset_path datasets/alpaca_data.json \
    --output_dir saved/alpaca
"""

from hashlib import sha256
from pathlib import Path

import transformers

from llama import parallel
from llama.checkpoint import parse_dtype
from llama.data import ALPACA_PREAMBLE, Collator, split_dataset, tokenize_dataset
from llama.generation import load_model, open_pair
from llama.prompt_tuning import (
    MUST_STAY,
    PromptTrainer,
    add_soft_prompt,
    check_options,
    check_unused,
    newest_checkpoint,
    plot_losses,
    save_adapter,
    steps_of,
)


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    dataset_path: str,
    output_dir: str,
    init_prompt: str = ALPACA_PREAMBLE,
    num_virtual_tokens: int = 32,
    num_epochs: float = 3.0,
    max_steps: int = -1,
    batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    lr: float = 1e-2,
    warmup_steps: int = 10,
    lr_scheduler: str = "cosine",
    max_seq_len: int = 256,
    max_grad_norm: float = 1.0,
    val_set_size: int = 0,
    eval_steps: int = 50,
    save_steps: int = 50,
    logging_steps: int = 10,
    resume: bool = False,
    train_on_inputs: bool = False,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    dtype: str | None = None,
) -> None:
    """Train a soft prompt on instructions; the model itself, split over the ranks, stays as it is.

    Args:
        ckpt_dir: folder with params.json and shards, best one a rank (see split_model.py).
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or the folder it is in.
        dataset_path: JSON or JSON lines: instruction, output, and perhaps input.
        output_dir: a new folder for the adapter, its checkpoints, the losses and their picture.
        init_prompt: text whose embeddings the prompt starts from; "" starts at random ones.
        num_virtual_tokens: length of the prompt.
        num_epochs: passes over the data.
        max_steps: steps to train for, whatever num_epochs says; -1 leaves it to num_epochs.
        batch_size: rows a step, the same ones on every rank.
        gradient_accumulation_steps: batches whose gradients add up to one step.
        lr: highest learning rate.
        warmup_steps: steps over which the learning rate rises.
        lr_scheduler: how it falls: cosine, linear, polynomial, inverse_sqrt,
            cosine_with_restarts, or not at all: constant, constant_with_warmup.
        max_seq_len: longest prompt, instruction and answer together; longer rows are cut.
        max_grad_norm: gradients are scaled down to this length; 0 leaves them.
        val_set_size: rows held out for an evaluation loss.
        eval_steps: steps between evaluations.
        save_steps: steps between checkpoints that --resume can go on from.
        logging_steps: steps between logged losses.
        resume: go on from the newest checkpoint in output_dir, which all machines must see.
        train_on_inputs: learn the instructions too, not the answers alone.
        gradient_checkpointing: compute activations twice rather than hold them.
        seed: of the order of rows, the rows held out and a random start.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
    """
    options = {
        "num_virtual_tokens": num_virtual_tokens,
        "num_epochs": num_epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "lr_scheduler": lr_scheduler,
        "max_seq_len": max_seq_len,
        "max_grad_norm": max_grad_norm,
        "val_set_size": val_set_size,
        "eval_steps": eval_steps,
        "save_steps": save_steps,
        "logging_steps": logging_steps,
        "train_on_inputs": train_on_inputs,
        "seed": seed,
    }
    check_options(options)
    wanted = parse_dtype(dtype)
    out = Path(output_dir)
    checkpoint = newest_checkpoint(out) if resume else check_unused(out)
    device = parallel.setup()
    ckpt, tokenizer = open_pair(ckpt_dir, tokenizer_path)
    with parallel.rank_0_first():
        rows = tokenize_dataset(
            dataset_path,
            tokenizer,
            max_seq_len - num_virtual_tokens,
            train_on_inputs=train_on_inputs,
            cache_dir=out / "tokenized",
        )
    train_rows, eval_rows = split_dataset(rows, val_set_size, seed)
    steps = steps_of(len(train_rows), batch_size, gradient_accumulation_steps, num_epochs)
    transformer = load_model(ckpt, device, wanted)
    transformer.gradient_checkpointing = gradient_checkpointing
    parallel.stand_alone()
    transformers.logging.set_verbosity_error()  # it warns of what stand_alone does
    arguments = transformers.TrainingArguments(
        output_dir=output_dir,
        max_steps=max_steps if max_steps > 0 else steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=lr,
        warmup_steps=warmup_steps,
        lr_scheduler_type=lr_scheduler,
        max_grad_norm=max_grad_norm,
        eval_strategy="steps" if eval_rows is not None else "no",
        eval_on_start=eval_rows is not None,  # the loss before tuning, to compare with
        eval_steps=eval_steps,
        save_steps=save_steps,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        seed=seed,
        use_cpu=device.type == "cpu",
        prediction_loss_only=True,
        report_to="none",
    )
    transformers.set_seed(seed)
    init_ids = tokenizer.encode(init_prompt, bos=False) if init_prompt else None
    model = add_soft_prompt(transformer, num_virtual_tokens, init_ids, ckpt_dir)
    trainer = PromptTrainer(
        model=model,
        args=arguments,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=Collator(tokenizer.pad_id),
        must_stay={name: options[name] for name in MUST_STAY}
        | {
            "dataset_sha256": sha256(Path(dataset_path).read_bytes()).hexdigest(),
            "dtype": str(transformer.norm.weight.dtype),
        },
    )
    trainer.run(checkpoint)
    if parallel.rank() == 0:
        save_adapter(model, out)
        trainer.save_state()
        plot_losses(trainer.state.log_history, out / "loss.png")
        print(f"{out}: generate with it: torchrun --nproc_per_node {parallel.world_size()} "
              f"example_ft.py --ckpt_dir {ckpt_dir} --tokenizer_path {tokenizer_path} "
              f"--tuning_ckpt_path {out}")  # fmt: skip


if __name__ == "__main__":
    parallel.run(main)
