"""Run folders as records, finished or not, and the numbers that a report draws from them."""

import json
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest

from dreambooth.errors import UserError
from studies import sweep, worker
from studies.analysis import explained_variance, frontier, spread, stable_interval
from studies.grid import read_grid
from studies.results import (
    DONE,
    FAILED,
    MEASURES,
    UNFINISHED,
    axes_of,
    axis_numbers,
    entries_of,
    grouped,
    label_key,
    pictures,
    read_sweep,
)
from studies.steps import at_steps
from tests.conftest import ROOT
from tests.synthetic_sweep import cell_name, write_cell, write_checkpoints, write_ending, write_scores, write_sweep


def cell(folder, **labels):
    return write_cell(folder, labels, 0.5, 0.01)


# ---- what is read ----


def test_a_finished_cell_has_all_that_its_folder_says(tmp_path):
    write_cell(tmp_path, {"learning_rate": "0.01", "seed": 3}, 0.5, 0.01)
    (record,) = read_sweep(tmp_path)
    assert (record.labels, record.state, record.reason) == ({"learning_rate": "0.01", "seed": "3"}, DONE, "")
    rows = [json.loads(line) for line in (tmp_path / record.cell / "metrics.jsonl").read_text().splitlines()]
    assert record.scores == pytest.approx(
        {
            "dino": 0.5, "clip_i": 0.5, "clip_t": 0.63, "diversity": 0.9, "class_diversity": 0.95,
            "class_drift": 0.075, "class_distance": 0.2, "drift": 0.005, "held_out": 0.33,
            "file_size": 66304, "seconds": 52.0, "peak_memory": 561393664,
            "parameters": 15800, "loss": statistics.fmean(row["loss"] for row in rows[-6:]),
        }
    )  # fmt: skip
    assert record.base == pytest.approx({"clip_i": 0.16, "dino": -0.03, "clip_t": 0.66, "diversity": 0.94})
    assert (record.photos["dino"], record.options["seed"], len(record.prompts)) == (0.944, 3, 3)


def test_scores_that_are_only_made_on_request_are_read(tmp_path):
    path = write_cell(tmp_path, {"a": 1}, 0.5, 0.01) / "evaluation" / "scores.json"
    report = json.loads(path.read_text())
    report["models"]["adapted"]["lpips_diversity"] = 0.7
    report["other_prompts"] = {
        "distance": 0.2, "clip_t_before": 0.6, "clip_t_after": 0.5, "similarity_before": 0.1, "similarity_after": 0.4,
    }  # fmt: skip
    path.write_text(json.dumps(report))
    (record,) = read_sweep(tmp_path)
    expected = {"lpips_diversity": 0.7, "other_distance": 0.2, "other_clip_t": -0.1, "other_leakage": 0.3}
    assert {name: record.scores[name] for name in expected} == pytest.approx(expected)
    assert expected.keys() <= MEASURES.keys()


def test_every_cell_is_a_row_with_its_state_and_reason(tmp_path):
    cell(tmp_path, a=1)
    write_ending(tmp_path / "a=2", 2, "error: --kron_a1 5 does not divide")
    (tmp_path / "a=3").mkdir()
    trained = cell(tmp_path, a=4)
    (trained / "evaluation" / "scores.json").unlink()
    (trained / "sweep.json").unlink()
    write_ending(tmp_path / "a=5", 75, "stopped")
    (tmp_path / "a=5" / "metrics.jsonl").write_text('{"step": 7, "loss": 0.5}\n')
    write_cell(tmp_path, {"a": 6}, None, 0.01)  # is not to be evaluated
    write_scores(cell(tmp_path, a=7), math.nan)
    (tmp_path / "shared").mkdir()
    found = {record.labels["a"]: (record.state, record.reason) for record in read_sweep(tmp_path)}
    assert found == {
        "1": (DONE, ""),
        "2": (FAILED, "exit code 2: error: --kron_a1 5 does not divide"),
        "3": (UNFINISHED, "not begun"),
        "4": (UNFINISHED, "trained, not scored yet"),
        "5": (UNFINISHED, "stopped or running, after step 7"),
        "6": (DONE, ""),
        "7": (FAILED, found["7"][1]),
    }
    assert "dino" in found["7"][1] and not next(r for r in read_sweep(tmp_path) if r.labels["a"] == "7").scores


