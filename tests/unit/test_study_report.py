"""The report on a sweep: its files, its page without a network, and its plots."""

import base64
import csv
import io
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dreambooth.errors import UserError
from dreambooth.report.figures import DPI, rendered
from studies.cells import Ending
from studies.choice import Choice
from studies.exports import csv_text, json_text
from studies.grid import parse_grid
from studies.plots import HEIGHT, SHARP, draw_heatmap, draw_lines, draw_tradeoff
from studies.rendering import png_bytes
from studies.report import write_plots, write_report
from studies.results import DONE, MEASURES, Record, axes_of, axis_numbers, read_sweep
from studies.rounds import read_rounds, write_rounds
from studies.sections import Plot
from tests.conftest import ROOT
from tests.synthetic_sweep import write_cell, write_checkpoints, write_ending, write_sweep

FILES = ["results.csv", "results.json", "report.md", "report.html"]
DINO = MEASURES["dino"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "rates & <shapes>"
    return write_sweep(folder, rates=("0.01", "0.02", "0.08"), shapes=("2-32", "8-8"), seeds=(0, 1, 2), pictures=1)


@pytest.fixture(scope="module")
def written(sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(sweep, folder, Choice())
    return folder


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def page(written):
    return Page((written / "report.html").read_text())


def share_of(picture: Image.Image, colour: str) -> float:
    """The share of pixels that have a colour."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    return float((np.abs(np.asarray(picture).astype(int) - wanted).max(-1) < 12).mean())


# ---- files ----


def test_the_same_folders_make_the_same_bytes(sweep, written, tmp_path):
    write_report(sweep, tmp_path, Choice())
    names = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert {*map(str, names)} >= {*FILES, "plots/heatmap-learning_rate-shape-dino.png", "plots/pictures-00.png"}
    assert [(tmp_path / name).read_bytes() == (written / name).read_bytes() for name in names] == [True] * len(names)


def check_made_again(written: Path, again: Path, choice: Choice) -> None:
    """Check that results.json makes the same tables, and plots of scores, without the run folders."""
    write_report(written / "results.json", again, choice)
    for name in ("results.csv", "results.json"):
        assert (again / name).read_bytes() == (written / name).read_bytes()
    old, new = (
        [line for line in (folder / "report.md").read_text().splitlines() if line.startswith(("#", "|"))]
        for folder in (written, again)
    )
    assert {line for line in old if line not in new} <= {"## Pictures", "## Over the training steps"}
    plots = [path.name for path in (again / "plots").glob("*.png")]
    assert any(name.startswith(("heatmap-", "steps-", "checkpoints-")) for name in plots)
    for name in plots:
        assert (again / "plots" / name).read_bytes() == (written / "plots" / name).read_bytes()


@pytest.mark.parametrize("kind", ["written", "stepped"])
def test_a_report_can_be_made_again_from_its_results_alone(kind, request, tmp_path):
    check_made_again(request.getfixturevalue(kind), tmp_path / "again", Choice())


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "Expecting"),
        ("[]", "list"),
        ('{"cells": []}', "'rounds' is missing"),
        ('{"sweep": "a", "rounds": [], "cells": [{"cell": "a=1"}]}', "'command' is missing"),
    ],
)
def test_a_file_that_is_not_a_report_s_results_is_refused(text, why, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=f"results.json is not the results.json of a report: .*{why}"):
        write_report(path, tmp_path / "report", Choice())
    assert not (tmp_path / "report").exists()


def test_every_cell_is_a_row_of_the_files_for_programs(sweep, written):
    cells = [record.cell for record in read_sweep(sweep)]
    rows = list(csv.DictReader(io.StringIO((written / "results.csv").read_text())))
    assert [row["cell"] for row in rows] == cells and len(cells) == 18
    failed = next(row for row in rows if row["state"] == "failed")
    assert (failed["exit_code"], failed["shape"], failed["dino"]) == ("2", "8-8", "")
    assert "step 31 is not finite" in failed["reason"] and failed["command"].startswith("python train_dreambooth")
    content = json.loads((written / "results.json").read_text(), parse_constant=pytest.fail)
    assert [cell["cell"] for cell in content["cells"]] == cells
    first = content["cells"][0]
    assert first["options"]["learning_rate"] == 0.01 and first["summary"]["versions"]["torch"] == "2.13.0"
    assert float(rows[0]["dino"]) == first["scores"]["dino"] and len(first["prompts"]) == 3


def test_results_do_not_say_where_the_project_lies():
    command = [f"{ROOT}/.venv/bin/python", "train.py", f"--output_dir={ROOT}/outputs/a=1", "--seed=0", "/data/dog"]
    ending = Ending(0, f"Wrote {ROOT}/outputs/a=1/x.json", command, began=0.0, seconds=1.0)
    options = {"output_dir": f"{ROOT}/outputs/a=1", "prompts": [f"{ROOT}/b.txt"], "instance_data_dir": "/data/dog"}
    record = Record("a=1", {"a": "1"}, DONE, "", options=options, ending=ending)
    told = json_text("sweep", [record], {"a": ["1"]}) + csv_text([record], {"a": ["1"]})
    assert str(ROOT) not in told and told.count("/data/dog") == 3
    assert (
        "python train.py --output_dir=outputs/a=1 --seed=0 /data/dog" in told and '"Wrote outputs/a=1/x.json"' in told
    )


def test_every_plot_of_the_markdown_is_there_and_its_tables_are_rectangular(written):
    text = (written / "report.md").read_text()
    names = re.findall(r"!\[.*\]\((plots/[\w.-]+)\)", text)
    assert len(names) >= 12 and all((written / name).exists() for name in names)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert "its loss is nan \\| lower" in text and "<b>" not in text.replace("\\<b\\>", "")


# ---- the page ----


def test_the_page_needs_nothing_but_itself(written, page):
    assert "default-src 'none'" in next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert not page.all("link") and not any("src" in script for script in page.all("script"))
    for image in page.all("img"):
        kind, _, content = image["src"].partition(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg") and image["alt"]
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert "url(" not in (written / "report.html").read_text()


def test_what_users_wrote_is_text_in_the_page(page):
    assert "rates & <shapes>" in page.text and not page.all("shapes")
    assert "its loss is nan | lower --learning_rate" in page.text


def test_sliders_reach_every_grid_and_a_grid_has_every_cell(page):
    sliders = [json.loads(entries["data-entries"]) for entries in page.all("input")]
    assert sliders == [["a photo of sks dog on a beach", "the class prompt"], ["0", "1", "2"]]
    keys = {"-".join(map(str, key)) for key in itertools.product(*(range(len(entries)) for entries in sliders))}
    grids = [entries for entries in page.all("div") if "data-key" in entries]
    assert [grid["data-prompt"] for grid in grids] == [prompt for prompt in sliders[0] for _ in sliders[1]]
    assert {grid["data-key"] for grid in grids} == keys and len(grids) == len(keys)
    assert ["hidden" in grid for grid in grids] == [False] + [True] * (len(grids) - 1)
    pictures = [image for image in page.all("img") if image["src"].startswith("data:image/jpeg")]
    drawn = 18 - 3 - 1  # three failed, one was cut off
    assert len(pictures) == 2 * (drawn + 3)  # for each prompt also the base model, once a seed
    assert page.text.count("step 31 is not finite") == 3 * (1 + 2 + 1)  # the list, both prompts' grids, the cells


def test_the_width_of_an_open_interval_is_a_lower_bound(written):
    line = next(line for line in (written / "report.md").read_text().splitlines() if line.startswith("| 2-32 | 0.01"))
    assert re.search(r"≤ 0\.01 to 0\.01\d* \| ≥ 0\.\d", line)


# ---- checkpoints ----


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """A sweep of which checkpoints were scored, and a failed cell; and its report in the same folder."""
    folder = tmp_path_factory.mktemp("stepped")
    for rate, likenesses in (("0.01", {20: 0.3, 40: 0.4}), ("0.02", {20: 0.6, 40: 0.55})):
        write_checkpoints(write_cell(folder, {"learning_rate": rate}, 0.5, float(rate), pictures=1), likenesses, 1)
    write_ending(folder / "learning_rate=0.04", 2, "error: step 31 is not finite")
    write_report(folder, folder, Choice())
    return folder


def test_scores_are_drawn_over_the_steps_with_the_best_of_each(stepped):
    text = (stepped / "report.md").read_text()
    for measure in ("dino", "clip_t", "class_drift"):
        assert f"plots/checkpoints-{measure}.png" in text and (stepped / f"plots/checkpoints-{measure}.png").exists()
    section = text[text.index("## Over the training steps") :]
    head, _, first, second, failed = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    cells = [dict(zip(head.split("|"), row.split("|"))) for row in (first, second, failed)]
    assert [cell[" dino "].strip() for cell in cells] == ["60 (0.500)", "20 (0.600)", "-"]
    assert [cell[" class\\_drift "].strip() for cell in cells] == ["20 (0.027)", "60 (0.075)", "-"]


def test_every_scored_checkpoint_is_a_row_before_its_cell_s_own(stepped):
    rows = list(csv.DictReader(io.StringIO((stepped / "results.csv").read_text())))
    assert [(row["learning_rate"], row["step"], row["state"], row["dino"]) for row in rows] == [
        ("0.01", "20", "checkpoint", "0.3"), ("0.01", "40", "checkpoint", "0.4"), ("0.01", "60", "done", "0.5"),
        ("0.02", "20", "checkpoint", "0.6"), ("0.02", "40", "checkpoint", "0.55"), ("0.02", "60", "done", "0.5"),
        ("0.04", "", "failed", ""),
    ]  # fmt: skip
    (first, *_) = json.loads((stepped / "results.json").read_text())["cells"]
    assert [(entry["step"], entry["scores"]["dino"]) for entry in first["checkpoints"]] == [(20, 0.3), (40, 0.4)]


def test_a_slider_runs_over_the_steps_from_the_last_one(stepped):
    page = Page((stepped / "report.html").read_text())
    sliders = {tuple(json.loads(slider["data-entries"])): slider["value"] for slider in page.all("input")}
    assert sliders[("20", "40", "60")] == "2"
    shown = [entries["data-key"] for entries in page.all("div") if "data-key" in entries and "hidden" not in entries]
    assert shown == ["0-2"]


def test_steps_may_be_an_axis_of_heat_maps_and_pictures(stepped, tmp_path):
    choice = Choice(heatmap=["step", "learning_rate"], pictures=["learning_rate", "step"], scores=["dino"])
    write_report(stepped, tmp_path, choice)
    page = Page((tmp_path / "report.html").read_text())
    assert (tmp_path / "plots" / "heatmap-step-learning_rate-dino.png").exists()
    assert sum(entries.get("alt", "").startswith("0.01, 20: ") for entries in page.all("img")) == 2
    with pytest.raises(UserError, match="--over step"):
        write_report(stepped, tmp_path, Choice(over=["step"]))


# ---- sweeps of other forms ----


def test_a_sweep_that_has_not_begun_has_a_report(tmp_path):
    (tmp_path / "seed=1").mkdir()
    write_report(tmp_path, tmp_path, Choice())
    assert "1 unfinished" in Page((tmp_path / "report.html").read_text()).text
    assert "not begun" in (tmp_path / "results.csv").read_text()


def test_a_sweep_without_scores_is_compared_by_its_loss(tmp_path):
    for rate in ("0.01", "0.1"):
        write_cell(tmp_path, {"learning_rate": rate}, None, float(rate))
    write_report(tmp_path, tmp_path, Choice())
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        "stability-learning_rate-loss.png", "steps-loss.png", "steps-grad_norm.png",
    }  # fmt: skip


def test_a_report_removes_the_plots_that_it_does_not_make_any_more_and_nothing_else(tmp_path):
    for name in ("steps-loss", "old"):
        image = Image.new("RGB", (4, 4))
        (tmp_path / f"{name}.png").write_bytes(png_bytes(image, name="old"))
    Image.new("RGB", (4, 4)).save(tmp_path / "mine.png")
    (tmp_path / "copy-of-old.png").write_bytes((tmp_path / "old.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"")
    write_plots(tmp_path, [Plot("steps-loss", "", Image.new("RGB", (4, 4))), Plot("größe", "", image)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "steps-loss.png", "größe.png", "mine.png", "copy-of-old.png", "broken.png",
    }  # fmt: skip
    write_plots(tmp_path, [])
    assert {path.name for path in tmp_path.iterdir()} == {"mine.png", "copy-of-old.png", "broken.png"}


def test_methods_with_axes_of_their_own_are_lines_of_one_plot(tmp_path):
    for rate in ("0.01", "0.02"):
        write_cell(tmp_path, {"learning_rate": rate, "shape": "2-32", "seed": 0}, 0.5, 0.01, pictures=1)
        write_cell(tmp_path, {"learning_rate": rate, "shape": "4-16", "seed": 0}, 0.4, 0.01, 4, pictures=1)
        write_cell(tmp_path, {"learning_rate": rate, "lora_rank": "1", "seed": 0}, 0.45, 0.01, 1, pictures=1)
    write_ending(tmp_path / "learning_rate=0.02,lora_rank=2,seed=0", 1, "killed")
    write_report(tmp_path, tmp_path, Choice())
    page = Page((tmp_path / "report.html").read_text())
    assert all(line in page.text for line in ("shape 2-32", "shape 4-16", "lora_rank 1", "lora_rank 2"))
    shown = [image["alt"] for image in page.all("img") if image["src"].startswith("data:image/jpeg")]
    assert any(alt.startswith("-, 0.01") for alt in shown)  # a cell without a shape is not dropped


def test_a_second_round_has_its_own_tables_and_does_not_bias_the_others(tmp_path):
    folder = tmp_path / "sweep"
    folder.mkdir()
    (tmp_path / "grid.yaml").write_text(
        "script: t.py\nevaluate: {prompt: [a]}\naxes:\n  shape: {2-32: {}, 8-8: {}}\n  learning_rate: [0.01, 0.02]\n"
        "  subject: {dog: {}}\nbest: {axis: learning_rate, score: dino, axes: {subject: {dog: {}, cat: {}}}}\n"
    )
    grid = parse_grid(str(tmp_path / "grid.yaml"))
    rounds, _ = read_rounds(grid)
    write_rounds(folder, grid, rounds)
    dogs = {("2-32", "0.01"): 0.5, ("2-32", "0.02"): 0.4, ("8-8", "0.01"): 0.2, ("8-8", "0.02"): 0.3}
    for (shape, rate), dino in dogs.items():
        write_cell(folder, {"shape": shape, "learning_rate": rate, "subject": "dog"}, dino, float(rate))
    for shape, rate in (("2-32", "0.01"), ("8-8", "0.02")):  # cats are difficult
        write_cell(folder, {"shape": shape, "learning_rate": rate, "subject": "cat"}, 0.1, float(rate))
    # An earlier choice, from when the run at 0.01 had failed
    write_cell(folder, {"shape": "2-32", "learning_rate": "0.02", "subject": "cat"}, 0.9, 0.02)
    write_report(folder, folder, Choice(scores=["dino"]))
    text = (folder / "report.md").read_text()
    assert "| 2-32 | 0.01 | **0.01: 0.500**, 0.02: 0.400 |" in text
    assert re.search(r"\| 2-32 \| 0.01 \| 2 of 2 \| \*\*0.300 ± 0.283", text)
    assert re.search(r"\| 8-8 \| 0.02 \| 2 of 2 \| 0.200", text)
    compared = text[text.index("compare the first round's 4 cells") :]
    assert re.search(r"\| 2-32 \| 0.01 \| 0.500 \|.* 1 \|", compared)  # the best, by its dog
    assert compared.count("| 1 of 1 |") == 4 and "± 0" not in compared
    data = json.loads((folder / "results.json").read_text())
    (second,) = data["rounds"]
    scores = {cell["cell"]: cell["scores"].get("dino") for cell in data["cells"]}
    for setting in second["settings"]:
        assert setting["means"] == {rate: scores[cell] for rate, (cell,) in setting["first_round"].items()}
        assert setting["best"] == max(setting["means"], key=setting["means"].get)
        assert len(setting["second_round"]) == 2
    check_made_again(folder, tmp_path / "again", Choice(scores=["dino"]))
    page = Page((folder / "report.html").read_text())
    assert "Second round: the best learning_rate by dino" in page.text and "0.300 ± 0.283" in page.text
    assert share_of(Image.open(folder / "plots" / "heatmap-learning_rate-shape-dino.png"), "#d1242f") > 0


@pytest.mark.parametrize(
    "choice, words",
    [
        ({"over": ["sed"]}, "--over sed: .* learning_rate, shape, seed"),
        ({"heatmap": ["shape", "rank"]}, "--heatmap rank"),
        ({"pictures": ["shape", "shape"]}, "--pictures shape shape"),
        ({"scores": ["dnio"]}, "--scores dnio: .* dino"),
    ],
)
def test_what_the_sweep_lacks_is_refused_before_anything_is_written(choice, words, sweep, tmp_path):
    with pytest.raises(UserError, match=words):
        write_report(sweep, tmp_path / "report", Choice(**choice))
    assert not (tmp_path / "report").exists()


def test_a_damaged_picture_is_named(tmp_path):
    folder = write_cell(tmp_path, {"seed": 1}, 0.5, 0.01, pictures=1)
    (folder / "evaluation" / "images" / "adapted" / "00-0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    with pytest.raises(UserError, match="seed=1.*00-0.png"):
        write_report(tmp_path, tmp_path, Choice())


# ---- plots ----


def test_the_best_is_ringed_and_failures_are_hatched(sweep):
    records = read_sweep(sweep)
    picture = draw_heatmap(records, "learning_rate", "shape", DINO)
    ring, hatch = "#d1242f", "#b35900"
    assert share_of(picture, hatch) > 0.001
    across = np.flatnonzero((np.abs(np.asarray(picture).astype(int) - [0xD1, 0x24, 0x2F]).max(-1) < 12).any(0))
    assert across.max() < picture.width / 2  # the best rate is the lowest one
    done = [record for record in records if record.state == "done"]
    assert share_of(draw_heatmap(done, "learning_rate", "shape", DINO), hatch) == 0
    assert share_of(draw_heatmap(records[-1:], "learning_rate", "shape", DINO), ring) == 0


def test_plots_of_little_are_drawn(tmp_path):
    write_cell(tmp_path, {"learning_rate": "0.01"}, 0.5, 0.01)
    write_ending(tmp_path / "learning_rate=0.02", 1, "killed")
    records = read_sweep(tmp_path)
    numbers = axis_numbers(axes_of(records)["learning_rate"])
    assert share_of(draw_lines(records, "learning_rate", numbers, [], DINO), "#0969da") > 0
    assert draw_tradeoff(records, ["learning_rate"], [], MEASURES["parameters"], DINO) is not None
    assert draw_tradeoff(records[1:], ["learning_rate"], [], MEASURES["parameters"], DINO) is None


def test_names_cover_neither_points_nor_each_other(tmp_path, monkeypatch):
    for number in range(8):  # with more likeness, less truth to the prompt: none beats another
        write_cell(tmp_path, {"method": f"method_of_number_{number}"}, 0.5 + 0.01 * number, 0.01)
    records, measures = read_sweep(tmp_path), (MEASURES["clip_t"], DINO)
    figures = []
    monkeypatch.setattr("studies.plots.rendered", lambda figure: figures.append(figure) or rendered(figure))
    draw_tradeoff(records, ["method"], ["method"], *measures)
    [axes] = figures[0].axes
    names = [text.get_window_extent() for text in axes.texts]
    scores = [[record.scores[measure.name] for measure in measures] for record in records]
    points = axes.transData.transform(scores)
    assert len(names) >= 3
    assert not any(one.overlaps(other) for one, other in itertools.combinations(names, 2))
    assert not any(extent.contains(*point) for extent in names for point in points)
    assert axes.get_window_extent().height > 0.65 * HEIGHT * SHARP / DPI  # whatever the rows of the legend


# ---- the program ----


def test_the_program_says_what_it_wrote_or_what_is_wrong(sweep, tmp_path):
    def run(*arguments):
        command = [sys.executable, "scripts/report.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run(sweep, "--output_dir", tmp_path).returncode == 0 and (tmp_path / "report.html").exists()
    wrong = run(ROOT / "docs")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "docs is not a sweep" in wrong.stderr
