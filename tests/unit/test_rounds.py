"""Grids whose axes belong to one another, and second rounds: which cells there are, and what is chosen."""

import json
import random
from dataclasses import replace

import pytest
import yaml

from dreambooth.errors import UserError
from studies.grid import parse_grid
from studies.results import Record
from studies.rounds import as_data, choose, from_data, in_words, numbered, read_rounds, rounds_in, write_rounds

BEST = {"axis": "learning_rate", "score": "dino", "axes": {"subject": {"dog": {}, "cat": {}}, "seed": [0, 1]}}
METHODS = [
    {"method": {"kron": {}}, "learning_rate": [1, 2], "subject": {"dog": {}}, "seed": [0]},
    {
        "method": {"lora": {"rank": 1}, "lora-4": {"rank": 4}},
        "learning_rate": [2, 5],
        "subject": {"dog": {}},
        "seed": [0],
    },
]


@pytest.fixture
def grid(tmp_path):
    def parsed(axes=METHODS, best=BEST, **entries):
        entries = {"script": "train.py", "evaluate": {"prompt": ["a {}"]}, "axes": axes, "best": best, **entries}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
        return parse_grid(str(tmp_path / "grid.yaml"))

    return parsed


def of_dinos(rounds, dinos, **states):
    """Records of the first round's cells: DINO by (method, rate), all other cells failed."""
    records = {}
    for setting in rounds.settings:
        for rate, names in setting.tried.items():
            dino = dinos.get((setting.labels["method"], rate))
            state = "done" if isinstance(dino, float) else dino or "failed"
            scores = {"dino": dino} if state == "done" else {}
            records |= {name: Record(name, {}, state, "", scores) for name in names}
    return records


# ---- axes that belong to one another ----


def test_the_cells_of_a_list_of_axes_are_those_of_all_its_items(grid):
    assert [cell.name for cell in grid(best=None).cells()] == [
        f"method={method},learning_rate={rate},subject=dog,seed=0"
        for method, rates in (("kron", (1, 2)), ("lora", (2, 5)), ("lora-4", (2, 5)))
        for rate in rates
    ]


def test_anchors_keep_a_grid_short(tmp_path):
    (tmp_path / "grid.yaml").write_text(
        "script: t.py\naxes:\n  - {a: [1], seed: &seeds [0, 1]}\n  - {b: [1], seed: *seeds}\n"
    )
    cells = [cell.name for cell in parse_grid(str(tmp_path / "grid.yaml")).cells()]
    assert cells == ["a=1,seed=0", "a=1,seed=1", "b=1,seed=0", "b=1,seed=1"]


@pytest.mark.parametrize(
    "axes, named",
    [
        ([], "axes"),
        ({}, "axes"),
        ([{}], "item 1"),
        ([{"seed": [0]}, None], "item 2"),
        ([{"seed": [0]}, {"seed": 3}], "item 2: seed"),
        ([{"seed": [0, 1]}, {"seed": [1]}], "seed=1"),
        ([{"seed": [0], "rank": [1]}, {"rank": [1], "seed": [0]}], "seed=0,rank=1"),  # one run by two names
    ],
)
def test_items_that_are_no_axes_or_name_a_cell_twice_are_refused(grid, axes, named):
    with pytest.raises(UserError, match=named):
        grid(axes=axes, best=None).cells()


# ---- the second round ----


