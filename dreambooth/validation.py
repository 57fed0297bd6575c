"""Sample images: drawn from the encoded prompts, laid out as one labelled sheet."""

import bisect
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dreambooth.config import TrainingConfig
from dreambooth.optimizers import evaluating
from dreambooth.order import Stream, seed_of
from dreambooth.ranks import splits_models
from dreambooth.report import Progress, log_image, warn_only
from dreambooth.text import Encode
from dreambooth.training import steps_per_pass
from dreambooth.vae import draw_images, vae_on_device

SMALLEST, LARGEST = 192, 512  # px; smaller images are enlarged to be seen, larger ones shrunk to keep the file small
GAP = 4  # px
LINE = 21  # px
MOST_LINES = 4  # of a label; the rest of a prompt is cut off


@torch.no_grad()
def validate(
    progress: Progress,
    pipeline: DiffusionPipeline,
    encode: Encode,
    prompts: Sequence[str],
    optimizer: torch.optim.Optimizer,
    samples: int,
    config: TrainingConfig,
    step: int,
) -> None:
    """Draw the validation prompts where they are due after `step`, for OUTPUT_DIR/samples and the trackers.

    `samples` is the number of samples in a pass over the photos. What fails is a warning.
    """
    accelerator = progress.accelerator
    pass_steps = steps_per_pass(samples, config, accelerator.num_processes)
    if not validation_due(step, progress.total_steps, pass_steps, config):
        return
    progress.read()  # trackers take the steps in their order
    if not (accelerator.is_main_process or splits_models()):  # a model that is split is called by all together
        return
    with (
        warn_only(f"no samples of step {step}, training goes on"),
        evaluating(optimizer),
        vae_on_device(pipeline, accelerator.device),
    ):
        embeddings = encode(torch.arange(len(prompts), device=accelerator.device))
        rows = draw_samples(pipeline, embeddings, prompts, config)
        if accelerator.is_main_process:
            save_samples(accelerator, rows, step, config)


def validation_due(step: int, total_steps: int, pass_steps: int, config: TrainingConfig) -> bool:
    """Whether samples are drawn after this optimizer step: before the first, every so often, and after the last."""
    every = config.validation_steps or config.validation_epochs * pass_steps
    return bool(config.validation_prompt) and (step % every == 0 or step == total_steps)


def draw_samples(
    pipeline: DiffusionPipeline, embeddings: dict[str, Tensor], prompts: Sequence[str], config: TrainingConfig
) -> list[list[Image.Image]]:
    """Return a row of images for each validation prompt. Seeds are fixed, so that successive sheets compare.

    `embeddings` holds one row for each of `prompts`, under the names of the pipeline's arguments; the prompt "" is
    the unconditional one.
    """
    pipeline.set_progress_bar_config(disable=True)
    unconditional = _rows(embeddings, prompts.index(""))
    if pipeline.config.get("force_zeros_for_empty_prompt"):  # as SDXL's pipeline does where no negative prompt is given
        unconditional = {name: torch.zeros_like(tensor) for name, tensor in unconditional.items()}
    rows = []
    for number, prompt in enumerate(config.validation_prompt):
        conditions = _rows(embeddings, prompts.index(prompt))
        conditions |= {f"negative_{name}": tensor for name, tensor in unconditional.items()}
        first = number * config.num_validation_images
        seeds = [seed_of(config.seed, Stream.VALIDATION, first + i) for i in range(config.num_validation_images)]
        row = []
        for start in range(0, len(seeds), config.sample_batch_size):
            generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + config.sample_batch_size]]
            row += draw_images(
                pipeline,
                **conditions,
                num_images_per_prompt=len(generators),
                height=config.resolution,
                width=config.resolution,
                num_inference_steps=config.validation_num_inference_steps,
                guidance_scale=config.validation_guidance_scale,
                generator=generators,
            )
        rows.append(row)
    return rows


def _rows(embeddings: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: tensor[row : row + 1] for name, tensor in embeddings.items()}


def save_samples(
    accelerator: Accelerator, rows: Sequence[Sequence[Image.Image]], step: int, config: TrainingConfig
) -> Path:
    """Write OUTPUT_DIR/samples/step-NNNNNN.png and send it to the trackers; return its path."""
    sheet = draw_sheet(rows, config.validation_prompt, title=f"step {step}")
    path = Path(config.output_dir) / "samples" / f"step-{step:06d}.png"
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)
    log_image(accelerator, "samples", sheet, step)
    return path


# ---- the sheet ----


def draw_sheet(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], title: str = "") -> Image.Image:
    """Return one picture: a row of images under each label, the title above all."""
    cells = [[_fitted(image) for image in row] for row in rows]
    width = max(sum(cell.width + GAP for cell in row) - GAP for row in cells)
    texts = [_wrap(label, width - 12) for label in labels]
    heights = [LINE * len(text) + 10 + max(cell.height for cell in row) for text, row in zip(texts, cells)]
    top = LINE + 8 if title else 0
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((6, 5), title, fill="#656d76", font=ImageFont.load_default(15))
    for row, lines, height in zip(cells, texts, heights):
        for number, line in enumerate(lines):
            draw.text((6, top + 4 + number * LINE), line, fill="black", font=ImageFont.load_default(15))
        left = 0
        for cell in row:
            sheet.paste(cell, (left, top + LINE * len(lines) + 10))
            left += cell.width + GAP
        top += height
    return sheet


def _fitted(image: Image.Image) -> Image.Image:
    """Return the image with its longer side at least SMALLEST, by a whole factor, and at most LARGEST."""
    longer = max(image.size)
    factor = LARGEST / longer if longer > LARGEST else -(-SMALLEST // longer)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _wrap(text: str, width: int) -> list[str]:
    """Break a text into at most MOST_LINES lines, between words where it can; "…" stands for the rest."""
    font = ImageFont.load_default(15)
    lines, rest = [], " ".join(text.split())
    while rest:
        ends = range(1, len(rest) + 1)
        end = max(1, bisect.bisect_right(ends, width, key=lambda end: font.getlength(rest[:end])))
        if end < len(rest) and " " in rest[: end + 1]:
            end = rest[: end + 1].rindex(" ")
        line, rest = rest[:end], rest[end:].lstrip()
        lines.append(line)
        if rest and len(lines) == MOST_LINES:
            return [*lines[:-1], line[:-1].rstrip() + "…"]
    return lines or [""]
