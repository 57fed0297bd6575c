"""What each part of an adapter does: what is lost, and what the class gets back, without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dreambooth.errors import UserError
from interpretation.adapters import Interpreted
from interpretation.parts import parts_of
from interpretation.trials import Bench, Trial, Tried
from studies.sheets import draw_pictures, thumbnail

PICTURES = 4  # prompts on a sheet
CLASS, BASE = "class", "base model"


@dataclass(frozen=True)
class Ablation:
    """An adapter, and the same without each of its parts."""

    label: str
    whole: Trial
    base: Tried
    parts: Sequence[Trial]  # by the name of what each is without
    prompts: Sequence[str]  # that are drawn; last, that of class images

    @property
    def without_layers(self) -> list[Trial]:
        """The trials without layers: a singular pair is in all of them, and in some it is all that they have."""
        return [trial for trial in self.parts if trial.parameters < self.whole.parameters]

    @property
    def holder(self) -> Trial | None:
        """Without which layers the likeness falls most."""
        return max(self.without_layers, key=lambda trial: trial.below(self.whole)[0], default=None)

    @property
    def costliest(self) -> Trial | None:
        """Without which layers the base model's predictions for the class move least."""
        return min(self.without_layers, key=lambda trial: trial.scores["drift"] or 0.0, default=None)

    def findings(self) -> list[str]:
        """Return in sentences which part holds the subject, and which costs the class."""
        if self.holder is None or self.costliest is None:
            return ["It has one part alone, so nothing can be left out."]
        whole, base = self.whole.scores, self.whole.results.models["base"].dino
        fall, error = self.holder.below(self.whole)
        doubt = "" if error is None else f" ± {error:.2f}, standard error over prompts"
        clear = "" if error is None or fall > 2 * error else " That is within what chance can do."
        costs = self.costliest.scores["drift"] or 0.0
        return [
            f"{self.holder.name} holds the subject: without it DINO falls from {whole['dino']:.2f} to "
            f"{self.holder.scores['dino']:.2f} (by {fall:.2f}{doubt}; base model {base:.2f}).{clear}",
            f"{self.costliest.name} costs the class most: without it the drift of predictions for the class is "
            f"{costs:.4f} instead of {whole['drift'] or 0:.4f}, with DINO {self.costliest.scores['dino']:.2f}.",
        ]

    def sheet(self, pruned: Trial | None) -> Image.Image:
        """Return what is drawn without each part, and pruned if it was: the same prompts and seeds in a column."""
        shown = min(PICTURES, len(self.whole.drawn.rows))
        columns = [*(f"{number}" for number in range(1, shown + 1)), CLASS]
        rows = {BASE: self.base, "whole adapter": self.whole} | {f"without {x.name}": x for x in self.parts}
        rows |= {"pruned": pruned} if pruned else {}
        images = {}
        for name, tried in rows.items():
            firsts = [*(row[0] for row in tried.drawn.rows[:shown]), tried.drawn.class_images[0]]
            images |= {(name, column): thumbnail(image) for column, image in zip(columns, firsts)}
        return draw_pictures([*rows], columns, images, self.label)

    def numbers(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        base = self.whole.results
        return {
            "adapter": self.label,
            "base": {
                **{name: getattr(base.models["base"], name) for name in ("dino", "clip_i", "clip_t")},
                "loss": self.base.losses.scores().of_subject,
                "class_similarity": base.prior.similarity_before if base.prior else None,
            },
            "whole": _numbers(self.whole),
            "without": {trial.name: _numbers(trial) | _falls(trial, self.whole) for trial in self.parts},
        }


def ablate(bench: Bench, adapter: Interpreted, whole: Trial, pairs: int, prefix: str = "") -> Ablation:
    """Return what an adapter does without each of its parts. `prefix` begins the names of image folders."""
    parts = [bench.try_out(f"{prefix}without {x.name}", adapter, x.rest, x.name) for x in parts_of(adapter, pairs)]
    prompts = [*bench.prompts.drawn["adapted"], bench.prompts.of_class]
    return Ablation(adapter.label, whole, bench.base, parts, prompts)


def check_ablations(adapters: Sequence[Interpreted]) -> None:
    """Raise UserError if an adapter cannot be put beside the base model's weights and taken away again."""
    for adapter in adapters:
        file = adapter.matched.file
        if file.needs_weights or file.words:
            raise UserError(
                f"{file.path} is {file.noun}: parts of Kronecker adapters and LoRAs alone can be left out. Without "
                "photos and prompts, its numbers are shown"
            )


def _numbers(trial: Trial) -> dict[str, Any]:
    return {
        "parameters": trial.parameters,
        **trial.scores,
        "loss_explained_by_timestep": [[step, share] for step, share in trial.explained()],
    }


def _falls(trial: Trial, whole: Trial) -> dict[str, float | None]:
    fall, error = trial.below(whole)
    return {"dino_fall": fall, "dino_fall_standard_error": error}
