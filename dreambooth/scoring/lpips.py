"""Diversity by LPIPS, as the DreamBooth paper measures it.

torchmetrics computes it. That and torchvision, which it needs, are only installed by those who want it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreambooth.data.crops import pixel_values
from dreambooth.errors import UserError

TESTED = "torchmetrics==1.9.0"
PAIRS = 8  # compared at once
Images = Sequence[Image.Image]


@dataclass(frozen=True, kw_only=True)
class LpipsDiversity:
    """A model's diversity; None where there is one image, or none."""

    prompts: float | None  # mean over prompts
    by_prompt: tuple[float | None, ...]
    class_images: float | None


@dataclass(frozen=True)
class Lpips:
    """LPIPS (Zhang et al., arXiv 1801.03924) between images, on a network's features."""

    metric: Any  # torchmetrics' LearnedPerceptualImagePatchSimilarity

    def diversity_of(self, rows: Sequence[Images], class_images: Images) -> LpipsDiversity:
        """Return the diversity of a model's images, one row for each prompt. All prompts weigh the same."""
        by_prompt = tuple(self.mean_distance(row) for row in rows)
        varied = [distance for distance in by_prompt if distance is not None]
        return LpipsDiversity(
            prompts=fmean(varied) if varied else None,
            by_prompt=by_prompt,
            class_images=self.mean_distance(class_images),
        )

    @torch.no_grad()
    def mean_distance(self, images: Images) -> float | None:
        """Return the mean distance over all pairs of different images of one size; None if there is no pair.

        Source: DreamBooth (arXiv 2208.12242, sec. 4.3), DIV.
        """
        if len(images) < 2:
            return None
        pixels = [pixel_values(np.asarray(image)) for image in images]
        self.metric.reset()
        for left, right in _pairs(pixels):
            self.metric.update(left.to(self.metric.device), right.to(self.metric.device))
        return self.metric.compute().item()


def load_lpips(network: Literal["alex", "vgg", "squeeze"], device: torch.device) -> Lpips:
    """Return LPIPS on alex, vgg or squeeze, whose weights torchvision downloads the first time.

    Raises UserError if a package is missing or broken, or the weights cannot be had.
    """
    try:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        return Lpips(LearnedPerceptualImagePatchSimilarity(net_type=network).to(device))
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was made for another torch
        release = torch.__version__.partition("+")[0]
        raise UserError(
            f"--lpips {network} needs torchmetrics and a torchvision that fits torch {release}: "
            f"pip install {TESTED} torchvision torch=={release} ({_first_line(error)})"
        ) from error
    except OSError as error:
        raise UserError(f"--lpips {network}: its weights cannot be read: {_first_line(error)}") from error


def _pairs(pixels: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all pairs of different images, PAIRS at once: two tensors (pairs, 3, height, width)."""
    pairs = [*combinations(pixels, 2)]
    for start in range(0, len(pairs), PAIRS):
        left, right = zip(*pairs[start : start + PAIRS])
        yield torch.stack(left), torch.stack(right)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