def test_a_setting_is_run_at_its_best_on_the_replicates_under_the_first_round_s_names(grid):
    rounds, cells = read_rounds(grid())
    chosen = choose(rounds, of_dinos(rounds, {("kron", "1"): 0.5, ("kron", "2"): 0.4, ("lora", "5"): 0.7}))
    assert [(one.setting.name, one.best) for one in chosen] == [
        ("method=kron", "1"), ("method=lora", "5"), ("method=lora-4", None)
    ]  # fmt: skip
    expected = [
        f"method={method},subject={subject},seed={seed}".replace(",s", f",learning_rate={rate},s", 1)
        for method, rate in (("kron", 1), ("lora", 5))
        for subject in ("dog", "cat")
        for seed in (0, 1)
    ]
    assert [name for one in chosen for name in one.cells] == expected
    assert numbered(rounds, chosen) == dict(enumerate(expected, 6))  # the first round has 6 cells
    assert cells[expected[4]].options == {"rank": "1", "learning_rate": "5", "seed": "0"}
    assert {name for name in expected if name in rounds.first} == {expected[0], expected[4]}
    assert rounds.added == {name for name in cells if name not in rounds.first} and len(rounds.added) == 6 * 3
    assert "method=lora: 5 (5: 0.7, 2: 1 of 1 failed)" in in_words(rounds, chosen)


def test_numbers_do_not_depend_on_what_is_chosen_or_left_out(grid):
    rounds, _ = read_rounds(grid())
    dinos = {("kron", "2"): 0.4, ("lora-4", "2"): 0.7}
    first, third = (
        [number for number, name in numbered(rounds, choose(rounds, of_dinos(rounds, dinos))).items() if method in name]
        for method in ("method=kron", "method=lora-4")
    )
    assert first == [6, 7, 8, 9] and third == [14, 15, 16, 17]


def test_an_entry_counts_if_all_its_replicates_are_done_and_the_measure_says_what_is_better(grid):
    axes = {"learning_rate": [1, 2, 3], "subject": {"dog": {}, "cat": {}}, "seed": [0]}
    rounds, _ = read_rounds(grid(axes, {**BEST, "score": "drift"}))
    drifts = {("1", "dog"): 0.5, ("1", "cat"): 0.1, ("2", "dog"): 0.2, ("2", "cat"): 0.2, ("3", "dog"): 0.01}
    records = {
        name: Record(name, {}, "done" if (rate, subject) in drifts else "failed", "",
                     {"drift": drifts[rate, subject]} if (rate, subject) in drifts else {})
        for rate in "123" for subject in ("dog", "cat")
        for name in [f"learning_rate={rate},subject={subject},seed=0"]
    }  # fmt: skip
    (one,) = choose(rounds, records)
    assert (
        one.best == "2" and one.means == {"1": pytest.approx(0.3), "2": 0.2} and one.missing == {"3": "1 of 2 failed"}
    )
    shuffled = dict(random.Random(0).sample([*records.items()], len(records)))
    assert choose(rounds, shuffled) == [one]
    records["learning_rate=3,subject=cat,seed=0"] = Record("", {}, "unfinished", "")
    assert choose(rounds, records)[0].best is None


def test_an_entry_that_follows_prompts_less_than_it_has_to_does_not_count(grid):
    axes = {"learning_rate": [1, 2, 3, 4], "subject": {"dog": {}, "cat": {}}, "seed": [0]}
    rounds, _ = read_rounds(grid(axes, {**BEST, "keep": {"clip_t": 0.92}}))
    dinos = {"1": 0.5, "2": 0.6, "3": 0.8, "4": 0.7}
    clip_ts = {"1": (0.6, 0.7), "2": (0.52, 0.68), "3": (0.55, 0.51), "4": (0.6, 0.6)}  # 2 and 4 keep 0.923 of it
    records = {
        name: Record(name, {}, "done", "", {"dino": dinos[rate], "clip_t": clip_t}, base={"clip_t": base})
        for rate in dinos
        for subject, clip_t, base in zip(("dog", "cat"), clip_ts[rate], (0.6, 0.7))
        for name in [f"learning_rate={rate},subject={subject},seed=0"]
    }
    (one,) = choose(rounds, records)
    assert one.best == "4" and one.missing == {"3": "clip_t 0.530, below 0.598"}
    assert choose(replace(rounds, keep={}), records)[0].best == "3"
    assert choose(from_data(as_data(rounds, [one])), records) == [one]
    records["learning_rate=4,subject=cat,seed=0"] = replace(records["learning_rate=4,subject=cat,seed=0"], base={})
    (one,) = choose(rounds, records)
    assert one.best == "2" and one.missing["4"] == "no clip_t of the base model"


