"""The options of the scripts: what makes no sense is refused by its flag's name."""

import dataclasses
import inspect

import pytest

from llama.options import GenerationOptions, TunedGenerationOptions
from llama.tuning.options import EvaluationOptions, TuningOptions

NEEDED = {"ckpt_dir": "c", "tokenizer_path": "t"}
GENERATION = GenerationOptions(**NEEDED)
CHAT = GenerationOptions(**NEEDED, chat=True)
TUNED = TunedGenerationOptions(**NEEDED, tuning_ckpt_path="p")
TUNING = TuningOptions(**NEEDED, dataset_path="d", output_dir="o", max_seq_len=96)
BAD = [
    (TUNING, "num_virtual_tokens", 96, "below --max_seq_len 96"),
    (TUNING, "num_virtual_tokens", 0, "at least 1"),
    (TUNING, "num_epochs", 0.0, "above 0"),
    (TUNING, "num_epochs", float("nan"), "above 0"),
    (TUNING, "max_steps", 0, "at least 1, or -1"),
    (TUNING, "batch_size", 0, "at least 1"),
    (TUNING, "gradient_accumulation_steps", -1, "at least 1"),
    (TUNING, "lr", -1.0, "above 0"),
    (TUNING, "lr", float("inf"), "above 0"),
    (TUNING, "lr_scheduler", "wavy", "one of cosine, linear"),
    (TUNING, "template", "vicuna", "one of alpaca, chat, none, not 'vicuna'"),
    (TUNING, "warmup_steps", -1, "at least 0"),
    (TUNING, "max_grad_norm", -1.0, "at least 0"),
    (TUNING, "eval_steps", 0, "at least 1"),
    (TUNING, "save_steps", 0, "at least 1"),
    (TUNING, "patience", -1, "at least 0"),
    (TUNING, "patience", 3, "goes with --val_set_size"),
    (TUNING, "init_prompt", "Hi", "goes with --init text: give that too"),
    (TUNING, "init_prompt", "", "a text"),
    (TUNING, "report_to", "all", "one of none, tensorboard, wandb, not 'all'"),
    (TUNING, "logging_steps", 0, "at least 1"),
    (TUNING, "seed", -1, "at least 0"),
    (TUNING, "seed", 2**32, "below"),
    (TUNING, "dtype", "int8", "one of float32, bfloat16, float16, not 'int8'"),
    (GENERATION, "max_gen_len", 0, "at least 1"),
    (GENERATION, "temperature", -1, "0 .greedy. or more"),
    (GENERATION, "temperature", float("inf"), "0 .greedy. or more"),
    (GENERATION, "top_p", 0, "above 0"),
    (GENERATION, "seed", -1, "from 0"),
    (GENERATION, "seed", 2**32, "from 0"),  # torch on a CPU would take it for 0
    (GENERATION, "top_k", -1, "at least 0"),
    (GENERATION, "min_p", 1.5, "from 0 to 1"),
    (GENERATION, "repetition_penalty", -1.0, "from 0.01 to 100"),
    (GENERATION, "repetition_penalty", 1e-300, "from 0.01 to 100"),
    (GENERATION, "stop", [""], "at least one character"),
    (GENERATION, "stop", "text", "at least one character"),
    (GENERATION, "n", 0, "at least 1"),
    (GENERATION, "top_k", 2.5, "whole number"),
    (GENERATION, "stop", [5], "at least one character"),
    (GENERATION, "logprobs", -1, "at least 0"),
    (GENERATION, "logprobs", 1, "go with --json"),
    (GENERATION, "system", "x", "goes with --chat or --instruct"),
    (CHAT, "n", 2, "does not go with --chat"),
    (CHAT, "json", True, "does not go with --chat"),
    (CHAT, "prompt", "x", "and --chat: give one of them"),
    (GENERATION, "max_seq_len", 0, "from 1"),
    (GENERATION, "max_seq_len", 10**20, "from 1"),
    (GENERATION, "max_gen_len", 10**20, "no endless one"),
    (GENERATION, "max_batch_size", 0, "at least 1"),
    (GENERATION, "dtype", "int3", "one of float32, bfloat16, float16"),
    (TUNED, "tuning_ckpt_path", None, "is needed, but where each row of --prompts_file"),
]


@pytest.mark.parametrize(("good", "name", "value", "message"), BAD)
def test_options_that_make_no_sense_are_named(good, name, value, message):
    with pytest.raises(ValueError, match=rf"--{name}\b.*{message}"):
        dataclasses.replace(good, **{name: value})


def test_what_a_resumed_run_must_keep_is_known():
    kept = dataclasses.replace(TUNING, lr=0.5).must_stay()
    assert kept == {
        **{"batch_size": 8, "gradient_accumulation_steps": 1, "lr": 0.5, "warmup_steps": 10},
        **{"lr_scheduler": "cosine", "max_seq_len": 96, "val_set_size": 0, "max_grad_norm": 1.0},
        **{"train_on_inputs": False, "seed": 0, "num_virtual_tokens": 64, "method": "residual"},
        "quantize": None,
    }


@pytest.mark.parametrize("options", [TuningOptions, EvaluationOptions, TunedGenerationOptions])
def test_every_option_has_a_line_of_help(options):
    for field in dataclasses.fields(options):
        assert f"\n    {field.name}: " in inspect.getdoc(options)
