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
    "axes": {"seed": [0, 1]},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, once):
    """The folder of a finished sweep."""
    return once("sweep", lambda: run_sweep(tmp_path_factory.mktemp("sweep")))


def run_sweep(folder):
    grid = {**GRID, "options": {**GRID["options"], "class_data_dir": str(folder / "class-images")}}
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    environment = {**os.environ, "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"}
    command = [str(ROOT / "scripts" / "sweep.sh"), str(folder / "grid.yaml"), "--output_dir", str(folder / "seeds")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "seeds"


def test_every_cell_is_an_ordinary_run_with_scores(sweep):
    scores = [json.loads((sweep / f"seed={seed}" / "evaluation" / "scores.json").read_text()) for seed in (0, 1)]
    assert all(-1 <= score["models"]["adapted"]["dino"] <= 1 for score in scores)
    assert scores[0]["settings"]["adapter"] == [str(sweep / "seed=0" / "pytorch_kronecker_weights.safetensors")]
    assert (sweep / "seed=1" / "README.md").exists()


def test_a_run_sums_itself_up_for_programs(sweep):
    summary = json.loads((sweep / "seed=0" / "summary.json").read_text())
    assert summary["method"] == "kronecker" and summary["result"] == "pytorch_kronecker_weights.safetensors"
    assert summary["parameters"] == 13_696 and summary["steps"] == 2 and summary["processes"] == 1
    rows = [json.loads(line) for line in (sweep / "seed=0" / "metrics.jsonl").read_text().splitlines()]
    assert summary["seconds"] == pytest.approx(sum(row["step_time"] for row in rows), abs=1e-3)
    assert 2**20 < summary["peak_memory"] < 2**34
    assert summary["versions"]["torch"] and summary["device"].startswith("cpu")


def test_cells_share_class_images_and_encodings(sweep):
    assert [path.name for path in sorted((sweep.parent / "class-images").glob("*.png"))] == [
        "class-000000.png",
        "class-000001.png",
    ]
    assert Image.open(sweep.parent / "class-images" / "class-000000.png").text[PROMPT_KEY] == "a photo of dog"
    assert "Drawing" in (sweep / "seed=0" / "sweep.log").read_text()
    assert "Drawing" not in (sweep / "seed=1" / "sweep.log").read_text()
    assert list((sweep / "shared").glob("*.safetensors"))
    (image,) = (sweep / "shared").glob("*.png")  # of the base model, which both are compared with
    base = [Image.open(sweep / f"seed={seed}" / "evaluation" / "images" / "base" / "00-0.png") for seed in (0, 1)]
    assert Image.open(image).tobytes() == base[0].tobytes() == base[1].tobytes()
