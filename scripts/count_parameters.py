"""Count what each method trains in SD 1.5, SD 2.1 and SDXL, and compare with what DiffuseKronA's paper prints.

    python scripts/count_parameters.py                                  # all methods; six Kronecker adapters
    python scripts/count_parameters.py --kron_a1 4 --kron_a2 64         # A (4, 64) in every layer
    python scripts/count_parameters.py --kron_a1 1 --kron_a2 d_in       # as a LoRA of rank 1
    python scripts/count_parameters.py --kron_a1 4 8 --kron_a2 64 32    # the pairs (4, 64) and (8, 32)
    python scripts/count_parameters.py --lora_rank 8

Writes Markdown tables to the standard output: the parameters that each method trains, in the UNet alone and with the
text encoders; their size in fp32, which is that of the method's file; the largest rank that an adapter's delta of a
layer can have; the models, with the attention projections that adapters adapt; and the numbers that the paper prints,
with what they count. If an (a1, a2) does not divide the layers of a model, its cell says so. One that fits no model
ends in an error and exit code 2.

Methods are really attached, as training attaches them, to models without weights built from
kron_formats/architectures: nothing is downloaded, and a CPU does it in seconds.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2",
#     "bitsandbytes==0.50.2", "safetensors==0.8.0", "datasets==5.2.0", "filelock==4.3.1", "psutil==7.2.2",
#     "numpy==2.4.6", "pillow==13.0.0", "PyYAML==6.0.3", "Jinja2==3.1.6", "matplotlib==3.11.2", "tqdm==4.70.1",
#     "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dreambooth.runtime.library_warnings import drop_needless_warnings

drop_needless_warnings()  # before the imports that cause some

from diffusers import UNet2DConditionModel
from torch import nn

from dreambooth.errors import readable_errors
from dreambooth.family import Family
from dreambooth.kronecker import KRONECKER
from dreambooth.markdown import table
from dreambooth.method import Method
from dreambooth.options.field import option_names
from dreambooth.options.kronecker import size_argument
from dreambooth.options.training import config_class
from dreambooth.wording import size
from kron_adapter import KroneckerError, KroneckerLinear, inject_kronecker, remove_kronecker
from kron_formats.architectures import ARCHITECTURES, load_architecture
from kron_formats.families import ATTENTION_TARGETS, TEXT_ENCODER_TARGETS
from kron_formats.sizes import FactorSize
from methods.train import FAMILIES, METHODS
from studies.counting import WORD, count_trained, stand_in

DOES_NOT_FIT = "does not fit"
NOTHING = "-"


# ---- what is counted, and where ----


@dataclass(frozen=True)
class Contender:
    """A method with its options."""

    title: str
    method: str  # its name
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.title

    def load(self) -> Method:
        return KRONECKER if self.method == KRONECKER.name else METHODS[self.method].load()


@dataclass(frozen=True)
class Kronecker(Contender):
    """W + A ⊗ B with A (a1, a2)."""

    a1: FactorSize = 1
    a2: FactorSize = 1

    def rank(self, d_in: int, d_out: int) -> int:
        """Return the largest rank of ΔW (d_out, d_in):  rank(A ⊗ B) = rank(A) · rank(B).

        Raises KroneckerError if (a1, a2) does not divide the layer's sizes.
        """
        layer = KroneckerLinear(nn.Linear(d_in, d_out, device="meta"), self.a1, self.a2)
        return min(layer.A.shape) * min(layer.B.shape)


@dataclass(frozen=True)
class Lora(Contender):
    """W + B A of rank r."""

    r: int = 1

    def rank(self, d_in: int, d_out: int) -> int:
        """Return the largest rank of ΔW (d_out, d_in)."""
        return min(self.r, d_in, d_out)


def kronecker(a1: FactorSize, a2: FactorSize) -> Kronecker:
    return Kronecker(f"Kronecker ({a1}, {a2})", "kronecker", {"kron_a1": a1, "kron_a2": a2}, a1, a2)


PAIRS = ((4, 64), (16, 16), (8, 64), (64, 8))
KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")  # of the cross-attention
KV_APART = Contender(
    "Kronecker (4, 64), cross-attention's K and V (1, d_in)",
    "kronecker",
    {"kron_factors": [f"{name}=1,d_in" for name in KEYS_AND_VALUES]},
)
KV_ALONE = Contender(
    "Kronecker (1, d_in), cross-attention's K and V alone",
    "kronecker",
    {"kron_targets": [*KEYS_AND_VALUES], "kron_a1": 1, "kron_a2": "d_in"},
)


def lora(r: int) -> Lora:
    return Lora(f"LoRA r={r}", "lora", {"rank": r}, r)


NEW_WORD = {"modifier_token": "<new1>"}
SVDIFF = Contender("SVDiff", "svdiff")
CUSTOM_DIFFUSION = Contender("Custom Diffusion, K and V", "custom_diffusion", NEW_WORD)
CROSSATTN = Contender("Custom Diffusion, crossattn", "custom_diffusion", {**NEW_WORD, "freeze_model": "crossattn"})
TEXTUAL_INVERSION = Contender("Textual Inversion, a vector", "textual_inversion")
DREAMBOOTH = Contender("DreamBooth", "dreambooth")
NAMED = (SVDIFF, CUSTOM_DIFFUSION, CROSSATTN, TEXTUAL_INVERSION, DREAMBOOTH)


def others() -> list[Contender]:
    """Return all methods but the adapters, one without a title above under its own name."""
    titled = {
        name: [contender for contender in NAMED if contender.method == name] for name in METHODS if name != "lora"
    }
    return [contender for name, found in titled.items() for contender in found or [Contender(name, name)]]


@dataclass(frozen=True)
class Place:
    """Where parameters are counted: in a model's UNet alone, or in its text encoders too."""

    title: str
    architecture: str
    with_text: bool

    def models(self) -> list[nn.Module]:
        """Return the models, on the meta device."""
        unet, *text_encoders = load_architecture(self.architecture).values()
        return [unet, *text_encoders] if self.with_text else [unet]


