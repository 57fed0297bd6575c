"""The sheet of an evaluation: the photos, and what both models drew from the same seeds, side by side."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageOps

from dreambooth.drawing.sheet import draw_sheet
from dreambooth.options.evaluation import EvaluationOptions
from dreambooth.scoring.models import Drawn
from dreambooth.scoring.prompts import ADAPTED, Prompts

COLUMNS = 8  # images
THUMBNAIL = (192, 192)  # px
GAP = (16, 192)  # px, between the models


def contact_sheet(
    photos: Sequence[Image.Image], prompts: Prompts, drawn: Mapping[str, Drawn], config: EvaluationOptions
) -> Image.Image:
    """Return a sheet: a row of photos, and for each prompt a row of both models' images of the same seeds.

    Last come the class, and the prompts that do not name the subject.
    """
    rows = [photos[:COLUMNS]]
    labels = ["photos that were not trained on" if config.has_references else "photos"]

    def add(prompt: str, images: list[Sequence[Image.Image]]) -> None:
        rows.append(_side_by_side(images))
        labels.append(f"{prompt}: {' | '.join(drawn)}")

    for number, prompt in enumerate(prompts.drawn[ADAPTED]):
        add(prompt, [of_model.rows[number] for of_model in drawn.values()])
    if all(of_model.class_images for of_model in drawn.values()):
        add(prompts.of_class, [of_model.class_images for of_model in drawn.values()])
    if all(of_model.others for of_model in drawn.values()):
        for number, other in enumerate(prompts.others):
            add(other.text, [of_model.others[number] for of_model in drawn.values()])
    return draw_sheet([[ImageOps.contain(image, THUMBNAIL) for image in row] for row in rows], labels)


def _side_by_side(groups: Sequence[Sequence[Image.Image]]) -> list[Image.Image]:
    """Return the first images of each group, as many as fit in COLUMNS, with a gap between the groups."""
    gap = Image.new("RGB", GAP, "white")
    row = [cell for group in groups for cell in [*group[: COLUMNS // len(groups)], gap]]
    return row[:-1]
