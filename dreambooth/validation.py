"""Sample images: drawn from the encoded prompts, laid out as one labelled sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dreambooth.config import TrainingConfig
from dreambooth.data import Stream, seed_of
from dreambooth.training import steps_per_epoch

CELL = 192  # px; smaller images are enlarged to be seen
LABEL = 28  # px


def validation_due(
    step: int, total_steps: int, num_instances: int, config: TrainingConfig, accelerator: Accelerator
) -> bool:
    """Whether this process draws samples after this optimizer step: every so often, and after the last."""
    epoch_steps = steps_per_epoch(num_instances, config, accelerator.num_processes)
    every = config.validation_steps or config.validation_epochs * epoch_steps
    wanted = bool(config.validation_prompt) and (step % every == 0 or step == total_steps)
    return wanted and accelerator.is_main_process


def draw_samples(
    pipeline: DiffusionPipeline, embeddings: dict[str, Tensor], prompts: Sequence[str], config: TrainingConfig
) -> list[list[Image.Image]]:
    """Return a row of images for each validation prompt. Seeds are fixed, so that successive sheets compare.

    `embeddings` holds one row for each of `prompts`, under the names of the pipeline's arguments; the prompt "" is
    the unconditional one.
    """
    pipeline.set_progress_bar_config(disable=True)
    unconditional = prompts.index("")
    rows = []
    for number, prompt in enumerate(config.validation_prompt):
        row = prompts.index(prompt)
        conditions = {name: tensor[row : row + 1] for name, tensor in embeddings.items()}
        conditions |= {f"negative_{name}": tensor[unconditional][None] for name, tensor in embeddings.items()}
        seeds = [
            seed_of(config.seed, Stream.VALIDATION, number * config.num_validation_images + i)
            for i in range(config.num_validation_images)
        ]
        images = pipeline(
            **conditions,
            height=config.resolution,
            width=config.resolution,
            num_images_per_prompt=len(seeds),
            num_inference_steps=config.validation_num_inference_steps,
            guidance_scale=config.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        rows.append(images)
    return rows


def save_samples(
    accelerator: Accelerator, rows: Sequence[Sequence[Image.Image]], step: int, config: TrainingConfig
) -> Path:
    """Write OUTPUT_DIR/samples/step-NNNNNN.png and send it to the trackers; return its path."""
    sheet = draw_sheet(rows, config.validation_prompt, title=f"step {step}")
    path = Path(config.output_dir) / "samples" / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({"samples": [sheet]}, step=step)
    return path


def draw_sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], title: str = "") -> Image.Image:
    """Return one picture: a row of images under each label, the title above all."""
    cells = [[_enlarged(image) for image in row] for row in rows]
    width = max(sum(cell.width + 4 for cell in row) for row in cells)
    heights = [max(cell.height for cell in row) + LABEL for row in cells]
    top = LABEL if title else 0
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    _write(draw, title, 4, width)
    for row, label, height in zip(cells, labels, heights):
        _write(draw, label, top + 4, width)
        left = 0
        for cell in row:
            sheet.paste(cell, (left, top + LABEL))
            left += cell.width + 4
        top += height
    return sheet


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-CELL // max(image.size))
    return (
        image if factor == 1 else image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    )


def _write(draw: ImageDraw.ImageDraw, text: str, top: int, width: int) -> None:
    """Write one line, shortened to fit."""
    font = ImageFont.load_default(15)
    while text and draw.textlength(text, font) > width - 12:
        text = text.rstrip("…")[:-1] + "…"
    draw.text((6, top), text, fill="black", font=font)
