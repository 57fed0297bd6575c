"""Time forward and backward of one adapted layer, for several adapters, against the frozen layer alone.

    python benchmarks/layer.py                                          # every shape; bf16 on a GPU, fp32 elsewhere
    python benchmarks/layer.py --shapes 1280,256 640,1024 --dtype bf16

A shape is FEATURES,ROWS: attention projections of Stable Diffusion and SDXL map 320, 640 or 1280 features to as many,
and get one row for every latent pixel of their level. The input needs a gradient, as it does inside a model. In bf16
the base is bf16, all factors are fp32, and the forward pass runs under autocast, as accelerate runs it.

Prints a table of time / time of the frozen layer, as median (first to third quartile) of the rounds' own ratios, and
writes layer-DTYPE.md and layer-DTYPE.json, which has all times in milliseconds, to --output_dir.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import FROZEN, PEERS, adapt, choose_peers
from benchmarks.timing import interleave, machine, milliseconds, parser, ratios, spread, write_results
from dreambooth.base_model.loading import DTYPES
from dreambooth.errors import readable_errors

SHAPES = [(features, rows) for features in (320, 640, 1280) for rows in (64, 256, 1024, 4096)]
WARM_UP = 3  # rounds


class Layer(nn.Module):
    """A model of one attention projection."""

    def __init__(self, features: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.to_q = nn.Linear(features, features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    measurements = {f"{d} features, {n} rows": measure(d, n, device, arguments) for d, n in arguments.shapes}
    header = [f"{machine(device)}, {arguments.dtype}", *measurements]
    rows = [[FROZEN, *(f"{median(times[FROZEN]):.2f} ms" for times in measurements.values())]]
    for peer in arguments.peers[1:]:
        rows.append([peer, *(spread(ratios(times[peer], times[FROZEN])) for times in measurements.values())])
    caption = "Forward and backward of one layer: time / time of the frozen layer, median (quartiles)."
    write_results(arguments, f"layer-{arguments.dtype}", caption, header, rows, measurements)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=20)
    gpu = torch.cuda.is_available()
    options.add_argument("--device", default="cuda" if gpu else "cpu")
    options.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32", help="Of the base.")
    options.add_argument("--shapes", type=shape, nargs="+", default=SHAPES, metavar="FEATURES,ROWS")
    options.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    arguments = options.parse_args()
    arguments.peers = choose_peers(arguments.peers)
    return arguments


def shape(text: str) -> tuple[int, int]:
    features, rows = map(int, text.split(","))
    return features, rows


def measure(features: int, rows: int, device: torch.device, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Return peer -> milliseconds of forward and backward in every round."""
    dtype = DTYPES[arguments.dtype]
    x = torch.randn(1, rows, features, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(1, rows, features, device=device, dtype=dtype)
    ways = {peer: stepper(peer, x, dy, arguments.clock) for peer in arguments.peers}
    return interleave(ways, arguments.rounds, WARM_UP)


def stepper(peer: str, x: Tensor, dy: Tensor, clock: str) -> Callable[[], float]:
    """Return a function that makes one step and returns its milliseconds."""
    model = Layer(x.shape[-1], x.device, x.dtype).requires_grad_(False)
    parameters = [] if peer == FROZEN else adapt(model, peer)

    def step() -> None:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
            y = model(x)
        torch.autograd.grad(y, [x, *parameters], dy)

    return lambda: milliseconds(step, x.device, clock)


if __name__ == "__main__":
    with readable_errors():
        main()
