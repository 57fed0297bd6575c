"""The Kronecker adapter:  W + scale · (A ⊗ B)  with A (a1, a2)."""

from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import option
from dreambooth.options.prompts import ClassPromptOptions
from dreambooth.options.steps import TextEncoderOptions


@dataclass(frozen=True, kw_only=True)
class KroneckerOptions(TextEncoderOptions, ClassPromptOptions):
    """Kronecker adapter, W + A ⊗ B."""

    kron_a1: int = option("Rows of A. Must divide every adapted layer's output features.", 4, at_least=1)
    kron_a2: int = option("Columns of A. Must divide every adapted layer's input features.", 64, at_least=1)
    kron_factors: list[str] = option(
        "Rows and columns of A for single projections: to_k=8,64 to_v=8,64; in YAML {to_k: [8, 64]}. Default: none.", []
    )
    kron_targets: list[str] = option(
        "Linear layers of the UNet to adapt, by the end of their path.", ["to_q", "to_k", "to_v", "to_out.0"]
    )
    kron_init: Literal["invariant", "reference", "contrast"] = option(
        "Initialisation of A. invariant: one learning rate suits all factor shapes; reference: as in the paper; "
        "contrast: invariant, but A of attn2.to_k and attn2.to_v, if it has a column for each input feature, begins as "
        "what tells the instance prompts from class_prompt.",
        "invariant",
    )
    text_encoder_kron_a1: int | None = option("kron_a1 of the text encoders. Default: kron_a1.", None, at_least=1)
    text_encoder_kron_a2: int | None = option("kron_a2 of the text encoders. Default: kron_a2.", None, at_least=1)

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
            "the sizes of A are --kron_a1 and --kron_a2, or --kron_factors for single projections",
        ),
        (
            "network_module lora_type algo",
            "this script trains a Kronecker adapter (LoKr), whose sizes are --kron_a1 and --kron_a2",
        ),
        ("conv_dim conv_alpha", "convolutions are not adapted; --kron_targets are linear layers"),
        (
            "lora_layers lora_unet_blocks lora_blocks lora_target_modules target_modules use_blora freeze_model",
            "name the layers to adapt with --kron_targets, by the end of their path, for example attn2.to_k",
        ),
        ("use_dora dora_wd", "the adapter has no DoRA variant; --kron_a1 and --kron_a2 set its capacity"),
    )

    @property
    def needs_class_prompt(self) -> str | None:
        return "--kron_init contrast" if self.kron_init == "contrast" else super().needs_class_prompt

    def factors_by_target(self) -> dict[str, tuple[int, int]]:
        """Return kron_factors as {"to_k": (8, 64)}. Raises UserError if an entry cannot be parsed."""
        factors = {}
        for entry in self.kron_factors:
            target, _, numbers = entry.partition("=")
            parts = numbers.split(",")
            if not target or len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
                raise UserError(f"--kron_factors {entry}: write PROJECTION=A1,A2, for example to_k=8,64")
            factors[target] = (int(parts[0]), int(parts[1]))
        return factors

    def check(self) -> None:
        self.factors_by_target()
        for name in ("text_encoder_kron_a1", "text_encoder_kron_a2"):
            if getattr(self, name) is not None and not self.train_text_encoder:
                raise UserError(f"--{name} needs --train_text_encoder")
