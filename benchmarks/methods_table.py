"""The runs of methods.py as a table and a picture: of each way mean and spread over its seeds.

python benchmarks/methods_table.py --runs benchmarks/methods.jsonl --picture docs/methods.svg
"""

import json
import statistics
from pathlib import Path

from llama import cli

WAY = ("dataset", "method", "init", "num_virtual_tokens", "lr", "steps", "batch_size")
ALSO = ("lr_scheduler", "test_rows")  # in which the runs of a way are alike, too
NAMES = {"peft_prompt": "PEFT's\nprompt", "peft_p_tuning": "PEFT's\nP-tuning"}


def main(runs: str, picture: str = "") -> None:
    """Print the table, and draw the picture where one is asked for."""
    ways = by_way(Path(runs))
    print_table(ways)
    if picture:
        draw(ways, Path(picture))


def by_way(file: Path) -> dict[tuple, list[dict]]:
    """The runs of a file by all but the seed: dataset, method, and so on."""
    ways: dict[tuple, list[dict]] = {}
    for line in file.read_text().splitlines():
        run = json.loads(line)
        key = tuple(run[name] for name in WAY + ALSO)
        ways.setdefault(key, []).append(run)
    return dict(sorted(ways.items()))


def last_loss(run: dict) -> float:
    """The test loss at a run's last step."""
    return run["loss"][str(run["steps"])]


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def name_of(way: tuple) -> str:
    """How the picture names a method and what its prompts start from."""
    start = "" if way[2] == "random" else f"\nfrom {way[2]}"
    return NAMES.get(way[1], way[1]) + start


def print_table(ways: dict[tuple, list[dict]]) -> None:
    """Print a line of Markdown for each way."""
    print("| dataset | method | from | length | rate | steps | rows | seeds | test loss | right |")
    print("|---" * 10 + "|")
    for key, runs in ways.items():
        right = ""
        if all("wrong" in run for run in runs):
            asked = runs[0]["asked"]
            right = f"{spread([asked - run['wrong'] for run in runs], 1)} of {asked}"
        loss = spread([last_loss(run) for run in runs], 3)
        print("|", *(f"{cell} |" for cell in (*key[: len(WAY)], len(runs), loss, right)))


def draw(ways: dict[tuple, list[dict]], path: Path) -> None:
    """Draw the test losses of the ways with several seeds, each at its best learning rate.

    A dot is a seed, a line their mean.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"], rcParams["svg.fonttype"] = "llama", "none"  # the same file each time
    shown = {key: [last_loss(run) for run in ways[key]] for key in ways if len(ways[key]) > 1}
    if not shown:
        raise ValueError("--picture: no way in the file has several seeds")
    rate, steps = WAY.index("lr"), WAY.index("steps")
    at_best: dict[tuple, tuple] = {}
    for key in sorted(shown, key=lambda key: statistics.mean(shown[key])):
        at_best.setdefault(key[:rate] + key[rate + 1 :], key)
    datasets = sorted({key[0] for key in shown})
    figure = Figure(figsize=(9.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(datasets), squeeze=False)[0]
    for panel, dataset in zip(panels, datasets):
        best = [key for key in at_best.values() if key[0] == dataset]
        for place, key in enumerate(best):
            colour = "#c8641e" if key[1].startswith("peft") else "#2b6ca3"
            panel.plot([place] * len(shown[key]), shown[key], "o", color=colour, alpha=0.6)
            mean = statistics.mean(shown[key])
            panel.plot([place - 0.3, place + 0.3], [mean, mean], color=colour)
        names = [f"{name_of(x)}\n{x[steps]} steps" for x in best]
        panel.set_xticks(range(len(best)), names, fontsize=8)
        panel.set_title(f"{dataset}.json", fontsize=11)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylim(bottom=0 if dataset == "appointments" else None)
    panels[0].set_ylabel("test loss a token")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    cli.run(main)
