"""The parts of benchmarks/gpu.py: which program each runs, for how long at most, and its rows of the table."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import ratios, spread  # and nothing that makes a context on the GPU, which would take memory

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("Kronecker (4, 64)", "PEFT LoRA r=4", "Kronecker (16, 16)", "PEFT LoKr")  # in this order if time is short
RECIPES = (8, 12, 24, 80)  # GB
SD15, SDXL = "SD 1.5 512 px", "SDXL 1024 px"
GIB = 2**30
JUNIT = "tests.xml"
TESTS = str(ROOT / "tests" / "gpu")

# The arguments of the programs: in the sizes that people train and draw in, and in little on a CPU, where nothing is
# compiled.
REAL: dict[str, tuple[str, ...]] = {
    "tests": (TESTS,),
    f"step, {SD15}": ("--architecture", "sd15", "--rounds", "20"),
    f"step, {SDXL}": ("--architecture", "sdxl", "--rounds", "10"),
    "compiled": ("--compile", "--prepare_seconds", "40"),
    "random SDXL": ("sdxl",),
    "recipe": (),
    f"drawing, {SD15}": ("--architecture", "sd15", "--images", "4"),
    f"drawing, {SDXL}": ("--architecture", "sdxl", "--images", "1", "--rounds", "3"),
}
ON_CPU = ("--device", "cpu", "--dtype", "fp32", "--rounds", "1")
SMALL_IMAGE = ("--images", "1", "--num_inference_steps", "1", "--resolution", "64")
LITTLE: dict[str, tuple[str, ...]] = {
    "tests": (f"{TESTS}/test_unet.py",),  # the quickest
    f"step, {SD15}": ("--architecture", "tiny", "--latents", "4", *ON_CPU),
    f"step, {SDXL}": ("--architecture", "tiny-sdxl", "--latents", "4", *ON_CPU),
    "compiled": ("--prepare_seconds", "40"),
    "random SDXL": ("tiny-sdxl", "--device", "cpu"),
    "recipe": ("--steps", "3", "--resolution", "64"),
    f"drawing, {SD15}": ("--architecture", "tiny", *SMALL_IMAGE, *ON_CPU),
    f"drawing, {SDXL}": ("--architecture", "tiny-sdxl", *SMALL_IMAGE, *ON_CPU),
}


@dataclass(frozen=True)
class Row:
    """One line of the table, a part's name apart."""

    what: str
    figure: str = ""
    ratio: str = ""
    allocated: float | None = None  # bytes, as the next
    reserved: float | None = None
    result: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Part:
    """A program with its arguments, but for --output_dir."""

    name: str
    program: str  # a module of this folder, or pytest
    words: tuple[str, ...]
    seconds: float  # after which it is ended
    read: Callable[[Path], list[Row]]  # its rows, from the folder that it wrote to


def parts(scratch: Path, dry_run: bool) -> list[Part]:
    """Return all parts, in the order in which they are worth most. What has to be compiled may take long: last."""
    words, base = LITTLE if dry_run else REAL, str(scratch / "random-sdxl")
    peers = ("--peers", *PEERS)

    def recipe(gb: int) -> Part:
        name = f"sdxl-{gb}gb.yaml"
        given = (str(ROOT / "configs" / name), "--pretrained_model_name_or_path", base, *words["recipe"])
        return Part(f"recipe {name}", "recipes", given, 100 if gb == 80 else 60, recipe_rows)

    def step(model: str, name: str, seconds: float, *more: str) -> Part:
        return Part(name, "unet_step", (*words[f"step, {model}"], *more, *peers), seconds, step_rows)

    def drawing(model: str) -> Part:
        return Part(f"drawing, {model}", "drawing", words[f"drawing, {model}"], 80, drawing_rows)

    return [
        Part("tests", "pytest", (*words["tests"], "-m", "gpu", "--verbose"), 150, test_rows),
        step(SDXL, f"step, {SDXL}", 80),
        step(SD15, f"step, {SD15}", 60),
        Part("random SDXL", "random_models", (*words["random SDXL"], base), 60, written_row),
        *map(recipe, RECIPES),
        drawing(SD15),
        drawing(SDXL),
        step(SD15, f"compiled step, {SD15}", 80, *words["compiled"]),
        step(SDXL, f"compiled step, {SDXL}", 80, *words["compiled"]),
    ]


def measurements(folder: Path) -> Any:
    """Return what a program measured, from the JSON file that it wrote."""
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))["measurements"]


def step_rows(folder: Path) -> list[Row]:
    """One row for each peer. Allocated: the weights, what it holds between steps, and a step's peak beyond both."""
    found = measurements(folder)
    first, *_ = found["milliseconds"].values()
    rows = []
    for peer, times in found["milliseconds"].items():
        allocated = found["weights_bytes"] + found["held_bytes"][peer] + found["peak_bytes"][peer]
        rows.append(Row(peer, f"{spread(times, 1)} ms", spread(ratios(times, first), 3), allocated))
    for peer, error in found["failed"].items():
        ours = peer.startswith("Kronecker")  # what others cannot do is worth knowing, and no fault of this project
        rows.append(Row(peer, result=error if ours else f"does not run: {error}", failed=ours))
    return rows


def written_row(folder: Path) -> list[Row]:
    return [Row("folder for the recipes", result="written")]


def recipe_rows(folder: Path) -> list[Row]:
    found = measurements(folder)
    result = found["problem"] or ("no limit" if found["limit_bytes"] is None else f"fits {found['gib']} GiB")
    figure = f"{spread(found['step_seconds'], 2)} s"
    memory = found["allocated"], found["reserved"]
    return [Row(f"for {found['gib']} GB", figure, "", *memory, result, failed=found["problem"] is not None)]


def drawing_rows(folder: Path) -> list[Row]:
    speeds = measurements(folder)["images_per_second"]
    first, *_ = speeds.values()
    return [Row(way, f"{spread(own, 2)} images/s", spread(ratios(own, first), 3)) for way, own in speeds.items()]


def test_rows(folder: Path) -> list[Row]:
    """One row for each test, from pytest's report."""
    return [_test_row(case) for case in ElementTree.parse(folder / JUNIT).iter("testcase")]


def _test_row(case: ElementTree.Element) -> Row:
    what = case.get("name", "").removeprefix("test_").replace("_", " ")
    figure = f"{float(case.get('time', 0)):.1f} s"
    for outcome in case:
        if outcome.tag in ("failure", "error", "skipped"):
            message = outcome.get("message", "").partition("\n")[0]
            result = f"{'skipped' if outcome.tag == 'skipped' else 'failed'}: {message}"
            return Row(what, figure, result=result, failed=outcome.tag != "skipped")
    return Row(what, figure, result="passed")


def cells(part: str, row: Row) -> list[str]:
    """Return a row as the table has it."""
    memory = ("" if size is None else f"{size / GIB:.2f}" for size in (row.allocated, row.reserved))
    result = row.result.replace("|", r"\|")
    return [part, row.what, row.figure, row.ratio, *memory, f"failed: {result}" if row.failed else result]


HEADER = ["part", "what", "figure", "to the first", "allocated, GiB", "reserved, GiB", "result"]
