"""Draw images with Kronecker adapters or LoRAs.

    python scripts/generate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors \\
        --prompt "a photo of sks dog on the beach" "a watercolor of sks dog" --num_images 4 --output_dir outputs/images

Several adapters add up, each with its strength: --adapter dog.safetensors:0.8 style.safetensors:0.5. Every layout that
scripts/convert.py reads is accepted. Without --adapter the base model alone draws.

Writes OUTPUT_DIR/PROMPT-SEED.png for every image, and grid.png, a labelled sheet with one row per prompt. Image i of
every prompt is drawn from seed + i.
"""

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


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions, DrawingOptions):
    """What to draw, and where to write it."""

    prompt: list[str] = option("Prompts, one row of the grid each.")
    output_dir: str = option("Folder for the images and grid.png.", "outputs/images", path=True)


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once

    check_folder(config.output_dir, "--output_dir")

    import torch

    from dreambooth.drawing.draw import draw_images
    from dreambooth.drawing.pipelines import load_adapted_pipeline, prepare_drawing
    from dreambooth.drawing.sheet import draw_sheet
    from methods.readers import READERS

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pipeline = load_adapted_pipeline(config, READERS).to(device)
    prepare_drawing(pipeline, READERS, config)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows, seeds = [], range(config.seed, config.seed + config.num_images)
    for number, prompt in enumerate(config.prompt):
        images = draw_images(pipeline, seeds, config.batch_size, prompt=prompt, **config.pipeline_arguments())
        for seed, image in zip(seeds, images):
            image.save(output / f"{number:02d}-{seed}.png")
        rows.append(images)
    draw_sheet(rows, config.prompt).save(output / "grid.png")
    print(f"Wrote {len(rows) * config.num_images} images and {output / 'grid.png'}")


if __name__ == "__main__":
    with readable_errors():
        main()
