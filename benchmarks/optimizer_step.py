"""Time an optimizer step over the Kronecker factors of SDXL's UNet, for several implementations of AdamW.

    python benchmarks/optimizer_step.py                      # on the GPU if there is one
    python benchmarks/optimizer_step.py --device cpu --rounds 20

One round is one step of each, in a new order. Prints a table of medians in milliseconds: accumulation of gradients in
the backward pass, clipping, step and `zero_grad`. Two more columns tell how many times faster than the plain loop over
all tensors the step is, and clipping, step and `zero_grad` together, as median (first to third quartile) of the rounds'
own ratios. Writes the table, and all times, to optimizer_step.md and .json in --output_dir.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import interleave, machine, milliseconds, parser, ratios, spread, write_results
from dreambooth.errors import readable_errors
from dreambooth.loop.optimizers import build_optimizer
from dreambooth.method import Group
from dreambooth.options.training import TrainingConfig
from kron_adapter import inject_kronecker, kronecker_parameters
from kron_formats.architectures import load_architecture

OPTIONS = TrainingConfig(pretrained_model_name_or_path="", instance_prompt="", learning_rate=1e-4)
LOOP = "for loop"
WAYS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    LOOP: lambda factors: torch.optim.AdamW(factors, lr=1e-4, foreach=False, fused=False),
    "torch's default": lambda factors: torch.optim.AdamW(factors, lr=1e-4),
    "foreach": lambda factors: torch.optim.AdamW(factors, lr=1e-4, foreach=True),
    "fused": lambda factors: torch.optim.AdamW(factors, lr=1e-4, fused=True),
    "build_optimizer": lambda factors: build_optimizer([Group("UNet", factors, 1e-4, 1e-2)], OPTIONS, 1),
}
PARTS = ("backward", "clip", "step", "zero_grad")
WARM_UP = 3  # rounds


def main() -> None:
    arguments = parse()
    device, shapes = torch.device(arguments.device), factor_shapes()
    gradients = [1e-3 * torch.randn(shape, device=device) for shape in shapes]
    ways = {name: stepper(way, shapes, gradients, arguments.clock) for name, way in WAYS.items()}
    times = interleave(ways, arguments.rounds, WARM_UP)
    caption = f"An optimizer step over {len(shapes)} factors, {sum(map(torch.Size.numel, shapes)):,} parameters, "
    caption += f"milliseconds; {machine(device)}."
    header = ["AdamW", *PARTS, "step, times faster", "clip, step and zero_grad, times faster"]
    write_results(arguments, "optimizer_step", caption, header, [row(name, times) for name in times], times)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=30)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options.parse_args()


def factor_shapes() -> list[torch.Size]:
    unet = load_architecture("sdxl")["unet"]
    inject_kronecker(unet, 4, 64)
    return [factor.shape for factor in kronecker_parameters(unet)]


def stepper(way, shapes: list[torch.Size], gradients: list[torch.Tensor], clock: str) -> Callable[[], list[float]]:
    """Return a function that makes one step and returns the milliseconds of each of PARTS."""
    factors = [nn.Parameter(0.01 * torch.randn(shape, device=gradients[0].device)) for shape in shapes]
    optimizer = way(factors)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step() -> list[float]:
        outputs = [factor * 1.0 for factor in factors]  # its gradient is a tensor of its own, as a layer's is
        parts = (
            lambda: torch.autograd.backward(outputs, gradients),
            lambda: nn.utils.clip_grad_norm_(parameters, 1.0),
            optimizer.step,
            optimizer.zero_grad,
        )
        return [milliseconds(part, gradients[0].device, clock) for part in parts]

    return step


def row(name: str, times: dict[str, list[list[float]]]) -> list[str]:
    parts, loop_parts = list(zip(*times[name])), list(zip(*times[LOOP]))
    step = ratios(loop_parts[2], parts[2])
    rest = ratios([sum(loop[1:]) for loop in times[LOOP]], [sum(own[1:]) for own in times[name]])
    return [name, *(f"{median(part):.2f}" for part in parts), spread(step, 1), spread(rest, 1)]


if __name__ == "__main__":
    with readable_errors():
        main()
