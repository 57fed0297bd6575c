"""What the training programs of the toy world share: options, optimizers, the moving average of weights, and resuming.

The data of a step is a function of its number, so a program that is started again continues from its last save with
the same result as if it had never stopped.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import PARAM_LIST, AveragedModel
from tqdm import tqdm

from dreambooth.options.paths import path_argument
from kron_formats.files import whole_file

Model = TypeVar("Model", bound=nn.Module)

EMA_SPAN = 0.1  # share of all steps that the moving average spans
WARMUP, DECAY = 0.01, 0.4  # shares of all steps in which the learning rates rise from zero, and fall back to it
MUON_TO_ADAM = 0.15  # learning rate of AdamW as a share of Muon's


def build_parser(doc: str | None, **defaults) -> argparse.ArgumentParser:
    """Return a parser with the options that all programs share, with a program's own defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output_dir",
        type=path_argument,
        required=True,
        help="folder for the model, sample sheets and the state to resume from",
    )
    options = {
        "steps": "optimizer steps in total, those of earlier starts included",
        "batch_size": "pictures per step",
        "learning_rate": "of Muon, which trains the matrices; AdamW trains the rest",
        "seed": "of weights and data",
        "save_every": "steps between saves",
    }
    for name, default in {"seed": 0, "save_every": 500, **defaults}.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{options[name]}; default: {default}"
        )
    return parser


def device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def fit(
    model: Model,
    loss_of: Callable[[Model, int], Tensor],
    save: Callable[[Model, int], None],
    options: argparse.Namespace,
) -> None:
    """Train `model` for options.steps optimizer steps, under bf16 autocast. Resumes if options.output_dir has a state.

    loss_of: called with the model and the number of the step; returns the loss on that step's data
    save: called with the moving average of the weights and the number of steps done, every options.save_every steps and
        at the end
    """
    options.output_dir.mkdir(parents=True, exist_ok=True)
    model.to(device())
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] torch's overloads lack it
    model.train()
    average = AveragedModel(model, multi_avg_fn=ema(max(2, EMA_SPAN * options.steps)))
    optimizers = build_optimizers(model, options.learning_rate)
    state = options.output_dir / "state.pt"
    first = _resume(state, model, average, optimizers) if state.exists() else 0
    progress = tqdm(
        range(first, options.steps), initial=first, total=options.steps, desc=options.output_dir.name, mininterval=10
    )
    shown, started = None, time.monotonic()
    for step in progress:
        torch.manual_seed(options.seed * 1_000_003 + step)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * rate(step, options.steps)
        with torch.autocast(device().type, torch.bfloat16), _group_norm_in_fp32():
            loss = loss_of(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        average.update_parameters(model)
        shown = loss.item() if shown is None else shown + 0.02 * (loss.item() - shown)
        progress.set_postfix(loss=f"{shown:.4f}")
        done = step + 1
        if done % options.save_every == 0 or done == options.steps:
            _save(state, model, average, optimizers, done)
            save(cast(Model, average.module.eval()), done)
            tqdm.write(f"{done} steps, loss {shown:.4f}, {(time.monotonic() - started) / 60:.1f} min since the start")


def ema(span: float) -> Callable[[PARAM_LIST, PARAM_LIST, Tensor | int], None]:
    """Return the update of a moving average over about `span` steps, for AveragedModel.

    Early on it spans only the last tenth of the steps done, since the initial weights are noise.
    """

    @torch.no_grad()
    def update(averages: PARAM_LIST, parameters: PARAM_LIST, steps: Tensor | int) -> None:
        torch._foreach_lerp_(averages, parameters, max(1 / span, 9 / (10 + int(steps))))

    return update


def rate(step: int, steps: int) -> float:
    """Return the share of the full learning rate: linear warm-up, constant, linear decay to zero."""
    return min(1.0, (step + 1) / (WARMUP * steps), (steps - step) / (DECAY * steps))


def build_optimizers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW for the input and output layers and all vectors, and Muon for the other matrices.

    A convolution counts as a matrix (channels out, channels in x height x width).
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inside = not any(word in name for word in ("embed", "conv_in", "conv_out", "quant_conv", "patch"))
        (matrices if parameter.ndim >= 2 and inside else rest).append(parameter)
    adam = torch.optim.AdamW(rest, lr=MUON_TO_ADAM * learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    optimizers = [adam, FlatMuon(matrices, learning_rate)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["full_lr"] = group["lr"]
    return optimizers


class FlatMuon(torch.optim.Muon):
    """torch's Muon, which takes only matrices, on flattened views of parameters with more dimensions."""

    def __init__(self, parameters: list[nn.Parameter], lr: float):
        self.parameters = parameters
        self.views = [nn.Parameter(_as_matrix(parameter.detach())) for parameter in parameters]
        super().__init__(self.views, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for parameter, view in zip(self.parameters, self.views):
            view.grad = None if parameter.grad is None else _as_matrix(parameter.grad)
        super().step(closure)


def _as_matrix(tensor: Tensor) -> Tensor:
    if tensor.ndim == 4:  # channels_last convolutions are contiguous in this order, so that the result is a view
        tensor = tensor.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    return tensor.flatten(1)


class _group_norm_in_fp32:
    """Inside this context group norms run in fp32: on CPUs their bf16 backward is five times as slow."""

    def __enter__(self):
        self.original = F.group_norm
        F.group_norm = lambda x, *rest: self.original(x.float(), *rest)

    def __exit__(self, *_):
        F.group_norm = self.original


def _save(state: Path, model: nn.Module, average: AveragedModel, optimizers: list, step: int) -> None:
    tensors = [part.state_dict() for part in (model, average, *optimizers)]
    with whole_file(state) as unfinished:
        torch.save({"step": step, "parts": tensors}, unfinished)


def _resume(state: Path, model: nn.Module, average: AveragedModel, optimizers: list) -> int:
    saved = torch.load(state, map_location=device(), weights_only=True)
    for part, tensors in zip((model, average, *optimizers), saved["parts"]):
        part.load_state_dict(tensors)
    return saved["step"]


def batches(count: int, size: int) -> Iterator[range]:
    """Yield the numbers below `count` in ranges of at most `size`."""
    for start in range(0, count, size):
        yield range(start, min(start + size, count))
