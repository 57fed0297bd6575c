"""The options of the compared methods. Imports no torch, so that --help is instant."""

from dataclasses import dataclass

from dreambooth.options.field import option
from dreambooth.options.steps import TextEncoderOptions


@dataclass(frozen=True, kw_only=True)
class LoraOptions(TextEncoderOptions):
    """LoRA."""

    rank: int = option("Rank of the update, r; its alpha is r too.", 4, at_least=1)

    foreign = (  # answers to flags of other trainers; see dreambooth/options/foreign.py
        ("network_dim lora_rank lora_r r", "use --rank"),
        ("lora_alpha network_alpha alpha", "alpha is --rank; the strength is chosen when images are drawn"),
        ("network_module lora_type algo", "this method is LoRA, whose size is --rank"),
        ("kron_a1 kron_a2 kron_factors", "a LoRA's size is --rank"),
    )
