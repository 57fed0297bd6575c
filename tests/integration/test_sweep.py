"""A sweep of real trainings, each scored. What can go wrong with one is in tests/faults/test_sweeps.py."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dreambooth.drawing.class_images import PROMPT_KEY
from tests.conftest import ROOT

TOY = "toyworld/models"
GRID = {
    "script": "train_dreambooth_kronecker.py",
    "config": "configs/quickstart.yaml",
    "options": {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "train_batch_size": 1,
        "validation_prompt": None,
        "prior_source": "images",
        "num_class_images": 2,
        "prior_num_inference_steps": 2,
    },
    "evaluate": {
        "class_noun": "dog",
        "prompt": ["a photo of {} on a beach"],
        "num_images": 1,
        "num_class_images": 0,
        "num_inference_steps": 2,
        "clip_model": f"{TOY}/clip",
        "dino_model": f"{TOY}/dino",
    },
    "axes": {"learning_rate": [0.01, 0.02], "seed": [0]},
    "best": {
        "axis": "learning_rate",
        "score": "dino",
        "axes": {"seed": {"1": {"seed": 1, "evaluate_checkpoints": True}}},
    },
}
FIRST = ("learning_rate=0.01,seed=0", "learning_rate=0.02,seed=0")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The folder of a finished sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    grid = {**GRID, "options": {**GRID["options"], "class_data_dir": str(folder / "class-images")}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    environment = {**os.environ, "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "scripts" / "sweep.sh"), str(folder / "grid.yaml"), "--output_dir", str(folder / "rates")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "rates"


def dino(sweep, cell):
    scores = json.loads((sweep / cell / "evaluation" / "scores.json").read_text())
    assert scores["settings"]["adapter"] == [str(sweep / cell / "pytorch_kronecker_weights.safetensors")]
    return scores["models"]["adapted"]["dino"]


def test_every_cell_is_an_ordinary_run_with_scores(sweep):
    assert all(-1 <= dino(sweep, cell) <= 1 for cell in FIRST)
    assert all((sweep / cell / "README.md").exists() for cell in FIRST)


def test_the_best_cell_runs_with_another_seed_too(sweep):
    best = max(FIRST, key=lambda cell: dino(sweep, cell)).replace("seed=0", "seed=1")
    assert {path.parent.name for path in sweep.glob("*/summary.json")} == {*FIRST, best}
    assert -1 <= dino(sweep, best) <= 1


def test_a_checkpoint_is_scored_as_the_result_is_and_the_last_is_the_result(sweep):
    cell = sweep / max(FIRST, key=lambda cell: dino(sweep, cell)).replace("seed=0", "seed=1")
    assert [path.name for path in (cell / "evaluation").glob("checkpoint-*")] == ["checkpoint-1"]
    at_1, result = (
        json.loads((cell / "evaluation" / folder / "scores.json").read_text()) for folder in ("checkpoint-1", ".")
    )
    assert at_1["settings"]["adapter"] == [str(cell / "checkpoint-1" / "pytorch_kronecker_weights.safetensors")]
    assert at_1["models"]["base"] == result["models"]["base"]
    assert at_1["models"]["adapted"] != result["models"]["adapted"]
    assert [*(sweep / FIRST[0] / "evaluation").glob("checkpoint-*")] == []


def test_a_run_sums_itself_up_for_programs(sweep):
    summary = json.loads((sweep / FIRST[0] / "summary.json").read_text())
    assert summary["method"] == "kronecker" and summary["result"] == "pytorch_kronecker_weights.safetensors"
    assert summary["parameters"] == 13_184 and summary["steps"] == 2 and summary["processes"] == 1
    rows = [json.loads(line) for line in (sweep / FIRST[0] / "metrics.jsonl").read_text().splitlines()]
    assert summary["seconds"] == pytest.approx(sum(row["step_time"] for row in rows), abs=1e-3)
    assert 2**20 < summary["peak_memory"] < 2**34
    assert summary["file_size"] == (sweep / FIRST[0] / summary["result"]).stat().st_size
    assert summary["versions"]["torch"] and summary["device"].startswith("cpu")


def test_scores_are_where_the_training_was_logged(sweep):
    for cell in FIRST:
        (scores,) = (sweep / cell).rglob("events.out.tfevents.*.scores")
        assert b"scores/dino" in scores.read_bytes()
        assert len(list(scores.parent.iterdir())) == 2  # the training's, in the same run


def test_cells_share_class_images_and_encodings(sweep):
    assert [path.name for path in sorted((sweep.parent / "class-images").glob("*.png"))] == [
        "class-000000.png",
        "class-000001.png",
    ]
    assert Image.open(sweep.parent / "class-images" / "class-000000.png").text[PROMPT_KEY] == "a photo of dog"
    assert "Drawing" in (sweep / FIRST[0] / "sweep.log").read_text()
    assert "Drawing" not in (sweep / FIRST[1] / "sweep.log").read_text()
    assert list((sweep / "shared").glob("*.safetensors"))
    (image,) = (sweep / "shared").glob("*.png")  # of the base model, which both are compared with
    base = [Image.open(sweep / cell / "evaluation" / "images" / "base" / "00-0.png") for cell in FIRST]
    assert Image.open(image).tobytes() == base[0].tobytes() == base[1].tobytes()
