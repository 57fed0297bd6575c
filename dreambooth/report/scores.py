"""Scores of checkpoints: how well each denoises photos that are not trained on, and which one does it best."""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dreambooth.base_model.loading import BaseModel
from dreambooth.base_model.process import NoiseProcess
from dreambooth.base_model.prompts import Encode
from dreambooth.data.dataset import scored_prompts
from dreambooth.data.photos import Photo
from dreambooth.data.references import Reference, read_references, refuse_trained
from dreambooth.errors import UserError, warn_only
from dreambooth.layout import METRICS_NAME
from dreambooth.loop.optimizers import evaluating
from dreambooth.loop.steps import Denoiser
from dreambooth.method import Attached
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.options.training import TrainingConfig
from dreambooth.output.best import LOSS, keep_best
from dreambooth.report.metrics import read_metrics
from dreambooth.report.progress import Progress
from dreambooth.runtime.ranks import splits_models
from dreambooth.scoring.denoising import Denoising, drift, encode_pictures
from dreambooth.wording import counted

logger = logging.getLogger(__name__)

PAIRS = EvaluationOptions.denoising_pairs  # of noise and timestep
CLASS_PICTURES = 16  # at most
DRIFT = "drift"  # in metrics.jsonl and trackers, beside LOSS


# ---- what is denoised ----


def read_scored(config: TrainingConfig) -> list[Reference]:
    """Return the photos on which checkpoints are scored, none without --score_checkpoints.

    Raises UserError if there are none, or if one of them is trained on.
    """
    if not config.score_checkpoints:
        return []
    if config.reference_dir is None:
        return read_references(config.instance_data_dir or "", "--instance_data_dir", config.holdout)
    references = read_references(config.reference_dir, "--reference_dir")
    if config.instance_data_dir is not None:
        refuse_trained(references, read_references(config.instance_data_dir, "--instance_data_dir"))
    return references


def prepare_scores(
    references: Sequence[Reference],
    class_photos: Sequence[Photo],
    base: BaseModel,
    process: NoiseProcess,
    config: TrainingConfig,
) -> Denoising | None:
    """Return what checkpoints denoise; None without `references`. Drift needs a class prompt.

    It is measured on the first class photos, or on the references if there are none.
    """
    if not references:
        return None
    encode = functools.partial(
        encode_pictures,
        shape=(config.resolution, config.resolution),
        vae=base.load_vae(),
        interpolation=config.image_interpolation_mode,
    )
    shown = encode(references)
    of_class = shown if config.class_prompts else None
    if class_photos:
        first = [
            Reference(photo.path, Image.fromarray(photo.pixels), photo.original_size)
            for photo in class_photos[:CLASS_PICTURES]
        ]
        of_class = encode(first)
    logger.info("Scoring checkpoints on %s that are not trained on", counted(len(references), "photo"))
    return Denoising(shown, of_class, process, PAIRS, config.sample_batch_size, base.device)


# ---- scoring ----


class Scores:
    """Scores checkpoints as training goes on, and changes nothing in it. All processes must make and call it."""

    def __init__(
        self,
        denoising: Denoising | None,
        base: BaseModel,
        encode: Encode,
        prompts: Sequence[str],
        attached: Attached,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        config: TrainingConfig,
    ):
        self.denoising, self.attached, self.optimizer = denoising, attached, optimizer
        self.progress, self.config = progress, config
        places = torch.tensor([prompts.index(prompt) for prompt in scored_prompts(config)], device=base.device)
        self.denoiser = Denoiser(base.denoiser, lambda rows: encode(places[rows]), base.family.condition)
        self.of_base: Tensor | None = None  # the base model's predictions for the class, once they are needed

    def due(self, step: int) -> bool:
        """Whether the result of `step` is scored: that of every checkpoint that every run saves, and the last."""
        last = step == self.progress.total_steps
        return self.denoising is not None and (last or step % self.config.checkpointing_steps == 0)

    @torch.no_grad()
    def score(self, step: int) -> None:
        """If it is due, score what `step` optimizer steps have trained, for metrics.jsonl and the trackers."""
        accelerator = self.progress.accelerator
        if not self.due(step):
            return
        self.progress.settle_steps()  # trackers need the steps in order
        if not (accelerator.is_main_process or splits_models()):
            return
        assert self.denoising is not None  # it is due
        with (
            warn_only(f"step {step} was not scored, training continues"),
            evaluating(self.optimizer),
            accelerator.autocast(),
        ):
            values = {LOSS: self.denoising.scores(self.denoiser).of_subject}
            if (change := self._drift(self.denoising)) is not None:
                values[DRIFT] = change
            self.progress.note(step, values)

    def keep_best(self, step: int, weights_name: str, final: bool = False) -> None:
        """If `step` was scored, bring OUTPUT_DIR/best up to date. Called once its checkpoint, or `final`, is saved."""
        if not (self.due(step) and self.progress.accelerator.is_main_process):
            return
        rows = read_metrics(Path(self.config.output_dir) / METRICS_NAME)
        losses = {row["step"]: row[LOSS] for row in rows if row.get(LOSS) is not None}
        keep_best(losses, weights_name, step if final else None, self.config)

    def _drift(self, denoising: Denoising) -> float | None:
        """Return the drift of the class; None without pictures, or if the method cannot restore the base model."""
        if denoising.class_pictures is None:
            return None
        if self.of_base is None:
            try:
                with self.attached.without():
                    self.of_base = denoising.class_predictions(self.denoiser)
            except UserError:
                return None
        return drift(self.of_base, denoising.class_predictions(self.denoiser))
