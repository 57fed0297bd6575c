"""Two subjects of different classes through the real commands: training, resuming, scoring."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open

import train_dreambooth_kronecker as sd
from scripts import evaluate
from tests.conftest import WEIGHTS, assert_same, draw_photos, factors, launch, metrics

SUBJECTS = {
    "dog": {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog"},
    "robot": {"instance_prompt": "a photo of ohwx robot", "class_prompt": "a photo of robot"},
}


@pytest.fixture
def options(options, prior, tmp_path):
    """A short run on three photos of a dog and one of a robot, with two images of each class."""
    for name, count in (("dog", 3), ("robot", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        draw_photos(tmp_path / "photos" / name, count)
    (tmp_path / "subjects.yaml").write_text(yaml.safe_dump(SUBJECTS))
    del options["instance_prompt"], prior["class_prompt"]
    own = {"instance_data_dir": tmp_path / "photos", "subjects": tmp_path / "subjects.yaml", "num_class_images": 2}
    return {**options, **prior, **own, "kron_init": "contrast"}


def test_two_subjects_train_resume_and_are_scored(options, run_main, quick_evaluation, tmp_path, capfd):
    result = launch("train_dreambooth_kronecker.py", **options, checkpointing_steps=2)
    assert result.returncode == 0, result.stderr
    assert "4 photos of 2 subjects; 4 class images; 4 steps = 0.7 passes of 6 samples" in result.stdout
    assert "WARNING" not in result.stderr
    drawn = {path.parent.name: Image.open(path).text for path in (tmp_path / "class").glob("*/class-000001.png")}
    assert {name: text["class_prompt"] for name, text in drawn.items()} == {
        "a-photo-of-dog": "a photo of dog",
        "a-photo-of-robot": "a photo of robot",
    }
    trained = factors(options["output_dir"])
    with safe_open(options["output_dir"] / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["kronecker.instance_prompt"] == "a photo of sks dog; a photo of ohwx robot"
    assert json.loads(metadata["kronecker.config"])["subjects"] == SUBJECTS
    card = (options["output_dir"] / "README.md").read_text()
    assert "2 subjects" in card and "`a photo of ohwx robot`" in card

    # Resumed from its own config file, which holds the subjects, it ends with the same bits
    del options["subjects"]
    (tmp_path / "subjects.yaml").unlink()
    config = options["output_dir"] / "config.yaml"
    run_main(sd, config=config, resume_from_checkpoint=options["output_dir"] / "checkpoint-2")
    assert_same(factors(options["output_dir"]), trained)
    assert [row["step"] for row in metrics(options["output_dir"])] == [1, 2, 3, 4]

    (tmp_path / "subjects.yaml").write_text(yaml.safe_dump(SUBJECTS))
    scored = tmp_path / "scored"
    run_main(
        evaluate,
        adapter=options["output_dir"] / WEIGHTS,
        instance_data_dir=options["instance_data_dir"],
        subjects=tmp_path / "subjects.yaml",
        prompt="a red {}",
        together="a photo of {dog} and {robot}",
        output_dir=scored,
        **quick_evaluation,
    )
    likeness = json.loads((scored / "scores.json").read_text())["likeness"]
    assert list(likeness["photos"]) == ["dog", "robot"]
    for name in ("dog", "robot"):
        own = json.loads((scored / name / "scores.json").read_text())
        assert (
            own["models"]["adapted"]["by_prompt"][0]["prompt"] == f"a red {'sks' if name == 'dog' else 'ohwx'} {name}"
        )
        assert own["models"]["adapted"]["dino"] == pytest.approx(likeness["adapted"][name][name]["dino"], abs=1e-5)
    assert set(likeness["adapted"]["together"]) == {"dog", "robot"}
    assert np.isfinite(likeness["adapted"]["together"]["dog"]["dino"])
    printed = capfd.readouterr().out
    assert "adapted: together" in printed and "DINO to the photos of" in printed


@pytest.mark.parametrize("missing", ["folder", "photos"])
def test_a_subject_without_photos_is_refused_before_the_base_model_is_looked_for(options, missing, run_main, tmp_path):
    (tmp_path / "photos" / "robot" / "00.jpg").unlink()
    if missing == "folder":
        (tmp_path / "photos" / "robot").rmdir()
    with pytest.raises(Exception, match="--subjects, robot: --instance_data_dir .*robot"):
        run_main(sd, **{**options, "pretrained_model_name_or_path": tmp_path / "none"})
