"""Draw images with Kronecker adapters.

    python scripts/generate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors \\
        --prompt "a photo of sks dog on the beach" "a watercolor of sks dog" --num_images 4 --output_dir outputs/images

Several adapters add up, each with its strength: --adapter dog.safetensors:0.8 style.safetensors:0.5. Files of every
layout that scripts/convert.py reads will do, LoRAs too.

Writes one PNG per image and grid.png, a labelled sheet with one row per prompt. Image i of every prompt is drawn from
seed + i. Without --adapter it draws with the base model alone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dreambooth.adapters import hasten_drawing, load_adapted_pipeline
from dreambooth.errors import readable_errors
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.drawing import DrawingOptions
from dreambooth.options.field import option
from dreambooth.options.parsing import parse_options
from dreambooth.validation import draw_sheet


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions, DrawingOptions):
    """What to draw, and where to."""

    prompt: list[str] = option("Prompts, one row of the grid each.")
    output_dir: str = option("Folder for the images and grid.png.", "outputs/images")


def main() -> None:
    config = parse_options(Config, __doc__)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pipeline = load_adapted_pipeline(config).to(device)
    hasten_drawing(pipeline, config)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(config.prompt):
        images = pipeline(
            prompt,
            negative_prompt=config.negative_prompt,
            height=config.height,
            width=config.width,
            num_images_per_prompt=config.num_images,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            generator=[torch.Generator().manual_seed(config.seed + i) for i in range(config.num_images)],
        ).images
        for i, image in enumerate(images):
            image.save(output / f"{number:02d}-{config.seed + i}.png")
        rows.append(images)
    draw_sheet(rows, config.prompt).save(output / "grid.png")
    print(f"Wrote {len(rows) * config.num_images} images and {output / 'grid.png'}")


if __name__ == "__main__":
    with readable_errors():
        main()
