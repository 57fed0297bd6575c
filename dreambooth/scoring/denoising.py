"""How well a model denoises pictures that it was not trained on, and how far its predictions for the class have moved.

Nothing is sampled: every model gets the same pictures with the same noise at the same timesteps, so differences between
models are far less noisy than scores of the few images that are drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dreambooth.base_model.latents import normalise
from dreambooth.base_model.moments import encode_moments
from dreambooth.base_model.process import NoiseProcess
from dreambooth.data.crops import central_crop, pixel_values, share_inside
from dreambooth.data.references import Reference
from dreambooth.data.sizes import Size
from dreambooth.drawing.prompts import family_of
from dreambooth.loop.losses import row_losses
from dreambooth.loop.steps import Denoiser
from dreambooth.options.steps import LossOptions

SEED = 0  # of the pairs
PLAIN = LossOptions()  # the squared error, at all timesteps alike
SUBJECT, CLASS = 0, 1  # rows of the encoded prompts


@dataclass(frozen=True, kw_only=True)
class DenoisingScores:
    """Mean squared errors of a model's predictions; see `Denoising.scores`."""

    whole: float
    masked: float | None

    @property
    def of_subject(self) -> float:
        """The loss inside the masks, which tells best what was learned; over whole pictures if none has a mask."""
        return self.whole if self.masked is None else self.masked


@dataclass(frozen=True)
class RowLosses:
    """A model's losses on every row, on the CPU."""

    timesteps: Tensor  # (rows,) int64
    whole: Tensor  # (rows,) fp64, over whole pictures
    masked: Tensor  # (rows,) fp64, inside the masks; NaN of pictures that have none, or an empty one

    @property
    def trained(self) -> Tensor:
        """Of every row what training counts: the loss inside its mask, or over the whole picture if it has none."""
        return torch.where(self.masked.isnan(), self.whole, self.masked)

    def scores(self) -> DenoisingScores:
        """Return the means."""
        inside = self.masked[~self.masked.isnan()]
        return DenoisingScores(whole=self.whole.mean().item(), masked=inside.mean().item() if len(inside) else None)


# ---- what is denoised ----


@dataclass(frozen=True)
class Pictures:
    """Pictures of one shape, (height, width) px, as the denoiser is trained on them. All tensors are fp32."""

    latents: Tensor  # (pictures, channels, height / 8, width / 8)
    size_conditions: Tensor  # (pictures, 6), px: original size, corner of the crop, size of the crop
    masks: Sequence[Tensor | None]  # of each picture: (1, height, width), 1 inside


@torch.no_grad()
def encode_pictures(
    photos: Sequence[Reference], shape: Size, vae: AutoencoderKL, interpolation: str = "lanczos"
) -> Pictures:
    """Return the centres of photos in one shape, (height, width) px. Their latents are the means of the VAE's."""
    latents, sizes, masks = [], [], []
    for photo in photos:  # one at a time: they can be large
        crop = central_crop(photo.size, shape)
        pixels = pixel_values(crop.cut(np.asarray(photo.image), interpolation))
        mean, _ = encode_moments(vae, pixels[None]).chunk(2, dim=1)
        latents.append(normalise(mean, vae.config).cpu())
        sizes.append(crop.size_conditions(photo.size))
        masks.append(None if photo.mask is None else share_inside(crop.cut(np.asarray(photo.mask), "bilinear")))
    return Pictures(torch.cat(latents), torch.tensor(sizes, dtype=torch.float32), masks)


@dataclass(frozen=True)
class Pairs:
    """Pairs of noise and timestep, the same for every model and on every machine."""

    noise: Tensor  # (pairs, channels, height / 8, width / 8) fp32
    timesteps: Tensor  # (pairs,) int64, rising


def draw_pairs(count: int, shape: Sequence[int], num_timesteps: int) -> Pairs:
    """Return `count` pairs for latents of a shape (channels, height / 8, width / 8).

    The timesteps 0 ... num_timesteps - 1 are cut into `count` equal parts, and one is drawn from each.
    """
    generator = torch.Generator().manual_seed(SEED)
    places = torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)
    return Pairs(torch.randn(count, *shape, generator=generator), (places * num_timesteps / count).long())