@functools.cache
def all_places() -> tuple[Place, ...]:
    places: list[Place] = []
    for name, file in ARCHITECTURES.items():
        encoders = "text encoders" if len(load_architecture(file)) > 2 else "text encoder"
        places += [Place(f"{name} UNet", file, False), Place(f"{name} UNet + {encoders}", file, True)]
    return tuple(places)


SD15 = Place("SD 1.5 UNet + text encoder", "sd15", True)
SDXL = Place("SDXL UNet", "sdxl", False)


def count(contender: Contender, place: Place) -> int:
    """Return how many parameters train in a place. Raises KroneckerError if factors do not divide a layer's sizes."""
    if place.with_text:
        return attach(contender, place.architecture, True)[1]
    try:
        return attach(contender, place.architecture, True)[0]
    except KroneckerError:  # it may fit the UNet alone
        return attach(contender, place.architecture, False)[0]


@functools.cache
def attach(contender: Contender, architecture: str, with_text: bool) -> tuple[int, int]:
    """Return how many parameters train in the UNet, and in all models, by attaching the method as training does.

    Raises KroneckerError as `count` does.
    """
    method = contender.load()
    family, config = configure(method, contender, architecture, with_text)
    tokenizers = {name: stand_in() for name in family.text_encoders}
    return count_trained(method, family, load_architecture(architecture), tokenizers, config)


def configure(method: Method, contender: Contender, architecture: str, with_text: bool) -> tuple[Family, Any]:
    """Return a family and its options of a run. `with_text`: text encoders train too, if the method has the choice."""
    entry = FAMILIES["sdxl" if architecture == "sdxl" else "sd"]
    options = config_class(entry.options, method.options)
    given = {"train_text_encoder": with_text, "initializer_token": WORD}
    given = {name: value for name, value in given.items() if name in option_names(options)}
    given = {"pretrained_model_name_or_path": "", "instance_prompt": "", **given, **contender.options}
    return entry.load(), options(**given)


# ---- the paper ----


@dataclass(frozen=True)
class Printed:
    """A number of trained parameters in DiffuseKronA's paper (arXiv 2402.17412v2)."""

    where: str
    number: str
    contender: Contender
    place: Place
    why: str  # it is, or is not, what is counted here


WITH_TEXT = "the same, with the text encoder"
UNET_ALONE = "the same, of the UNet alone"
PRINTED = (
    Printed("Table 4, DreamBooth", "982.5 M", DREAMBOOTH, SD15, WITH_TEXT),
    Printed("Table 4, LoRA-DreamBooth", "1.09 M", lora(4), SD15, WITH_TEXT),
    Printed("Table 2, DiffuseKronA", "0.52 M", kronecker(4, 64), SD15, WITH_TEXT),
    Printed("Table 4, DiffuseKronA", "0.32 M", kronecker(8, 64), SD15, WITH_TEXT),
    Printed(
        "Table 4, SVDiff",
        "0.44 M",
        SVDIFF,
        SD15,
        "computed from the size of a file: 1.7 MiB / 4 bytes = 445,645, headers included",
    ),
    Printed(
        "Table 4, Custom Diffusion",
        "57.1 M",
        CUSTOM_DIFFUSION,
        SD15,
        "counts the whole table of embeddings, frozen but for the new word: 19,169,280 + 49,409 · 768 = 57,115,392",
    ),
    Printed("Table 2, DiffuseKronA", "3.8 M", kronecker(4, 64), SDXL, UNET_ALONE),
    Printed("Table 2, LoRA-DreamBooth", "5.8 M", lora(4), SDXL, UNET_ALONE),
)


