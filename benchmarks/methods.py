"""Test losses, right answers and seconds of ways to tune a prompt, as lines of JSON in a file.

python benchmarks/methods.py --out runs.jsonl --dataset short_answers --methods prompt,residual
python benchmarks/methods.py --out runs.jsonl --methods peft_prompt,peft_p_tuning --hf_dir ckpts/hf
python benchmarks/methods.py --out runs.jsonl --methods "" --picture docs/methods.svg

Runs that the file has already are left out, so that it can be added to. peft_…: what PEFT does
with Hugging Face's model, on the same batches. At the end the file's runs are shown as a table, and
as a picture where one is asked for: of each way mean and spread over its seeds.
"""

import functools
import gc
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from llama import cli

REPO = Path(__file__).parent.parent
WAY = ("dataset", "method", "init", "num_virtual_tokens", "lr", "steps")
NAMES = {"peft_prompt": "PEFT's prompt", "peft_p_tuning": "PEFT's P-tuning"}
HELD_OUT = 47  # rows of a dataset that has no file of its own for tests; always the same ones


def main(
    out: str,
    dataset: str = "appointments",
    methods: str = "prompt,residual,p_tuning",
    inits: str = "rows",
    lrs: str = "1e-2",
    seeds: str = "0",
    lengths: str = "32",
    schedulers: str = "cosine",
    steps: int = 60,
    batch_size: int = 8,
    every: int = 20,
    test_rows: int = 0,
    exact_match: bool = False,
    ckpt_dir: str = str(REPO / "ckpts/SmolLM2-135M-Instruct"),
    hf_dir: str = "",
    picture: str = "",
) -> None:
    """Train each combination and add a line for it to the file; then show them all."""
    if methods:
        train(**{name: value for name, value in locals().items() if name != "picture"})
    ways = by_way(Path(out))
    print_table(ways)
    if picture:
        draw(ways, Path(picture))


def train(
    out: str,
    dataset: str,
    methods: str,
    inits: str,
    lrs: str,
    seeds: str,
    lengths: str,
    schedulers: str,
    steps: int,
    batch_size: int,
    every: int,
    test_rows: int,
    exact_match: bool,
    ckpt_dir: str,
    hf_dir: str,
) -> None:
    """Train each combination that the file does not have, and add a line for it."""
    from llama import parallel

    device = parallel.setup()
    import transformers

    from llama.checkpoint.formats import open_pair
    from llama.generation import LLaMA, load_model
    from llama.tuning.data import split_dataset, tokenize_dataset
    from llama.tuning.evaluate import mean_loss, wrong_answers
    from llama.tuning.options import TuningOptions
    from llama.tuning.templates import question_of

    transformers.logging.set_verbosity_error()
    ckpt, tokenizer = open_pair(ckpt_dir, None, None)
    generator = LLaMA(load_model(ckpt, device), tokenizer, max_batch_size=16)
    generator.model.recompute_ffn = False
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
                method=method.removeprefix("peft_"),
                init=init,
                lr=float(lr),
                num_virtual_tokens=int(length),
                lr_scheduler=scheduler,
                seed=int(seed),
                max_steps=steps,
                batch_size=batch_size,
                save_steps=10**6,
            )
            sizes = options.max_seq_len, options.num_virtual_tokens
            data = tokenize_dataset(options.dataset_path, tokenizer, *sizes)
            train_rows, tested = data.rows, data.rows
            test = REPO / f"datasets/{dataset}_test.json"
            if test.exists():
                tested = tokenize_dataset(test, tokenizer, *sizes).rows
            else:
                train_rows, tested = split_dataset(data.rows, HELD_OUT, 0)
            tested = tested.select(range(test_rows or len(tested)))
            transformers.set_seed(options.seed)
            make = with_peft if method.startswith("peft_") else with_ours
            trainer = make(generator, options, data, train_rows, hf_dir)
            prompts = kept_prompts(every)
            trainer.add_callback(prompts)
            trainer.run(None) if make is with_ours else trainer.train()
        losses = {}
        for step, (seconds, prompt) in prompts.found.items():
            generator.soft_prompt = prompt
            losses[step] = mean_loss(generator, tested, method), seconds
        run["loss"] = {step: round(loss, 4) for step, (loss, _) in losses.items()}
        run["seconds"] = {step: round(seconds, 1) for step, (_, seconds) in losses.items()}
        if exact_match:
            questions = [question_of(row, tokenizer) for row in tested]
            longest = 8 + max(question.n_tokens for question in questions)
            run["wrong"] = len(wrong_answers(generator, questions, longest, method))
            run["asked"] = len(questions)
        print(json.dumps(run), flush=True)
        with file.open("a") as lines:
            lines.write(json.dumps(run) + "\n")
        generator.soft_prompt = None
        del trainer, prompts
        gc.collect()


