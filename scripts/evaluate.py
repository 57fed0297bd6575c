"""Score an adapter beside its base model: fidelity to subject and prompts, diversity, and drift of the class.

    python scripts/evaluate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors --dtype fp16 \\
        --instance_data_dir photos/dog --instance_token sks --class_noun dog \\
        --prompts configs/prompts/live_subjects.txt --output_dir outputs/dog/evaluation

Images are drawn for the prompts, with "sks dog" for {}, and for the class prompt, without and with the adapter; image i
of every prompt is drawn from seed + i. CLIP-T is computed with "dog" for {}. If the adapter has a new word, {} stands
for that: "<dog>" of Textual Inversion, "<new1> dog" of Custom Diffusion; the base model, which lacks it, draws "dog".

    CLIP-I, DINO   fidelity to the subject: mean cosine of images and photos in CLIP's and in DINO's embeddings
    CLIP-T         fidelity to the prompt: mean cosine of images and their prompts in CLIP's embeddings
    diversity      mean DINO distance, 1 - cosine, of two images of a prompt; needs --num_images of at least 2
    prior          of class images: mean DINO cosine to the photos (if it rises, "dog" comes to mean this dog) and
                   diversity, without and with the adapter; mean DINO distance of the two images of a seed

Scores against the photos that were trained on also reward copying them. --reference_dir has other photos of the
subject; --holdout N takes the last N of --instance_data_dir, if the adapter was trained with --holdout N. Images are
then compared with these, and the models denoise them, all with the same noise at the same timesteps:

    held-out       mean squared error of the prediction for "a photo of sks dog": lower is better
    in masks       the same inside the masks of the photos that have one (photo.mask.png)
    drift          mean squared change of the prediction for class images and their prompt: 0 if the class is intact

These are the measures of the DreamBooth paper (arXiv 2208.12242, sec. 4), whose diversity uses LPIPS distances instead.
By default DINO is the paper's ViT-S/16, and CLIP is ViT-B/32. The row "photos" compares the photos with each other:
what a perfect adapter would score. --adapter takes files of every method, which add up as in scripts/generate.py;
without any, the base model alone is scored.

Writes scores.json (settings, means, every prompt), scores.csv (one row per model and prompt), the images as
images/MODEL/PROMPT-SEED.png, and sheet.png: the photos, and the models' images of the same seeds side by side.
"""

import csv
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from dreambooth.scoring.subject import (
    PLACEHOLDER,
    name_subject,
    prompt_lines,
    read_subject_photos,
    warn_of_trained_photos,
)
from dreambooth.wording import counted
from kron_formats.files import whole_file, write_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dreambooth.data.references import Reference
    from dreambooth.drawing.pipelines import Adapter
    from dreambooth.scoring.denoising import Denoising, DenoisingScores
    from dreambooth.scoring.measures import PhotoScores, PriorDrift, PromptScores

