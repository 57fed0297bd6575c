"""What a model with an adapter, or with a part of one, draws and denoises, and the scores of that.

Every trial draws the same prompts from the same seeds, and denoises the same pictures with the same noise. Adapters
stay beside the weights, so the base model is loaded once.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from dreambooth.base_model.loading import DTYPES
from dreambooth.data.references import read_references
from dreambooth.drawing.pipelines import Adapter, Reader, add_adapters, load_base_pipeline
from dreambooth.errors import UserError
from dreambooth.loop.steps import Denoiser
from dreambooth.scoring.denoising import Denoising, RowLosses, denoiser_of
from dreambooth.scoring.embeddings import Evaluators
from dreambooth.scoring.inputs import Photos
from dreambooth.scoring.models import (
    Denoised,
    Drawn,
    Measured,
    draw_model,
    drawing,
    drawing_base,
    prepare_denoising,
    ready,
)
from dreambooth.scoring.prompts import ADAPTED, BASE, Prompts
from dreambooth.scoring.results import Results, score
from interpretation.adapters import Interpreted
from interpretation.options import InterpretationOptions
from interpretation.parts import Layers

BINS = 8  # parts of the timesteps


@dataclass(frozen=True)
class Tried:
    """What a model drew and denoised."""

    name: str
    drawn: Drawn
    losses: RowLosses  # on the photos
    of_class: Tensor  # its predictions for class images


@dataclass(frozen=True)
class Trial(Tried):
    """A model with an adapter, or a part of one, beside the base model."""

    parameters: int  # of what was added
    results: Results
    base: RowLosses  # the base model's losses

    @property
    def scores(self) -> dict[str, float | None]:
        """The scores that trials are compared by."""
        model, prior = self.results.models[ADAPTED], self.results.prior
        assert prior, "class images are always drawn"
        return {
            "dino": model.dino,
            "clip_i": model.clip_i,
            "clip_t": model.clip_t,
            "loss": self.losses.scores().of_subject,
            "class_similarity": prior.similarity_after,
            "class_distance": prior.distance,
            "drift": prior.drift,
        }

    @property
    def added_likeness(self) -> float:
        """How much DINO is above the base model's."""
        return self.results.models[ADAPTED].dino - self.results.models[BASE].dino

    def below(self, whole: "Trial") -> tuple[float, float | None]:
        """Return how far DINO is below another trial's, and the standard error of that over prompts, if several."""
        pairs = zip(whole.results.models[ADAPTED].by_prompt, self.results.models[ADAPTED].by_prompt)
        falls = [before.dino - after.dino for before, after in pairs]
        return fmean(falls), stdev(falls) / len(falls) ** 0.5 if len(falls) > 1 else None

    def explained(self) -> list[tuple[int, float]]:
        """Return the share of the base model's loss that is gone, by timestep."""
        return explained_by_timestep(self.base, self.losses)


def explained_by_timestep(before: RowLosses, after: RowLosses, bins: int = BINS) -> list[tuple[int, float]]:
    """Return (mean timestep, 1 - loss after / loss before) of equally many rows each, in the order of timesteps.

    Losses are those inside masks, over the rows that have one; over whole pictures if none has.
    """
    masked = not before.masked.isnan().all()
    old, new = (losses.masked if masked else losses.whole for losses in (before, after))
    known = ~old.isnan()
    timesteps, old, new = before.timesteps[known], old[known], new[known]
    parts = timesteps.argsort(stable=True).chunk(bins)
    return [
        (round(timesteps[rows].double().mean().item()), 1 - (new[rows].sum() / old[rows].sum()).item())
        for rows in parts
    ]


@dataclass(frozen=True)
class Bench:
    """The base model, on which adapters are tried one after the other."""

    pipeline: Any
    readers: Sequence[Reader]
    prompts: Prompts
    photos: Photos
    evaluators: Evaluators
    denoising: Denoising
    base: Tried
    config: InterpretationOptions

    def try_out(self, folder: str, adapter: Interpreted, layers: Layers, name: str = "") -> Trial:
        """Return what the base model draws, which is saved in a folder too, and denoises with layers of an adapter.

        Raises UserError if its losses are not finite.
        """
        folder = re.sub(r"\W+", "-", folder).strip("-")
        prompts = replace(self.prompts, drawn={folder: self.prompts.drawn[ADAPTED]})
        with self._with(adapter, layers):
            drawn = draw_model(drawing(self.pipeline, self.config), prompts, folder, self.config)
            denoiser = _denoiser(self.pipeline, self.prompts, ADAPTED, self.config)
            tried = _tried(name or folder, drawn, self.denoising, denoiser, self.config)
        measured = Measured(
            {BASE: self.base.drawn, ADAPTED: drawn},
            {model: Denoised(x.losses.scores(), x.of_class) for model, x in ((BASE, self.base), (ADAPTED, tried))},
        )
        results = score(measured, self.photos.subject, self.prompts, self.evaluators)
        parameters = sum(change.numel() for change in layers.values())
        return Trial(**vars(tried), parameters=parameters, results=results, base=self.base.losses)

    def losses_with(self, adapter: Interpreted, layers: Layers) -> RowLosses:
        """Return how the base model denoises the photos with these layers of an adapter. Nothing is drawn."""
        with self._with(adapter, layers):
            return self.denoising.losses(_denoiser(self.pipeline, self.prompts, ADAPTED, self.config))

    @contextmanager
    def _with(self, adapter: Interpreted, layers: Layers) -> Iterator[None]:
        """Have these layers of an adapter in the base model."""
        if layers:
            part = Adapter(replace(adapter.matched, layers=layers), adapter.scale, "interpreted")
            add_adapters(self.pipeline, [part], self.readers)
        try:
            yield
        finally:
            for reader in reversed(self.readers):
                reader.remove(self.pipeline)


def set_up(
    readers: Sequence[Reader],
    prompts: Prompts,
    photos: Photos,
    evaluators: Evaluators,
    device: torch.device,
    config: InterpretationOptions,
) -> Bench:
    """Return the base model with what it draws and denoises.

    Photos that were trained on are denoised if there are no others. Raises UserError if its losses are not finite.
    """
    if not photos.untrained:
        photos = replace(photos, untrained=read_references(config.instance_data_dir or "", "--instance_data_dir"))
    pipeline = ready(load_base_pipeline(config, DTYPES[config.dtype]), readers, device, config)
    drawn = draw_model(drawing_base(pipeline, device, config), prompts, BASE, config)
    denoising = prepare_denoising(pipeline, photos, drawn, config)
    assert denoising, "there are photos, and pairs"
    base = _tried(BASE, drawn, denoising, _denoiser(pipeline, prompts, BASE, config), config)
    return Bench(pipeline, readers, prompts, photos, evaluators, denoising, base, config)


def _denoiser(pipeline: Any, prompts: Prompts, model: str, config: InterpretationOptions) -> Denoiser:
    texts = [f"a photo of {prompts.subjects[model]}", prompts.of_class]
    return denoiser_of(pipeline, texts, config.max_token_length)


def _tried(name: str, drawn: Drawn, denoising: Denoising, denoiser: Denoiser, config: InterpretationOptions) -> Tried:
    losses, of_class = denoising.losses(denoiser), denoising.class_predictions(denoiser)
    assert of_class is not None, "class images are always drawn"
    if not math.isfinite(losses.scores().whole):
        raise UserError(f"what the model predicts with {name} is not finite in --dtype {config.dtype}; try fp32")
    return Tried(name, drawn, losses, of_class)
