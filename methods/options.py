"""The options of the compared methods. Imports no torch, so that --help is instant."""

from dataclasses import dataclass

from dreambooth.options.field import option
from dreambooth.options.steps import TextEncoderOptions


@dataclass(frozen=True, kw_only=True)
class LoraOptions(TextEncoderOptions):
    """LoRA."""

    rank: int = option("Rank of the update, r.", 4, at_least=1)
    lora_alpha: float | None = option(
        "Alpha: the update is multiplied by alpha / rank, in training and in the file. Default: rank.", None, above=0
    )

    foreign = (  # answers to flags of other trainers; see dreambooth/options/foreign.py
        ("network_dim lora_rank lora_r r", "use --rank"),
        ("network_alpha alpha", "use --lora_alpha"),
        ("network_module lora_type algo", "this method is LoRA, whose size is --rank"),
        ("kron_a1 kron_a2 kron_factors", "a LoRA's size is --rank"),
    )

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank if it is not given."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha
