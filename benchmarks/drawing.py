"""Time drawing with an adapter beside the base weights, merged into them, and without one.

    python benchmarks/drawing.py                                         # SD 1.5, 4 images of 512 px at once, on a GPU
    python benchmarks/drawing.py --architecture sdxl --images 1          # SDXL at 1024 px
    python benchmarks/drawing.py --architecture tiny --resolution 64     # a small model, in seconds

Images are drawn as scripts/generate.py draws them: prompts encoded, a fast solver with classifier-free guidance, the
VAE in fp32. The base model has random weights, which all ways share; the adapter is Kronecker (4, 64) on every
attention projection.

Prints a table of images per second, as median (first to third quartile), and of the rounds' own ratios to drawing
without an adapter. Writes it, and all measurements, to drawing-ARCHITECTURE-DTYPE.md and .json in --output_dir.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import adapt
from benchmarks.random_models import CHOICES, random_pipeline, shared
from benchmarks.timing import interleave, machine, milliseconds, parser, ratios, spread, write_results
from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.process import build_sampler
from dreambooth.drawing.draw import draw_images
from dreambooth.errors import readable_errors
from kron_adapter import merge_kronecker

BARE, MERGED, BESIDE = WAYS = ("no adapter", "merged", "beside the weights")
ADAPTER = "Kronecker (4, 64)"
WARM_UP = 1  # rounds


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    pipeline = random_pipeline(arguments.architecture, device, DTYPES[arguments.dtype])
    pipeline.scheduler = build_sampler(pipeline.scheduler)
    pipeline.vae.float()
    pipeline.set_progress_bar_config(disable=True)
    unets = adapted(pipeline.unet)
    draws = {way: functools.partial(draw, pipeline, unets[way], arguments) for way in WAYS}
    timed = {way: functools.partial(milliseconds, draws[way], device, arguments.clock) for way in WAYS}
    times = interleave(timed, arguments.rounds, WARM_UP)
    speeds = {way: [1e3 * arguments.images / time for time in times[way]] for way in WAYS}
    rows = [[way, spread(speeds[way]), spread(ratios(speeds[way], speeds[BARE]), 3)] for way in WAYS]
    caption = f"{arguments.architecture}, {arguments.dtype}, {arguments.resolution} px, {arguments.images} at once, "
    caption += f"{arguments.num_inference_steps} steps; {machine(device)}."
    name = f"drawing-{arguments.architecture}-{arguments.dtype}"
    write_results(arguments, name, caption, ["", "images/s", "to no adapter"], rows, {"images_per_second": speeds})


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=5)
    gpu = torch.cuda.is_available()
    options.add_argument("--architecture", choices=CHOICES, default="sd15")
    options.add_argument("--device", default="cuda" if gpu else "cpu")
    options.add_argument("--dtype", choices=list(DTYPES), default="fp16" if gpu else "fp32", help="Of the base.")
    options.add_argument("--resolution", type=int, help="Side of the images, px (default: as trained).")
    options.add_argument("--images", type=int, default=4, help="Images drawn at once.")
    options.add_argument("--num_inference_steps", type=int, default=20, help="Denoising steps per image.")
    arguments = options.parse_args()
    if arguments.resolution is None:
        arguments.resolution = {"sdxl": 1024, "sd21": 768, "sd15": 512}.get(arguments.architecture, 64)
    return arguments


def adapted(unet: Any) -> dict[str, Any]:
    """Return way -> UNet. All are on the memory of `unet`, but for the weights that an adapter is merged into."""
    unets = {way: shared({"unet": unet})["unet"] for way in WAYS}
    for way in (MERGED, BESIDE):
        adapt(unets[way], ADAPTER)
    merge_kronecker(unets[MERGED])
    return unets


def draw(pipeline: Any, unet: Any, arguments: argparse.Namespace) -> None:
    pipeline.register_modules(unet=unet)
    draw_images(
        pipeline,
        range(arguments.images),
        arguments.images,
        prompt="a photo of sks dog",
        height=arguments.resolution,
        width=arguments.resolution,
        num_inference_steps=arguments.num_inference_steps,
    )


if __name__ == "__main__":
    with readable_errors():
        main()
