"""What is measured on both models, the base model and then the adapted one: what they draw, and how they denoise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.process import noise_process
from dreambooth.base_model.source import load_scheduler
from dreambooth.data.references import of_image
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.kept_images import drawing_identity, load_or_draw
from dreambooth.drawing.pipelines import (
    Adapter,
    Reader,
    add_adapters,
    change_weights,
    load_base_pipeline,
    load_pipeline_with,
    prepare_drawing,
)
from dreambooth.errors import UserError
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.denoising import PLAIN, Denoising, DenoisingScores, denoiser_of, encode_pictures
from dreambooth.scoring.inputs import Photos
from dreambooth.scoring.prompts import ADAPTED, BASE, Prompts


@dataclass(frozen=True)
class Drawn:
    """What a model drew."""

    rows: list[list[Image.Image]]  # one for each prompt
    class_images: list[Image.Image]
    others: list[list[Image.Image]]  # one row for each prompt that does not name the subject


@dataclass(frozen=True)
class Denoised:
    """How a model denoised."""

    losses: DenoisingScores  # on the references
    of_class: Tensor | None  # its predictions for the class


@dataclass(frozen=True)
class Measured:
    """What was measured, by model: the base model and, if there are adapters, the adapted one."""

    drawn: dict[str, Drawn]
    denoised: dict[str, Denoised]  # empty if nothing is denoised


def measure(
    adapters: Sequence[Adapter],
    readers: Sequence[Reader],
    prompts: Prompts,
    photos: Photos,
    device: torch.device,
    config: EvaluationOptions,
) -> Measured:
    """Return what each model draws, which is saved too, and how it denoises. One pipeline is in memory at a time."""
    pipeline = ready(load_base_pipeline(config, DTYPES[config.dtype]), readers, device, config)
    drawn = {BASE: draw_model(drawing_base(pipeline, device, config), prompts, BASE, config)}
    denoising = prepare_denoising(pipeline, photos, drawn[BASE], config)
    denoised = {BASE: _denoise(denoising, pipeline, prompts, BASE, config)} if denoising else {}
    if adapters:
        if change_weights(adapters):
            del pipeline
            pipeline = load_pipeline_with(adapters, config, readers)
        else:
            add_adapters(pipeline, adapters, readers)
        pipeline = ready(pipeline, readers, device, config)
        drawn[ADAPTED] = draw_model(drawing(pipeline, config), prompts, ADAPTED, config)
        denoised |= {ADAPTED: _denoise(denoising, pipeline, prompts, ADAPTED, config)} if denoising else {}
    return Measured(drawn, denoised)


def ready(pipeline: Any, readers: Sequence[Reader], device: torch.device, config: EvaluationOptions) -> Any:
    """Return the pipeline on the device, ready to draw in silence and without a safety checker."""
    if "safety_checker" in pipeline.components:  # or black images would be scored
        pipeline.register_modules(safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prepare_drawing(pipeline.to(device), readers, config)
    return pipeline


# ---- drawing ----


Draw = Callable[[str, Sequence[int]], list[Image.Image]]  # prompt, seeds -> an image for each seed


def drawing(pipeline: Any, config: EvaluationOptions) -> Draw:
    """Return what draws with the pipeline."""

    def draw(prompt: str, seeds: Sequence[int]) -> list[Image.Image]:
        return draw_images(pipeline, seeds, config.batch_size, prompt=prompt, **config.common_arguments())

    return draw


def drawing_base(pipeline: Any, device: torch.device, config: EvaluationOptions) -> Draw:
    """Return what draws with the base model, and takes images from --base_images_cache that were drawn before."""
    draw = drawing(pipeline, config)
    if config.base_images_cache is None:
        return draw
    folder, identity = Path(config.base_images_cache), drawing_identity(config, device)
    return lambda prompt, seeds: load_or_draw(folder, identity, prompt, seeds, lambda: draw(prompt, seeds))


def draw_model(draw: Draw, prompts: Prompts, model: str, config: EvaluationOptions) -> Drawn:
    """Draw and save a model's images; without an adapter only those of the subject, since nothing else drifts."""
    folder = Path(config.output_dir) / "images" / model
    folder.mkdir(parents=True, exist_ok=True)

    def images_of(prompt: str, count: int, name: str) -> list[Image.Image]:
        seeds = range(config.seed, config.seed + count)
        images = draw(prompt, seeds)
        for seed, image in zip(seeds, images):
            image.save(folder / f"{name}-{seed}.png")
        return images

    def rows_of(texts: Sequence[str], kind: str, prefix: str) -> list[list[Image.Image]]:
        progress = tqdm(texts, desc=f"{kind}, {model}", unit="prompt", disable=not texts)
        return [images_of(text, config.num_images, f"{prefix}{number:02d}") for number, text in enumerate(progress)]

    others = [other.text for other in prompts.others] if config.adapter else []
    return Drawn(
        rows_of(prompts.drawn[model], "Images", ""),
        images_of(prompts.of_class, config.num_class_images if config.adapter else 0, "class"),
        rows_of(others, "Other prompts", "other-"),
    )


# ---- denoising ----


def prepare_denoising(pipeline: Any, photos: Photos, base: Drawn, config: EvaluationOptions) -> Denoising | None:
    """Return what the models denoise, references and class images, in the size of what the base model has drawn.

    None without references. Class images are those that the user has, or those in `base`.
    """
    if not (photos.untrained and config.denoising_pairs):
        return None
    width, height = base.rows[0][0].size
    of_class = photos.of_class or [of_image(image) for image in base.class_images]
    pictures = encode_pictures(photos.untrained, (height, width), pipeline.vae)
    class_pictures = encode_pictures(of_class, (height, width), pipeline.vae) if of_class else None
    process = noise_process(load_scheduler(config), PLAIN)
    return Denoising(pictures, class_pictures, process, config.denoising_pairs, config.batch_size, pipeline.device)


def _denoise(denoising: Denoising, pipeline: Any, prompts: Prompts, model: str, config: EvaluationOptions) -> Denoised:
    """Return how a model denoises. Raises UserError if its losses are not finite."""
    texts = [f"a photo of {prompts.subjects[model]}", prompts.of_class]
    denoiser = denoiser_of(pipeline, texts, config.max_token_length)
    losses = denoising.scores(denoiser)
    if not math.isfinite(losses.whole):
        raise UserError(
            f"what the {model} model predicts for held-out photos is not finite in --dtype {config.dtype}; try fp32"
        )
    return Denoised(losses, denoising.class_predictions(denoiser))
