"""What bench.py measured: ratios, what they are wanted to be, the table and the plot."""

import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path

UNITS = {  # of each measure, in the table's order
    "decode_b1": "tokens/s",
    "decode_b8": "tokens/s",
    "prefill": "tokens/s",
    "load": "s",
    "peak": "MB a rank",
    "tune": "steps/s",
    "tune_peak": "MB a rank",
}
COSTS = ("load", "peak", "tune_peak")  # of which less is better; of the others more
SIDES = ("llama.cpp", "transformers", "bare")  # beside llama; in tune transformers is PEFT's
CURVES = {"context": "tokens before it", "batch": "texts at once"}
NOISE = 1.1  # a step may be so much slower than by the rule without breaking it


@dataclass(frozen=True)
class Record:
    """What one side took, again and again, in one variant of a model."""

    model: str
    ranks: int
    dtype: str
    measure: str  # one of UNITS or CURVES
    side: str  # llama, or one of SIDES
    samples: tuple[float, ...]
    size: int = 0  # on the x axis of one of CURVES

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Wanted:
    """A ratio that is to be reached: llama's speed to another, or a step's time to the bare one."""

    model: str  # of its name, the beginning
    ranks: int
    measure: str
    dtypes: tuple[str, ...]
    against: str  # one of SIDES, or b1 or float32: llama's own
    ratio: float

    def __str__(self) -> str:
        return f"{'≤' if self.against == 'bare' else '≥'} {self.ratio:g} {self.against}"

    def met(self, ratio: float) -> bool:
        return ratio <= self.ratio if self.against == "bare" else ratio >= self.ratio


HALF, FLOAT = ("bfloat16", "float16"), ("float32", "bfloat16", "float16")
ALL = (*FLOAT, "int8", "int4")
SMOLLM2, RANDOM = "SmolLM2", "random"
WANTED = (
    Wanted(SMOLLM2, 1, "decode_b1", ("float32", "int8"), "llama.cpp", 1.0),
    Wanted(SMOLLM2, 1, "decode_b1", (*HALF, "int4"), "llama.cpp", 0.9),
    Wanted(SMOLLM2, 1, "decode_b1", FLOAT, "transformers", 1.8),
    Wanted(SMOLLM2, 1, "decode_b1", ALL, "bare", 1.12),
    Wanted(SMOLLM2, 1, "decode_b8", ALL, "b1", 5),
    Wanted(SMOLLM2, 1, "prefill", ("float32",), "llama.cpp", 2),
    Wanted(SMOLLM2, 1, "prefill", (*HALF, "int8"), "llama.cpp", 1.5),
    Wanted(SMOLLM2, 1, "prefill", FLOAT, "transformers", 1.3),
    Wanted(SMOLLM2, 1, "prefill", HALF, "float32", 0.7),
    Wanted(SMOLLM2, 1, "tune", ("int8", "int4"), "float32", 0.7),
    Wanted(RANDOM, 1, "decode_b1", FLOAT, "transformers", 1.75),
    Wanted(RANDOM, 2, "decode_b1", ALL, "bare", 1.25),
)


