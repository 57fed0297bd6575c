"""Time a training step of a whole UNet, for several adapters, against the least that a step can cost.

    python benchmarks/unet_step.py                                       # SD 1.5; 64x64 latents on a GPU, else 16x16
    python benchmarks/unet_step.py --architecture sdxl --compile         # SDXL at 1024 px, on a GPU
    python benchmarks/unet_step.py --peers "Kronecker (4, 64)" "PEFT LoRA r=4" --rounds 5

A step is the forward pass, the loss, the backward pass, clipping and AdamW. The UNet has the real configuration and
random weights; all peers share them. "frozen" is the bound: no adapter, but one trained number in the first attention
layer, so that gradients flow back as far. In bf16 the base is bf16, all factors are fp32, and the forward
pass runs under autocast, as accelerate runs it.

Prints a table of time / time of the bound, as median (first to third quartile) of the rounds' own ratios; of the bytes
that the forward pass keeps for the backward pass beyond the parameters; and of the step's peak memory beyond what was
in use before it: allocated memory on a GPU, resident memory on Linux. A peer that does not run has its error below the
table. Writes it, and all measurements, to unet_step-ARCHITECTURE-DTYPE.md and .json in --output_dir.
"""

import argparse
import copy
import ctypes
import functools
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import FROZEN, PEERS, adapt, choose_peers
from benchmarks.random_models import CHOICES, random_unet
from benchmarks.timing import interleave, machine, milliseconds, parser, ratios, spread, write_results
from dreambooth.base_model.loading import DTYPES, compile_blocks
from dreambooth.errors import readable_errors
from dreambooth.loop.optimizers import build_optimizer
from dreambooth.method import Group
from dreambooth.options.training import TrainingConfig

OPTIONS = TrainingConfig(pretrained_model_name_or_path="", instance_prompt="")
MIB = 2**20
WARM_UP = 1  # rounds
Step = Callable[[], None]


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device)
    unet = random_unet(arguments.architecture, device, DTYPES[arguments.dtype])
    inputs = random_inputs(unet, arguments)
    steps, held, failed = prepare(unet, inputs, arguments)
    timed = {peer: functools.partial(milliseconds, step, device, arguments.clock) for peer, step in steps.items()}
    times = interleave(timed, arguments.rounds, WARM_UP)
    saved = {peer: saved_bytes(step, unet) for peer, step in steps.items()}
    peaks = {peer: peak_bytes(step, device) for peer, step in steps.items()}
    rows = [
        [
            peer,
            f"{median(times[peer]):.0f}",
            spread(ratios(times[peer], times[FROZEN]), 3),
            f"{saved[peer] / MIB:.0f}",
            f"{peaks[peer] / MIB:.0f}",
        ]
        for peer in times
    ]
    rows += [[peer, "does not run", "", "", ""] for peer in failed]
    what = f"A training step of the {arguments.architecture} UNet, {arguments.dtype}, batch {arguments.batch}, "
    what += f"{arguments.latents}x{arguments.latents} latents; {machine(device)}."
    what += "".join(f"\n\n{peer}: {error}" for peer, error in failed.items())
    measurements = {
        "milliseconds": times,
        "saved_bytes": saved,
        "peak_bytes": peaks,  # beyond what is held between steps: the weights, which all share, and:
        "held_bytes": held,
        "weights_bytes": sum(parameter.nbytes for parameter in unet.parameters()),
        "failed": failed,
    }
    header = ["", "ms", "time / frozen", "saved, MiB", "peak, MiB"]
    write_results(arguments, f"unet_step-{arguments.architecture}-{arguments.dtype}", what, header, rows, measurements)


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=10)
    gpu = torch.cuda.is_available()
    options.add_argument("--architecture", choices=CHOICES, default="sd15")
    options.add_argument("--device", default="cuda" if gpu else "cpu")
    options.add_argument("--dtype", choices=["fp32", "bf16"], default="bf16" if gpu else "fp32", help="Of the base.")
    options.add_argument(
        "--latents", type=int, help="Side of the latents, latent pixels (default: as trained on a GPU, else 16)."
    )
    options.add_argument("--batch", type=int, default=1, help="Images.")
    options.add_argument("--gradient_checkpointing", action="store_true")
    options.add_argument("--compile", action="store_true", help="Compile the UNet's repeated blocks.")
    options.add_argument(
        "--prepare_seconds",
        type=float,
        default=math.inf,
        help="After this time no further peer is prepared, which compiles it (default: all are).",
    )
    options.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    arguments = options.parse_args()
    if arguments.latents is None:
        arguments.latents = (128 if arguments.architecture == "sdxl" else 64) if gpu else 16
    arguments.peers = choose_peers(arguments.peers)
    return arguments


