"""The options of ft_main.py and of evaluate.py: each is a field, and so a flag."""

import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from llama.cli import check_at_least
from llama.options import check_dtype, check_max_seq_len, check_quantize

# How Stanford Alpaca's prompts begin; with --init text what a soft prompt starts from.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
TEMPLATES = ("alpaca", "chat", "none")
METHODS = {"prompt": 3e-2, "p_tuning": 1e-3, "residual": 1e-3}  # and their learning rates
INITS = ("rows", "text", "vocab", "random")
# Where losses can be logged, and the packages of which one is needed for it.
REPORTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
}
SCHEDULES = (  # those of transformers that need no settings of their own
    *("cosine", "linear", "polynomial", "inverse_sqrt", "cosine_with_restarts"),
    *("constant", "constant_with_warmup"),
)


def option(default: object, at_least: int | None = None, must_stay: bool = False) -> Any:
    """Make a field: its default, its smallest value, whether a resumed run must keep it."""
    return dataclasses.field(
        default=default, metadata={"at_least": at_least, "must_stay": must_stay}
    )


def check_fields(options: Any) -> None:
    """Raise ValueError, naming the flag, for a value that option() forbids, and what both share."""
    for field in dataclasses.fields(options):
        value, at_least = getattr(options, field.name), field.metadata.get("at_least")
        if at_least is not None and value is not None:
            check_at_least(at_least, **{field.name: value})
    if options.template not in (None, *TEMPLATES):
        wanted = ", ".join(TEMPLATES)
        raise ValueError(f"--template must be one of {wanted}, not {options.template!r}")
    check_dtype(options.dtype)
    check_quantize(options.quantize)


