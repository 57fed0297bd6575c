"""Pages with tables of results, which are made from results.json and can be made again.

    python studies/pages.py docs/studies.md

writes into a Markdown page what stands between these two comments, for every such pair:

    <!-- table: ./studies/adapters.json second dino clip_t parameters -->
    <!-- end -->

The first word is the results.json of a report, relative to the page, and the second says what the table is:

    settings AXIS,AXIS SCORE ...    mean ± standard deviation for each combination of some axes, over all others
    second SCORE ...                the same for the second round's choices, on its subjects and seeds
    every AXIS,AXIS SCORE ... AXIS=ENTRY ...    the same for every cell of both rounds that has these entries
    stability SCORE                 how far each setting stays close to its best score

Scores are columns of results.csv. An axis may be `step`, if checkpoints were scored. `settings` and `stability` compare
the first round's cells: see studies/report.py.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.markdown import table
from dreambooth.options.paths import path_argument
from kron_formats.files import whole_file, write_text
from studies.choice import Choice, plan
from studies.exports import read_results
from studies.grid import STEP
from studies.rendering import markdown_cell
from studies.report import of_first_round
from studies.results import Record
from studies.rounds import Rounds
from studies.sections import LOSS, stability
from studies.steps import at_steps
from studies.tables import rounds_table, settings_table

MARKED = re.compile(r"(<!-- table: (?P<words>[^\n]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("page", type=path_argument, metavar="PAGE", help="file of Markdown")
    page = parser.parse_args().page
    if not page.is_file():
        raise UserError(f"{page} is not a file; give a page of Markdown")
    filled = fill(page.read_text(encoding="utf-8"), page.parent)
    with whole_file(page) as unfinished:
        write_text(unfinished, filled)


def fill(text: str, folder: Path) -> str:
    """Return a page in `folder` with its tables as the results are now. Raises UserError if one cannot be made."""
    return MARKED.sub(lambda found: f"{found[1]}\n{make_table(found['words'].split(), folder)}\n\n{found[3]}", text)


def make_table(words: Sequence[str], folder: Path) -> str:
    """Return the table that the words of a comment ask for, in Markdown."""
    where = f"table: {' '.join(words)}"
    if len(words) < 3 or words[1] not in TABLES:
        raise UserError(f"{where}: expected FILE, one of {', '.join(TABLES)}, and scores")
    file, kind, *rest = words
    _, records, rounds = read_results(folder / file)
    header, rows = TABLES[kind](records, rounds, rest)
    if not rows:
        raise UserError(f"{where}: {file} has nothing for it")
    return table([markdown_cell(name) for name in header], [[*map(markdown_cell, row)] for row in rows])


Made = tuple[list[str], list[list[str]]]  # header, rows


def settings(records: Sequence[Record], rounds: Sequence[Rounds], words: Sequence[str]) -> Made:
    """Return the means at every combination of the axes that the first word names."""
    axes, *scores = words
    return means(of_first_round(records, rounds), axes.split(","), scores)


def every(records: Sequence[Record], rounds: Sequence[Rounds], words: Sequence[str]) -> Made:
    """Return the same for all cells with the entries that words with a "=" name."""
    axes, *rest = words
    entries = dict(word.split("=", 1) for word in rest if "=" in word)
    chosen = [record for record in records if entries.items() <= record.labels.items()]
    return means(chosen, axes.split(","), [word for word in rest if "=" not in word])


def means(records: Sequence[Record], axes: Sequence[str], scores: Sequence[str]) -> Made:
    if STEP in axes:
        records = at_steps(records)
    layout = plan(records, Choice(scores=scores, over=[]))
    if unknown := [axis for axis in axes if axis not in layout.axes]:
        raise UserError(f"{unknown[0]} is not an axis; there are {', '.join(layout.axes)}")
    return scored(settings_table(records, replace(layout, settings=[*axes])), scores)


def second(records: Sequence[Record], rounds: Sequence[Rounds], words: Sequence[str]) -> Made:
    made = [
        scored(rounds_table(each, records, plan(records, Choice(scores=words)))["scored"], words) for each in rounds
    ]
    return (made[0][0], [row for _, rows in made for row in rows]) if made else ([], [])


def stable(records: Sequence[Record], rounds: Sequence[Rounds], words: Sequence[str]) -> Made:
    """Return how far each setting stays close to its best over the first axis of numbers."""
    compared = of_first_round(records, rounds)
    layout = plan(compared, Choice(scores=words))
    parts = [part for part in stability(compared, layout) if part["rows"]]
    if not parts:
        return [], []
    line, axis = (parts[0][key] for key in ("line", "axis"))
    header = [line, f"best {axis}", words[0], f"within {LOSS:.0%}", "factors of 2", "runs"]
    keys = ("line", "best", "score", "interval", "factors", "runs")
    return header, [[row[key] for key in keys] for row in parts[0]["rows"]]


def scored(found: Mapping[str, Any], scores: Sequence[str]) -> Made:
    """Return the columns of some scores."""
    places = [[measure.name for measure in found["measures"]].index(score) for score in scores]
    rows = [[*row["entries"], row["runs"], *(row["cells"][place]["text"] for place in places)] for row in found["rows"]]
    return [*found["axes"], "runs", *scores], rows


TABLES: Mapping[str, Callable[[Sequence[Record], Sequence[Rounds], Sequence[str]], Made]] = {
    "settings": settings,
    "second": second,
    "every": every,
    "stability": stable,
}


if __name__ == "__main__":
    with readable_errors():
        main()
