"""Time a training step of every method, attached as training attaches it, against the least that a step can cost.

    python benchmarks/methods_step.py                                    # SD 1.5; 64x64 latents on a GPU, else 16x16
    python benchmarks/methods_step.py --architecture tiny                # a small model, in seconds
    python benchmarks/methods_step.py --methods lora svdiff --train_text_encoder

A step encodes the prompt if what encodes it trains, and is then the forward pass, the loss, the backward pass, clipping
and the optimizer's step. Models have the real configuration and random weights, which are always the same. Each method
takes turns with "frozen", the bound of unet_step.py: one trained number in the first attention layer, prompts encoded
beforehand. In bf16 the base is bf16 where the method allows it, and passes run under autocast.

SVDiff first decomposes all weights, which takes a core 9 minutes for SD 1.5; as in training, it keeps what it finds in
Hugging Face's cache of assets. DreamBooth needs 16 bytes of memory per weight.

Prints a table of trained parameters; time / time of the bound, as median (first to third quartile) of the rounds' own
ratios; the memory that is held between steps beyond the frozen model; and a step's peak beyond that. Writes it, and all
measurements, to methods_step-ARCHITECTURE-DTYPE.md and .json in --output_dir.
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import FROZEN, adapt
from benchmarks.random_models import pipeline_of, random_encoders, random_unet, shared
from benchmarks.timing import interleave, machine, milliseconds, parser, ratios, spread, write_results
from benchmarks.unet_step import WARM_UP, bytes_in_use, optimizer_over, peak_bytes
from dreambooth.base_model.loading import DTYPES
from dreambooth.errors import readable_errors
from dreambooth.family import Family
from dreambooth.loop.optimizers import build_optimizer
from dreambooth.method import Host, trained_parameters
from dreambooth.options.prompts import CHUNK_LENGTH
from kron_formats.architectures import ARCHITECTURES
from methods.train import METHODS
from scripts.count_parameters import Contender, configure, kronecker, lora, others, size

PROMPT = "a photo of <new1> <dog>"  # with the words of both methods that learn one
TINY = "tiny"
Step = Callable[[], None]


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    base = random_models(arguments.architecture, device, DTYPES[arguments.dtype])
    rows, measurements = [], {}
    for contender in [kronecker(*arguments.kron_factors), lora(4), *others()]:
        if contender.method in arguments.methods:
            cells, measurements[str(contender)] = compare(contender, base, arguments)
            rows.append([str(contender), *cells])
            gc.collect()
    what = f"A training step of {arguments.architecture}, {arguments.dtype}, batch {arguments.batch}, "
    what += f"{arguments.latents}x{arguments.latents} latents, "
    what += "UNet and text encoders" if arguments.train_text_encoder else "UNet alone where the method has the choice"
    header = ["", "parameters", "ms", "time / frozen", "held", "peak of a step"]
    name = f"methods_step-{arguments.architecture}-{arguments.dtype}"
    write_results(arguments, name, f"{what}; {machine(device)}.", header, rows, measurements)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=10)
    gpu = torch.cuda.is_available()
    options.add_argument("--architecture", choices=[*ARCHITECTURES.values(), TINY], default="sd15")
    options.add_argument("--device", default="cuda" if gpu else "cpu")
    options.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32", help="Of the base.")
    options.add_argument("--latents", type=int, help="Side of the latents (default: as trained on a GPU, else 16).")
    options.add_argument("--batch", type=int, default=1, help="Images.")
    options.add_argument("--train_text_encoder", action="store_true", help="Where the method has the choice.")
    names = ["kronecker", *METHODS]
    options.add_argument("--methods", nargs="+", default=names, choices=names, metavar="NAME")
    arguments = options.parse_args()
    if arguments.latents is None:
        arguments.latents = (128 if arguments.architecture == "sdxl" else 64) if gpu else 16
    arguments.kron_factors = (2, 32) if arguments.architecture == TINY else (4, 64)
    return arguments


def random_models(architecture: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return component -> model: the UNet, then the text encoders, with random weights."""
    models = {"unet": random_unet(architecture, device, dtype), **random_encoders(architecture, device, dtype)}
    return {name: model.requires_grad_(False).train() for name, model in models.items()}