def test_a_replicate_axis_that_best_does_not_name_keeps_its_entries(grid):
    axes = {"learning_rate": [1, 2], "subject": {"dog": {}}, "seed": [0, 1]}
    rounds, _ = read_rounds(grid(axes, {**BEST, "axes": {"subject": {"cat": {}}}}))
    assert rounds.settings[0].tried["1"] == [f"learning_rate=1,subject=dog,seed={seed}" for seed in (0, 1)]
    assert rounds.settings[0].then["1"] == [f"learning_rate=1,subject=cat,seed={seed}" for seed in (0, 1)]


def test_a_setting_s_entries_may_come_from_several_items(grid):
    item = {"method": {"kron": {}}, "subject": {"dog": {}}, "seed": [0]}
    rounds, _ = read_rounds(grid([{**item, "learning_rate": [1]}, {**item, "learning_rate": [2]}]))
    assert [[*setting.tried] for setting in rounds.settings] == [["1", "2"]]


WITHOUT_SEED = [{name: entries for name, entries in METHODS[0].items() if name != "seed"}, METHODS[1]]
MORE_SEEDS = [METHODS[0], {**METHODS[0], "learning_rate": [3], "seed": [0, 1]}]


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"best": "dino"}, "best"),
        ({"best": {"axis": "learning_rate", "score": "dino"}}, "axes is missing"),
        ({"best": {**BEST, "over": "seed"}}, "over"),
        ({"best": {**BEST, "score": "dinosaur"}}, "dinosaur"),
        ({"best": {**BEST, "keep": 0.9}}, "keep"),
        ({"best": {**BEST, "keep": {"dino": 0.9}}}, "dino is not a score to keep; known: clip_t"),
        ({"best": {**BEST, "keep": {"clip_t": 92}}}, "clip_t: 92: expected a share"),
        ({"best": {**BEST, "keep": {"clip_t": True}}}, "clip_t: true"),
        ({"best": {**BEST, "score": "loss", "keep": {"clip_t": 0.9}}, "evaluate": None}, "no clip_t"),
        ({"best": {**BEST, "axis": "rate"}}, "rate"),
        ({"best": {**BEST, "axis": "seed"}}, "axis: seed"),
        ({"best": {**BEST, "axes": {"seed": 3}}}, "seed"),
        ({"best": {**BEST, "axes": {"subject": {"dog": {"rank": 2}}}}}, "subject=dog,seed=0"),  # means another run
        ({"best": {**BEST, "axes": {"subject": {"cat": {"output_dir": "x"}}}}}, "output_dir"),
        ({"axes": WITHOUT_SEED}, "seed is not an axis of the first round"),
        ({"axes": MORE_SEEDS}, "learning_rate 1 is not run on every"),
        ({"evaluate": None}, "no dino"),
    ],
)
def test_what_cannot_be_decided_is_refused_before_anything_runs(grid, changed, named):
    with pytest.raises(UserError, match=named):
        read_rounds(grid(**changed))


def test_a_grid_without_best_has_one_round(grid):
    assert read_rounds(grid(best=None)) is None


def test_the_rounds_of_a_folder_are_read_back_by_reports(grid, tmp_path):
    parsed = grid(best={**BEST, "keep": {"clip_t": 0.9}})
    rounds, _ = read_rounds(parsed)
    write_rounds(tmp_path, parsed, rounds)
    assert rounds_in(tmp_path) == [rounds]
    (tmp_path / "rounds-grid.json").write_text(json.dumps({"axis": "x"}))
    with pytest.raises(UserError, match=r"rounds-grid\.json"):
        rounds_in(tmp_path)
