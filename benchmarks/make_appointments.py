"""Write datasets/appointments.json and …_test.json: sentences, and when and where in one form.

python benchmarks/make_appointments.py

An answer is the date and time as ISO 8601 has them and the town, and nothing else, so that right
and wrong can be counted: "Amara meets Emil in Cork on the 3rd of March 1987 at 7.30 in the
evening." asks for "1987-03-03 19:30 Cork".
"""

import datetime
import json
import random
from pathlib import Path

from llama import cli

SENTENCES = (
    "{who} meets {other} in {place} on {date} at {time}.",
    "On {date} at {time}, {who} gives a talk in {place}.",
    "The concert in {place} begins at {time} on {date}.",
    "{who} leaves {place} on {date}; the train is at {time}.",
    "At {time} on {date} the market in {place} opens, says {who}.",
    "{place}, {date}: {who} and {other} have a table for {n} at {time}.",
    "Please be in {place} at {time} on {date}, with {n} copies.",
    "{who} wrote to {other}: see you at {time}, {date}, in {place}.",
    "The ferry to {other}'s island leaves {place} at {time} on {date}.",
    "{n} guests come to {place} on {date}, the first of them at {time}.",
    "Dinner with {who} is at {time} on {date} in {place}.",
    "On {date} {who} has an appointment in {place}, in room {n}, at {time}.",
)
PEOPLE = ("Amara", "Bruno", "Chen", "Dalia", "Emil", "Farah", "Goran", "Hanna", "Ines", "Jonas")
PLACES = ("Bergen", "Cork", "Graz", "Kyoto", "Lima", "Malmo", "Oaxaca", "Porto", "Quito", "Turin")


def ordinal(day: int) -> str:
    """Write a day as 1st, 2nd, 3rd, 4th."""
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{day}{'th' if 10 < day < 14 else ends.get(day % 10, 'th')}"


def dates(when: datetime.datetime) -> list[str]:
    """Write a date in the ways that people do."""
    month, short, weekday = (when.strftime(form) for form in ("%B", "%b", "%A"))
    day, year = when.day, when.year
    return [
        f"{day} {month} {year}",
        f"{month} {day}, {year}",
        f"{month} {ordinal(day)}, {year}",
        f"the {ordinal(day)} of {month} {year}",
        f"{short} {day}, {year}",
        f"{weekday}, {day} {month} {year}",
    ]


def times(when: datetime.datetime) -> list[str]:
    """Write a time in the ways that people do."""
    hour, minute, half = when.hour % 12 or 12, f"{when.minute:02}", when.strftime("%p").lower()
    part = "the morning" if when.hour < 12 else "the afternoon"
    part = "the evening" if when.hour > 17 else part
    short = f"{hour}:{minute}" if when.minute else str(hour)
    return [f"{when.hour}:{minute}", f"{short} {half}", f"{hour}.{minute} in {part}"]


def make_rows(n: int, seed: int) -> list[dict[str, str]]:
    """Make n different rows; the same ones for the same seed."""
    chance, rows = random.Random(seed), {}
    first = datetime.datetime(1950, 1, 1)
    while len(rows) < n:
        days, quarters = chance.randrange(365 * 80), chance.randint(6 * 4, 23 * 4)
        when = first + datetime.timedelta(days, minutes=15 * quarters)
        who, other = chance.sample(PEOPLE, 2)
        place = chance.choice(PLACES)
        sentence = chance.choice(SENTENCES).format(
            date=chance.choice(dates(when)),
            time=chance.choice(times(when)),
            who=who,
            other=other,
            place=place,
            n=chance.randint(2, 99),
        )
        rows[sentence] = {"prompt": f"{sentence}\n", "completion": f"{when:%Y-%m-%d %H:%M} {place}"}
    return list(rows.values())


def main(n_train: int = 600, n_test: int = 200, seed: int = 0) -> None:
    """Write both files; no sentence of one is in the other."""
    rows = make_rows(n_train + n_test, seed)
    for name, part in (("appointments", rows[:n_train]), ("appointments_test", rows[n_train:])):
        lines = ",\n ".join(json.dumps(row) for row in part)
        Path("datasets", f"{name}.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