def compare(contender: Contender, base: dict[str, Any], arguments: argparse.Namespace) -> tuple[list[str], Any]:
    """Return the cells of a method's row, and all that was measured."""
    device = torch.device(arguments.device)
    frozen = frozen_step(contender, base, arguments)
    frozen()
    before = bytes_in_use(device)
    step, parameters = method_step(contender, base, arguments)
    step()
    gc.collect()
    held = bytes_in_use(device) - before
    timed = {
        name: functools.partial(milliseconds, way, device, arguments.clock)
        for name, way in {FROZEN: frozen, str(contender): step}.items()
    }
    times = interleave(timed, arguments.rounds, WARM_UP)
    peak = peak_bytes(step, device)
    own = times[str(contender)]
    cells = [
        f"{parameters:,}",
        f"{median(own):.0f}",
        spread(ratios(own, times[FROZEN]), 3),
        size(max(0, int(held)) // 4),
        size(max(0, int(peak)) // 4),
    ]
    return cells, {"milliseconds": times, "held_bytes": held, "peak_bytes": peak, "parameters": parameters}


def frozen_step(contender: Contender, base: dict[str, Any], arguments: argparse.Namespace) -> Step:
    """Return a step that trains one number."""
    family, _ = configure(contender.load(), contender, arguments.architecture, False)
    pipeline = pipeline_of(family, shared(base))
    parameters = adapt(pipeline.unet, FROZEN)
    return stepper(family, pipeline, False, parameters, optimizer_over(parameters, FROZEN), arguments)


def method_step(contender: Contender, base: dict[str, Any], arguments: argparse.Namespace) -> tuple[Step, int]:
    """Return a step of a method, and how many numbers it trains."""
    method = contender.load()
    family, config = configure(method, contender, arguments.architecture, arguments.train_text_encoder)
    pipeline = pipeline_of(family, shared(base))
    if method.whole_precision:
        for name in base:
            getattr(pipeline, name).float()
    text_trains = method.trains_text(config)
    models = family.trained_models(pipeline.components, text_trains)
    host = Host(family, models, family.present_tokenizers(pipeline.components))
    attached = method.attach(host, config)
    optimizer = build_optimizer(attached.groups, config, num_ranks=1)
    count = sum(parameter.numel() for parameter in trained_parameters(attached))
    in_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return stepper(family, pipeline, text_trains, in_optimizer, optimizer, arguments), count


def stepper(
    family: Family,
    pipeline: Any,
    encodes: bool,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    arguments: argparse.Namespace,
) -> Step:
    """Return a function that makes one training step, and encodes the prompt in it if it `encodes`."""
    device, side = torch.device(arguments.device), arguments.latents
    unet, dtype = pipeline.unet, pipeline.unet.dtype

    def draw() -> Tensor:
        return torch.randn(arguments.batch, 4, side, side, device=device)

    latents, target = draw().to(dtype), draw()
    timesteps = torch.randint(1000, (arguments.batch,), device=device)
    sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * arguments.batch, device=device)

    def encode() -> dict[str, Tensor]:
        return family.encode_prompts(pipeline, [PROMPT] * arguments.batch, CHUNK_LENGTH)

    with torch.no_grad():
        fixed = None if encodes else encode()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.dtype == "bf16"):
            embeddings = {name: tensor.to(dtype) for name, tensor in (fixed or encode()).items()}
            prediction = unet(latents, timesteps, **family.condition(embeddings, sizes)).sample
        F.mse_loss(prediction.float(), target).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    with readable_errors():
        main()