# ---- the program ----


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    given = list(zip(arguments.kron_a1, arguments.kron_a2))
    of_one_shape = [kronecker(a1, a2) for a1, a2 in given or PAIRS]
    adapters = [*of_one_shape, lora(arguments.lora_rank)]
    contenders = [*of_one_shape, *([] if given else [KV_APART, KV_ALONE]), lora(arguments.lora_rank), *others()]
    tables = [
        count_table("trained parameters", "{:,}".format, contenders),
        count_table("in fp32", lambda parameters: size(4 * parameters), contenders),
        rank_table(adapters),
        model_table(),
        printed_table(),
    ]
    print("\n\n".join(tables))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--kron_a1",
        type=size_argument("a1"),
        nargs="+",
        default=[],
        help="rows of A: a number that divides a layer's output features, or a fraction of these: d_out, d_out/8. "
        "Several pair up with --kron_a2. Default: 4 16 8 64, and shapes that differ between layers",
    )
    parser.add_argument(
        "--kron_a2",
        type=size_argument("a2"),
        nargs="+",
        default=[],
        help="columns of A: a number that divides a layer's input features, or a fraction of these: d_in, d_in/8. "
        "Several pair up with --kron_a1. Default: 64 16 64 8",
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


def model_table() -> str:
    """Return each model's weights and attention projections, which adapters adapt."""
    rows = []
    for place in all_places():
        models = place.models()
        weights = sum(weight.numel() for model in models for weight in model.parameters())
        rows.append([place.title, f"{weights:,}", str(len(adapted_layers(models)))])
    return table(["", "weights", "attention projections"], rows)


def count_table(title: str, words: Callable[[int], str], contenders: Sequence[Contender]) -> str:
    """Return what trains, as `words` puts a number, a row for each contender and a column for each place.

    Raises KroneckerError if one of them fits none of the models.
    """

    def cell(number: int | None) -> str:
        return DOES_NOT_FIT if number is None else words(number) if number else NOTHING

    rows = [[str(contender), *map(cell, counts(contender))] for contender in contenders]
    return table([title, *(place.title for place in all_places())], rows)


def counts(contender: Contender) -> list[int | None]:
    """Return a contender's parameters in each place, None where it does not fit.

    Raises KroneckerError if that is everywhere.
    """
    found, problems = [], []
    for place in all_places():
        try:
            found.append(count(contender, place))
        except KroneckerError as error:
            found.append(None)
            problems.append(f"{contender} fits none of the models; {place.title}: {error}")
    if len(problems) == len(found):
        raise KroneckerError(problems[0])
    return found


def rank_table(adapters: Sequence[Kronecker | Lora]) -> str:
    """Return the largest rank of ΔW, a row for each shape of layer in any of the models."""
    layers = (layer for file in ARCHITECTURES.values() for layer in adapted_layers(load_architecture(file).values()))
    rows = [
        [f"{d_in} -> {d_out}", *(rank_cell(adapter, d_in, d_out) for adapter in adapters)]
        for d_in, d_out in sorted({(layer.in_features, layer.out_features) for layer in layers})
    ]
    return table(["largest rank, d_in -> d_out", *map(str, adapters)], rows)


def rank_cell(adapter: Kronecker | Lora, d_in: int, d_out: int) -> str:
    try:
        return str(adapter.rank(d_in, d_out))
    except KroneckerError:
        return DOES_NOT_FIT


def printed_table() -> str:
    """Return what the paper prints beside what is counted here."""
    rows = [
        [f"{row.where}, {row.number}", f"{count(row.contender, row.place):,}", row.place.title, row.why]
        for row in PRINTED
        if row.contender.method in (KRONECKER.name, *METHODS)
    ]
    return table(["the paper", "counted", "in", "what the paper's number is"], rows)


if __name__ == "__main__":
    with readable_errors():
        main()