BASE, ADAPTED = "base", "adapted"
DENOISING_PAIRS = 64
SCORES = ("clip_i", "dino", "clip_t", "diversity")
DENOISING_SCORES = ("whole", "masked")
COLUMNS = 8  # of the sheet, images
Prompts = Mapping[str, Sequence[str]]  # model -> the prompts that it draws
THUMBNAIL = (192, 192)  # px
GAP = (16, 192)  # px, between the models


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions, DrawingOptions):
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
        DENOISING_PAIRS,
        at_least=0,
    )
    instance_token: str | None = option(
        "Rare token that the adapter was trained with. Default: the new word of the adapter, or else sks.", None
    )
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
    class_data_dir: str | None = option(
        "Folder with the class images on which drift is measured. Default: those that the base model draws.",
        None,
        path=True,
        needs={"adapter": GIVEN},
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
        if self.instance_data_dir is None and self.reference_dir is None:
            raise UserError("--instance_data_dir or --reference_dir, a folder with photos of the subject, is required")
        if self.holdout and self.reference_dir is not None:
            raise UserError("--holdout and --reference_dir both say which photos were not trained on; use one of them")
        if not self.has_references:
            for name in ("class_data_dir", "denoising_pairs"):
                if getattr(self, name) not in (getattr(type(self), name), 0):
                    raise UserError(f"--{name} needs photos that were not trained on: --reference_dir or --holdout")

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
    denoising: "dict[str, DenoisingScores]"  # of each model; empty if it was not measured


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once
    check_folder(config.output_dir, "--output_dir")
    sources, prompts = zip(*named_prompts(config))
    if without := [prompt for prompt in prompts if PLACEHOLDER not in prompt]:
        raise UserError(f"the prompt '{without[0]}' has no {PLACEHOLDER}, which stands for the subject")
    references = read_untrained(config)
    class_photos = read_class_folder(config)
    photos = [photo.image for photo in references] or read_subject_photos(config.instance_data_dir or "")
    print(f"Comparing with {counted(len(photos), 'photo')} {config.compared_with}", flush=True)

    show_library_warnings()

    import torch

    from dreambooth.drawing.pipelines import adapted_tokenizers, read_adapters
    from dreambooth.drawing.words import subject_phrase
    from dreambooth.scoring.denoising import drift
    from dreambooth.scoring.embeddings import load_evaluators
    from dreambooth.scoring.measures import score_images, score_photos, score_prior
    from dreambooth.tokens import warn_of_cut_prompts
    from methods.readers import READERS

    adapters = read_adapters(config, READERS)
    files = [adapter.matched.file for adapter in adapters]
    warn_of_trained_photos({file.path.name: file.own_metadata for file in files}, config.holdout)
    subject = subject_phrase(files, config.instance_token, config.class_noun)
    subjects: dict[str, str] = {BASE: subject, ADAPTED: subject}
    if any(file.words for file in files):
        subjects[BASE] = config.class_noun  # the base model does not have the words
    named = {model: name_subject(prompts, subject) for model, subject in subjects.items()}
    texts = name_subject(prompts, config.class_noun)
    drawn_texts = [*zip(sources, named[ADAPTED]), ("--class_prompt", class_prompt(config))]
    drawn_texts += [("--negative_prompt", config.negative_prompt)]
    tokenizers = adapted_tokenizers(config, adapters)
    warn_of_cut_prompts(drawn_texts, tokenizers.values(), config.max_token_length, subject)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    evaluators = load_evaluators(config.clip_model, config.dino_model, device)
    evaluators.warn_of_cut_texts(zip(sources, texts))

    drawn, denoised = measure(adapters, subjects, named, references, class_photos, device, config)
    scores = {model: score_images(images.rows, photos, texts, evaluators) for model, images in drawn.items()}
    prior = None
    if adapters and config.num_class_images:
        prior = score_prior(drawn[BASE].class_images, drawn[ADAPTED].class_images, photos, evaluators)
        prior = replace(prior, drift=drift(*(of_class for _, of_class in denoised.values())) if denoised else None)
    losses = {model: loss for model, (loss, _) in denoised.items()}
    results = Results(score_photos(photos, evaluators), scores, prior, losses)

    output = Path(config.output_dir)
    write_csv(output / "scores.csv", named, texts, results)
    contact_sheet(photos, named[ADAPTED], drawn, config).save(output / "sheet.png")
    write_json(output / "scores.json", named, texts, results, config)  # last and whole: where it is, all is done
    print(table(results, config))
    print(f"Wrote {output / 'scores.json'}, scores.csv, sheet.png and images")


def named_prompts(config: Config) -> list[tuple[str, str]]:
    """Return (where it comes from, prompt) for each prompt to draw."""
    if config.prompts:
        return [
            (f"--prompts {config.prompts}, line {line}", text) for line, text in prompt_lines(config.prompts).items()
        ]
    return [(f"--prompt, number {number}", text) for number, text in enumerate(config.prompt, 1)]


def read_untrained(config: Config) -> "list[Reference]":
    """Return the photos that were not trained on, none without --reference_dir and --holdout."""
    from dreambooth.data.references import read_references, refuse_trained

    if config.reference_dir is not None:
        references = read_references(config.reference_dir, "--reference_dir")
        if config.instance_data_dir is not None:
            refuse_trained(references, read_references(config.instance_data_dir, "--instance_data_dir"))
        return references
    if config.holdout:
        return read_references(config.instance_data_dir or "", "--instance_data_dir", config.holdout)
    return []


def read_class_folder(config: Config) -> "list[Reference]":
    """Return the class images of --class_data_dir, none without it."""
    from dreambooth.data.references import read_references

    photos = [] if config.class_data_dir is None else read_references(config.class_data_dir, "--class_data_dir")
    return photos[: config.num_class_images]


# ---- denoising ----


def prepare_denoising(
    pipeline: Any, references: "Sequence[Reference]", class_photos: "Sequence[Reference]", base: "Drawn", config: Config
) -> "Denoising | None":
    """Return what the models denoise: references and class images, in the size of what `base` has drawn."""
    from dreambooth.base_model.process import noise_process
    from dreambooth.base_model.source import load_scheduler
    from dreambooth.data.references import of_image
    from dreambooth.scoring.denoising import PLAIN, Denoising, encode_pictures

    if not (references and config.denoising_pairs):
        return None
    width, height = base.rows[0][0].size
    of_class = class_photos or [of_image(image) for image in base.class_images]
    pictures = encode_pictures(references, (height, width), pipeline.vae)
    class_pictures = encode_pictures(of_class, (height, width), pipeline.vae) if of_class else None
    process = noise_process(load_scheduler(config), PLAIN)
    return Denoising(pictures, class_pictures, process, config.denoising_pairs, config.batch_size, pipeline.device)


def denoise(
    denoising: "Denoising", pipeline: Any, model: str, subject: str, config: Config
) -> "tuple[DenoisingScores, Tensor | None]":
    """Return a model's losses on the references, and its predictions for the class.

    Raises UserError if they are not finite.
    """
    from dreambooth.scoring.denoising import denoiser_of

    prompts = [f"a photo of {subject}", class_prompt(config)]
    denoiser = denoiser_of(pipeline, prompts, config.max_token_length)
    scores = denoising.scores(denoiser)
    if not math.isfinite(scores.whole):
        raise UserError(
            f"what the {model} model predicts for held-out photos is not finite in --dtype {config.dtype}; try fp32"
        )
    return scores, denoising.class_predictions(denoiser)


# ---- both models ----


def measure(
    adapters: "Sequence[Adapter]",
    subjects: Mapping[str, str],
    prompts: Prompts,
    references: "Sequence[Reference]",
    class_photos: "Sequence[Reference]",
    device: "torch.device",
    config: Config,
) -> "tuple[dict[str, Drawn], dict[str, tuple[DenoisingScores, Tensor | None]]]":
    """Return what each model draws and how it denoises: the base model, then, if there are adapters, with them."""
    from dreambooth.base_model.loading import DTYPES
    from dreambooth.drawing.pipelines import add_adapters, change_weights, load_base_pipeline, load_pipeline_with
    from methods.readers import READERS

    pipeline = ready(load_base_pipeline(config, DTYPES[config.dtype]), device, config)
    drawn = {BASE: draw(pipeline, prompts[BASE], BASE, config)}
    denoising = prepare_denoising(pipeline, references, class_photos, drawn[BASE], config)
    denoised = {BASE: denoise(denoising, pipeline, BASE, subjects[BASE], config)} if denoising else {}
    if adapters:
        if change_weights(adapters):
            del pipeline
            pipeline = load_pipeline_with(adapters, config, READERS)
        else:
            add_adapters(pipeline, adapters, READERS)
        drawn[ADAPTED] = draw(ready(pipeline, device, config), prompts[ADAPTED], ADAPTED, config)
        denoised |= {ADAPTED: denoise(denoising, pipeline, ADAPTED, subjects[ADAPTED], config)} if denoising else {}
    return drawn, denoised


def ready(pipeline: Any, device: "torch.device", config: Config) -> Any:
    """Return the pipeline on the device, ready to draw in silence and without a safety checker."""
    from dreambooth.drawing.pipelines import prepare_drawing
    from methods.readers import READERS

    if "safety_checker" in pipeline.components:  # or black images would be scored
        pipeline.register_modules(safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    prepare_drawing(pipeline.to(device), READERS, config)
    return pipeline


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


def write_json(path: Path, prompts: Prompts, texts: Sequence[str], results: Results, config: Config) -> None:
    models = {}
    for model, scores in results.models.items():
        means = asdict(scores)
        by_prompt = [{"prompt": p, "text": t} | row for p, t, row in zip(prompts[model], texts, means.pop("by_prompt"))]
        denoising = {"denoising": asdict(losses)} if (losses := results.denoising.get(model)) else {}
        models[model] = means | denoising | {"by_prompt": by_prompt}
    report = asdict(results) | {"models": models}
    del report["denoising"]  # it is with the models
    text = json.dumps({"settings": asdict(config)} | report, indent=2, ensure_ascii=False)
    with whole_file(path) as unfinished:
        write_text(unfinished, text + "\n")


def write_csv(path: Path, prompts: Prompts, texts: Sequence[str], results: Results) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        columns = [f"denoising_{name}" for name in DENOISING_SCORES] if results.denoising else []
        writer.writerow(["model", "prompt", "text", *SCORES, *columns])
        for model, scores in results.models.items():
            for prompt, text, row in zip(prompts[model], texts, scores.by_prompt):
                values = [getattr(row, name) for name in SCORES]
                if results.denoising:  # of the model, whatever the prompt
                    values += [getattr(results.denoising[model], name) for name in DENOISING_SCORES]
                writer.writerow([model, prompt, text, *values])


def contact_sheet(
    photos: Sequence[Image.Image], prompts: Sequence[str], drawn: Mapping[str, Drawn], config: Config
) -> Image.Image:
    """Return a sheet: a row of photos, and for each prompt a row of both models' images of the same seeds."""
    rows = [photos[:COLUMNS]]
    labels = ["photos that were not trained on" if config.has_references else "photos"]
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


def table(results: Results, config: Config) -> str:
    """Return the means as a table in plain text. The row of the photos says if they were not trained on."""
    columns = ["CLIP-I", "DINO", "CLIP-T", "diversity"] + ["held-out", "in masks"] * bool(results.denoising)
    lines = [f"{'':8}" + "".join(f"{name:>11}" for name in columns)]
    photos = "held out" if config.has_references else "photos"
    for name, scores in {photos: results.photos, **results.models}.items():
        cells = [number(getattr(scores, score, None)) for score in SCORES]
        if (losses := results.denoising.get(name)) is not None:
            cells += [number(getattr(losses, score), 4) for score in DENOISING_SCORES]
        lines.append(f"{name:8}" + "".join(f"{cell:>11}" for cell in cells))
    if prior := results.prior:
        lines += [
            "prior, base -> adapted: "
            f"DINO to the photos {number(prior.similarity_before)} -> {number(prior.similarity_after)}, "
            f"diversity {number(prior.diversity_before)} -> {number(prior.diversity_after)}, "
            f"distance at one seed {number(prior.distance)}"
            + (f", drift {number(prior.drift, 4)}" if prior.drift is not None else "")
        ]
    return "\n".join(lines)


def number(score: float | None, digits: int = 3) -> str:
    return "-" if score is None else f"{score:.{digits}f}"


if __name__ == "__main__":
    with readable_errors():
        main()
