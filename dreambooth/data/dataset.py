"""An endless stream of batches made from photos.

Sample k of a run (k = 0, 1, 2, ... over all devices) is a function of the seed and k alone: which photo, which crop,
which noise. A resumed run therefore continues exactly, and the number of devices does not change what is trained on.
With buckets, it also depends on the batch size, since all images of a batch have one shape.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dreambooth.data.crops import Crop, Crops
from dreambooth.data.noise import Draw
from dreambooth.data.order import (
    GlobalSampler,
    batch_unit,
    numbers_by_folder,
    order_of_pass,
    own_pass,
    place_in_passes,
    samples_of_step,
)
from dreambooth.data.photos import Photo
from dreambooth.data.sizes import Size
from dreambooth.options.steps import BatchOptions
from dreambooth.options.subjects import Subject
from dreambooth.options.training import TrainingConfig
from dreambooth.seeds import Stream, generator_of, seed_of

# ---- photos to samples ----


@dataclass(frozen=True)
class Row:
    """One image of a batch. Either pixel_values or moments is None."""

    pixel_values: Tensor | None
    moments: Tensor | None
    prompt_row: int
    noise_seed: int
    size_conditions: tuple[int, ...]
    loss_weights: Tensor | None


class DreamBoothDataset(Dataset):
    """Sample k, for every k from 0 without end: a row of an instance photo and, with prior preservation, a class row.

    Subjects take turns, a sample each, or with buckets a batch each, so that all have equally many samples. Each pass
    over a subject's photos has a different order. The class row is a photo of the subject's class; with prior_source
    base_model, it is the instance row with its class prompt. Rows hold the moments of their crops if `moments` is
    given, else pixel values.
    """

    def __init__(
        self, crops: Crops, prompts: Sequence[str], moments: Mapping[Crop, Tensor] | None, config: TrainingConfig
    ):
        self.crops, self.moments, self.config = crops, moments, config
        self.photos, self.class_photos = crops.photos, crops.class_photos
        self.prompt_row = {prompt: row for row, prompt in enumerate(prompts)}
        self.numbers, self.class_numbers = numbers_by_folder(self.photos), numbers_by_folder(self.class_photos)
        self.shapes = {
            folder: tuple(crops.shapes[number] for number in numbers) for folder, numbers in self.numbers.items()
        }
        self.lengths = {folder: own_pass(shapes, config) for folder, shapes in self.shapes.items()}
        self.turns = [subject.folder for subject in config.all_subjects]
        self.class_turns = [subject.class_folder for subject in config.all_subjects]

    def __getitem__(self, k: int) -> list[Row]:
        config, number = self.config, self._photo_number(k)
        photo, shape = self.photos[number], self.crops.shapes[number]
        dropped = generator_of(config.seed, Stream.CAPTION_DROPOUT, k).random() < config.caption_dropout_probability
        crop = self.crops.draw(False, number, shape, k)
        rows = [self._row(crop, "" if dropped else photo.prompt, seed_of(config.seed, Stream.INSTANCE_NOISE, k))]
        if config.uses_base_model_prior:
            assert photo.class_prompt is not None  # the prior needs --class_prompt: PriorOptions.check
            # The class is not confined to the subject's mask.
            rows.append(replace(rows[0], prompt_row=self.prompt_row[photo.class_prompt], loss_weights=None))
        elif self.class_photos:
            rows.append(self._class_row(shape, k))
        return rows

    def _class_row(self, shape: Size, k: int) -> Row:
        number = self._class_photo_number(k)
        crop = self.crops.draw(True, number, shape, k)
        return self._row(crop, self.class_photos[number].prompt, seed_of(self.config.seed, Stream.CLASS_NOISE, k))

    def _photo_number(self, k: int) -> int:
        config, unit = self.config, batch_unit(self.config)
        folder, number, place = place_in_passes(k, self.turns, unit, self.lengths)
        order = order_of_pass(config.seed, number, self.shapes[folder], config.repeats, unit)
        return self.numbers[folder][order[place]]

    def _class_photo_number(self, k: int) -> int:
        lengths = {folder: len(numbers) for folder, numbers in self.class_numbers.items()}
        folder, number, place = place_in_passes(k, self.class_turns, batch_unit(self.config), lengths)
        order = generator_of(self.config.seed, Stream.CLASS_ORDER, number).permutation(lengths[folder])
        return self.class_numbers[folder][order[place]]

    def row_of_photo(self, number: int) -> Row:
        """Return a row of instance photo `number` alone, under its prompt. No sample: it has the noise of sample 0."""
        seed = seed_of(self.config.seed, Stream.INSTANCE_NOISE, 0)
        return self._row(self.crops.still(number), self.photos[number].prompt, seed)

    def paths_of_step(self, step: int, num_ranks: int) -> list[Path]:
        """Return the files of all photos and class photos of optimizer step `step`, counted from 1."""
        samples = samples_of_step(step, self.config, num_ranks)
        paths = [self.photos[self._photo_number(k)].path for k in samples]
        if self.class_photos:
            paths += [self.class_photos[self._class_photo_number(k)].path for k in samples]
        return list(dict.fromkeys(paths))

    def _row(self, crop: Crop, prompt: str, noise_seed: int) -> Row:
        return Row(
            pixel_values=self.crops.pixel_values(crop) if self.moments is None else None,
            moments=None if self.moments is None else self.moments[crop],
            prompt_row=self.prompt_row[prompt],
            noise_seed=noise_seed,
            size_conditions=crop.size_conditions(self.crops.photo(crop).original_size),
            loss_weights=self.crops.loss_weights(crop),
        )


# ---- samples to batches ----


@dataclass(frozen=True)
class Batch:
    """One forward pass: the instance rows, then as many class rows with prior preservation. All have one shape.

    Either pixel_values or moments is None. Moments are the VAE's encoding of an image: mean and log-variance of its
    latents.
    """

    pixel_values: Tensor | None  # (rows, 3, height, width) fp32 in [-1, 1]
    moments: Tensor | None  # (rows, 2 · latent channels, height / 8, width / 8) fp32
    prompt_rows: Tensor  # (rows,) int64: row of each image's prompt in the encoded prompts
    posterior_noise: Tensor  # (rows, channels, height, width) of the latents, fp32: for sampling them from the moments
    noise: Tensor  # (rows, channels, height, width) of the latents, fp32: what is added to them
    timesteps: Tensor  # (rows,) int64, 0 is the cleanest
    size_conditions: Tensor  # (rows, 6) fp32, px: original height, width, crop top, left, target height, width
    loss_weights: Tensor | None  # (rows, 1, height, width) fp32; None if no row has a mask
    num_instances: int

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. If it is pinned, this does not wait for the copies."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":  # the DataLoader calls it
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def collate(samples: Sequence[list[Row]], draw: Draw) -> Batch:
    """Return samples as a batch: all instance rows, then all class rows, each with the noise of its seed."""
    rows = [row for kind in zip(*samples) for row in kind]
    drawn = [draw(row.noise_seed, row.size_conditions[4:]) for row in rows]
    cached = rows[0].moments is not None
    return Batch(
        pixel_values=None if cached else torch.stack([row.pixel_values for row in rows]),
        moments=torch.stack([row.moments for row in rows]) if cached else None,
        prompt_rows=torch.tensor([row.prompt_row for row in rows]),
        posterior_noise=torch.stack([row.posterior_noise for row in drawn]),
        noise=torch.stack([row.noise for row in drawn]),
        timesteps=torch.stack([row.timestep for row in drawn]),
        size_conditions=torch.tensor([row.size_conditions for row in rows], dtype=torch.float32),
        loss_weights=_stack_loss_weights(rows),
        num_instances=len(samples),
    )


def _stack_loss_weights(rows: Sequence[Row]) -> Tensor | None:
    """Return the loss weights of rows, 1 for those without a mask, or None if there are no masks."""
    if all(row.loss_weights is None for row in rows):
        return None
    everywhere = torch.ones(1, *rows[0].size_conditions[4:])
    return torch.stack([everywhere if row.loss_weights is None else row.loss_weights for row in rows])


def build_loader(
    dataset: Dataset,
    draw: Draw,
    config: BatchOptions,
    rank: int,
    num_ranks: int,
    first_step: int,
    begin_worker: Callable[[int], None] | None = None,
) -> DataLoader:
    """Return this device's endless batches after `first_step` optimizer steps, with noise from `draw`.

    `begin_worker` is called in every worker process, with its number. All arguments can be pickled: where processes
    are not forked, as on Windows, workers get them that way.
    """
    return DataLoader(
        dataset,
        batch_sampler=GlobalSampler(
            config.train_batch_size, config.gradient_accumulation_steps, rank, num_ranks, first_step
        ),
        collate_fn=functools.partial(collate, draw=draw),
        num_workers=config.dataloader_num_workers,
        worker_init_fn=begin_worker,
        pin_memory=torch.cuda.is_available(),
    )


def scored_prompts(config: TrainingConfig) -> list[str]:
    """Return the prompts under which checkpoints are scored: of the subject, then of the class if there is one."""
    if not config.score_checkpoints:
        return []
    (subject,) = config.all_subjects
    return [subject.instance_prompt, *([] if subject.class_prompt is None else [subject.class_prompt])]


def prompts_of(photos: Sequence[Photo], class_photos: Sequence[Photo], config: TrainingConfig) -> list[str]:
    """Return every prompt of a run once, in order of first use, always including the empty prompt."""
    of_classes = [prompt for own in class_prompts_of(photos, class_photos, config) for prompt in own]
    prompts = [photo.prompt for photo in photos] + of_classes
    return list(dict.fromkeys([*prompts, *scored_prompts(config), *config.validation_prompt, ""]))


def instance_prompts_of(photos: Sequence[Photo]) -> list[list[str]]:
    """Return, for each subject, the prompts of its photos."""
    return [[photos[number].prompt for number in numbers] for numbers in numbers_by_folder(photos).values()]


def class_prompts_of(photos: Sequence[Photo], class_photos: Sequence[Photo], config: TrainingConfig) -> list[list[str]]:
    """Return, for each subject, the prompts that stand for its class: those of its prior's rows, else its class prompt.

    The class prompt only if an option needs it.
    """
    return [_class_prompts_of(subject, photos, class_photos, config) for subject in config.all_subjects]


def _class_prompts_of(
    subject: Subject, photos: Sequence[Photo], class_photos: Sequence[Photo], config: TrainingConfig
) -> list[str]:
    if config.uses_base_model_prior:
        own = [photo.class_prompt for photo in photos if photo.folder == subject.folder]
        return [prompt for prompt in own if prompt is not None]
    if class_photos:
        return [photo.prompt for photo in class_photos if photo.folder == subject.class_folder]
    return [subject.class_prompt] if subject.class_prompt and config.needs_class_prompt else []
