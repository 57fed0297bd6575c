"""The photos of the subject, their captions and crops, and whether their latents are cached."""

from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import option
from dreambooth.options.subjects import SubjectOptions

BUCKET_STEP = 64  # px; the sides of buckets are multiples of it


@dataclass(frozen=True, kw_only=True)
class PhotoOptions(SubjectOptions):
    """Instance images: the photos of the subject."""

    # A resumed run compares the photos and captions themselves, so it does not matter where they come from.
    instance_data_dir: str | None = option(
        "Folder with the photos of the subject; subfolders are read for subjects alone. Captions: photo.txt or "
        "photo.caption beside photo.jpg, metadata.jsonl or metadata.csv; masks: photo.mask.png; class prompts: "
        "photo.class.txt.",
        None,
        decides_result=False,
        path=True,
    )
    dataset_name: str | None = option(
        "Dataset to use instead of instance_data_dir: a name on the Hub, a folder, also one of save_to_disk, or a "
        "table file. Its only split is used, or train.",
        None,
        decides_result=False,
        hub=True,
    )
    dataset_config_name: str | None = option("Configuration of that dataset.", None, decides_result=False)
    image_column: str = option("Column of that dataset that holds the images.", "image", decides_result=False)
    caption_column: str | None = option(
        "Column that holds the captions. Default: text in a folder's metadata.jsonl or metadata.csv; in a dataset, "
        "none: its photos have instance_prompt.",
        None,
        decides_result=False,
    )
    caption_dropout_probability: float = option(
        "Fraction of samples trained with an empty prompt, 0 to 1.", 0.0, at_least=0, at_most=1
    )
    holdout: int = option(
        "Photos of each subject to keep out of training, for scripts/evaluate.py: the last ones in the order of their "
        "names, or rows.",
        0,
        at_least=0,
    )
    repeats: int = option("How often each photo occurs in one pass over the photos of its subject.", 1, at_least=1)
    unmasked_weight: float = option("Weight of the loss outside a photo's mask; 1 inside.", 0.0, at_least=0)
    resolution: int = option("Side of the training images, px. A multiple of 8.", 512, at_least=8, multiple_of=8)
    center_crop: bool = option(
        "Crop images at the centre. Default: at random, differently each time an image is used.", False
    )
    random_flip: bool = option("Mirror each sample with probability 1/2.", False)
    aspect_ratio_buckets: bool = option(
        "Train each photo in the shape closest to its own: sides that are multiples of 64 px, area resolution².", False
    )
    image_interpolation_mode: Literal["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"] = option(
        "How images are resized.", "lanczos"
    )

    def check(self) -> None:
        if self.instance_data_dir is None and self.dataset_name is None:
            raise UserError("--instance_data_dir, the folder with the photos, or --dataset_name is required")
        if self.instance_data_dir is not None and self.dataset_name is not None:
            raise UserError(
                "--instance_data_dir and --dataset_name both say where the photos are; use only one of them"
            )
        if self.subjects is None and self.instance_prompt is None:
            raise UserError("--instance_prompt, for example 'a photo of sks dog', or --subjects is required")
        if self.subjects is not None and self.dataset_name is not None:
            raise UserError(
                "--subjects does not work with --dataset_name: the photos of each are in a folder below "
                "--instance_data_dir"
            )
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise UserError("--dataset_config_name needs --dataset_name")
        if self.image_column != "image" and self.dataset_name is None:
            raise UserError("--image_column needs --dataset_name")
        if self.aspect_ratio_buckets and self.resolution < BUCKET_STEP:
            raise UserError(
                f"--aspect_ratio_buckets needs a --resolution of at least {BUCKET_STEP}, not {self.resolution}: the "
                f"sides of buckets are multiples of {BUCKET_STEP} px"
            )


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Cached latents."""

    cache_latents: Literal["auto", "on", "off"] = option(
        "Encode each photo only once. auto: if its crop does not vary; on: always, with one fixed crop per photo.",
        "auto",
    )
    cache_latents_to_disk: str | None = option(
        "Folder in which to keep encoded photos and prompts for later runs. Default: none.",
        None,
        decides_result=False,
        path=True,
    )

    def check(self) -> None:
        if self.cache_latents == "off" and self.cache_latents_to_disk is not None:
            raise UserError("--cache_latents_to_disk does not work with --cache_latents off")
