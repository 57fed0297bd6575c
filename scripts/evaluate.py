"""Score an adapter beside its base model: fidelity to subject and prompts, diversity, and drift of the class.

    python scripts/evaluate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors --dtype fp16 \\
        --instance_data_dir photos/dog --instance_token sks --class_noun dog \\
        --prompts configs/prompts/live_subjects.txt --output_dir outputs/dog/evaluation

Images are drawn for the prompts, with "sks dog" for {}, and for the class prompt, without and with the adapter; image i
of every prompt is drawn from seed + i. CLIP-T is computed with "dog" for {}.

    CLIP-I, DINO   fidelity to the subject: mean cosine of images and photos in CLIP's and in DINO's embeddings
    CLIP-T         fidelity to the prompt: mean cosine of images and their prompts in CLIP's embeddings
    diversity      mean DINO distance, 1 - cosine, of two images of a prompt; needs --num_images of at least 2
    prior          of class images: mean DINO cosine to the photos (if it rises, "dog" comes to mean this dog) and
                   diversity, without and with the adapter; mean DINO distance of the two images of a seed

These are the measures of the DreamBooth paper (arXiv 2208.12242, sec. 4), whose diversity uses LPIPS distances instead.
By default DINO is the paper's ViT-S/16, and CLIP is ViT-B/32. The row "photos" compares the photos with each other:
what a perfect adapter would score. Several --adapter add up, as in scripts/generate.py; without any, the base model
alone is scored.

Writes scores.json (settings, means, every prompt), scores.csv (one row per model and prompt), the images as
images/MODEL/PROMPT-SEED.png, and sheet.png: the photos, and the models' images of the same seeds side by side.
"""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image, ImageOps
from tqdm.auto import tqdm

from dreambooth.drawing.sheet import draw_sheet
from dreambooth.errors import UserError, readable_errors
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.drawing import DrawingOptions
from dreambooth.options.field import GIVEN, option
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from dreambooth.runtime.library_warnings import show_library_warnings
from dreambooth.scoring.subject import PLACEHOLDER, name_subject, prompt_lines, read_subject_photos
from dreambooth.wording import counted
from kron_formats.files import whole_file, write_text

if TYPE_CHECKING:
    from dreambooth.scoring.measures import PhotoScores, PriorDrift, PromptScores

BASE, ADAPTED = "base", "adapted"
SCORES = ("clip_i", "dino", "clip_t", "diversity")
COLUMNS = 8  # of the sheet, images
THUMBNAIL = (192, 192)  # px
GAP = (16, 192)  # px, between the models


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions, DrawingOptions):
    """What to score, on which prompts, and with which models."""

    instance_data_dir: str = option("Folder with the photos of the subject to compare images with.", path=True)
    instance_token: str = option("Rare token that the adapter was trained with.", "sks")
    class_noun: str = option('Class of the subject, for example dog; {} in prompts then stands for "sks dog".')
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
    clip_model: str = option(
        "CLIP to score with: a name on the Hub, or a folder.", "openai/clip-vit-base-patch32", hub=True
    )
    dino_model: str = option("DINO to score with: a name on the Hub, or a folder.", "facebook/dino-vits16", hub=True)
    output_dir: str = option(
        "Folder for scores.json, scores.csv, images and sheet.png.", "outputs/evaluation", path=True
    )

    def check(self) -> None:
        if bool(self.prompts) == bool(self.prompt):
            raise UserError("give either --prompts, a file, or --prompt")
        if not self.class_noun.strip():
            raise UserError("--class_noun is empty; it says what the subject is, for example dog")


@dataclass(frozen=True)
class Drawn:
    """What a model drew."""

    rows: list[list[Image.Image]]  # one for each prompt
    class_images: list[Image.Image]


