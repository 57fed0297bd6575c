"""Pages whose tables are made from results: what each says, what is refused, and that ours are up to date."""

import re
import subprocess
import sys

import pytest

from dreambooth.errors import UserError
from studies.exports import json_text
from studies.pages import MARKED, fill
from studies.results import DONE, Record, axes_of
from studies.rounds import Rounds, Setting
from tests.conftest import ROOT

PAGES = [
    page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if MARKED.search(page.read_text())
]


def record(method: str, rate: str, subject: str, dino: float) -> Record:
    labels = {"method": method, "learning_rate": rate, "subject": subject}
    name = ",".join(f"{axis}={label}" for axis, label in labels.items())
    scores = {"dino": dino, "clip_t": dino / 2, "parameters": 3200.0}
    return Record(name, labels, DONE, "", scores, summary={"steps": 300}, checkpoints={100: {"dino": dino - 0.1}})


@pytest.fixture
def folder(tmp_path):
    """A folder with the results of a sweep of two rounds: rates on the dog, then the better one on the cat too."""
    first = [record(m, rate, "dog", dino) for m, row in SCORES.items() for rate, dino in row.items()]
    then = [record("a", "0.02", "cat", 0.1), record("b_1", "0.01", "cat", 0.2)]
    names = {(r.labels["method"], r.labels["learning_rate"], r.labels["subject"]): r.cell for r in [*first, *then]}
    settings = [
        Setting(
            {"method": method},
            {rate: [names[method, rate, "dog"]] for rate in row},
            {rate: [names[key] for key in ((method, rate, s) for s in ("dog", "cat")) if key in names] for rate in row},
        )
        for method, row in SCORES.items()
    ]
    rounds = [Rounds("learning_rate", "dino", ["subject"], settings)]
    records = [*first, *then]
    (tmp_path / "results.json").write_text(json_text("rates", records, axes_of(records), rounds))
    (tmp_path / "alone.json").write_text(json_text("rates", first, axes_of(first), []))
    return tmp_path


SCORES = {"a": {"0.01": 0.42, "0.02": 0.5, "0.04": 0.49}, "b_1": {"0.01": 0.6, "0.02": 0.3, "0.04": 0.2}}


def page(words: str, inside: str = "") -> str:
    return f"# Rates\n\n<!-- table: {words} -->\n{inside}<!-- end -->\n\nAfter it: | no | table |\n"


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            "results.json settings method dino parameters",  # without what only the second round ran
            [["method", "runs", "dino", "parameters"], ["a", "3 of 3", "0.470 ± 0.044", "3,200"]],
        ),
        (
            "results.json settings method,learning_rate clip_t",
            [["method", r"learning\_rate", "runs", r"clip\_t"], ["a", "0.01", "1 of 1", "0.210"]],
        ),
        (
            "results.json second dino",
            [["method", r"learning\_rate", "runs", "dino"], ["a", "0.02", "2 of 2", "0.300 ± 0.283"]],
        ),
        (
            "results.json stability dino",
            [
                ["method", r"best learning\_rate", "dino", "within 5%", "factors of 2", "runs"],
                ["a", "0.02", "0.500", "0.016 to ≥ 0.04", "≥ 1.3", "1"],
            ],
        ),
        (
            "results.json every method,learning_rate dino learning_rate=0.02",
            [["method", r"learning\_rate", "runs", "dino"], ["a", "0.02", "2 of 2", "0.300 ± 0.283"]],
        ),
        (
            "results.json settings method,step dino",
            [["method", "step", "runs", "dino"], ["a", "100", "3 of 3", "0.370 ± 0.044"]],
        ),
        ("alone.json settings method dino", [["method", "runs", "dino"], ["a", "3 of 3", "0.470 ± 0.044"]]),
    ],
)
def test_a_table_says_what_the_results_say(words, expected, folder):
    filled = fill(page(words), folder)
    found = rows(filled)
    assert [found[0], found[2]] == expected
    assert found[-1][0] == r"b\_1"
    assert filled.startswith("# Rates\n\n<!-- table:") and filled.endswith("<!-- end -->\n\nAfter it: | no | table |\n")
    assert fill(filled, folder) == filled == fill(page(words, "\n| old |\n\n"), folder)


@pytest.mark.parametrize(
    "words, why",
    [
        ("results.json", "expected FILE, one of settings, second, every, stability, and scores"),
        ("results.json means dino", "expected FILE, one of settings"),
        ("nothing.json second dino", "nothing.json is not the results.json of a report"),
        ("results.json second dnio", "dnio"),
        ("results.json settings metod dino", "metod is not an axis; there are method, learning_rate, subject"),
        ("alone.json second dino", "alone.json has nothing for it"),
        ("results.json every method dino method=c", "dino: no finished cell has it"),
    ],
)
def test_a_table_that_cannot_be_made_is_refused(words, why, folder):
    with pytest.raises(UserError, match=re.escape(why)):
        fill(page(words), folder)


def test_a_page_that_is_refused_stays_as_it_is(folder):
    path = folder / "page.md"
    path.write_text(page("results.json second dino", "| old |\n") + page("results.json second dnio"))
    before = path.read_text()
    command = [sys.executable, ROOT / "studies" / "pages.py", path]
    assert subprocess.run(command, capture_output=True, text=True).returncode == 2
    assert path.read_text() == before
    path.write_text(page("results.json second dino", "| old |\n"))
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    assert "| old |" not in path.read_text() and "0.300 ± 0.283" in path.read_text()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_tables_of_our_pages_are_what_their_results_say(path):
    assert fill(path.read_text(encoding="utf-8"), path.parent) == path.read_text(encoding="utf-8")
