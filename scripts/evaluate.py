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
    LPIPS          with --lpips: the same with LPIPS distances, as in the paper; also of class images
    prior          of class images: mean DINO cosine to the photos (if it rises, "dog" comes to mean this dog) and
                   diversity, without and with the adapter; mean DINO distance of the two images of a seed

Training may also change what has nothing to do with the subject. --other_prompts FILE has prompts that do not name it,
which both models draw from the same seeds:

    other prompts  mean DINO distance of the two images of a seed, CLIP-T without and with the adapter, and mean DINO
                   cosine to the photos without and with it: if it rises, the subject leaks into other images

Scores against the photos that were trained on also reward copying them. --reference_dir has other photos of the
subject; --holdout N takes the last N of --instance_data_dir, if the adapter was trained with --holdout N. Images are
then compared with these, and the models denoise them, all with the same noise at the same timesteps:

    held-out       mean squared error of the prediction for "a photo of sks dog": lower is better
    in masks       the same inside the masks of the photos that have one (photo.mask.png)
    drift          mean squared change of the prediction for class images and their prompt: 0 if the class is intact

These are the measures of the DreamBooth paper (arXiv 2208.12242, sec. 4), whose diversity is that of --lpips.
By default DINO is the paper's ViT-S/16, and CLIP is ViT-B/32. The row "photos" compares the photos with each other:
what a perfect adapter would score. --adapter takes files of every method, which add up as in scripts/generate.py;
without any, the base model alone is scored.

An adapter of several subjects is scored on each, in OUTPUT_DIR/FOLDER, by --subjects FILE instead of --instance_token
and --class_noun. OUTPUT_DIR/scores.json then tells how like the images of each are to the photos of every subject.
--together "a photo of {dog} and {robot}" draws several in one image, in OUTPUT_DIR/together.

The base model's images are the same for every adapter that is scored on the same prompts. --base_images_cache DIR keeps
them, and takes from DIR what an earlier evaluation drew in exactly the same way.

Writes scores.json (settings, means, every prompt), scores.csv (one row per model and prompt), the images as
images/MODEL/PROMPT-SEED.png, and sheet.png: the photos, and the models' images of the same seeds side by side.
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

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import readable_errors
from dreambooth.options.evaluation import TOGETHER, EvaluationOptions
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from dreambooth.runtime.library_warnings import show_library_warnings
from dreambooth.scoring.inputs import all_photos, read_asked, read_others, read_photos
from dreambooth.scoring.subject import warn_of_trained_photos
from dreambooth.wording import counted


@dataclass(frozen=True, kw_only=True)
class Config(EvaluationOptions):
    """What to score, on which prompts, and with which models."""


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once
    check_folder(config.output_dir, "--output_dir")
    if config.base_images_cache is not None:
        check_folder(config.base_images_cache, "--base_images_cache")
    asked, others, subjects = read_asked(config), read_others(config), config.of_each_subject()
    photos = {folder: read_photos(own) for folder, own in subjects.items()}
    for folder, own in subjects.items():
        print(f"Comparing with {counted(len(photos[folder].subject), 'photo')} {own.compared_with}", flush=True)

    show_library_warnings()

    import torch

    from dreambooth.drawing.pipelines import adapted_tokenizers, read_adapters
    from dreambooth.scoring.contact_sheet import contact_sheet
    from dreambooth.scoring.embeddings import load_evaluators
    from dreambooth.scoring.lpips import load_lpips
    from dreambooth.scoring.models import measure
    from dreambooth.scoring.prompts import name_prompts, name_together, warn_of_cut_drawings, warn_of_cut_texts
    from dreambooth.scoring.report import table, write_csv, write_json
    from dreambooth.scoring.results import score
    from dreambooth.scoring.several import mixing_of, mixing_table, write_mixing
    from methods.readers import READERS

    adapters = read_adapters(config, READERS)
    files = [adapter.matched.file for adapter in adapters]
    warn_of_trained_photos({file.path.name: file.own_metadata for file in files}, config.holdout)
    prompts = {folder: name_prompts(asked, others, files, own) for folder, own in subjects.items()}
    own_photos = {folder: found.subject for folder, found in photos.items()}
    if config.together:
        subjects[TOGETHER], prompts[TOGETHER] = config.of_together(), name_together(config)
        photos[TOGETHER] = all_photos(photos.values())
    tokenizers = adapted_tokenizers(config, adapters)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    evaluators = load_evaluators(config.clip_model, config.dino_model, device)
    for named in prompts.values():
        warn_of_cut_drawings(named, tokenizers.values(), config)
        warn_of_cut_texts(named, evaluators)
    lpips = load_lpips(config.lpips, device) if config.lpips else None

    measured = {}
    for folder, own in subjects.items():
        measured[folder] = measure(adapters, READERS, prompts[folder], photos[folder], device, own)
        results = score(measured[folder], photos[folder].subject, prompts[folder], evaluators, lpips)
        output = Path(own.output_dir)
        write_csv(output / "scores.csv", prompts[folder], results)
        contact_sheet(photos[folder].subject, prompts[folder], measured[folder].drawn, own).save(output / "sheet.png")
        write_json(output / "scores.json", prompts[folder], results, own)  # last and whole: where it is, all is done
        print(table(results, own))
        print(f"Wrote {output / 'scores.json'}, scores.csv, sheet.png and images")
    if config.subjects is not None:
        mixing = mixing_of(measured, own_photos, evaluators)
        write_mixing(Path(config.output_dir) / "scores.json", mixing, config)
        print(mixing_table(mixing))
        print(f"Wrote {Path(config.output_dir) / 'scores.json'}")


if __name__ == "__main__":
    with readable_errors():
        main()
