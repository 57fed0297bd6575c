"""Sample images: drawn from the encoded prompts during training, saved as one labelled sheet, shown in a page."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from dreambooth.base_model.latents import vae_on_device
from dreambooth.base_model.prompts import Encode
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.sheet import save_sheet
from dreambooth.errors import warn_only
from dreambooth.family import Embeddings
from dreambooth.layout import SAMPLES_NAME, sheet_path
from dreambooth.loop.optimizers import evaluating
from dreambooth.loop.steps import steps_per_pass
from dreambooth.options.drawing import SampleOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.report.page import save_page
from dreambooth.report.progress import Progress
from dreambooth.report.trackers import log_image
from dreambooth.runtime.ranks import splits_models
from dreambooth.seeds import Stream, seed_of


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
    """If samples are due after `step`, draw the validation prompts for OUTPUT_DIR/samples and the trackers.

    `samples` is the number of samples in a pass over the photos. If drawing fails, that is a warning.
    """
    accelerator = progress.accelerator
    pass_steps = steps_per_pass(samples, config, accelerator.num_processes)
    if not validation_due(step, progress.total_steps, pass_steps, config):
        return
    progress.settle_steps()  # trackers need the steps in order
    if not (accelerator.is_main_process or splits_models()):  # all processes must call a split model together
        return
    with (
        warn_only(f"no samples of step {step}, training continues"),
        evaluating(optimizer),
        vae_on_device(pipeline, accelerator.device),
    ):
        embeddings = encode(torch.arange(len(prompts), device=accelerator.device))
        rows = draw_samples(pipeline, embeddings, prompts, config)
        if accelerator.is_main_process:
            save_samples(accelerator, rows, step, config)


def validation_due(step: int, total_steps: int, pass_steps: int, config: SampleOptions) -> bool:
    """Whether samples are drawn after this optimizer step: after step 0, at every interval, and after the last."""
    every = config.validation_steps or config.validation_epochs * pass_steps
    return bool(config.validation_prompt) and (step % every == 0 or step == total_steps)


def draw_samples(
    pipeline: DiffusionPipeline, embeddings: Embeddings, prompts: Sequence[str], config: TrainingConfig
) -> list[list[Image.Image]]:
    """Return a row of images for each validation prompt. Seeds are the same at every step, so sheets can be compared.

    `embeddings` has one row for each of `prompts`, under the names of the pipeline's arguments. The prompt "" is the
    unconditional one.
    """
    pipeline.set_progress_bar_config(disable=True)
    unconditional = _row(embeddings, prompts.index(""))
    if pipeline.config.get("force_zeros_for_empty_prompt"):  # as SDXL's pipeline does without a negative prompt
        unconditional = {name: torch.zeros_like(tensor) for name, tensor in unconditional.items()}
    rows = []
    for number, prompt in enumerate(config.validation_prompt):
        conditions = _row(embeddings, prompts.index(prompt))
        conditions |= {f"negative_{name}": tensor for name, tensor in unconditional.items()}
        first = number * config.num_validation_images
        images = draw_images(
            pipeline,
            [seed_of(config.seed, Stream.VALIDATION, first + i) for i in range(config.num_validation_images)],
            config.sample_batch_size,
            **conditions,
            height=config.resolution,
            width=config.resolution,
            num_inference_steps=config.validation_num_inference_steps,
            guidance_scale=config.validation_guidance_scale,
        )
        rows.append(images)
    return rows


def _row(embeddings: Embeddings, row: int) -> Embeddings:
    return {name: tensor[row : row + 1] for name, tensor in embeddings.items()}


def save_samples(
    accelerator: Accelerator, rows: Sequence[Sequence[Image.Image]], step: int, config: TrainingConfig
) -> Path:
    """Write OUTPUT_DIR/samples/step-NNNNNN.png, show it in the page and send it to the trackers; return its path."""
    path = sheet_path(Path(config.output_dir), step)
    path.parent.mkdir(exist_ok=True)
    sheet = save_sheet(path, rows, config.validation_prompt, title=f"step {step}")
    save_page(config)
    log_image(accelerator, SAMPLES_NAME, sheet, step)
    return path