# ---- measuring ----


@dataclass(frozen=True)
class Denoising:
    """What every model denoises. The pairs of noise and timestep are dealt over the pictures in turn.

    A measure takes as many rows as there are pairs, or as there are pictures if those are more.
    """

    references: Pictures  # of the subject
    class_pictures: Pictures | None
    process: NoiseProcess
    pairs: int
    batch_size: int  # rows denoised at once
    device: torch.device

    @torch.no_grad()
    def scores(self, denoiser: Denoiser) -> DenoisingScores:
        """Return a model's mean loss on the references under the first prompt, as training computes it.

        whole    over whole pictures
        masked   inside the masks, over the pictures that have one; None if there is none
        """
        return self.losses(denoiser).scores()

    @torch.no_grad()
    def losses(self, denoiser: Denoiser) -> RowLosses:
        """Return the same losses of every row."""
        pictures, steps, whole, masked = self.references, [], [], []
        for rows, timesteps, target, prediction in self._rows(denoiser, pictures, SUBJECT):
            steps.append(timesteps.cpu())
            whole.append(row_losses(prediction, target, timesteps, None, self.process, PLAIN).cpu().double())
            masked.append(torch.full_like(whole[-1], torch.nan))
            # A mask may be empty here, if the subject is at the photo's edge
            masks = {place: mask for place, row in enumerate(rows) if (mask := pictures.masks[row]) is not None}
            if shown := [place for place, mask in masks.items() if mask.any()]:
                weights = torch.stack([masks[place] for place in shown]).to(self.device)
                inside = (prediction[shown], target[shown], timesteps[shown], weights)
                masked[-1][shown] = row_losses(*inside, self.process, PLAIN).cpu().double()
        return RowLosses(torch.cat(steps), torch.cat(whole), torch.cat(masked))

    @torch.no_grad()
    def class_predictions(self, denoiser: Denoiser) -> Tensor | None:
        """Return what a model predicts for the class pictures under the second prompt, on the CPU; None without any.

        (rows, channels, height / 8, width / 8) fp32
        """
        if self.class_pictures is None:
            return None
        rows = self._rows(denoiser, self.class_pictures, CLASS)
        return torch.cat([prediction.float().cpu() for *_, prediction in rows])

    def _rows(
        self, denoiser: Denoiser, pictures: Pictures, prompt: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
        """Yield, batch by batch, which picture each row shows, its timestep, target and prediction, on the device."""
        count = len(pictures.latents)
        pairs = draw_pairs(self.pairs, pictures.latents.shape[1:], self.process.num_timesteps)
        total = max(self.pairs, count)
        for start in range(0, total, self.batch_size):
            numbers = range(start, min(start + self.batch_size, total))
            shown, paired = [row % count for row in numbers], [row % self.pairs for row in numbers]
            values = (pictures.latents[shown], pairs.noise[paired], pairs.timesteps[paired])
            latents, noise, timesteps = (value.to(self.device) for value in values)
            noised = self.process.noise(latents, noise, timesteps)
            prompts = torch.full_like(timesteps, prompt)
            sizes = pictures.size_conditions[shown].to(self.device)
            yield shown, timesteps, noised.target, denoiser(noised.latents, noised.timesteps, prompts, sizes)


def drift(before: Tensor | None, after: Tensor | None) -> float | None:
    """Return the mean squared change of class predictions: what training has done to the class. None without any."""
    return None if before is None or after is None else (after - before).square().mean().item()


# ---- a pipeline's model ----


@torch.no_grad()
def denoiser_of(pipeline: Any, prompts: Sequence[str], max_token_length: int) -> Denoiser:
    """Return the model in a pipeline, with prompts encoded as in training: of the subject, and of the class.

    Raises UserError if the pipeline is of no known family.
    """
    family = family_of(pipeline)
    alone = [family.encode_captions(pipeline, [prompt], max_token_length) for prompt in prompts]
    embeddings = {name: torch.cat([row[name] for row in alone]) for name in alone[0]}

    def encode(rows: Tensor) -> dict[str, Tensor]:
        return {name: tensor[rows] for name, tensor in embeddings.items()}

    return Denoiser(getattr(pipeline, family.denoiser), encode, family.condition)
