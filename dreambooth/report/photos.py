"""Whether the photos fit their prompts, before training, and what was learned of each, after it.

Each photo is denoised with the same noise at the same timesteps: by the base model without a prompt, by the base model
under the photo's prompt, and by what was trained. So what makes a photo hard to denoise by itself, as fine grass does,
cancels out. A prompt that describes a photo makes it easier to denoise (Li et al., "Your Diffusion Model is Secretly a
Zero-Shot Classifier", 2023), so a photo of something else stands out before anything is learned. After a long training
it does not: that learns the odd photo too. A run that was resumed finds the same numbers.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dreambooth.base_model.latents import LatentsOf
from dreambooth.base_model.loading import BaseModel
from dreambooth.base_model.process import NoiseProcess
from dreambooth.base_model.prompts import Encode
from dreambooth.data.dataset import DreamBoothDataset, collate
from dreambooth.data.noise import Draw
from dreambooth.errors import warn_only
from dreambooth.family import Embeddings
from dreambooth.layout import PHOTOS_NAME
from dreambooth.loop.optimizers import evaluating
from dreambooth.loop.steps import Denoiser
from dreambooth.method import Attached
from dreambooth.options.training import TrainingConfig
from dreambooth.runtime.ranks import splits_models
from dreambooth.scoring.denoising import Denoising, Pictures
from kron_formats.files import printable, read_json, whole_file, write_text

logger = logging.getLogger(__name__)

PAIRS = 16  # of noise and timestep, the same for every photo


# ---- measuring ----


class PhotoScores:
    """With --score_photos, writes OUTPUT_DIR/photos.json and warns of photos that do not fit their prompts.

    A failure is a warning, as with a method that cannot restore the base model.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        dataset: DreamBoothDataset,
        draw: Draw,
        latents_of: LatentsOf,
        process: NoiseProcess,
        base: BaseModel,
        encode: Encode,
        attached: Attached,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
    ):
        self.accelerator, self.dataset, self.draw, self.latents_of = accelerator, dataset, draw, latents_of
        self.process, self.base, self.encode = process, base, encode
        self.attached, self.optimizer, self.config = attached, optimizer, config
        self.names = [photo.name for photo in dataset.photos]
        self.prompts = [photo.prompt for photo in dataset.photos]
        self.denoising: list[Denoising] = []  # of each photo, once they are needed
        self.base_losses: list[Tensor] | None = None  # of each photo under its prompt, (pairs,), once measured
        self.with_prompt: list[float] = []  # those relative to the losses without a prompt

    def before_training(self) -> None:
        """Measure the base model, also in a run that is resumed, and warn."""
        main = self.accelerator.is_main_process
        if not self.config.score_photos or not (main or splits_models()):  # all processes call a split model together
            return
        with warn_only("the photos were not scored"), self.accelerator.autocast():
            self.denoising = [self._denoising_of(number) for number in range(len(self.names))]
            with self.attached.without():
                losses, unprompted = self._losses(self.prompts), self._losses([""] * len(self.prompts))
            self.base_losses, self.with_prompt = losses, _ratios(losses, unprompted)
            self._save()
            if main and (warning := warning_of(self.names, self.with_prompt)):
                logger.warning("%s", warning)

    def after_training(self) -> None:
        """Measure what was trained, once it is saved, if the base model could be measured."""
        if self.base_losses is None:
            return
        with warn_only("the photos were not scored"), self.accelerator.autocast(), evaluating(self.optimizer):
            self._save(_ratios(self._losses(self.prompts), self.base_losses))

    @torch.no_grad()
    def _denoising_of(self, number: int) -> Denoising:
        batch = collate([[self.dataset.row_of_photo(number)]], self.draw).to(self.base.device)
        batch = replace(batch, posterior_noise=torch.zeros_like(batch.posterior_noise))  # the mean of the VAE's latents
        weights = None if batch.loss_weights is None else batch.loss_weights[0].cpu()
        picture = Pictures(self.latents_of(batch).cpu(), batch.size_conditions.cpu(), [weights])
        return Denoising(picture, None, self.process, PAIRS, self.config.sample_batch_size, self.base.device)

    @torch.no_grad()
    def _losses(self, prompts: Sequence[str]) -> list[Tensor]:
        """Return the model's losses on each photo, (pairs,), under a prompt of the run for each."""
        pairs = zip(self.denoising, prompts, strict=True)
        return [denoising.losses(self._denoiser_under(prompt)).trained for denoising, prompt in pairs]

    def _denoiser_under(self, prompt: str) -> Denoiser:
        row = self.dataset.prompt_row[prompt]

        def encode(rows: Tensor) -> Embeddings:
            return self.encode(torch.full_like(rows, row))

        return Denoiser(self.base.denoiser, encode, self.base.family.condition)

    def _save(self, learned: Sequence[float] | None = None) -> None:
        if self.accelerator.is_main_process:
            save_photo_scores(Path(self.config.output_dir), self.names, self.with_prompt, learned)


def _ratios(losses: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    """Return of each photo the mean ratio of two losses."""
    return [(loss / other).mean().item() for loss, other in zip(losses, others, strict=True)]


# ---- what is said and written ----


def warning_of(names: Sequence[str], with_prompt: Sequence[float]) -> str | None:
    """Return a warning of the photos that their prompts make harder to denoise, if prompts help most of the photos."""
    odd = [number for number, ratio in enumerate(with_prompt) if ratio > 1]
    if not 0 < len(odd) < len(names) / 2:
        return None
    listed = ", ".join(f"{printable(names[number])} ({with_prompt[number]:.2f})" for number in odd)
    others = [ratio for ratio in with_prompt if not ratio > 1]
    return (
        f"The base model denoises {listed} worse under the photo's prompt than without one, unlike the other photos "
        f"({min(others):.2f} to {max(others):.2f}). Such a photo may show something else, or have a wrong caption. "
        "Look at it; if so, stop, remove it or correct its caption, and start again"
    )


def save_photo_scores(
    output: Path, names: Sequence[str], with_prompt: Sequence[float], learned: Sequence[float] | None = None
) -> None:
    """Write OUTPUT_DIR/photos.json: of each photo two relative losses, the second once training has ended."""
    columns = {"name": names, "loss_with_prompt": with_prompt, "loss_after_training": learned or [None] * len(names)}
    content = {
        "pairs": PAIRS,
        "photos": [dict(zip(columns, values)) for values in zip(*columns.values(), strict=True)],
        "warning": warning_of(names, with_prompt),
    }
    with whole_file(output / PHOTOS_NAME) as unfinished:
        write_text(unfinished, json.dumps(content, indent=1) + "\n")


def read_photo_scores(output: Path) -> Mapping[str, Any] | None:
    """Return what OUTPUT_DIR/photos.json holds; None if there is none."""
    path = output / PHOTOS_NAME
    return read_json(path) if path.exists() else None
