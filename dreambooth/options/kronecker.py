"""The Kronecker adapter:  W + scale · (A ⊗ B)  with A (a1, a2) and B (b1, b2)."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import defaults, option
from dreambooth.options.steps import TextEncoderOptions
from dreambooth.options.subjects import SubjectOptions
from kron_formats.errors import KroneckerError
from kron_formats.sizes import FactorSize, as_size, check_size

DEFAULT_SHAPE = (4, 64)  # (a1, a2)
TEXT_PROJECTIONS = ("attn2.to_k", "attn2.to_v")  # the layers that read prompts
RATE_FORM = "write NAME=RATE, for example attn2=0.02"
SHAPE_OPTIONS = ("kron_a1", "kron_a2", "kron_b1", "kron_b2", "kron_factors", "kron_targets")
FORM = "write NAME=A1,A2, for example to_k=8,64 or attn2.to_k=1,d_in"


@dataclass(frozen=True, kw_only=True)
class KroneckerOptions(SubjectOptions, TextEncoderOptions):
    """Kronecker adapter, W + A ⊗ B."""

    kron_a1: FactorSize | None = option(
        "Rows of A: a number that divides every adapted layer's output features, or a fraction of these: d_out, "
        f"d_out/8. Default: {DEFAULT_SHAPE[0]}.",
        None,
        at_least=1,
    )
    kron_a2: FactorSize | None = option(
        "Columns of A: a number that divides every adapted layer's input features, or a fraction of these: d_in, "
        f"d_in/8. Default: {DEFAULT_SHAPE[1]}.",
        None,
        at_least=1,
    )
    kron_b1: int | None = option(
        "Rows of B, instead of those of A: kron_b1 8 is kron_a1 d_out/8. Default: what kron_a1 leaves.",
        None,
        at_least=1,
    )
    kron_b2: int | None = option(
        "Columns of B, instead of those of A: kron_b2 8 is kron_a2 d_in/8. Default: what kron_a2 leaves.",
        None,
        at_least=1,
    )
    kron_factors: list[str] = option(
        "Rows and columns of A for some layers of the UNet, named as in kron_targets; the longest name counts: "
        "to_k=8,64 attn2.to_k=1,d_in; in YAML {to_k: [8, 64]}. Default: none.",
        [],
    )
    kron_lr: list[str] = option(
        "Learning rates of some layers of the UNet, named as in kron_targets; the longest name counts: attn2=0.02 "
        "up_blocks.1=0.005; in YAML {attn2: 0.02}. Default: learning_rate for all.",
        [],
    )
    kron_targets: list[str] = option(
        "Linear layers of the UNet to adapt, by words of their path: to_k, attn1 (self-attention), attn2 "
        "(cross-attention), ff (feed-forward), up_blocks.1; or re:REGEX, which the whole path matches.",
        ["to_q", "to_k", "to_v", "to_out.0"],
    )
    scale_weight_norms: float | None = option(
        "Largest Frobenius norm of a layer's change: after every step, factors of a larger one are scaled down to it. "
        "Default: no limit.",
        None,
        above=0,
    )
    kron_init: Literal["invariant", "reference", "contrast"] = option(
        "Initialisation of A. invariant: one learning rate suits all factor shapes; reference: as in the paper; "
        "contrast: invariant, but A of attn2.to_k and attn2.to_v begins as what tells the instance prompts from "
        "class_prompt; kron_factors apart, A is then (1, d_in) there, or with subjects (their number, d_in).",
        "invariant",
    )
    init_adapter: str | None = option(
        "File to start from. A Kronecker adapter decides which layers are adapted and the sizes of their factors; of "
        "a LoRA, training starts from the nearest factors of the sizes given here, and says how near they are. "
        "Default: none.",
        None,
        path=True,
    )
    text_encoder_kron_a1: FactorSize | None = option(
        "kron_a1 of the text encoders. Default: as in the UNet.", None, at_least=1
    )
    text_encoder_kron_a2: FactorSize | None = option(
        "kron_a2 of the text encoders. Default: as in the UNet.", None, at_least=1
    )

    foreign = (  # answers to flags of other trainers; see dreambooth/options/foreign.py
        (
            "rank lora_rank lora_r network_dim",
            "a Kronecker adapter has two sizes, --kron_a1 and --kron_a2; (4, 64) has 2/3 of the parameters of LoRA "
            "r=4 in SDXL",
        ),
        (
            "lora_alpha network_alpha alpha",
            "a Kronecker adapter has no alpha: --kron_init invariant lets one --learning_rate suit all sizes, and its "
            "strength is chosen when images are drawn",
        ),
        (
            "factor lokr_factor network_args",
            "the sizes of A are --kron_a1 and --kron_a2, or --kron_factors for single layers; those of B --kron_b1 and "
            "--kron_b2",
        ),
        (
            "network_module lora_type algo",
            "this script trains a Kronecker adapter (LoKr), whose sizes are --kron_a1 and --kron_a2",
        ),
        ("network_weights dim_from_weights init_lora", "use --init_adapter FILE; the file gives the sizes"),
        ("conv_dim conv_alpha", "convolutions are not adapted; --kron_targets are linear layers"),
        (
            "lora_layers lora_unet_blocks lora_blocks lora_target_modules target_modules use_blora freeze_model",
            "name the layers to adapt with --kron_targets, by words of their path: attn2.to_k, up_blocks.1",
        ),
        ("use_dora dora_wd", "the adapter has no DoRA variant; --kron_a1 and --kron_a2 set its capacity"),
    )

    def __post_init__(self) -> None:
        """Put a number where a size is the text of one, and the default where a side has no size.

        With init_adapter, what was not given stays so: its file may decide it.
        """
        for name in ("kron_a1", "kron_a2", "text_encoder_kron_a1", "text_encoder_kron_a2"):
            object.__setattr__(self, name, as_size(getattr(self, name)))
        for a, b, default in zip(("kron_a1", "kron_a2"), ("kron_b1", "kron_b2"), DEFAULT_SHAPE):
            if self.init_adapter is None and getattr(self, a) is None and getattr(self, b) is None:
                object.__setattr__(self, a, default)

    @property
    def needs_class_prompt(self) -> str | None:
        return "--kron_init contrast" if self.kron_init == "contrast" else super().needs_class_prompt

    def shape(self) -> tuple[FactorSize, FactorSize]:
        """Return (a1, a2) of the UNet's layers; a size of B is a fraction of the layer's."""
        a1 = self.kron_a1 or DEFAULT_SHAPE[0] if self.kron_b1 is None else f"d_out/{self.kron_b1}"
        a2 = self.kron_a2 or DEFAULT_SHAPE[1] if self.kron_b2 is None else f"d_in/{self.kron_b2}"
        return a1, a2

    def text_encoder_shape(self) -> tuple[FactorSize, FactorSize]:
        """Return (a1, a2) of the text encoders' layers."""
        a1, a2 = self.shape()
        return self.text_encoder_kron_a1 or a1, self.text_encoder_kron_a2 or a2

    def factors_by_target(self) -> dict[str, tuple[FactorSize, FactorSize]]:
        """Return kron_factors as {"to_k": (8, 64)}.

        Raises UserError if an entry cannot be parsed, or is repeated.
        """
        factors = {}
        for target, value, entry in _named_values("kron_factors", self.kron_factors, FORM):
            parts = [as_size(size) for size in value.split(",")]
            if len(parts) != 2:
                raise UserError(f"--kron_factors {entry}: {FORM}")
            for factor, size in zip(("a1", "a2"), parts):
                _check_size(f"--kron_factors {entry}", factor, size, f"; {FORM}")
            factors[target] = (parts[0], parts[1])
        return factors

    def contrast_factors(self) -> dict[str, tuple[FactorSize, FactorSize]]:
        """Return (a1, a2) of the layers that start from the contrast of prompts: A sees whole inputs.

        It looks in as many directions as there are subjects, or the next power of two, which divides a layer's outputs.
        """
        rows = 1 << (len(self.all_subjects) - 1).bit_length()
        return dict.fromkeys(TEXT_PROJECTIONS, (rows, "d_in")) if self.kron_init == "contrast" else {}

    def rates_by_target(self) -> dict[str, float]:
        """Return kron_lr as {"attn2": 0.02}. Raises UserError if an entry cannot be parsed, or is repeated."""
        rates = {}
        for target, value, entry in _named_values("kron_lr", self.kron_lr, RATE_FORM):
            try:
                rates[target] = float(value)
            except ValueError:
                raise UserError(f"--kron_lr {entry}: {RATE_FORM}") from None
            if not (math.isfinite(rates[target]) and rates[target] >= 0):
                raise UserError(f"--kron_lr {entry}: a learning rate is a finite number of at least 0")
        return rates

    def shape_options_given(self) -> list[str]:
        """Return the options about layers of the UNet and their factors that differ from their defaults."""
        default = defaults(KroneckerOptions)
        return [name for name in SHAPE_OPTIONS if getattr(self, name) != default[name]]

    def check(self) -> None:
        self.factors_by_target()
        if self.rates_by_target() and self.optimizer_name() == "Prodigy":
            raise UserError("--optimizer Prodigy finds a single learning rate and does not work with --kron_lr")
        if self.scale_weight_norms is not None and self.optimizer_name() == "ScheduleFreeAdamW":
            raise UserError(
                "--optimizer ScheduleFreeAdamW saves an average of what it trains, which --scale_weight_norms does not "
                "limit"
            )
        if self.init_adapter is not None and self.kron_init == "contrast":
            raise UserError(
                f"--init_adapter {self.init_adapter} and --kron_init contrast are two starts: leave one of them out"
            )
        for a, b, side in (("kron_a1", "kron_b1", "d_out"), ("kron_a2", "kron_b2", "d_in")):
            rows, rest = getattr(self, a), getattr(self, b)
            if rows is not None and rest is not None:
                raise UserError(
                    f"--{b} {rest} and --{a} {rows}: give one of them, since their product is the layer's {side}; "
                    f"--{a} {side}/{rest} is the same as --{b} {rest}"
                )
        for name in ("kron_a1", "kron_a2", "text_encoder_kron_a1", "text_encoder_kron_a2"):
            if (size := getattr(self, name)) is not None:
                _check_size(f"--{name} {size}", name[-2:], size)
        for name in ("text_encoder_kron_a1", "text_encoder_kron_a2"):
            if getattr(self, name) is not None and not self.train_text_encoder:
                raise UserError(f"--{name} needs --train_text_encoder")


def _named_values(option_name: str, entries: Sequence[str], form: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and the whole of every NAME=VALUE. Raises UserError if one is not that, or repeats a name."""
    names = set()
    for entry in entries:
        name, _, value = entry.rpartition("=")
        if not name:
            raise UserError(f"--{option_name} {entry}: {form}")
        if name in names:
            raise UserError(f"--{option_name} {entry}: {name} has a value already; give one for each name")
        names.add(name)
        yield name, value, entry


def _check_size(where: str, factor: str, size: FactorSize, form: str = "") -> None:
    try:
        check_size(factor, size)
    except KroneckerError as error:
        raise UserError(f"{where}: {error}{form}") from error


def size_argument(factor: str) -> Callable[[str], FactorSize]:
    """Return the `type` of an argument for the size "a1" or "a2" of A, in programs that have no options."""

    def read(text: str) -> FactorSize:
        try:
            check_size(factor, text)
        except KroneckerError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return as_size(text)

    return read
