"""Count the parameters of Kronecker adapters in SD 1.5, SD 2.1 and SDXL, beside LoRA on the same layers.

    python scripts/count_parameters.py                                  # four pairs (a1, a2) beside LoRA r = 4
    python scripts/count_parameters.py --kron_a1 4 --kron_a2 64         # one pair
    python scripts/count_parameters.py --kron_a1 4 8 --kron_a2 64 32    # the pairs (4, 64) and (8, 32)
    python scripts/count_parameters.py --lora_rank 8

Writes two Markdown tables to the standard output: adapted attention layers and trained parameters, with the size of
the tensors in fp32; and the largest rank that the delta weight of a layer can have. If an (a1, a2) does not divide the
layers of a model, its cell says so. One that fits no model ends in an error and exit code 2.

Adapters are really injected, into models without weights built from kron_formats/architectures: nothing is downloaded,
and a CPU does it in seconds.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel
from peft import LoraConfig, LoraModel
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dreambooth.errors import readable_errors
from kron_adapter import (
    KroneckerError,
    KroneckerLinear,
    inject_kronecker,
    kronecker_parameters,
    remove_kronecker,
)
from kron_formats.architectures import ARCHITECTURES, load_architecture
from kron_formats.families import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS

DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class Kronecker:
    """W + A ⊗ B with A (a1, a2). Its methods raise KroneckerError if (a1, a2) does not divide a layer's sizes."""

    a1: int
    a2: int

    def __str__(self) -> str:
        return f"Kronecker ({self.a1}, {self.a2})"

    def count(self, model: nn.Module) -> int:
        """Return the number of trained parameters in `model`, which comes back frozen and without the adapters."""
        inject_kronecker(model, self.a1, self.a2, targets_of(model))
        parameters = sum(parameter.numel() for parameter in kronecker_parameters(model))
        remove_kronecker(model)
        return parameters

    def rank(self, d_in: int, d_out: int) -> int:
        """Return the largest rank of ΔW (d_out, d_in):  rank(A ⊗ B) = rank(A) · rank(B)."""
        layer = KroneckerLinear(nn.Linear(d_in, d_out, device="meta"), self.a1, self.a2)
        return min(layer.A.shape) * min(layer.B.shape)


@dataclass(frozen=True)
class Lora:
    """W + B A of rank r, as peft does it."""

    r: int

    def __str__(self) -> str:
        return f"LoRA r={self.r}"

    def count(self, model: nn.Module) -> int:
        """Return the number of trained parameters in `model`, which comes back frozen and without the adapters."""
        config = LoraConfig(r=self.r, target_modules=list(targets_of(model)))
        lora = LoraModel(model, config, "default", low_cpu_mem_usage=True)  # low_cpu_mem_usage: on the meta device
        parameters = sum(parameter.numel() for parameter in lora.parameters() if parameter.requires_grad)
        lora.unload()
        return parameters

    def rank(self, d_in: int, d_out: int) -> int:
        """Return the largest rank of ΔW (d_out, d_in)."""
        return min(self.r, d_in, d_out)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    pairs = zip(arguments.kron_a1, arguments.kron_a2)
    adapters = [*(Kronecker(a1, a2) for a1, a2 in pairs), Lora(arguments.lora_rank)]
    models = load_models()
    print(parameter_table(models, adapters))
    print()
    print(rank_table(models, adapters))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--kron_a1",
        type=positive,
        nargs="+",
        default=[4, 16, 8, 64],
        help="rows of A; divide a layer's output features. Several pair up with --kron_a2. Default: 4 16 8 64",
    )
    parser.add_argument(
        "--kron_a2",
        type=positive,
        nargs="+",
        default=[64, 16, 64, 8],
        help="columns of A; divide a layer's input features. Several pair up with --kron_a1. Default: 64 16 64 8",
    )
    parser.add_argument("--lora_rank", type=positive, default=4, help="rank of the LoRA to compare with. Default: 4")
    arguments = parser.parse_args(argv)
    rows, columns = len(arguments.kron_a1), len(arguments.kron_a2)
    if rows != columns:
        parser.error(f"--kron_a1 and --kron_a2 pair up, but have {rows} and {columns} values")
    return arguments


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def load_models() -> dict[str, list[nn.Module]]:
    """Return name -> the models adapted together, on the meta device: each UNet alone, and with its text encoders."""
    models = {}
    for name, file in ARCHITECTURES.items():
        unet, *text_encoders = load_architecture(file).values()
        models[f"{name} UNet"] = [unet]
        plural = "s" if len(text_encoders) > 1 else ""
        models[f"{name} UNet + text encoder{plural}"] = [unet, *text_encoders]
    return models


def targets_of(model: nn.Module) -> tuple[str, ...]:
    return ATTENTION_TARGETS if isinstance(model, UNet2DConditionModel) else TEXT_ENCODER_TARGETS


def adapted_layers(models: Iterable[nn.Module]) -> list[nn.Linear]:
    """Return the layers that every adapter adapts, in the models' order."""
    layers = []
    for model in models:
        injected = inject_kronecker(model, 1, 1, targets_of(model))  # 1 divides every size
        layers += [layer.base for layer in injected.values()]
        remove_kronecker(model)
    return layers


def parameter_table(models: dict[str, list[nn.Module]], adapters: Sequence[Kronecker | Lora]) -> str:
    """Return trained parameters and MiB in fp32, a row for each of `models`.

    Raises KroneckerError if one of the adapters fits none of the models.
    """
    columns = [parameter_column(models, adapter) for adapter in adapters]
    layers = [str(len(adapted_layers(parts))) for parts in models.values()]
    return markdown(["trained parameters", "layers", *map(str, adapters)], zip(models, layers, *columns))


def parameter_column(models: dict[str, list[nn.Module]], adapter: Kronecker | Lora) -> list[str]:
    column, problems = [], []
    for name, parts in models.items():
        try:
            parameters = sum(adapter.count(model) for model in parts)
            column.append(f"{parameters:,} ({parameters * 4 / 2**20:.2f} MiB)")
        except KroneckerError as error:
            column.append(DOES_NOT_FIT)
            problems.append(f"{adapter} fits none of the models; {name}: {error}")
    if len(problems) == len(models):
        raise KroneckerError(problems[0])
    return column


def rank_table(models: dict[str, list[nn.Module]], adapters: Sequence[Kronecker | Lora]) -> str:
    """Return the largest rank of ΔW, a row for each shape of layer in any of `models`."""
    shapes = {(layer.in_features, layer.out_features) for parts in models.values() for layer in adapted_layers(parts)}
    rows = [
        [f"{d_in} -> {d_out}", *(rank_cell(adapter, d_in, d_out) for adapter in adapters)]
        for d_in, d_out in sorted(shapes)
    ]
    return markdown(["largest rank, d_in -> d_out", *map(str, adapters)], rows)


def rank_cell(adapter: Kronecker | Lora, d_in: int, d_out: int) -> str:
    try:
        return str(adapter.rank(d_in, d_out))
    except KroneckerError:
        return DOES_NOT_FIT


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table with its columns aligned: names to the left, numbers to the right."""
    rows = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    with readable_errors():
        main()