@dataclass(frozen=True)
class Results:
    """What scores.json has besides the settings."""

    photos: "PhotoScores"
    models: "dict[str, PromptScores]"
    prior: "PriorDrift | None"


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once
    check_folder(config.output_dir, "--output_dir")
    sources, prompts = zip(*named_prompts(config))
    if without := [prompt for prompt in prompts if PLACEHOLDER not in prompt]:
        raise UserError(f"the prompt '{without[0]}' has no {PLACEHOLDER}, which stands for the subject")
    photos = read_subject_photos(config.instance_data_dir)
    print(f"Comparing with {counted(len(photos), 'photo')} in {config.instance_data_dir}", flush=True)

    show_library_warnings()

    import torch

    from dreambooth.base_model.source import load_tokenizers
    from dreambooth.drawing.pipelines import add_adapters, load_base_pipeline, prepare_drawing, read_adapters
    from dreambooth.scoring.embeddings import load_evaluators
    from dreambooth.scoring.measures import score_images, score_photos, score_prior
    from dreambooth.tokens import warn_of_cut_prompts
    from methods.readers import READERS

    adapters = read_adapters(config, READERS)
    named = name_subject(prompts, f"{config.instance_token} {config.class_noun}")
    texts = name_subject(prompts, config.class_noun)
    drawn_texts = [*zip(sources, named), ("--class_prompt", class_prompt(config))]
    drawn_texts += [("--negative_prompt", config.negative_prompt)]
    warn_of_cut_prompts(drawn_texts, load_tokenizers(config).values(), config.max_token_length, config.instance_token)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    evaluators = load_evaluators(config.clip_model, config.dino_model, device)
    evaluators.warn_of_cut_texts(zip(sources, texts))

    pipeline = load_base_pipeline(config).to(device)
    if "safety_checker" in pipeline.components:  # or black images would be scored
        pipeline.register_modules(safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prepare_drawing(pipeline, READERS, config)
    drawn = {BASE: draw(pipeline, named, BASE, config)}
    if adapters:
        add_adapters(pipeline, adapters, READERS)
        prepare_drawing(pipeline.to(device), READERS, config)
        drawn[ADAPTED] = draw(pipeline, named, ADAPTED, config)

    scores = {model: score_images(images.rows, photos, texts, evaluators) for model, images in drawn.items()}
    prior = None
    if adapters and config.num_class_images:
        prior = score_prior(drawn[BASE].class_images, drawn[ADAPTED].class_images, photos, evaluators)
    results = Results(score_photos(photos, evaluators), scores, prior)

    output = Path(config.output_dir)
    write_csv(output / "scores.csv", named, texts, results)
    contact_sheet(photos, named, drawn, config).save(output / "sheet.png")
    write_json(output / "scores.json", named, texts, results, config)  # last and whole: where it is, all is done
    print(table(results))
    print(f"Wrote {output / 'scores.json'}, scores.csv, sheet.png and images")


def named_prompts(config: Config) -> list[tuple[str, str]]:
    """Return (where it comes from, prompt) for each prompt to draw."""
    if config.prompts:
        return [
            (f"--prompts {config.prompts}, line {line}", text) for line, text in prompt_lines(config.prompts).items()
        ]
    return [(f"--prompt, number {number}", text) for number, text in enumerate(config.prompt, 1)]


# ---- drawing ----


def draw(pipeline: Any, prompts: Sequence[str], model: str, config: Config) -> Drawn:
    """Draw and save a model's images; class images only if there is an adapter, since otherwise nothing drifts."""
    from dreambooth.drawing.draw import draw_images

    folder = Path(config.output_dir) / "images" / model
    folder.mkdir(parents=True, exist_ok=True)

    def images_of(prompt: str, count: int, name: str) -> list[Image.Image]:
        seeds = range(config.seed, config.seed + count)
        images = draw_images(pipeline, seeds, config.batch_size, prompt=prompt, **config.common_arguments())
        for seed, image in zip(seeds, images):
            image.save(folder / f"{name}-{seed}.png")
        return images

    progress = tqdm(prompts, desc=f"Images, {model}", unit="prompt")
    rows = [images_of(prompt, config.num_images, f"{number:02d}") for number, prompt in enumerate(progress)]
    return Drawn(rows, images_of(class_prompt(config), config.num_class_images if config.adapter else 0, "class"))


def class_prompt(config: Config) -> str:
    return config.class_prompt or f"a photo of {config.class_noun}"


# ---- what is written ----


def write_json(path: Path, prompts: Sequence[str], texts: Sequence[str], results: Results, config: Config) -> None:
    models = {}
    for model, scores in results.models.items():
        means = asdict(scores)
        by_prompt = [{"prompt": p, "text": t} | row for p, t, row in zip(prompts, texts, means.pop("by_prompt"))]
        models[model] = means | {"by_prompt": by_prompt}
    report = asdict(results) | {"models": models}
    text = json.dumps({"settings": asdict(config)} | report, indent=2, ensure_ascii=False)
    with whole_file(path) as unfinished:
        write_text(unfinished, text + "\n")


def write_csv(path: Path, prompts: Sequence[str], texts: Sequence[str], results: Results) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "prompt", "text", *SCORES])
        for model, scores in results.models.items():
            for prompt, text, row in zip(prompts, texts, scores.by_prompt):
                writer.writerow([model, prompt, text, *(getattr(row, name) for name in SCORES)])


def contact_sheet(
    photos: Sequence[Image.Image], prompts: Sequence[str], drawn: Mapping[str, Drawn], config: Config
) -> Image.Image:
    """Return a sheet: a row of photos, and for each prompt a row of both models' images of the same seeds."""
    rows, labels = [photos[:COLUMNS]], ["photos"]
    models = " | ".join(drawn)
    for number, prompt in enumerate(prompts):
        rows.append(side_by_side([images.rows[number] for images in drawn.values()]))
        labels.append(f"{prompt}: {models}")
    if all(images.class_images for images in drawn.values()):
        rows.append(side_by_side([images.class_images for images in drawn.values()]))
        labels.append(f"{class_prompt(config)}: {models}")
    return draw_sheet([[ImageOps.contain(image, THUMBNAIL) for image in row] for row in rows], labels)


def side_by_side(groups: Sequence[Sequence[Image.Image]]) -> list[Image.Image]:
    """Return the first images of each group, as many as fit in COLUMNS, with a gap between the groups."""
    gap = Image.new("RGB", GAP, "white")
    row = [cell for group in groups for cell in [*group[: COLUMNS // len(groups)], gap]]
    return row[:-1]


def table(results: Results) -> str:
    """Return the means as a table in plain text."""
    head = "".join(f"{name:>11}" for name in ("CLIP-I", "DINO", "CLIP-T", "diversity"))
    lines = [f"{'':8}{head}"]
    for name, scores in {"photos": results.photos, **results.models}.items():
        lines.append(f"{name:8}" + "".join(f"{number(getattr(scores, score, None)):>11}" for score in SCORES))
    if prior := results.prior:
        lines += [
            "prior, base -> adapted: "
            f"DINO to the photos {number(prior.similarity_before)} -> {number(prior.similarity_after)}, "
            f"diversity {number(prior.diversity_before)} -> {number(prior.diversity_after)}, "
            f"distance at one seed {number(prior.distance)}"
        ]
    return "\n".join(lines)


def number(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


if __name__ == "__main__":
    with readable_errors():
        main()
