"""The folder of a run: where a run begins in it, and what is told of a checkpoint of another."""

import json

import pytest

from llama.tuning.run_folder import best_of, check_same_run, where_to_begin, write_run


def fill(folder, *names):
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the user")
    return folder


LEFT_OVER = ["samples.jsonl", "runs/events", "checkpoint-3/run.json", "notes.txt"]


def test_a_job_may_always_resume_and_begins_anew_where_no_checkpoint_is_whole(tmp_path, capfd):
    folder = fill(tmp_path / "out", *LEFT_OVER)
    for out in (folder, tmp_path / "none"):
        assert where_to_begin(out, resume=True) is None
        assert f"{out}: no whole checkpoint to go on from: begins anew\n" in capfd.readouterr().err
    write_run(fill(folder / "checkpoint-2", "trained.safetensors"), 2, {})
    assert where_to_begin(folder, resume=True) == folder / "checkpoint-2"
    assert "begins anew" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "README.md", "trainer_state.json"])
def test_what_another_run_has_finished_is_not_written_over_with_resume_either(tmp_path, name):
    folder = fill(tmp_path / "out", name, *LEFT_OVER)
    with pytest.raises(ValueError, match=f"out: in use: holds {name}; choose another folder; it"):
        where_to_begin(folder, resume=True)
    with pytest.raises(ValueError, match=r"checkpoint-3, .*samples.jsonl.*, or --resume a run in"):
        where_to_begin(folder, resume=False)


def test_what_a_checkpoint_was_begun_with_is_named_and_a_consequence_is_not(tmp_path):
    folder = fill(tmp_path / "checkpoint-1")
    facts = {"dim": 64, "dtype": "f", "norms_sha256": "1", "lr": 0.1, "quantize": None}
    facts |= {"dataset_sha256": "2", "tokens_sha256": "3"}
    before = facts | {"template": "none"}  # which was a fact once
    del before["quantize"]  # which was left out once where it was None
    write_run(folder, 1, before)
    check_same_run(folder, facts, {"lr": 0.1})

    def named(**changes):
        with pytest.raises(ValueError, match=r"checkpoint-1: begun with other settings: ") as error:
            check_same_run(folder, facts | changes, {"lr": 0.1, "quantize": None})
        return str(error.value).split("settings: ")[1].split(". Give")[0]

    assert named(lr=0.2, dim=32) == "dim 64, not 32; --lr 0.1, not 0.2"
    assert named(dtype="g", norms_sha256="9") == "dtype f, not g"
    assert named(norms_sha256="9") == "the model's weights"
    assert named(dataset_sha256="9", tokens_sha256="9") == "the dataset"
    assert named(tokens_sha256="9").startswith("the tokens of its rows (--template, --columns")
    assert named(quantize="int8") == "--quantize None, not int8"


def test_the_best_evaluation_is_the_first_with_the_lowest_loss_and_never_nan():
    losses = [float("nan"), 3.0, 2.0, 2.0, float("inf")]
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    assert best_of([{"step": 9, "loss": 1.0}, *history])["step"] == 2
    assert best_of(history[:1]) is None
    assert best_of(json.loads("[]")) is None