@pytest.mark.parametrize(
    "content, words",
    [("{", "Expecting"), ("[]", ""), ('{"models": {"adapted": {}}}', "'base' is missing"), ("\0", ""), ("null", "")],
)
def test_scores_that_cannot_be_read_are_named(content, words, tmp_path):
    path = cell(tmp_path, a=1) / "evaluation" / "scores.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"a=1.*scores.json.*{words}"):
        read_sweep(tmp_path)


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n", b"\xff\xfe"])
def test_a_damaged_configuration_is_named(content, tmp_path):
    (cell(tmp_path, a=1) / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match="a=1.*config.yaml"):
        read_sweep(tmp_path)


def test_what_is_not_a_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="missing is not a folder"):
        read_sweep(tmp_path / "missing")
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path.name} is not a sweep.*AXIS=ENTRY"):
        read_sweep(tmp_path)


def test_reading_needs_no_torch(tmp_path):
    cell(tmp_path, a=1)
    program = (
        f"import sys, pathlib, studies.report as r; r.read_sweep(pathlib.Path({str(tmp_path)!r})); print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "matplotlib"} & {*result.stdout.split()}


def test_the_first_picture_of_each_prompt_is_the_one_of_the_lowest_seed(tmp_path):
    folder = cell(tmp_path, a=1) / "evaluation" / "images" / "adapted"
    folder.mkdir(parents=True)
    for name in ("00-10.png", "00-9.png", "01-9.png", "class-9.png", "sheet.png", "x-1.png"):
        (folder / name).touch()
    (record,) = read_sweep(tmp_path)
    names = {prompt: path.name for prompt, path in pictures(tmp_path, record).items()}
    assert names == {"00": "00-9.png", "01": "01-9.png", "class": "class-9.png"}


# ---- axes ----


@pytest.mark.parametrize("axis", ["a/b", "a=b", "a,b", "'a b'"])
def test_an_axis_that_no_folder_can_be_named_after_is_refused(axis, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"script: train_dreambooth_kronecker.py\naxes: {{{axis}: {{x: {{seed: 1}}, y: {{seed: 2}}}}}}\n")
    with pytest.raises(UserError, match="grid.yaml: axes: "):
        read_grid(str(grid))


def test_cells_that_have_not_begun_have_their_folder(tmp_path, monkeypatch):
    grid, folder = tmp_path / "grid.yaml", tmp_path / "sweep"
    grid.write_text("script: train_dreambooth_kronecker.py\naxes: {seed: [1, 2]}\n")
    monkeypatch.setattr(sys, "argv", ["sweep.py", str(grid), "--output_dir", str(folder), "--cell", "1"])
    monkeypatch.setenv(sweep.BEGAN, "0")  # as from scripts/sweep.sh, which has checked the cells
    monkeypatch.setattr(worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker.Worker, "run", lambda *_: worker.DONE)
    assert sweep.main() == 0
    assert [(record.cell, record.reason) for record in read_sweep(folder)] == [
        ("seed=1", "not begun"), ("seed=2", "not begun"),
    ]  # fmt: skip


def test_entries_are_in_the_order_of_their_numbers():
    labels = ["16-4", "4-16", "10", "9", "1e-3", "rank-4", "rank-16", "none"]
    assert sorted(labels, key=label_key) == ["1e-3", "9", "10", "4-16", "16-4", "none", "rank-4", "rank-16"]


@pytest.mark.parametrize(
    "labels, numbers",
    [
        (["0.01", "1e-3"], [0.01, 0.001]),
        (["2-32", "16-4"], [2, 16]),
        (["2-32", "2-16"], None),  # the first number does not tell them apart
        (["1", "one"], None),
        (["1", "1.0"], None),
        (["1", "nan"], None),
        (["1"], None),
    ],
)
def test_an_axis_of_numbers_is_known(labels, numbers):
    assert axis_numbers(labels) == (None if numbers is None else dict(zip(labels, numbers)))


def test_cells_of_two_grids_in_one_folder_have_the_axes_of_both(tmp_path):
    cell(tmp_path, learning_rate="0.01", shape="2-32")
    cell(tmp_path, learning_rate="0.01", shape="4-16")
    cell(tmp_path, learning_rate="0.01", rank="4")
    records = read_sweep(tmp_path)
    assert set(axes_of(records)) == {"learning_rate", "shape", "rank"}
    assert axes_of(records)["shape"] == ["2-32", "4-16"] and entries_of(records, "shape") == ["2-32", "4-16", "-"]
    assert set(grouped(records, ["shape", "rank"])) == {"shape 2-32", "shape 4-16", "rank 4"}


def test_a_sweep_is_read_in_the_order_of_its_entries(tmp_path):
    write_sweep(tmp_path / "sweep", rates=("0.01", "0.0025"), shapes=("8-8", "2-32"), seeds=(10, 9))
    names = [record.cell for record in read_sweep(tmp_path / "sweep")]
    assert names[:3] == [
        cell_name(learning_rate="0.0025", shape="2-32", seed=9),
        cell_name(learning_rate="0.0025", shape="2-32", seed=10),
        cell_name(learning_rate="0.0025", shape="8-8", seed=9),
    ]


# ---- over the steps ----


def test_checkpoints_are_records_of_their_steps_and_the_result_is_the_last(tmp_path):
    write_checkpoints(cell(tmp_path, a=1), {20: 0.3, 40: 0.6}, pictures=1)
    cell(tmp_path, a=2)  # only its result was scored
    write_ending(tmp_path / "a=3", 2, "error: killed")
    (record, _, failed) = records = read_sweep(tmp_path)
    assert record.checkpoints[40]["dino"] == 0.6 and "seconds" not in record.checkpoints[40]
    found = {(r.labels["a"], r.labels["step"]): (r.state, r.scores.get("dino")) for r in at_steps(records)}
    assert found == {
        ("1", "20"): (DONE, 0.3), ("1", "40"): (DONE, 0.6), ("1", "60"): (DONE, 0.5), ("2", "60"): (DONE, 0.5),
        ("3", "20"): (FAILED, None), ("3", "40"): (FAILED, None), ("3", "60"): (FAILED, None),
    }  # fmt: skip
    assert not any("seconds" in r.scores for r in at_steps(records)) and failed.checkpoints == {}
    (at_20, *_, at_60) = [r for r in at_steps(records) if r.labels["a"] == "1"]
    assert pictures(tmp_path, at_20)["00"] == tmp_path / "a=1" / "evaluation/checkpoint-20/images/adapted/00-0.png"
    assert pictures(tmp_path, at_60) == pictures(tmp_path, record)


def test_a_sweep_without_scored_checkpoints_has_no_steps(tmp_path):
    cell(tmp_path, a=1)
    assert at_steps(read_sweep(tmp_path)) == []


def test_what_is_scored_of_an_unfinished_cell_is_told_and_what_is_not_finite_fails_it(tmp_path):
    for a, dino in (("1", 0.4), ("2", math.nan)):
        folder = cell(tmp_path, a=a)
        write_checkpoints(folder, {20: dino})
    (tmp_path / "a=1" / "sweep.json").unlink()
    (tmp_path / "a=1" / "evaluation" / "scores.json").unlink()
    first, second = read_sweep(tmp_path)
    assert (first.state, first.reason) == (UNFINISHED, "trained; scored so far: checkpoints 20")
    assert second.state == FAILED and "at step 20" in second.reason and not second.checkpoints


# ---- spreads ----


def test_a_spread_is_that_of_a_sample():
    found = spread([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (found.mean, found.count) == (5.0, 8)
    assert found.deviation == pytest.approx(np.std([2, 4, 4, 4, 5, 5, 7, 9], ddof=1))
    assert spread([3.0]).deviation is None


# ---- stable interval ----


def test_the_interval_ends_where_the_line_crosses_the_limit():
    """Best 1 at 4, limit 0.95. Left, 1 -> 0.9 over a factor of two: half of it. Right, 1 -> 0.8: a quarter."""
    stable = stable_interval({2.0: 0.9, 4.0: 1.0, 8.0: 0.8})
    assert (stable.low, stable.high) == pytest.approx((4 / 2**0.5, 4 * 2**0.25))
    assert stable.factors == pytest.approx(0.75) and not stable.is_open and stable.best == 4.0


def test_the_crossing_is_the_one_that_interpolation_by_numpy_finds():
    scores = dict(zip([0.001, 0.003, 0.01, 0.02, 0.08], [0.2, 0.55, 0.6, 0.59, 0.3]))
    stable = stable_interval(scores)
    fine = np.linspace(np.log2(0.001), np.log2(0.08), 200_001)
    inside = fine[np.interp(fine, np.log2([*scores]), [*scores.values()]) >= 0.95 * 0.6]
    assert (math.log2(stable.low), math.log2(stable.high)) == pytest.approx((inside[0], inside[-1]), abs=1e-4)


def test_an_end_beyond_what_was_tried_is_open():
    stable = stable_interval({1.0: 0.5, 2.0: 0.98, 4.0: 1.0, 8.0: 0.96})
    assert (stable.high, stable.open_high, stable.open_low) == (8.0, True, False)
    alone = stable_interval({2.0: 0.5})
    assert (alone.factors, alone.open_low, alone.open_high) == (0, True, True)


def test_a_second_rise_beyond_the_interval_does_not_count():
    stable = stable_interval({1.0: 0.99, 2.0: 0.1, 4.0: 1.0})
    assert stable.low > 2 and not stable.open_low


def test_a_failure_ends_the_interval_at_its_neighbour_and_is_never_the_best():
    stable = stable_interval({1.0: None, 2.0: 0.99, 4.0: 1.0, 8.0: None, 16.0: 1.0})
    assert (stable.low, stable.high, stable.is_open) == (2.0, 4.0, False)
    assert stable_interval({1.0: None}) is None and stable_interval({}) is None


def test_lower_may_be_better_and_scores_may_be_negative():
    """Best 0.1, limit 0.105: a quarter of the way to 0.12. Best -0.1, limit -0.105: half of the way to -0.11."""
    assert stable_interval({1.0: 0.1, 2.0: 0.12}, higher_is_better=False).factors == pytest.approx(0.25)
    assert stable_interval({1.0: -0.1, 2.0: -0.11}).factors == pytest.approx(0.5)


# ---- variance ----


def test_shares_of_the_variance_by_hand():
    """Scores 1 2 / 3 6: mean 3, total 14. Rows 1.5 and 4.5: 2 · 2 · 1.5² = 9. Columns 2 and 4: 4. The rest: 1."""
    runs = [({"a": a, "b": b}, score) for (a, b), score in zip(["00", "01", "10", "11"], [1.0, 2.0, 3.0, 6.0])]
    explained = explained_variance(runs, ["a", "b"])
    assert explained.shares == pytest.approx({"a": 9 / 14, "b": 4 / 14})
    assert explained.rest == pytest.approx(1 / 14) and explained.count == 4


def test_a_share_is_the_r_squared_of_a_least_squares_fit_of_the_entries():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 3, 40), random.integers(0, 4, 40)  # unbalanced
    scores = a * 0.5 + random.normal(size=40)
    runs = [({"a": str(x), "b": str(y)}, float(score)) for x, y, score in zip(a, b, scores)]
    shares = explained_variance(runs, ["a", "b"]).shares
    for name, entries in (("a", a), ("b", b)):
        indicators = np.eye(4)[entries]
        _, residual, _, _ = np.linalg.lstsq(indicators[:, : entries.max() + 1], scores, rcond=None)
        assert shares[name] == pytest.approx(1 - residual[0] / ((scores - scores.mean()) ** 2).sum())


def test_equal_scores_have_no_variance_to_explain():
    assert explained_variance([({"a": "1"}, 0.1 + 0.2), ({"a": "2"}, 0.3)], ["a"]) is None
    assert explained_variance([], ["a"]) is None


def test_the_frontier_is_what_no_other_beats_in_both():
    points = [(1, 5), (2, 4), (2, 3), (3, 1), (0, 5), (3, 1)]
    assert frontier(points) == [0, 1, 3]
