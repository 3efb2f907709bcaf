import pytest
from table import COSTS, SIDES, UNITS, WANTED, Record, Results, plot, worse_than_linear

FASTER = {"llama": (29.0, 30.0, 90.0), "llama.cpp": (60.0,), "transformers": (10.0,)}
MODEL = "SmolLM2-135M-Instruct"


def results_of(measure="decode_b1", dtype="float32", ranks=1, **others):
    sides = FASTER | {"bare": (36.0,)} | others
    return Results([Record(MODEL, ranks, dtype, measure, side, x) for side, x in sides.items()])


def test_a_ratio_is_of_medians_and_above_one_where_llama_is_better():
    speed, memory = results_of(), results_of("peak")
    assert speed.ratio(MODEL, 1, "float32", "decode_b1", "llama.cpp") == 0.5
    assert speed.ratio(MODEL, 1, "float32", "decode_b1", "transformers") == 3
    assert speed.ratio(MODEL, 1, "float32", "decode_b1", "bare") == 1.2  # a step is so much longer
    assert memory.ratio(MODEL, 1, "float32", "peak", "llama.cpp") == 2
    assert speed.ratio(MODEL, 1, "int8", "decode_b1", "llama.cpp") is None


def test_a_row_says_what_is_wanted_and_whether_it_is_so():
    (row,) = results_of().rows(MODEL, 1)
    assert row[:4] == ["decode_b1, tokens/s", "float32", "30", "60 (0.50)"]
    assert row[6] == "≥ 1 llama.cpp; ≥ 1.8 transformers; ≤ 1.12 bare"
    assert row[7] == "0.50 no; 3.00 yes; 1.20 no"
    (row,) = results_of(ranks=2).rows(MODEL, 2)  # of which nothing is wanted
    assert row[6:] == ["", ""]


def test_half_precision_and_batches_are_compared_with_llama_itself():
    records = [
        Record(MODEL, 1, "float32", "prefill", "llama", (500.0,)),
        Record(MODEL, 1, "bfloat16", "prefill", "llama", (400.0,)),
        Record(MODEL, 1, "float32", "decode_b1", "llama", (10.0,)),
        Record(MODEL, 1, "float32", "decode_b8", "llama", (40.0,)),
    ]
    results = Results(records)
    assert results.verdicts(MODEL, 1, "bfloat16", "prefill") == [("≥ 0.7 float32", "0.80 yes")]
    assert results.verdicts(MODEL, 1, "float32", "decode_b8") == [("≥ 5 b1", "4.00 no")]


@pytest.mark.parametrize(("last", "found"), [(0.03, []), (0.05, [2])])
def test_a_step_that_grows_more_than_its_size_is_named(last, found):
    assert worse_than_linear([(1, 0.01), (2, 0.02), (4, last)]) == found


def test_the_text_has_every_table_and_the_plot_is_drawn(tmp_path):
    curve = [Record(MODEL, 1, "int8", "batch", "llama", (x / 100,), x) for x in (1, 2, 4)]
    results = Results([*results_of().records, *curve])
    text = results.text()
    assert f"{MODEL}, 1 rank\n" in text
    assert "batch, int8: no step worse than linear" in text
    assert "| ms a step     | 10.0 | 20.0 | 40.0 |" in text
    plot(results, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wanted_is_asked_of_something_that_is_measured():
    for wanted in WANTED:
        assert wanted.measure in UNITS
        assert wanted.measure not in COSTS
        assert wanted.against in (*SIDES, "b1", "float32")
