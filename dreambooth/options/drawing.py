"""What is drawn: class images and samples during training, and the images of scripts."""

from dataclasses import dataclass
from typing import Any, Literal

from dreambooth.errors import UserError
from dreambooth.options.field import GIVEN, option
from dreambooth.options.prompts import PromptOptions
from dreambooth.options.subjects import SubjectOptions

CLASS_IMAGES = {"with_prior_preservation": [True], "prior_source": ["images"]}
SAMPLES = {"validation_prompt": GIVEN}


@dataclass(frozen=True, kw_only=True)
class SampleBatchOptions:
    """Drawing during training: class images and samples."""

    sample_batch_size: int = option(
        "Images to draw at once on each device: class images, or samples of one prompt.",
        4,
        at_least=1,
        decides_result=False,
    )


@dataclass(frozen=True, kw_only=True)
class PriorOptions(SubjectOptions, SampleBatchOptions):
    """Prior preservation: keeps the class from turning into the subject."""

    # A resumed run compares the class images themselves, so it does not matter how they were drawn.
    with_prior_preservation: bool = option("Train on the class as well, to preserve its variety.", False)
    prior_source: Literal["images", "base_model"] = option(
        "images: train on class images. base_model: match the base model's prediction for the class prompt, which "
        "needs no class images.",
        "images",
    )
    prior_loss_weight: float = option(
        "Weight of the prior's loss; the instance images' is 1.",
        1.0,
        at_least=0,
        needs={"with_prior_preservation": [True]},
    )
    class_data_dir: str | None = option(
        "Folder with the class images, with subjects a folder in it for each class prompt; the base model draws those "
        "that are missing.",
        None,
        decides_result=False,
        path=True,
    )
    num_class_images: int = option(
        "Number of class images of each class: the first in the order of their names; those missing are drawn.",
        100,
        at_least=1,
        decides_result=False,
        needs=CLASS_IMAGES,
    )
    prior_num_inference_steps: int = option(
        "Denoising steps per class image.", 25, at_least=1, decides_result=False, needs=CLASS_IMAGES
    )
    prior_guidance_scale: float = option(
        "Scale of classifier-free guidance for class images.", 7.5, decides_result=False, needs=CLASS_IMAGES
    )
    prior_negative_prompt: str = option(
        "Negative prompt for class images.", "", decides_result=False, needs=CLASS_IMAGES
    )
    prior_seed: int | None = option(
        "Seed of the class images, for runs of several seeds that share them. Default: seed.",
        None,
        at_least=0,
        below=2**32,
        decides_result=False,
        needs=CLASS_IMAGES,
    )

    @property
    def uses_base_model_prior(self) -> bool:
        """Whether the prior is what the base model predicts for the instance images under their class prompts."""
        return self.with_prior_preservation and self.prior_source == "base_model"

    @property
    def uses_class_images(self) -> bool:
        """Whether the prior is learned from class images."""
        return self.with_prior_preservation and self.prior_source == "images"

    @property
    def needs_class_prompt(self) -> str | None:
        return "--with_prior_preservation" if self.with_prior_preservation else super().needs_class_prompt

    def check(self) -> None:
        if not self.with_prior_preservation:
            if self.class_data_dir:
                raise UserError("--class_data_dir needs --with_prior_preservation")
            if self.prior_source == "base_model":
                raise UserError("--prior_source base_model needs --with_prior_preservation")
            return
        if self.prior_source == "base_model" and self.class_data_dir:
            raise UserError(
                "--class_data_dir does not work with --prior_source base_model, which needs no class images"
            )
        if self.prior_source == "images" and not self.class_data_dir:
            raise UserError("--with_prior_preservation needs --class_data_dir, the folder for the class images")
        if self.prior_source == "images" and self.subjects is not None:
            self._check_class_folders()

    def _check_class_folders(self) -> None:
        """Raise UserError if the class images of two classes would be in one folder, or a class has none."""
        prompts: dict[str, str | None] = {}
        for subject in self.all_subjects:
            folder, prompt = subject.class_folder, subject.class_prompt
            if not folder:
                raise UserError(f"{subject.source('class_prompt')}: '{prompt}' has no letters to name a folder by")
            if prompts.setdefault(folder, prompt) != prompt:
                raise UserError(
                    f"{subject.source('class_prompt')}: the class images for '{prompt}' and '{prompts[folder]}' would "
                    f"both be in --class_data_dir {self.class_data_dir}, folder {folder}; word them more differently"
                )


@dataclass(frozen=True, kw_only=True)
class SampleOptions(SampleBatchOptions):
    """Samples: images drawn during training."""

    validation_prompt: list[str] = option(
        "Prompts to draw during training, each a row of the sheet. Default: none.", [], decides_result=False
    )
    num_validation_images: int = option(
        "Images per validation prompt.", 4, at_least=1, decides_result=False, needs=SAMPLES
    )
    validation_epochs: int = option(
        "Draw samples every this many passes over the instance images.",
        50,
        at_least=1,
        decides_result=False,
        needs={**SAMPLES, "validation_steps": [None]},
    )
    validation_steps: int | None = option(
        "Draw samples every this many optimizer steps. Overrides validation_epochs.",
        None,
        at_least=1,
        decides_result=False,
        needs=SAMPLES,
    )
    validation_num_inference_steps: int = option(
        "Denoising steps per sample.", 25, at_least=1, decides_result=False, needs=SAMPLES
    )
    validation_guidance_scale: float = option(
        "Scale of classifier-free guidance for samples.", 7.5, decides_result=False, needs=SAMPLES
    )


@dataclass(frozen=True, kw_only=True)
class PictureOptions(PromptOptions):
    """How images are drawn."""

    negative_prompt: str = option("Negative prompt for all images.", "")
    height: int | None = option(
        "Height of the images, px. A multiple of 8. Default: the base model's.", None, at_least=8, multiple_of=8
    )
    width: int | None = option(
        "Width of the images, px. A multiple of 8. Default: the base model's.", None, at_least=8, multiple_of=8
    )
    num_inference_steps: int = option("Denoising steps per image.", 25, at_least=1)
    guidance_scale: float = option("Scale of classifier-free guidance.", 7.5)

    def common_arguments(self) -> dict[str, Any]:
        """Return the arguments of `draw_images` that are the same for every prompt."""
        return {
            "negative_prompt": self.negative_prompt,
            "max_token_length": self.max_token_length,
            "height": self.height,
            "width": self.width,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
        }


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(PictureOptions):
    """Images to draw."""

    num_images: int = option("Images per prompt.", 4, at_least=1)
    batch_size: int = option("Images drawn at once.", 4, at_least=1)
    seed: int = option("Seed of each prompt's first image; each further image adds 1.", 0, at_least=0, below=2**63)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(PictureOptions):
    """The page: where it listens, and what it begins with."""

    host: str = option(
        "Address to listen on. 127.0.0.1 is this computer alone; with 0.0.0.0 everyone who reaches it can draw.",
        "127.0.0.1",
    )
    port: int = option("Port to listen on.", 7860, at_least=1, at_most=65535)
    prompt: str = option("Prompt that the page begins with.", "")
    seed: int = option("Seed that the page begins with.", 0, at_least=0, below=2**53)
