"""The options of prompt tuning: what makes no sense is refused by its flag's name."""

import dataclasses

import pytest

from llama.tuning.options import TuningOptions

NEEDED = {"ckpt_dir": "c", "tokenizer_path": "t", "dataset_path": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_virtual_tokens", 96, "below --max_seq_len 96"),
        ("num_virtual_tokens", 0, "at least 1"),
        ("num_epochs", 0.0, "above 0"),
        ("num_epochs", float("nan"), "above 0"),
        ("max_steps", 0, "at least 1, or -1"),
        ("batch_size", 0, "at least 1"),
        ("gradient_accumulation_steps", -1, "at least 1"),
        ("lr", -1.0, "above 0"),
        ("lr", float("inf"), "above 0"),
        ("lr_scheduler", "wavy", "one of cosine, linear"),
        ("warmup_steps", -1, "at least 0"),
        ("max_grad_norm", -1.0, "at least 0"),
        ("eval_steps", 0, "at least 1"),
        ("save_steps", 0, "at least 1"),
        ("logging_steps", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "below"),
        ("dtype", "int8", "one of float32, bfloat16, float16, not 'int8'"),
    ],
)
def test_options_that_train_nothing_are_named(name, value, message):
    good = TuningOptions(**NEEDED, max_seq_len=96)
    with pytest.raises(ValueError, match=rf"--{name}\b.*{message}"):
        dataclasses.replace(good, **{name: value})


def test_what_a_resumed_run_must_keep_is_known():
    kept = TuningOptions(**NEEDED, lr=0.5).must_stay()
    assert kept == {
        **{"batch_size": 8, "gradient_accumulation_steps": 1, "lr": 0.5, "warmup_steps": 10},
        **{"lr_scheduler": "cosine", "max_seq_len": 256, "val_set_size": 0},
        **{"train_on_inputs": False, "seed": 0, "num_virtual_tokens": 32},
    }


def test_every_option_has_a_line_of_help():
    for field in dataclasses.fields(TuningOptions):
        assert f"\n        {field.name}: " in TuningOptions.__doc__