@dataclass(frozen=True)
class TuningOptions:
    """Train a soft prompt on examples; the model itself, split over the ranks, stays as it is.

    Args:
        ckpt_dir: a folder in Meta's format, best with one shard a rank (see split_model.py), a
            Hugging Face folder, or a .gguf file; the last two are converted while loading.
        dataset_path: JSON, JSON lines, CSV, Parquet, or a folder of datasets.save_to_disk, with the
            columns messages (OpenAI) or conversations (ShareGPT); or instruction, output and
            perhaps input (Alpaca); or prompt and completion; or text.
        output_dir: a new folder for the adapter, its checkpoints, the losses and their picture.
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or the folder it is in; by
            default what ckpt_dir holds.
        template: what rows are put into: alpaca, chat (the tokenizer's own), or none; by default
            alpaca for instructions, chat for conversations, none for all others.
        columns: names in the dataset for those above: question=instruction,answer=output.
        method: what the prompt is computed from while it is trained: residual, itself and a network
            that changes it; p_tuning, a network alone; prompt, itself alone. All give the same
            kind of adapter.
        init: what it starts from: rows, the embeddings of rows that are trained on, as many as its
            length takes; text, those of init_prompt; vocab, those of random tokens; random, random
            vectors.
        init_prompt: for init text, cut or repeated to the prompt's length; by default Alpaca's.
        num_virtual_tokens: length of the prompt.
        num_epochs: passes over the data.
        max_steps: steps to train for, whatever num_epochs says; -1 leaves it to num_epochs.
        batch_size: rows a batch, of each replica of the model.
        gradient_accumulation_steps: batches whose gradients add up to one step.
        lr: highest learning rate; by default 0.03 for prompt, 0.001 for the other methods.
        warmup_steps: steps over which the learning rate rises.
        lr_scheduler: how it falls: cosine, linear, polynomial, inverse_sqrt,
            cosine_with_restarts, or not at all: constant, constant_with_warmup.
        max_seq_len: longest prompt and row together; longer rows are cut: answers at their end,
            conversations at their beginning.
        max_grad_norm: gradients are scaled down to this length; 0 leaves them.
        val_set_size: rows held out for an evaluation loss.
        eval_steps: steps between evaluations.
        patience: evaluations without a better loss after which a run ends; 0 never ends it so.
        save_steps: steps between checkpoints that --resume can go on from.
        logging_steps: steps between logged losses.
        report_to: tensorboard or wandb: also log there, in a folder in output_dir; or none.
        resume: go on from the newest checkpoint in output_dir, which all machines must see, or
            begin if there is none.
        train_on_inputs: learn the instructions too, not the answers alone.
        gradient_checkpointing: compute all activations twice rather than hold them; without it
            those of FFNs, where memory is too short for them.
        seed: of the order of rows, the rows held out and a random start.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
        quantize: int8 or int4: hold the model's matrices in 8 or 4 bits; the prompt is not.
        offload: layers whose weights stay in host memory, and come to the card when needed; what
            they compute is computed twice.
        tensor_parallel: ranks that the model is split over; by default all. With fewer, the ranks
            hold several replicas of it, which share the rows of each batch.
    """

    ckpt_dir: str
    dataset_path: str
    output_dir: str
    tokenizer_path: str | None = None
    template: str | None = None
    columns: str | None = None
    method: str = option("residual", must_stay=True)
    init: str = "rows"
    init_prompt: str | None = None
    num_virtual_tokens: int = option(64, at_least=1, must_stay=True)
    num_epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = option(8, at_least=1, must_stay=True)
    gradient_accumulation_steps: int = option(1, at_least=1, must_stay=True)
    lr: float | None = None
    warmup_steps: int = option(10, at_least=0, must_stay=True)
    lr_scheduler: str = option("cosine", must_stay=True)
    max_seq_len: int = option(256, must_stay=True)
    max_grad_norm: float = option(1.0, at_least=0, must_stay=True)
    val_set_size: int = option(0, must_stay=True)
    eval_steps: int = option(50, at_least=1)
    patience: int = option(0, at_least=0)
    save_steps: int = option(50, at_least=1)
    logging_steps: int = option(10, at_least=1)
    report_to: str = "none"
    resume: bool = False
    train_on_inputs: bool = option(False, must_stay=True)
    gradient_checkpointing: bool = False
    seed: int = option(0, at_least=0, must_stay=True)
    dtype: str | None = None
    quantize: str | None = option(None, must_stay=True)
    offload: int = option(0, at_least=0)
    tensor_parallel: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError, naming the flag, for what a run cannot be trained with."""
        check_fields(self)
        leaves_room = self.num_virtual_tokens < self.max_seq_len
        checks = {
            "method": (self.method in METHODS, f"one of {', '.join(METHODS)}"),
            "lr": (self.lr is None or 0 < self.lr < float("inf"), "above 0"),
            "num_epochs": (0 < self.num_epochs < float("inf"), "above 0"),
            "max_steps": (self.max_steps == -1 or self.max_steps > 0, "at least 1, or -1"),
            "seed": (self.seed < 2**32, "below 2**32"),
            "num_virtual_tokens": (leaves_room, f"below --max_seq_len {self.max_seq_len}"),
            "init": (self.init in INITS, f"one of {', '.join(INITS)}"),
            "init_prompt": (self.init_prompt != "", "a text"),
            "report_to": (self.report_to in REPORTS, f"one of {', '.join(REPORTS)}"),
            "lr_scheduler": (self.lr_scheduler in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        }
        for name, (right, wanted) in checks.items():
            if not right:
                raise ValueError(f"--{name} must be {wanted}, not {getattr(self, name)!r}")
        if self.init_prompt and self.init != "text":
            raise ValueError("--init_prompt goes with --init text: give that too")
        if self.patience and not self.val_set_size:
            raise ValueError("--patience goes with --val_set_size: rows to evaluate the loss on")

    def check_packages(self) -> None:
        """Raise ValueError, with the command that mends it, if what report_to needs is missing."""
        needed = REPORTS[self.report_to]
        if needed and not any(map(find_spec, needed)):
            raise ValueError(
                f"--report_to {self.report_to}: the package is not installed: pip install "
                f"{needed[0]}"
            )

    @property
    def highest_lr(self) -> float:
        """The highest learning rate: the one that is given, or the method's."""
        return METHODS[self.method] if self.lr is None else self.lr

    def must_stay(self) -> dict:
        """The options without which a resumed run would not go on with what it began."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata.get("must_stay")]
        return {name: getattr(self, name) for name in names} | {"lr": self.highest_lr}


@dataclass(frozen=True)
class EvaluationOptions:
    """Compare tuned prompts with the model alone, on a dataset, over all ranks of this run.

    A table goes to stdout, with a line for each: the loss of a learned token, the perplexity, and
    how many answers, always of the likeliest tokens, are exactly those of the dataset.

    Args:
        ckpt_dir: a folder in Meta's format, best with one shard a rank (see split_model.py), a
            Hugging Face folder, or a .gguf file; the last two are converted while loading.
        dataset_path: what ft_main.py takes; with its template, columns and max_seq_len, the rows
            and their loss are those of training.
        tokenizer_path: the model's tokenizer.model or tokenizer.json, or the folder it is in; by
            default what ckpt_dir holds.
        tuning_ckpt_paths: what ft_main.py or PEFT saved, with commas between them.
        base: evaluate the model alone, too.
        template: what rows are put into: alpaca, chat (the tokenizer's own), or none; by default
            alpaca for instructions, chat for conversations, none for all others.
        columns: names in the dataset for those that ft_main.py knows, as in
            question=instruction,answer=output.
        max_seq_len: longest row together with the longest of the prompts; longer rows are cut or
            left out.
        val_set_size: take those rows alone that ft_main.py held out with this, and with this seed.
        seed: of ft_main.py, for val_set_size.
        n_rows: take so many rows at most; by default all.
        batch_size: rows at once.
        exact_match: let the model write answers; False leaves that out, as for long answers.
        max_gen_len: the most tokens of an answer; by default a few more than the longest one of
            the rows has, up to 256.
        json: print one JSON object a line in place of the table, with the wrong answers.
        dtype: float32, bfloat16 or float16; by default what the checkpoint holds.
        quantize: int8 or int4: hold the model's matrices in 8 or 4 bits.
        offload: layers whose weights stay in host memory, and come to the card when needed.
    """

    ckpt_dir: str
    dataset_path: str
    tokenizer_path: str | None = None
    tuning_ckpt_paths: str = ""
    base: bool = True
    template: str | None = None
    columns: str | None = None
    max_seq_len: int = TuningOptions.max_seq_len
    val_set_size: int = option(0, at_least=0)
    seed: int = TuningOptions.seed
    n_rows: int | None = option(None, at_least=1)
    batch_size: int = option(TuningOptions.batch_size, at_least=1)
    exact_match: bool = True
    max_gen_len: int | None = option(None, at_least=1)
    json: bool = False
    dtype: str | None = None
    quantize: str | None = None
    offload: int = option(0, at_least=0)

    def __post_init__(self) -> None:
        """Raise ValueError, naming the flag, for what makes no sense."""
        check_fields(self)
        check_max_seq_len(self.max_seq_len)
        if not (self.base or self.adapters()):
            raise ValueError("--base False leaves nothing to evaluate: give --tuning_ckpt_paths")

    def adapters(self) -> list[str]:
        """The paths of the tuned prompts, each once."""
        paths = [path.strip() for path in self.tuning_ckpt_paths.split(",")]
        return list(dict.fromkeys(path for path in paths if path))
