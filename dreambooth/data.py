"""Photos, and the endless stream of batches made of them.

Sample k of a run (k = 0, 1, 2, ... over all devices) is a function of the seed and k alone: which photo, which crop,
which noise. So a resumed run continues where it stopped, and the number of devices does not change what is trained on.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreambooth.config import TrainingConfig, UserError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .avif .heic .heif".split()  # the last two get an explanation
)


# ---- files to photos ----


@dataclass(frozen=True)
class Photo:
    """An image as it is trained on: upright RGB, its shorter side at the training resolution."""

    path: Path
    pixels: np.ndarray  # (height, width, 3) uint8
    prompt: str


def read_photos(folder: str, flag: str, prompt: str, config: TrainingConfig) -> list[Photo]:
    """Return the readable images of a folder in the order of their names; `flag` is what errors call the folder.

    Other files are ignored; images that cannot be read are named in a warning. Raises UserError if none is left.
    """
    directory = Path(folder)
    if not directory.is_dir():
        raise UserError(f"{flag} {folder}: there is no such folder")
    photos, unreadable = [], []
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith(".") or path.is_dir():
            continue
        try:
            image = fit_shorter_side(read_image(path), config.resolution, config.image_interpolation_mode)
            photos.append(Photo(path, np.asarray(image), prompt))
        except Exception as error:  # image codecs raise nearly anything on damaged files
            unreadable.append(f"{path.name}: {error or type(error).__name__}")
    if not photos:
        found = "; ".join(unreadable) or "it holds no image files"
        raise UserError(f"{flag} {folder}: there is no readable image ({found})")
    if unreadable:
        logger.warning("%s %s: skipped unreadable images (%s)", flag, folder, "; ".join(unreadable))
    return photos


def read_image(path: Path) -> Image.Image:
    """Return an image file as upright 8-bit RGB: the first frame, on white where it is transparent.

    Raises OSError or ValueError for damaged files and Image.DecompressionBombError for absurdly large ones.
    """
    if path.suffix.lower() in (".heic", ".heif"):
        raise ValueError("HEIC is not supported; convert it to JPEG or PNG")
    # Opened here, since Pillow maps uncompressed TIFFs that it opens itself into memory, and scrambles the turned ones.
    with path.open("rb") as data, Image.open(data) as file:
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale a 16-bit, 32-bit or floating-point grey image by the smallest of the usual full ranges that holds it."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    full = next((top for top in ranges if values.max() <= top), values.max())
    return Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))


def fit_shorter_side(image: Image.Image, resolution: int, interpolation: str) -> Image.Image:
    """Resize an image so that its shorter side is `resolution` px."""
    if max(image.size) > 100 * min(image.size):  # would grow without bound: 30,000 x 1 px to 24 GB
        raise ValueError(f"{image.width} x {image.height} px is too elongated")
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    return image if size == image.size else image.resize(size, Image.Resampling[interpolation.upper()])


# ---- photos to samples ----


class Stream(IntEnum):
    """What a random number is for. Each gets a stream of its own, so that one more draw here moves nothing there."""

    INSTANCE_ORDER = 0
    CLASS_ORDER = 1
    INSTANCE_CROP = 2
    CLASS_CROP = 3
    INSTANCE_NOISE = 4
    CLASS_NOISE = 5
    CLASS_IMAGE = 6
    VALIDATION = 7


def seed_of(seed: int, stream: Stream, index: int) -> int:
    """Return the 64-bit seed of draw `index` in a stream of a run."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Batch:
    """One forward pass: the instance rows, then as many class rows with prior preservation."""

    pixel_values: Tensor  # (rows, 3, resolution, resolution) fp32 in [-1, 1]
    prompt_rows: Tensor  # (rows,) int64: row of each image's prompt in the encoded prompts
    noise_seeds: Tensor  # (rows,) int64: seeds each row's noise and timestep
    num_instances: int

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":  # the DataLoader calls it
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(self, pixel_values=function(self.pixel_values), prompt_rows=function(self.prompt_rows))


Row = tuple[Tensor, int, int]  # pixel values, prompt row, noise seed


class DreamBoothDataset(Dataset):
    """Sample k is an instance photo and, with prior preservation, a class photo: for every k from 0, without end.

    Each pass over the photos has an order of its own; every sample has a crop of its own.
    """

    def __init__(
        self, instances: Sequence[Photo], classes: Sequence[Photo], prompts: Sequence[str], config: TrainingConfig
    ):
        self.instances, self.classes = instances, classes
        self.prompt_row = {prompt: row for row, prompt in enumerate(prompts)}
        self.resolution, self.center_crop, self.seed = config.resolution, config.center_crop, config.seed

    def __getitem__(self, k: int) -> list[Row]:
        rows = [self._row(self.instances, k, Stream.INSTANCE_ORDER, Stream.INSTANCE_CROP, Stream.INSTANCE_NOISE)]
        if self.classes:
            rows.append(self._row(self.classes, k, Stream.CLASS_ORDER, Stream.CLASS_CROP, Stream.CLASS_NOISE))
        return rows

    def _row(self, photos: Sequence[Photo], k: int, order: Stream, crop: Stream, noise: Stream) -> Row:
        pass_number, position = divmod(k, len(photos))
        permutation = np.random.default_rng(seed_of(self.seed, order, pass_number)).permutation(len(photos))
        photo = photos[permutation[position]]
        pixels = self._crop(photo.pixels, seed_of(self.seed, crop, k))
        pixel_values = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1
        return pixel_values, self.prompt_row[photo.prompt], seed_of(self.seed, noise, k)

    def _crop(self, pixels: np.ndarray, seed: int) -> np.ndarray:
        spare = np.array(pixels.shape[:2]) - self.resolution
        top, left = spare // 2 if self.center_crop else np.random.default_rng(seed).integers(0, spare + 1)
        return pixels[top : top + self.resolution, left : left + self.resolution]


def collate(samples: Sequence[list[Row]]) -> Batch:
    """Stack samples: all instance rows, then all class rows. Each row brings its own prompt along."""
    rows = [row for kind in zip(*samples) for row in kind]
    pixel_values, prompt_rows, noise_seeds = zip(*rows)
    return Batch(
        pixel_values=torch.stack(pixel_values),
        prompt_rows=torch.tensor(prompt_rows),
        noise_seeds=torch.tensor(noise_seeds, dtype=torch.uint64).view(torch.int64),
        num_instances=len(samples),
    )


class GlobalSampler:
    """Yields, without end, this device's share of the samples: lists of `batch_size` numbers k.

    Optimizer step s uses the samples s·G to (s+1)·G - 1, G = devices · accumulation · batch size, whatever the split.
    """

    def __init__(self, batch_size: int, accumulation: int, rank: int, num_ranks: int, first_step: int):
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.first_forward = first_step * accumulation

    def __iter__(self) -> Iterator[list[int]]:
        forward = self.first_forward
        while True:
            first = (forward * self.num_ranks + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            forward += 1


def build_loader(dataset: Dataset, config: TrainingConfig, rank: int, num_ranks: int, first_step: int) -> DataLoader:
    """Return this device's endless batches, from optimizer step `first_step` on."""
    return DataLoader(
        dataset,
        batch_sampler=GlobalSampler(
            config.train_batch_size, config.gradient_accumulation_steps, rank, num_ranks, first_step
        ),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def distinct_prompts(photos: Sequence[Photo], *others: str) -> list[str]:
    """Return every prompt once, in the order of its first use."""
    return list(dict.fromkeys([photo.prompt for photo in photos] + list(others)))
