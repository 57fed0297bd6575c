"""Draw images with adapter files of every method, alone or together.

    python scripts/generate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors \\
        --prompt "a photo of sks dog on the beach" "a watercolor of sks dog" --num_images 4 --output_dir outputs/images

A file may be a Kronecker adapter, a LoRA, spectral shifts (SVDiff), Custom Diffusion's, a word (Textual Inversion), or
the folder of a model that was trained in full; scripts/convert.py --inspect FILE says which. Several add up, each with
its strength: --adapter dog.safetensors:0.8 style.safetensors:0.5. Without --adapter the base model alone draws.

Writes OUTPUT_DIR/PROMPT-SEED.png for every image, and grid.png, a labelled sheet with one row per prompt. Image i of
every prompt is drawn from seed + i.
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
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.drawing import DrawingOptions
from dreambooth.options.field import option
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from dreambooth.runtime.library_warnings import show_library_warnings


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions, DrawingOptions):
    """What to draw, and where to write it."""

    prompt: list[str] = option("Prompts, one row of the grid each.")
    output_dir: str = option("Folder for the images and grid.png.", "outputs/images", path=True)


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once

    show_library_warnings()
    check_folder(config.output_dir, "--output_dir")

    import torch

    from dreambooth.drawing.draw import draw_images
    from dreambooth.drawing.pipelines import (
        adapted_tokenizers,
        load_pipeline_with,
        prepare_drawing,
        read_adapters,
        subject_of,
    )
    from dreambooth.drawing.sheet import draw_sheet
    from dreambooth.drawing.words import warn_of_prompts_without_words
    from dreambooth.tokens import warn_of_cut_prompts
    from methods.readers import READERS

    adapters = read_adapters(config, READERS)
    texts = [(f"--prompt, number {number}", text) for number, text in enumerate(config.prompt, 1)]
    texts += [("--negative_prompt", config.negative_prompt)]
    tokenizers = adapted_tokenizers(config, adapters)
    warn_of_cut_prompts(texts, tokenizers.values(), config.max_token_length, subject_of(adapters))
    warn_of_prompts_without_words(config.prompt, [adapter.matched.file for adapter in adapters], tokenizers)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pipeline = load_pipeline_with(adapters, config, READERS)
    prepare_drawing(pipeline.to(device), READERS, config)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows, seeds = [], range(config.seed, config.seed + config.num_images)
    for number, prompt in enumerate(config.prompt):
        images = draw_images(pipeline, seeds, config.batch_size, prompt=prompt, **config.common_arguments())
        for seed, image in zip(seeds, images):
            image.save(output / f"{number:02d}-{seed}.png")
        rows.append(images)
    draw_sheet(rows, config.prompt).save(output / "grid.png")
    print(f"Wrote {len(rows) * config.num_images} images and {output / 'grid.png'}")


if __name__ == "__main__":
    with readable_errors():
        main()
