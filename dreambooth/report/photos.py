"""What was learned of each photo that was trained on, and a warning of one that stands out.

At the end of training, each photo is denoised by the base model and by what was trained, with the same noise at
the same timesteps. So what makes a photo hard to denoise by itself, as fine grass does, cancels out. The losses of
training steps would tell less: each has a noise and a timestep of its own, and no base model beside it. Nothing but the
final weights counts: a run that was resumed finds the same.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreambooth.base_model.latents import LatentsOf
from dreambooth.base_model.loading import BaseModel
from dreambooth.base_model.process import NoiseProcess
from dreambooth.base_model.prompts import Encode
from dreambooth.data.dataset import Batch, DreamBoothDataset, collate
from dreambooth.data.noise import Draw
from dreambooth.errors import warn_only
from dreambooth.layout import PHOTOS_NAME
from dreambooth.loop.optimizers import evaluating
from dreambooth.loop.steps import Denoiser
from dreambooth.method import Attached
from dreambooth.options.training import TrainingConfig
from dreambooth.report.progress import Progress
from dreambooth.runtime.ranks import splits_models
from dreambooth.scoring.denoising import Denoising, Pictures
from dreambooth.scoring.odd import odd_one
from kron_formats.files import printable, read_json, whole_file, write_text

logger = logging.getLogger(__name__)

PAIRS = 16  # of noise and timestep, the same for every photo


# ---- measuring ----


@torch.no_grad()
def score_photos(
    progress: Progress,
    dataset: DreamBoothDataset,
    draw: Draw,
    latents_of: LatentsOf,
    process: NoiseProcess,
    base: BaseModel,
    encode: Encode,
    attached: Attached,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
) -> None:
    """With --score_photos, write OUTPUT_DIR/photos.json, and warn of a photo of which far less was learned.

    Called once the result is saved. A failure is a warning, as with a method that cannot restore the base model.
    """
    main = progress.accelerator.is_main_process
    if not config.score_photos or not (main or splits_models()):  # all processes must call a split model together
        return
    with warn_only("the photos were not scored"), evaluating(optimizer), progress.accelerator.autocast():
        losses = []
        for number in range(len(dataset.photos)):
            batch = _as_batch(number, dataset, draw).to(base.device)
            denoising = Denoising(
                _pictures(batch, latents_of), None, process, PAIRS, config.sample_batch_size, base.device
            )
            denoiser = Denoiser(base.denoiser, _under(batch.prompt_rows, encode), base.family.condition)
            with attached.without():
                before = denoising.losses(denoiser).trained
            losses.append((denoising.losses(denoiser).trained / before).mean().item())
        if main:
            save_photo_scores([photo.name for photo in dataset.photos], losses, config)


def _as_batch(number: int, dataset: DreamBoothDataset, draw: Draw) -> Batch:
    """Return a photo as a batch of one row, whose latents are the mean of the VAE's."""
    batch = collate([[dataset.row_of_photo(number)]], draw)
    return replace(batch, posterior_noise=torch.zeros_like(batch.posterior_noise))


def _pictures(batch: Batch, latents_of: LatentsOf) -> Pictures:
    """Return the photo of a batch of one row. Its mask has the weights of the training loss."""
    weights = None if batch.loss_weights is None else batch.loss_weights[0].cpu()
    return Pictures(latents_of(batch).cpu(), batch.size_conditions.cpu(), [weights])


def _under(prompt_rows: Tensor, encode: Encode) -> Encode:
    return lambda rows: encode(prompt_rows[rows])


# ---- what is written ----


def save_photo_scores(names: Sequence[str], losses: Sequence[float], config: TrainingConfig) -> None:
    """Write OUTPUT_DIR/photos.json about photos, with their losses relative to the base model's; warn of an odd one."""
    odd = odd_one(losses)
    content: dict[str, Any] = {
        "pairs": PAIRS,
        "photos": [{"name": name, "relative_loss": loss} for name, loss in zip(names, losses, strict=True)],
        "warning": None if odd is None else _warning(names[odd], losses[odd], [*losses[:odd], *losses[odd + 1 :]]),
    }
    with whole_file(Path(config.output_dir) / PHOTOS_NAME) as unfinished:
        write_text(unfinished, json.dumps(content, indent=1) + "\n")
    if content["warning"]:
        logger.warning("%s", content["warning"])


def _warning(name: str, loss: float, others: Sequence[float]) -> str:
    return (
        f"Far less was learned of {printable(name)} than of the other photos: its loss is {loss:.2f} of the base "
        f"model's, theirs {min(others):.2f} to {max(others):.2f}. Look at it: if it shows another subject, is blurred "
        "or has a wrong caption, remove it or correct the caption, and train again"
    )


def read_photo_scores(output: Path) -> Mapping[str, Any] | None:
    """Return what OUTPUT_DIR/photos.json holds; None if there is none."""
    path = output / PHOTOS_NAME
    return read_json(path) if path.exists() else None