def prepare(
    unet: UNet2DConditionModel, inputs: dict[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, Step], dict[str, float], dict[str, str]]:
    """Return each peer's step, made once; the memory that it holds between steps, bytes; and the errors of the others.

    Raises what the bound raises, without which there is nothing to compare with.
    """
    device, began = torch.device(arguments.device), time.monotonic()
    steps, held, failed = {}, {}, {}
    for peer in arguments.peers:
        if time.monotonic() - began > arguments.prepare_seconds:
            failed[peer] = f"not prepared within {arguments.prepare_seconds:g} s"
            continue
        before = bytes_in_use(device)
        try:
            step = stepper(peer, unet, inputs, arguments)
            step()
        except Exception as error:
            if peer == FROZEN:
                raise
            failed[peer] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            steps[peer] = step
            gc.collect()
            held[peer] = bytes_in_use(device) - before
    return steps, held, failed


def random_inputs(unet: UNet2DConditionModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the UNet's keyword arguments, and the target as "target"."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(arguments.batch, *shape, device=arguments.device, dtype=unet.dtype)

    side, config = arguments.latents, unet.config
    inputs: dict[str, Any] = {
        "sample": draw(4, side, side),
        "target": draw(4, side, side),
        "timestep": torch.randint(1000, (arguments.batch,), device=arguments.device),
        "encoder_hidden_states": draw(77, config["cross_attention_dim"]),
    }
    if config["addition_embed_type"] == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": draw(pooled), "time_ids": draw(6)}
    return inputs


def stepper(peer: str, unet: UNet2DConditionModel, inputs: dict[str, Any], arguments: argparse.Namespace) -> Step:
    """Return a function that makes one training step of a UNet that shares its frozen weights with `unet`."""
    model = copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})
    parameters = adapt(model, peer)
    optimizer = optimizer_over(parameters, peer)
    vectors = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if arguments.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if arguments.compile:
        compile_blocks(model)
    inputs = dict(inputs)
    target = inputs.pop("target").float()

    def step() -> None:
        with torch.autocast(target.device.type, unet.dtype, enabled=unet.dtype != torch.float32):
            prediction = model(**inputs).sample
        F.mse_loss(prediction.float(), target).backward()
        nn.utils.clip_grad_norm_(vectors, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizer_over(parameters: Sequence[nn.Parameter], peer: str) -> torch.optim.Optimizer:
    """Return our optimizer over our factors, and PyTorch's fastest AdamW over those of others."""
    if peer.startswith("Kronecker"):
        group = Group("UNet", list(parameters), OPTIONS.learning_rate, OPTIONS.adam_weight_decay)
        return build_optimizer([group], OPTIONS, num_ranks=1)
    return torch.optim.AdamW(parameters, lr=OPTIONS.learning_rate, fused=True)


def saved_bytes(step: Step, unet: nn.Module) -> int:
    """Return the bytes of the storages, other than parameters', that the step's forward pass keeps."""
    known = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


def peak_bytes(step: Step, device: torch.device) -> float:
    """Return the peak memory of the step beyond what was in use before it; NaN if it cannot be measured."""
    counters = torch.get_device_module(device)
    if hasattr(counters, "reset_peak_memory_stats"):
        counters.reset_peak_memory_stats(device)
        before = counters.memory_allocated(device)
        step()
        return counters.max_memory_allocated(device) - before
    before = bytes_in_use(device)
    if math.isnan(before):
        return before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    step()
    return resident_bytes("VmHWM") - before


def bytes_in_use(device: torch.device) -> float:
    """Return allocated memory of a GPU, resident memory of a CPU's process; NaN if it cannot be measured."""
    counters = torch.get_device_module(device)
    if hasattr(counters, "memory_allocated"):
        return counters.memory_allocated(device)
    if device.type != "cpu":
        return math.nan
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns what earlier steps freed, or it would count as in use
        return resident_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, or another C library than glibc
        return math.nan


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    with readable_errors():
        main()