def by_way(file: Path) -> dict[tuple, list[dict]]:
    """The runs of a file by all but the seed: dataset, method, and so on."""
    ways: dict[tuple, list[dict]] = {}
    for line in file.read_text().splitlines():
        run = json.loads(line)
        key = tuple(run[name] for name in WAY)
        ways.setdefault(key, []).append(run)
    return dict(sorted(ways.items()))


def last(run: dict, name: str) -> float:
    """The loss, or the seconds, at a run's last step."""
    return run[name][str(run["steps"])]


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def print_table(ways: dict[tuple, list[dict]]) -> None:
    """Print a line of Markdown for each way."""
    print("| dataset | method | from | length | rate | steps | seeds | test loss | right |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key, runs in ways.items():
        right = ""
        if all("wrong" in run for run in runs):
            asked = runs[0]["asked"]
            right = f"{spread([asked - run['wrong'] for run in runs], 1)} of {asked}"
        loss = spread([last(run, "loss") for run in runs], 3)
        print("|", *(f"{cell} |" for cell in (*key, len(runs), loss, right)))


def draw(ways: dict[tuple, list[dict]], path: Path) -> None:
    """Draw the test losses of each way with several seeds: a dot a seed, a line at their mean."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"], rcParams["svg.fonttype"] = "llama", "none"  # the same file each time
    rcParams["font.sans-serif"] = ["Helvetica", "Arial", "sans-serif"]
    shown = {key: runs for key, runs in ways.items() if len(runs) > 1}
    datasets = sorted({key[0] for key in shown})
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for panel, dataset in zip(panels, datasets):
        mine = {
            key: [last(run, "loss") for run in shown[key]] for key in shown if key[0] == dataset
        }
        best = sorted(mine, key=lambda key: statistics.mean(mine[key]))
        for place, key in enumerate(best):
            colour = "#c8641e" if key[1].startswith("peft") else "#2b6ca3"
            panel.plot([place] * len(mine[key]), mine[key], "o", color=colour, alpha=0.6)
            mean = statistics.mean(mine[key])
            panel.plot([place - 0.3, place + 0.3], [mean, mean], color=colour)
        names = [f"{NAMES.get(key[1], key[1])}\nfrom {key[2]}" for key in best]
        panel.set_xticks(range(len(best)), names)
        panel.set_title(f"{dataset}.json", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=0 if dataset == "appointments" else None)
    panels[0].set_ylabel("test loss a token")
    figure.savefig(path, metadata={"Date": None})


def with_ours(generator, options, data, train_rows, _):
    """The Trainer of ft_main.py."""
    from llama.tuning.data import first_ids
    from llama.tuning.model import add_soft_prompt
    from llama.tuning.trainer import PromptTrainer

    model = add_soft_prompt(
        *(generator.model, options.num_virtual_tokens),
        *(first_ids(options, generator.tokenizer, train_rows), options.ckpt_dir),
        *(options.method, options.init),
    )
    return PromptTrainer(model, options, data, train_rows, None, generator.tokenizer.pad_id)


def with_peft(generator, options, data, train_rows, hf_dir):
    """A Trainer as PEFT's documentation has it, with the rows in our order."""
    import peft
    import torch
    import transformers

    from llama.tuning.data import LengthGrouped, collate, column
    from llama.tuning.options import ALPACA_PREAMBLE
    from llama.tuning.trainer import training_arguments

    class InOurOrder(transformers.Trainer):
        def _get_train_sampler(self, _=None):
            lengths = column(train_rows, "length")
            return LengthGrouped(lengths, options.batch_size, options.seed)

    base = transformers.AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": options.num_virtual_tokens}
    if options.method == "p_tuning":
        config = peft.PromptEncoderConfig(encoder_hidden_size=base.config.hidden_size, **common)
    else:
        config = peft.PromptTuningConfig(
            prompt_tuning_init=options.init.upper(),
            prompt_tuning_init_text=ALPACA_PREAMBLE,
            tokenizer_name_or_path=hf_dir,
            **common,
        )
    trainer = InOurOrder(
        model=peft.get_peft_model(base, config),
        args=training_arguments(options, len(train_rows), False, generator.device),
        train_dataset=train_rows,
        data_collator=functools.partial(collate, pad_id=generator.tokenizer.pad_id),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def kept_prompts(every: int):
    """Make a callback that keeps the prompt of every so many steps, and the seconds until then."""
    import transformers

    class Kept(transformers.TrainerCallback):
        def __init__(self):
            self.found = {}

        def on_train_begin(self, args, state, control, **_):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, model, **_):
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                seconds = time.perf_counter() - self.began
                prompt = model.get_prompt_embedding_to_save("default").float()
                self.found[state.global_step] = seconds, prompt

    return Kept()


if __name__ == "__main__":
    cli.run(main)
