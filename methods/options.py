"""The options of the compared methods. Imports no torch, so that --help is instant."""

from dataclasses import dataclass

from dreambooth.options.field import option
from dreambooth.options.steps import TextEncoderOptions


@dataclass(frozen=True, kw_only=True)
class LoraOptions(TextEncoderOptions):
    """LoRA."""

    rank: int = option("Rank of the update, r; its alpha is r too.", 4, at_least=1)
