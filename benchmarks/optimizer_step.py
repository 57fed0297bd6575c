"""Time an optimizer step over the Kronecker factors of SDXL's UNet, for several ways of doing AdamW.

    python benchmarks/optimizer_step.py                      # on the GPU, where there is one
    python benchmarks/optimizer_step.py --device cpu --rounds 20

One round is one step of every way, in a new order. Writes a Markdown table to the standard output: medians in
milliseconds of the accumulation of gradients in the backward pass, of their clipping, the step and `zero_grad`; and how
many times faster than the single loop over all tensors the step is, and clipping, step and `zero_grad` together, as
median (first to third quartile) of the rounds' own ratios.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dreambooth.config import TrainingConfig
from dreambooth.optimizers import build_optimizer
from kron_adapter import inject_kronecker, kronecker_parameters
from scripts.count_parameters import load_architecture, markdown

OPTIONS = TrainingConfig(pretrained_model_name_or_path="", instance_prompt="", learning_rate=1e-4)
LOOP = "for loop"
WAYS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    LOOP: lambda factors: torch.optim.AdamW(factors, lr=1e-4, foreach=False, fused=False),
    "torch's default": lambda factors: torch.optim.AdamW(factors, lr=1e-4),
    "foreach": lambda factors: torch.optim.AdamW(factors, lr=1e-4, foreach=True),
    "fused": lambda factors: torch.optim.AdamW(factors, lr=1e-4, fused=True),
    "build_optimizer": lambda factors: build_optimizer({"unet": factors}, OPTIONS, 1),
}
PARTS = ("backward", "clip", "step", "zero_grad")
WARM_UP = 3  # rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30, help="Steps that are timed (default: 30).")
    arguments = parser.parse_args()
    shapes = factor_shapes()
    gradients = [1e-3 * torch.randn(shape, device=arguments.device) for shape in shapes]
    steps = {name: stepper(way, shapes, gradients) for name, way in WAYS.items()}
    times = {name: [] for name in WAYS}
    for _ in range(WARM_UP + arguments.rounds):
        for name in random.sample(list(WAYS), len(WAYS)):
            times[name].append(steps[name]())
    print(f"{len(shapes)} factors, {sum(map(torch.Size.numel, shapes)):,} parameters; milliseconds\n")
    print(table({name: rows[WARM_UP:] for name, rows in times.items()}))


def factor_shapes() -> list[torch.Size]:
    unet = load_architecture("sdxl")["unet"]
    inject_kronecker(unet, 4, 64)
    return [factor.shape for factor in kronecker_parameters(unet)]


def stepper(way, shapes: list[torch.Size], gradients: list[torch.Tensor]) -> Callable[[], list[float]]:
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
        return [milliseconds(part, gradients[0].device) for part in parts]

    return step


def milliseconds(action: Callable, device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def table(times: dict[str, list[list[float]]]) -> str:
    rows = []
    for name, rounds in times.items():
        step = [loop[2] / own[2] for loop, own in zip(times[LOOP], rounds)]
        rest = [sum(loop[1:]) / sum(own[1:]) for loop, own in zip(times[LOOP], rounds)]
        medians = [f"{median(part):.2f}" for part in zip(*rounds)]
        rows.append([name, *medians, spread(step), spread(rest)])
    return markdown(["AdamW", *PARTS, "step, times faster", "clip, step and zero_grad, times faster"], rows)


def spread(values: list[float]) -> str:
    first, middle, third = quantiles(values, n=4)
    return f"{middle:.1f} ({first:.1f} to {third:.1f})"


if __name__ == "__main__":
    main()
