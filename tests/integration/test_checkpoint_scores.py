"""--score_checkpoints: scores as of the saved files, the best kept, and training as without it."""

import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline

import train_dreambooth_kronecker as script
from dreambooth.base_model.process import noise_process
from dreambooth.data.references import read_references
from dreambooth.scoring.denoising import PLAIN, Denoising, denoiser_of, drift, encode_pictures
from kron_adapter import load_kronecker
from tests.conftest import WEIGHTS, assert_same, factors, metrics

SCORED = {"held_out_loss", "drift"}


@pytest.fixture
def options(options, monkeypatch):
    """Optimizer steps at one point, results at another: scores are those of the results."""
    monkeypatch.setattr("dreambooth.report.scores.PAIRS", 6)
    more = {"optimizer": "ScheduleFreeAdamW", "learning_rate": 0.02, "checkpointing_steps": 2, "max_train_steps": 5}
    prior = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of dog"}
    return options | more | prior | {"holdout": 2}


def scores(output):
    return [row for row in metrics(output) if SCORED & row.keys()]


def measured(options, weights):
    """(loss, drift) of a saved result, by the pipeline."""
    pipeline = StableDiffusionPipeline.from_pretrained(options["pretrained_model_name_or_path"])
    photos = read_references(str(options["instance_data_dir"]), "--instance_data_dir", options["holdout"])
    pictures = encode_pictures(photos, (64, 64), pipeline.vae, "lanczos")
    measure = Denoising(pictures, pictures, noise_process(pipeline.scheduler, PLAIN), 6, 4, torch.device("cpu"))
    denoiser = denoiser_of(pipeline, [options["instance_prompt"], options["class_prompt"]], 75)
    before = measure.class_predictions(denoiser)
    load_kronecker(pipeline, weights)
    return measure.scores(denoiser).whole, drift(before, measure.class_predictions(denoiser))


def test_scores_are_those_of_the_saved_results_and_change_nothing_else(options, run_main, tmp_path):
    whole, plain, parts = (options | {"output_dir": tmp_path / name} for name in ("whole", "plain", "parts"))
    run_main(script, **whole, score_checkpoints=True)
    output = whole["output_dir"]
    rows = scores(output)
    assert [row["step"] for row in rows] == [2, 4, 5] and all(row.keys() == {"step", *SCORED} for row in rows)
    results = {step: output / f"checkpoint-{step}" / WEIGHTS for step in (2, 4)} | {5: output / WEIGHTS}
    for row in rows:
        loss, change = measured(options, results[row["step"]])
        assert math.isclose(row["held_out_loss"], loss, rel_tol=1e-5)
        assert math.isclose(row["drift"], change, rel_tol=1e-3) and change > 0
    best = min(rows, key=lambda row: row["held_out_loss"])
    score = json.loads((output / "best" / "score.json").read_text())
    assert (score["step"], score["held_out_loss"]) == (best["step"], best["held_out_loss"])
    assert (output / "best" / WEIGHTS).read_bytes() == results[best["step"]].read_bytes()
    card = (output / "README.md").read_text()
    assert f"result of step {best['step']}," in card and f"{best['held_out_loss']:.4f}" in card

    run_main(script, **plain)
    assert_same(factors(plain["output_dir"]), factors(output))
    assert not (plain["output_dir"] / "best").exists() and not scores(plain["output_dir"])

    # Interrupted after step 4, and resumed from step 2
    run_main(script, **parts | {"max_train_steps": 4}, score_checkpoints=True)
    run_main(script, **parts, score_checkpoints=True, resume_from_checkpoint="checkpoint-2")
    assert scores(parts["output_dir"]) == rows
    assert_same(factors(parts["output_dir"]), factors(output))
    assert json.loads((parts["output_dir"] / "best" / "score.json").read_text()) == score
    assert_same(factors(parts["output_dir"] / "best"), factors(output / "best"))


def test_scoring_needs_photos_that_are_not_trained_on(options, run_main, capsys):
    with pytest.raises(SystemExit):
        run_main(script, **options | {"holdout": 0}, score_checkpoints=True)
    assert (
        "--score_checkpoints needs photos that are not trained on: --holdout or --reference_dir"
        in capsys.readouterr().err
    )
    for change, words in {
        ("holdout", 5): "--holdout 5: --instance_data_dir .* has 5 photos",
        ("reference_dir", "nowhere"): "--reference_dir nowhere: there is no such folder",
    }.items():
        with pytest.raises(ValueError, match=words):
            run_main(script, **options | dict([change]), score_checkpoints=True)


def test_a_reference_that_is_trained_on_is_refused(options, run_main):
    with pytest.raises(
        ValueError, match="--reference_dir: 00.jpg is the same picture as 00.jpg in --instance_data_dir"
    ):
        run_main(script, **options, score_checkpoints=True, reference_dir=options["instance_data_dir"])
