"""Losses of ways to tune a prompt, each from several seeds, as lines of JSON.

python benchmarks/methods.py --out /tmp/methods.jsonl --dataset dates --methods prompt,residual \
    --lrs 1e-2,1e-3 --seeds 0,1

Runs that the file has already are left out, so that it can be added to.
"""

import gc
import itertools
import json
import tempfile
import time
from pathlib import Path

from llama import cli

REPO = Path(__file__).parent.parent
CKPT_DIR = REPO / "ckpts/SmolLM2-135M-Instruct"
# Of short_answers some rows are held out, always the same; dates has a file of its own for that.
DATASETS = {"dates": "dates_test.json", "short_answers": None}
HELD_OUT = 47


def main(
    out: str,
    dataset: str = "dates",
    methods: str = "prompt,residual,p_tuning",
    inits: str = "text",
    lrs: str = "1e-2",
    seeds: str = "0",
    lengths: str = "32",
    schedulers: str = "cosine",
    steps: int = 60,
    batch_size: int = 8,
    eval_steps: int = 20,
    test_rows: int = 0,
    ckpt_dir: str = str(CKPT_DIR),
) -> None:
    """Train each combination and add a line for it to the file."""
    from llama import parallel

    device = parallel.setup()
    import transformers

    from llama.checkpoint.formats import open_pair
    from llama.generation import load_model
    from llama.tuning.data import split_dataset, tokenize_dataset
    from llama.tuning.model import add_soft_prompt, soft_prompt_of
    from llama.tuning.options import TuningOptions
    from llama.tuning.trainer import PromptTrainer

    transformers.logging.set_verbosity_error()
    ckpt, tokenizer = open_pair(ckpt_dir, None, None)
    transformer = load_model(ckpt, device)
    transformer.recompute_ffn = False
    file = Path(out)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    axes = [axis.split(",") for axis in (methods, inits, lrs, lengths, schedulers, seeds)]
    for method, init, lr, length, scheduler, seed in itertools.product(*axes):
        run = {
            **{"dataset": dataset, "method": method, "init": init, "lr": float(lr)},
            **{"num_virtual_tokens": int(length), "lr_scheduler": scheduler, "seed": int(seed)},
            **{"steps": steps, "batch_size": batch_size, "test_rows": test_rows},
        }
        if any(run.items() <= line.items() for line in done):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = TuningOptions(
                ckpt_dir=ckpt_dir,
                dataset_path=str(REPO / f"datasets/{dataset}.json"),
                output_dir=folder,
                method=method,
                init=init,
                lr=float(lr),
                num_virtual_tokens=int(length),
                lr_scheduler=scheduler,
                seed=int(seed),
                max_steps=steps,
                batch_size=batch_size,
                eval_steps=eval_steps,
                save_steps=10**6,
            )

            def rows_of(path: Path, options: TuningOptions = options):
                sizes = options.max_seq_len, options.num_virtual_tokens
                return tokenize_dataset(path, tokenizer, *sizes)

            data = rows_of(Path(options.dataset_path))
            if (test := DATASETS[dataset]) is not None:
                train_rows, tested = data.rows, rows_of(REPO / "datasets" / test).rows
            else:
                train_rows, tested = split_dataset(data.rows, HELD_OUT, 0)
            n_tested = test_rows or len(tested)
            transformers.set_seed(options.seed)
            init_ids = tokenizer.encode(options.init_prompt, bos=False)
            model = add_soft_prompt(transformer, int(length), init_ids, ckpt_dir, method, init)
            tested = tested.select(range(n_tested))
            trainer = PromptTrainer(model, options, data, train_rows, tested, tokenizer.pad_id)
            began = time.perf_counter()
            trainer.run(None)
            run["seconds"] = round(time.perf_counter() - began, 1)
            history = trainer.state.log_history
            run["eval_loss"] = {
                row["step"]: row["eval_loss"] for row in history if "eval_loss" in row
            }
            run["norm"] = soft_prompt_of(model).norm(dim=1).mean().item()
        print(json.dumps(run), flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
        del model, trainer
        gc.collect()


if __name__ == "__main__":
    cli.run(main)
