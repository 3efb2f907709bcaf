"""Write datasets/dates.json and datasets/dates_test.json: sentences with a date, and that date.

python benchmarks/make_dates.py

An answer is the date in ISO 8601's form, and nothing else, so that right and wrong can be counted.
"""

import datetime
import json
import random
from pathlib import Path

from llama import cli

SENTENCES = (
    "{who} was born on {date} in {place}.",
    "The library in {place} has been open since {date}.",
    "On {date}, {n} guests came to the opening of the hall in {place}.",
    "{who} signed the contract on {date}, {n} days late.",
    "The concert of {date} in {place} was sold out.",
    "Our train left {place} on {date} at {hour} o'clock.",
    "{who} paid {n} euros on {date}.",
    "Since {date} the ferry to {place} runs every {hour} hours.",
    "The letter from {who} is dated {date}.",
    "The bridge near {place} was closed on {date} for repairs.",
    "{who} finished the marathon of {date} in place {n}.",
    "On {date}, {who} moved to {place}.",
    "It snowed in {place} on {date}, and {n} flights were cancelled.",
    "The invoice of {date} lists {n} items.",
    "{who} and {other} met in {place} on {date}.",
    "Room {n} is booked for {who} from {date} on.",
)
PEOPLE = ("Amara", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hanna", "Ines", "Jonas")
PLACES = ("Bergen", "Cork", "Graz", "Kyoto", "Lima", "Malmo", "Oaxaca", "Porto", "Quito", "Turin")


def ordinal(day: int) -> str:
    """Write a day as 1st, 2nd, 3rd, 4th."""
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{day}{'th' if 10 < day < 14 else ends.get(day % 10, 'th')}"


def spellings(date: datetime.date) -> list[str]:
    """Write a date in the ways that people do."""
    month, short, weekday = (date.strftime(form) for form in ("%B", "%b", "%A"))
    day, year = date.day, date.year
    return [
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"{month} {ordinal(day)}, {year}",
        f"the {ordinal(day)} of {month} {year}",
        f"{short} {day}, {year}",
        f"{day} {short} {year}",
        f"{weekday}, {month} {day}, {year}",
        f"{weekday} {day} {month} {year}",
    ]


def make_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Make n different rows; the same ones for the same seed."""
    chance, rows = random.Random(seed), {}
    first = datetime.date(1900, 1, 1)
    while len(rows) < n:
        date = first + datetime.timedelta(days=chance.randrange(365 * 125))
        who, other = chance.sample(PEOPLE, 2)
        sentence = chance.choice(SENTENCES).format(
            date=chance.choice(spellings(date)),
            who=who,
            other=other,
            place=chance.choice(PLACES),
            n=chance.randint(2, 99),
            hour=chance.randint(2, 23),
        )
        rows[sentence] = {"prompt": f"{sentence}\n", "completion": date.isoformat()}
    return list(rows.values())


def main(n_train: int = 400, n_test: int = 200, seed: int = 0) -> None:
    """Write both files; no sentence of one is in the other."""
    rows = make_rows(n_train + n_test, seed)
    parts = {"dates": rows[:n_train], "dates_test": rows[n_train:]}
    for name, part in parts.items():
        lines = ",\n ".join(json.dumps(row) for row in part)
        Path("datasets", f"{name}.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
