"""Make masks of the photos in a folder by rembg, so that training learns the subject and not what is around it.

    pip install 'rembg[cpu]==2.0.86'
    python scripts/make_masks.py --instance_data_dir photos/dog
    python scripts/make_masks.py --instance_data_dir photos/ann --model u2net_human_seg --overwrite

Writes photo.mask.png beside photo.jpg, white where the subject is; training and scripts/evaluate.py then read it. Masks
that are there stay without --overwrite. Says for every photo how much of it is subject, with a warning for next to
nothing or nearly all, and writes OUTPUT_DIR/sheet.png: the photos, with what is masked out in grey under a colour.

rembg downloads a model when it is used for the first time. Names of services make rembg send the photos there.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2",
#     "bitsandbytes==0.50.2", "safetensors==0.8.0", "datasets==5.2.0", "filelock==4.3.1", "psutil==7.2.2",
#     "numpy==2.4.6", "pillow==13.0.0", "PyYAML==6.0.3", "Jinja2==3.1.6", "matplotlib==3.11.2", "tqdm==4.70.1",
#     "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.data.folder import find_photos
from dreambooth.data.masks import Masked, load_segmenter, make_mask, mask_path, read_masked
from dreambooth.data.photos import readable
from dreambooth.drawing.mask_sheet import mask_sheet
from dreambooth.errors import UserError, readable_errors
from dreambooth.options.field import option
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from kron_formats.files import printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Photos and masks."""

    instance_data_dir: str = option("Folder with the photos; subfolders are not read.", path=True)
    model: str = option("rembg's model.", "u2net")
    overwrite: bool = option("Replace masks that are there.", False)
    output_dir: str = option("Folder for sheet.png; not that of the photos.", "outputs/masks", path=True)

    def check(self) -> None:
        if Path(self.output_dir).resolve() == Path(self.instance_data_dir).resolve():
            raise UserError(f"--output_dir {self.output_dir}: sheet.png would be a photo there; choose another folder")


def main() -> None:
    config = parse_options(Config, __doc__)
    logging.basicConfig(format="%(levelname)s %(message)s")
    folder = find_photos(config.instance_data_dir, "--instance_data_dir")
    for flag in ("instance_data_dir", "output_dir"):
        check_folder(getattr(config, flag), f"--{flag}")
    kept = {} if config.overwrite else {photo: masks[0] for photo, masks in folder.belongings["mask"].items()}
    new = {photo: mask_path(photo, folder) for photo in folder.photos if photo not in kept}
    segment = load_segmenter(config.model) if new else None

    def masked(photo: Path) -> Masked:
        if photo in kept:
            found, what = read_masked(photo, kept[photo], folder.source), "kept; --overwrite replaces it"
        else:
            assert segment is not None  # there are new ones
            found, what = make_mask(photo, new[photo], segment), "written"
        print(
            f"{printable(photo.name)}: {found.share:.0%} is subject; {found.mask_name or 'no mask'} {what}", flush=True
        )
        if found.doubt is not None:
            logger.warning("%s: %s", printable(photo.name), found.doubt)
        return found

    photos = readable(((photo.name, photo) for photo in folder.photos), masked, folder.source)
    sheet = Path(config.output_dir) / "sheet.png"
    sheet.parent.mkdir(parents=True, exist_ok=True)
    mask_sheet(photos).save(sheet)
    print(f"Wrote {sheet}")


if __name__ == "__main__":
    with readable_errors():
        main()
