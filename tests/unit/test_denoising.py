"""The denoising loss and drift, against a plain loop over diffusers' own scheduler, VAE and UNet."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch.nn.functional import interpolate, mse_loss

from dreambooth.base_model.process import noise_process
from dreambooth.data.references import Reference, read_references
from dreambooth.errors import UserError
from dreambooth.scoring.denoising import PLAIN, Denoising, denoiser_of, draw_pairs, drift, encode_pictures
from kron_adapter import inject_kronecker
from tests.adapters import perturb
from tests.conftest import ROOT
from toyworld.tiny_pipeline import build_pipeline

PHOTOS = sorted((ROOT / "toyworld" / "photos" / "robot").glob("*.png"))
PROMPTS = ["a photo of sks robot", "a photo of robot"]
SHAPE = 64, 64
SIZES = [(128, 128), (160, 128), (128, 200)]  # (height, width) of the pictures below


@pytest.fixture(scope="module")
def pictures():
    """Three pictures, one of them wide and one high, two of them with masks."""
    images = [Image.open(path).convert("RGB").resize(size[::-1]) for path, size in zip(PHOTOS, SIZES)]
    mask = np.zeros((160, 128), np.uint8)
    mask[40:100, 30:90] = 255
    edge = np.zeros((128, 200), np.uint8)
    edge[:, :20] = 255  # outside the central square
    masks = [None, Image.fromarray(mask), Image.fromarray(edge)]
    return [Reference(path, *entry) for path, *entry in zip(PHOTOS, images, SIZES, masks)]


def denoising(pipeline, pictures, pairs=7, batch_size=3):
    shown = encode_pictures(pictures, SHAPE, pipeline.vae, "lanczos")
    of_class = encode_pictures(pictures[:2], SHAPE, pipeline.vae, "lanczos")
    process = noise_process(pipeline.scheduler, PLAIN)
    return Denoising(shown, of_class, process, pairs, batch_size, torch.device("cpu"))


def central_square(image, resample):
    """An image of 64 px: its shorter side scaled to that, and the middle of the longer one."""
    scale = 64 / min(image.size)
    image = image.resize([round(scale * side) for side in image.size], resample)
    left, top = (image.width - 64) // 2, (image.height - 64) // 2
    return np.asarray(image.crop((left, top, left + 64, top + 64)), np.float32)


@torch.no_grad()
def one_by_one(pipeline, pictures, prompt, kind, pairs=7):
    """(prediction, target, mask or None) of each row, one row at a time."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    drawn = draw_pairs(pairs, (4, 8, 8), 1000)
    rows = []
    for row in range(max(pairs, len(pictures))):
        picture, pair = pictures[row % len(pictures)], row % pairs
        pixels = torch.tensor(central_square(picture.image, Image.Resampling.LANCZOS)).permute(2, 0, 1)[None]
        latents = pipeline.vae.encode(pixels / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
        noise, timestep = drawn.noise[pair : pair + 1], drawn.timesteps[pair : pair + 1]
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timestep) if velocity else noise
        encoded = pipeline.encode_prompt(
            prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        added = {}
        if kind == "sdxl":
            (height, width), short = picture.size, 64 / min(picture.size)
            corner = [int(round(short * side) - 64) // 2 for side in (height, width)]
            times = torch.tensor([[height, width, *corner, 64, 64]], dtype=torch.float32)
            added = {"added_cond_kwargs": {"text_embeds": encoded[2], "time_ids": times}}
        noisy = scheduler.add_noise(latents, noise, timestep)
        prediction = pipeline.unet(noisy, timestep, encoder_hidden_states=encoded[0], **added).sample
        mask = picture.mask and torch.tensor(central_square(picture.mask, Image.Resampling.BILINEAR))[None, None] / 255
        rows.append((prediction, target, mask))
    return rows


@pytest.mark.parametrize("kind, prediction_type", [("sd", "epsilon"), ("sd", "v_prediction"), ("sdxl", "epsilon")])
def test_losses_and_drift_are_those_of_a_plain_loop(kind, prediction_type, pictures):
    pipeline = build_pipeline(kind, prediction_type)
    measured = denoising(pipeline, pictures)
    denoiser = denoiser_of(pipeline, PROMPTS, 75)
    before = measured.class_predictions(denoiser)
    perturb(inject_kronecker(pipeline.unet, 4, 64), 0.3)
    scores, change = measured.scores(denoiser), drift(before, measured.class_predictions(denoiser))

    rows = one_by_one(pipeline, pictures, PROMPTS[0], kind)
    whole = [mse_loss(prediction, target).item() for prediction, target, _ in rows]
    assert math.isclose(scores.whole, sum(whole) / len(rows), rel_tol=1e-4)
    inside = []
    for prediction, target, mask in rows:
        if mask is not None and mask.any():
            weights = interpolate(mask, size=(8, 8), mode="area")
            squares = (prediction - target).square().mean(1, keepdim=True)
            inside.append(((squares * weights).sum() / weights.sum()).item())
    assert len(inside) == 2 and math.isclose(scores.masked, sum(inside) / 2, rel_tol=1e-4)
    assert scores.of_subject == scores.masked != scores.whole

    adapted = [prediction for prediction, *_ in one_by_one(pipeline, pictures[:2], PROMPTS[1], kind)]
    base = build_pipeline(kind, prediction_type)
    intact = [prediction for prediction, *_ in one_by_one(base, pictures[:2], PROMPTS[1], kind)]
    changes = [mse_loss(now, then).item() for now, then in zip(adapted, intact, strict=True)]
    assert math.isclose(change, sum(changes) / len(changes), rel_tol=1e-3) and change > 1e-4


def test_the_same_numbers_come_out_again_and_whatever_else_is_random(pictures):
    pipeline = build_pipeline("sd")
    denoiser = denoiser_of(pipeline, PROMPTS, 75)
    first = denoising(pipeline, pictures).scores(denoiser)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert denoising(pipeline, pictures).scores(denoiser) == first
    assert torch.equal(torch.get_rng_state(), state)
    others = denoising(pipeline, pictures, batch_size=7).scores(denoiser)
    assert math.isclose(others.whole, first.whole, rel_tol=1e-5)


def test_every_picture_is_denoised_if_there_are_more_than_pairs(pictures):
    pipeline = build_pipeline("sd")
    denoiser = denoiser_of(pipeline, PROMPTS, 75)
    scores = denoising(pipeline, pictures, pairs=2).scores(denoiser)
    losses = [mse_loss(*row[:2]).item() for row in one_by_one(pipeline, pictures, PROMPTS[0], "sd", pairs=2)]
    assert len(losses) == 3 and math.isclose(scores.whole, sum(losses) / 3, rel_tol=1e-4)


def test_without_masks_and_class_pictures_there_is_nothing_to_say(pictures):
    pipeline = build_pipeline("sd")
    shown = encode_pictures(pictures[:1], SHAPE, pipeline.vae, "lanczos")
    measured = Denoising(shown, None, noise_process(pipeline.scheduler, PLAIN), 2, 2, torch.device("cpu"))
    denoiser = denoiser_of(pipeline, PROMPTS, 75)
    scores = measured.scores(denoiser)
    assert scores.masked is None and scores.of_subject == scores.whole
    assert drift(measured.class_predictions(denoiser), None) is None


def test_pairs_are_fixed_and_spread_over_all_timesteps():
    pairs, again = draw_pairs(64, (4, 2, 2), 1000), draw_pairs(64, (4, 2, 2), 1000)
    assert torch.equal(pairs.noise, again.noise) and torch.equal(pairs.timesteps, again.timesteps)
    for part, timestep in enumerate(pairs.timesteps.tolist()):
        assert part * 1000 / 64 - 1 < timestep < (part + 1) * 1000 / 64
    assert draw_pairs(3000, (1, 1, 1), 1000).timesteps.unique().tolist() == list(range(1000))
    assert abs(pairs.noise.std() - 1) < 0.05 and abs(pairs.noise.mean()) < 0.05


# ---- photos that were not trained on ----


def test_references_are_the_photos_of_a_folder_with_their_masks_or_its_last_ones(tmp_path):
    for number in range(4):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
    Image.new("L", (40, 30), 255).save(tmp_path / "3.mask.png")
    photos = read_references(str(tmp_path), "--reference_dir")
    assert [(photo.path.name, photo.size, photo.mask is None) for photo in photos] == [
        (f"{number}.png", (30, 40), number < 3) for number in range(4)
    ]
    held_out = read_references(str(tmp_path), "--instance_data_dir", 3)
    assert [photo.path.name for photo in held_out] == ["1.png", "2.png", "3.png"]
    with pytest.raises(UserError, match="--holdout 4: --instance_data_dir .* has 4 photos"):
        read_references(str(tmp_path), "--instance_data_dir", 4)
