"""The base model, how it is held in memory during training, and the adapters that a script adds to it."""

from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import option


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions:
    """Base model."""

    pretrained_model_name_or_path: str = option(
        "Base model: a name on the Hub, or a folder in diffusers' layout.", hub=True
    )
    revision: str | None = option("Revision of the base model on the Hub. Default: its main branch.", None)
    variant: str | None = option("Variant of the base model's weight files, for example fp16. Default: none.", None)
    cache_dir: str | None = option(
        "Folder for downloads from the Hub. Default: the Hub's own cache.", None, decides_result=False, path=True
    )


@dataclass(frozen=True, kw_only=True)
class FrozenModelOptions(BaseModelOptions):
    """Base model: precision, memory and speed in training."""

    pretrained_vae_model_name_or_path: str | None = option(
        "VAE to use instead of the base model's: a name on the Hub, or a folder. Default: the base model's.",
        None,
        hub=True,
    )
    vae_precision: Literal["fp32", "fp16", "bf16"] = option("Precision of the VAE.", "fp32")
    base_precision: Literal["fp32", "fp16", "bf16", "nf4", "int8"] | None = option(
        "Precision of the frozen UNet and text encoders; nf4 and int8 quantise the UNet with bitsandbytes. "
        "Default: as mixed_precision.",
        None,
    )
    gradient_checkpointing: bool = option("Recompute activations in the backward pass: less memory, more time.", False)
    compile: bool = option("Compile the UNet's repeated blocks with torch.compile.", False)
    channels_last: bool = option("Keep the UNet and the VAE in the channels-last memory format.", False)
    enable_xformers_memory_efficient_attention: bool = option("Use xformers' attention instead of PyTorch's.", False)

    def check(self) -> None:
        if self.compile and self.base_precision in ("nf4", "int8"):
            raise UserError(
                f"--compile does not work with --base_precision {self.base_precision}: torch.compile cannot compile "
                "quantised layers"
            )


@dataclass(frozen=True, kw_only=True)
class AdaptedModelOptions(BaseModelOptions):
    """Adapters."""

    adapter: list[str] = option(
        "Adapter files, as FILE or FILE:SCALE. Default: none, only the base model.", [], path=True
    )
    adapter_scale: float = option(
        "Multiplies the strength of every adapter: 0 gives the base model, 1 the adapter as trained.", 1.0
    )
    dtype: Literal["fp32", "fp16", "bf16"] = option("Precision of the model.", "fp32")
