"""--score_photos: how prompts and training change the loss on each photo; the same if resumed, and training as ever."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

import train_dreambooth_kronecker as script
from dreambooth.base_model.process import noise_process
from dreambooth.data.references import read_references
from dreambooth.scoring.denoising import PLAIN, Denoising, denoiser_of, encode_pictures
from kron_adapter import load_kronecker
from tests.conftest import WEIGHTS, assert_same, factors


@pytest.fixture
def options(options, monkeypatch):
    monkeypatch.setattr("dreambooth.report.photos.PAIRS", 6)
    drawn = {"validation_prompt": "sks dog", "validation_num_inference_steps": 1, "num_validation_images": 1}
    return options | drawn | {"optimizer": "ScheduleFreeAdamW", "learning_rate": 0.02, "checkpointing_steps": 2}


def losses_by_pipeline(options, weights):
    """name -> the two relative losses, by the pipeline, one photo after the other."""
    pipeline = StableDiffusionPipeline.from_pretrained(options["pretrained_model_name_or_path"])
    photos = read_references(str(options["instance_data_dir"]), "--instance_data_dir")
    process, device = noise_process(pipeline.scheduler, PLAIN), torch.device("cpu")

    def losses(prompt):
        denoiser = denoiser_of(pipeline, [prompt], 75)
        pictures = [encode_pictures([photo], (64, 64), pipeline.vae) for photo in photos]
        return [Denoising(picture, None, process, 6, 4, device).losses(denoiser).whole for picture in pictures]

    base, unprompted = losses(options["instance_prompt"]), losses("")
    load_kronecker(pipeline, weights)
    trained = losses(options["instance_prompt"])
    pairs = [
        ((own / plain).mean().item(), (after / own).mean().item())
        for own, plain, after in zip(base, unprompted, trained, strict=True)
    ]
    return dict(zip((photo.path.name for photo in photos), pairs, strict=True))


@pytest.mark.parametrize("cropped", ["center_crop", "cache_latents"])
def test_losses_are_those_of_the_saved_result_and_change_nothing_else(cropped, options, run_main, tmp_path):
    options |= {"center_crop": True} if cropped == "center_crop" else {"cache_latents": "off"}
    whole, parts, plain = (options | {"output_dir": tmp_path / name} for name in ("whole", "parts", "plain"))
    run_main(script, **whole, score_photos=True)
    scored = json.loads((whole["output_dir"] / "photos.json").read_text())
    found = {photo["name"]: (photo["loss_with_prompt"], photo["loss_after_training"]) for photo in scored["photos"]}
    by_pipeline = losses_by_pipeline(options, whole["output_dir"] / WEIGHTS)
    assert found.keys() == by_pipeline.keys() and scored["pairs"] == 6
    for name, pair in found.items():
        assert pair == pytest.approx(by_pipeline[name], rel=1e-4)
    assert len({ratio for pair in found.values() for ratio in pair}) == 10

    if cropped == "center_crop":
        run_main(script, **parts | {"max_train_steps": 2}, score_photos=True)
        assert json.loads((parts["output_dir"] / "photos.json").read_text()) != scored
        run_main(script, **parts, score_photos=True, resume_from_checkpoint="latest")
        assert json.loads((parts["output_dir"] / "photos.json").read_text()) == scored
        page = parts["output_dir"] / "samples" / "index.html"
        assert "step 4" in page.read_text() and "04.jpg" in page.read_text()
    else:
        run_main(script, **plain)
        assert not (plain["output_dir"] / "photos.json").exists()
        assert_same(factors(plain["output_dir"]), factors(whole["output_dir"]))
