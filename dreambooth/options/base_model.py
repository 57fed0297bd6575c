"""The base model, how it is held in memory during training, and the adapters that a script adds to it."""

from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import GIVEN, option
from dreambooth.options.prompts import PromptOptions


@dataclass(frozen=True, kw_only=True)
class BaseModelOptions:
    """Base model."""

    pretrained_model_name_or_path: str = option(
        "Base model: a name on the Hub, a folder in diffusers' layout, or one .safetensors file.", hub=True
    )
    base_config: str | None = option(
        "For a base model in one file: a name on the Hub, or a folder, with the configurations and tokenizers of such "
        "a model; its weights are not read. Default: SD 1.5, SD 2.1 or SDXL on the Hub, whichever the file is like.",
        None,
        hub=True,
    )
    prediction_type: Literal["epsilon", "v_prediction"] | None = option(
        "What the UNet predicts: the noise or the velocity. Default: as the file or its configuration says.", None
    )
    rescale_betas_zero_snr: bool = option(
        "The base model was trained with zero terminal SNR: its last timestep is pure noise. Default: as the file or "
        "its configuration says.",
        False,
    )
    pretrained_vae_model_name_or_path: str | None = option(
        "VAE to use instead of the base model's: a name on the Hub, a folder, or one .safetensors file. Default: the "
        "base model's.",
        None,
        hub=True,
    )
    base_adapter: list[str] = option(
        "Adapters of any method that are part of the base model, merged into its weights, as FILE or FILE:SCALE. "
        "Default: none.",
        [],
        path=True,
    )
    revision: str | None = option("Revision of the base model on the Hub. Default: its main branch.", None)
    variant: str | None = option("Variant of the base model's weight files, for example fp16. Default: none.", None)
    cache_dir: str | None = option(
        "Folder for downloads from the Hub. Default: the Hub's own cache.", None, decides_result=False, path=True
    )


@dataclass(frozen=True, kw_only=True)
class FrozenModelOptions(BaseModelOptions, PromptOptions):
    """Base model: precision, memory and speed in training."""

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
        "Files of any method, or folders of fine-tuned models, as FILE or FILE:SCALE. Default: none, only the base "
        "model.",
        [],
        path=True,
    )
    allow_pickle: bool = option(
        "Also read adapter files that are pickles (.bin): only their tensors; no code in them is run.",
        False,
        needs={"adapter": GIVEN},
    )
    adapter_scale: float = option(
        "Multiplies the strength of every adapter: 0 gives the base model, 1 it as trained.",
        1.0,
        needs={"adapter": GIVEN},
    )
    dtype: Literal["fp32", "fp16", "bf16"] = option("Precision of the model.", "fp32")


def split_scale(entry: str) -> tuple[str, float]:
    """Return the path and the strength of "FILE:SCALE", 1.0 if none is given."""
    path, _, scale = entry.rpartition(":")
    try:
        return (path, float(scale)) if path else (entry, 1.0)
    except ValueError:
        return entry, 1.0  # the colon belongs to the path
