"""What scripts/evaluate.py scores, on which prompts, and with which models."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from dreambooth.errors import UserError
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.drawing import DrawingOptions
from dreambooth.options.field import GIVEN, option
from dreambooth.options.subjects import Subject, subjects_in

TOGETHER = "together"  # what is drawn of several subjects, and its folder


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(AdaptedModelOptions, DrawingOptions):
    """What to score, on which prompts, and with which models."""

    instance_data_dir: str | None = option(
        "Folder with the photos of the subject that were trained on, to compare images with.", None, path=True
    )
    reference_dir: str | None = option(
        "Folder with other photos of the subject, to compare images with instead, and to denoise. Default: none.",
        None,
        path=True,
    )
    holdout: int = option(
        "Compare with the last photos of instance_data_dir, as many as training kept out, and denoise them.",
        0,
        at_least=0,
    )
    denoising_pairs: int = option(
        "Pairs of noise and timestep with which photos that were not trained on are denoised; 0 skips it.",
        64,
        at_least=0,
    )
    instance_token: str | None = option(
        "Rare token that the adapter was trained with. Default: the new word of the adapter, or else sks.", None
    )
    class_noun: str = option(
        'Class of the subject, for example dog; {} in prompts then stands for "sks dog". Required, unless there are '
        "subjects.",
        "",
    )
    subjects: dict[str, dict[str, str | None]] | None = option(
        "YAML file with the subjects of a training of several, as there. Each is scored alone, in a folder of "
        "output_dir, against its photos in instance_data_dir/FOLDER; output_dir/scores.json tells how far they mix.",
        None,
        nested=True,
    )
    together: list[str] = option(
        'Prompts with several of the subjects at once: "a photo of {dog} and {robot}". Default: none.',
        [],
        needs={"subjects": GIVEN},
    )
    prompts: str | None = option(
        "File with one prompt per line, for example configs/prompts/objects.txt.", None, path=True
    )
    prompt: list[str] = option("Prompts, instead of a file. Each has {} for the subject.", [])
    class_prompt: str | None = option(
        'Prompt of the class images. Default: "a photo of" and class_noun.', None, needs={"adapter": GIVEN}
    )
    num_class_images: int = option(
        "Class images per model; 0 skips the prior.", 16, at_least=0, needs={"adapter": GIVEN}
    )
    class_data_dir: str | None = option(
        "Folder with the class images on which drift is measured. Default: those that the base model draws.",
        None,
        path=True,
        needs={"adapter": GIVEN},
    )
    other_prompts: str | None = option(
        "File with prompts that do not name the subject, one per line, on which both models should draw the same, for "
        "example configs/prompts/other.txt. Default: none.",
        None,
        path=True,
        needs={"adapter": GIVEN},
    )
    clip_model: str = option(
        "CLIP to score with: a name on the Hub, or a folder.", "openai/clip-vit-base-patch32", hub=True
    )
    dino_model: str = option("DINO to score with: a name on the Hub, or a folder.", "facebook/dino-vits16", hub=True)
    lpips: Literal["alex", "vgg", "squeeze"] | None = option(
        "Network for diversity by LPIPS as well, which needs torchmetrics and torchvision. Default: none.", None
    )
    base_images_cache: str | None = option(
        "Folder that keeps the base model's images for later evaluations, which then do not draw them again. Default: "
        "none.",
        None,
        path=True,
    )
    output_dir: str = option(
        "Folder for scores.json, scores.csv, images and sheet.png.", "outputs/evaluation", path=True
    )

    def check(self) -> None:
        if bool(self.prompts) == bool(self.prompt):
            raise UserError("give either --prompts, a file, or --prompt")
        if self.subjects is not None:
            self._check_several()
        elif not self.class_noun.strip():
            raise UserError("--class_noun is empty; it says what the subject is, for example dog")
        if self.instance_data_dir is None and self.reference_dir is None:
            raise UserError("--instance_data_dir or --reference_dir, a folder with photos of the subject, is required")
        if self.holdout and self.reference_dir is not None:
            raise UserError("--holdout and --reference_dir both say which photos were not trained on; use one of them")
        if not self.has_references:
            for name in ("class_data_dir", "denoising_pairs"):
                if getattr(self, name) not in (getattr(type(self), name), 0):
                    raise UserError(f"--{name} needs photos that were not trained on: --reference_dir or --holdout")

    def _check_several(self) -> None:
        """Raise UserError if what the subjects are called is said twice or cannot be told."""
        for name in ("instance_token", "class_noun", "class_prompt"):
            if getattr(self, name):
                raise UserError(f"--{name} does not work with --subjects, whose prompts say it; leave it out")
        folders = list(self.phrases())
        if self.together and TOGETHER in folders:
            raise UserError(
                f"--subjects {TOGETHER}: its images and those of --together would be in one folder; rename it"
            )
        for prompt in self.together:
            named = re.findall(r"{(.*?)}", prompt)
            if not named:
                raise UserError(f"--together '{prompt}' names no subject; write {{{folders[0]}}} for one")
            if unknown := [name for name in named if name not in folders]:
                raise UserError(f"--together '{prompt}': {{{unknown[0]}}} is none of --subjects, {', '.join(folders)}")

    def phrases(self) -> dict[str, tuple[str, str]]:
        """Return, for each of several subjects by its folder, what prompts call it, "sks dog", and its class, "dog"."""
        words = {subject.folder: subject.token_and_noun() for subject in subjects_in(self.subjects or {})}
        return {folder: (f"{token} {noun}", noun) for folder, (token, noun) in words.items()}

    def of_each_subject(self) -> dict[str, Self]:
        """Return the options with which each subject is evaluated alone, by its folder; "" if there is one."""
        if self.subjects is None:
            return {"": self}
        return {subject.folder: self._of(subject) for subject in subjects_in(self.subjects)}

    def _of(self, subject: Subject) -> Self:
        def below(folder: str | None, name: str = subject.folder) -> str | None:
            return None if folder is None else str(Path(folder) / name)

        token, noun = subject.token_and_noun()
        return replace(
            self,
            subjects=None,
            together=[],
            instance_token=token,
            class_noun=noun,
            class_prompt=subject.class_prompt,
            class_data_dir=below(self.class_data_dir, subject.class_folder),
            **{name: below(getattr(self, name)) for name in ("instance_data_dir", "reference_dir", "output_dir")},
        )

    def of_together(self) -> Self:
        """Return the options with which the prompts with several subjects are drawn."""
        folder = str(Path(self.output_dir) / TOGETHER)
        return replace(self, output_dir=folder, num_class_images=0, denoising_pairs=0)

    @property
    def prompt_of_class(self) -> str:
        """The prompt of class images."""
        return self.class_prompt or f"a photo of {self.class_noun}"

    @property
    def has_references(self) -> bool:
        """Whether there are photos that were not trained on."""
        return bool(self.holdout) or self.reference_dir is not None

    @property
    def compared_with(self) -> str:
        """What the images are compared with, in words."""
        if self.reference_dir is not None:
            return f"not trained on, in {self.reference_dir}"
        held_out = f"held out (--holdout {self.holdout}), " if self.holdout else ""
        return f"{held_out}in {self.instance_data_dir}"
