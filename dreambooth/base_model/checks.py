"""What can be wrong with a base model, found before any of its weights are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dreambooth.base_model.source import base_source, vae_source
from dreambooth.errors import UserError
from dreambooth.family import Family
from dreambooth.options.base_model import BaseModelOptions
from kron_formats.families import TOKENIZERS

SIZES = 6  # numbers that SDXL's UNet gets about its image, each as an embedding


def check_family(family: Family, config: BaseModelOptions) -> None:
    """Raise UserError if the base model is not of the family, or its denoiser was saved quantised.

    Denoisers of other families take other conditions, and those of other tasks, such as inpainting, other latents.
    """
    source = base_source(config)
    check_pipeline(family, source.pipeline_class, config)
    source.configurations.check_unquantised(family.denoiser)


def check_pipeline(family: Family, found: str | None, config: BaseModelOptions) -> None:
    """Raise UserError if the base model's pipeline, a name of its class, is not that of the family."""
    name, expected = config.pretrained_model_name_or_path, family.pipeline_class.__name__
    if found != expected:
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {found}, but this script trains a {expected} ({family.title})"
        )


def empty_models(config: BaseModelOptions, components: Sequence[str]) -> dict[str, nn.Module]:
    """Return the components that a base model has, without weights, for checks before loading.

    The first component is the denoiser, which must exist. Raises UserError if the base model cannot be found or read.
    """
    configurations = base_source(config).configurations
    denoiser, *others = components
    present = [denoiser, *(part for part in others if part in configurations.classes)]
    return {part: configurations.empty(part) for part in present}


def check_parts(config: BaseModelOptions) -> None:
    """Raise UserError if a part of the base model is missing, or if its parts do not fit each other."""
    source, vae = base_source(config), vae_source(config)
    configurations = source.configurations
    if source.family and (found := configurations.index.get("_class_name")) != source.family.pipeline:
        raise UserError(
            f"{configurations.flag} is a {found}, but {config.pretrained_model_name_or_path} holds a "
            f"{source.family.pipeline} ({source.family.title})"
        )
    encoders = [part for part in TOKENIZERS if part in configurations.classes]
    settings: dict[str, Any] = {part: configurations.empty(part).config for part in ("unet", *encoders)}
    if "scheduler" not in configurations.classes:
        raise UserError(f"{configurations.flag} is not a base model: it has no scheduler")
    flag = f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}"
    _check_latents(settings["unet"], vae.configurations.empty("vae").config, flag, config)
    _check_text(settings["unet"], {part: settings[part] for part in encoders}, flag)
    for part in encoders:
        name, known = TOKENIZERS[part], settings[part].vocab_size
        tokenizer = configurations.load(name)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without files
            raise UserError(f"{configurations.flag} is not a base model: its {name} has no vocabulary")
        if len(tokenizer) > known:
            raise UserError(
                f"{configurations.flag}: its {name} has {len(tokenizer):,} tokens, its {part} knows {known:,}"
            )
    source.weights.check(["unet", *encoders] + ([] if config.pretrained_vae_model_name_or_path else ["vae"]))
    if config.pretrained_vae_model_name_or_path:
        vae.weights.check(["vae"])


def _check_latents(unet: Mapping[str, Any], vae: Mapping[str, Any], flag: str, config: BaseModelOptions) -> None:
    """Raise UserError unless the UNet takes and returns what the VAE makes."""
    latents = vae["latent_channels"]
    other = config.pretrained_vae_model_name_or_path
    named = f"--pretrained_vae_model_name_or_path {other}" if other else "its VAE"
    if unet["in_channels"] != latents:
        raise UserError(
            f"{flag}: its UNet takes {unet['in_channels']} channels, but {named} makes latents of {latents}"
            + ("" if other else "; models for inpainting and other tasks that get an image cannot be used")
        )
    if unet["out_channels"] != latents:
        raise UserError(
            f"{flag}: its UNet returns {unet['out_channels']} channels, but {named} makes latents of {latents}"
        )


def _check_text(unet: Mapping[str, Any], encoders: Mapping[str, Any], flag: str) -> None:
    """Raise UserError unless the UNet attends to embeddings as wide as the text encoders make them."""
    widths = {part: encoder.hidden_size for part, encoder in encoders.items()}
    width, wanted = sum(widths.values()), unet["cross_attention_dim"]
    made = " and ".join(f"{part} {width}" for part, width in widths.items()) or "none"
    if isinstance(wanted, int) and unet.get("encoder_hid_dim") is None and width != wanted:
        raise UserError(f"{flag}: its UNet attends to text embeddings {wanted} wide, its text encoders make {made}")
    if unet.get("addition_embed_type") == "text_time" and "text_encoder_2" in encoders:
        pooled, sizes = encoders["text_encoder_2"].projection_dim, SIZES * unet["addition_time_embed_dim"]
        if pooled + sizes != (takes := unet["projection_class_embeddings_input_dim"]):
            raise UserError(
                f"{flag}: its UNet is conditioned on {takes} numbers (projection_class_embeddings_input_dim), but its "
                f"text_encoder_2 makes {pooled} and {SIZES} sizes make {sizes}"
            )