class Results:
    """All records of a run, by what they are of."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.medians = {self._key(r): r.median for r in records if r.measure in UNITS}

    @staticmethod
    def _key(r: Record) -> tuple:
        return (r.model, r.ranks, r.dtype, r.measure, r.side)

    def ratio(self, model: str, ranks: int, dtype: str, measure: str, against: str) -> float | None:
        """How many times as good llama is; against bare, how many times as long a step takes."""
        other = {
            "b1": (dtype, "decode_b1", "llama"),
            "float32": ("float32", measure, "llama"),
        }.get(against, (dtype, measure, against))
        ours = self.medians.get((model, ranks, dtype, measure, "llama"))
        theirs = self.medians.get((model, ranks, *other))
        if ours is None or theirs is None:
            return None
        return theirs / ours if against == "bare" or measure in COSTS else ours / theirs

    def verdicts(self, model: str, ranks: int, dtype: str, measure: str) -> list[tuple[str, str]]:
        """What is wanted of a row of the table, and the ratio with yes or no."""
        found = []
        for wanted in WANTED:
            fits = model.startswith(wanted.model) and dtype in wanted.dtypes
            if fits and (wanted.ranks, wanted.measure) == (ranks, measure):
                ratio = self.ratio(model, ranks, dtype, measure, wanted.against)
                if ratio is not None:
                    met = "yes" if wanted.met(ratio) else "no"
                    found.append((str(wanted), f"{ratio:.2f} {met}"))
        return found

    def rows(self, model: str, ranks: int) -> list[list[str]]:
        """The table of one model on so many ranks, without its heading."""
        rows = []
        for measure, unit in UNITS.items():
            for dtype in ALL:
                ours = self.medians.get((model, ranks, dtype, measure, "llama"))
                if ours is None:
                    continue
                row = [f"{measure}, {unit}", dtype, number(ours)]
                for side in SIDES:
                    theirs = self.medians.get((model, ranks, dtype, measure, side))
                    ratio = self.ratio(model, ranks, dtype, measure, side)
                    row.append("" if ratio is None else f"{number(theirs)} ({ratio:.2f})")
                verdicts = self.verdicts(model, ranks, dtype, measure)
                rows.append([*row, *("; ".join(x) for x in zip(*verdicts or [("", "")]))])
        return rows

    def curves(self) -> dict[tuple[str, str], list[tuple[int, float]]]:
        """Of each measure of CURVES and dtype: sizes, and the seconds of a step there."""
        curves: dict = {}
        for r in self.records:
            if r.measure in CURVES:
                curves.setdefault((r.measure, r.dtype), []).append((r.size, r.median))
        return {key: sorted(points) for key, points in curves.items()}

    def text(self) -> str:
        """All tables, in Markdown."""
        heading = ["measure", "dtype", "llama", *SIDES, "wanted", "is"]
        parts = []
        for model, ranks in dict.fromkeys((r.model, r.ranks) for r in self.records):
            if rows := self.rows(model, ranks):
                parts.append(f"{model}, {ranks} rank{'s' * (ranks > 1)}\n\n{table(heading, rows)}")
        for (measure, dtype), points in self.curves().items():
            rows = [["ms a step", *(f"{seconds * 1e3:.1f}" for _, seconds in points)]]
            steps = table([CURVES[measure], *(str(size) for size, _ in points)], rows)
            found = worse_than_linear(points)
            verdict = f"worse than linear from {found}" if found else "no step worse than linear"
            parts.append(f"{measure}, {dtype}: {verdict}\n\n{steps}")
        return "\n\n".join(parts)


def worse_than_linear(points: list[tuple[int, float]]) -> list[int]:
    """The sizes from which on a step's seconds grow more than the size does."""
    pairs = itertools.pairwise(points)
    return [a for (a, before), (b, after) in pairs if after / before > NOISE * b / a]


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns stand under each other."""
    widths = [max(map(len, column)) for column in zip(heading, *rows)]
    lines = [heading, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def plot(results: Results, path: Path) -> None:
    """Draw speeds as bars, side beside side, and the curves; only what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [m for m in UNITS if any(r.measure == m for r in results.records)]
    panels = [*bars, *dict.fromkeys(measure for measure, _ in results.curves())]
    model, ranks = next(
        ((r.model, r.ranks) for r in results.records if r.measure in UNITS), ("", 1)
    )
    columns = min(4, len(panels))
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, figsize=(4.5 * columns, 7), squeeze=False
    )
    for axis, panel in zip(axes.flat, panels):
        if panel in UNITS:
            _draw_bars(axis, results, model, ranks, panel)
        else:
            for (measure, dtype), points in results.curves().items():
                if measure == panel:
                    sizes, taken = zip(*points)
                    axis.plot(sizes, [x * 1e3 for x in taken], marker="o", label=dtype)
            axis.set(xscale="log", yscale="log", xlabel=CURVES[panel], title=f"{panel}: ms a step")
            axis.legend(fontsize="small")
    for axis in list(axes.flat)[len(panels) :]:
        axis.axis("off")
    figure.suptitle(f"{model}, {ranks} rank")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bars(axis, results: Results, model: str, ranks: int, measure: str) -> None:
    sides = ("llama", *SIDES)
    found = results.medians.items()
    here = {(k[2], k[4]): x for k, x in found if (k[0], k[1], k[3]) == (model, ranks, measure)}
    dtypes = [dtype for dtype in ALL if any(key[0] == dtype for key in here)]
    for i, side in enumerate(sides):
        if any(key[1] == side for key in here):
            places = [x + (i - 1.5) * 0.2 for x in range(len(dtypes))]
            values = [here.get((dtype, side), 0) for dtype in dtypes]
            axis.bar(places, values, width=0.2, label=side)
    axis.set_xticks(range(len(dtypes)), dtypes, fontsize="small")
    axis.set_title(f"{measure}, {UNITS[measure]}")
    axis.legend(fontsize="small")
