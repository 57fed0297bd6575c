"""What differs between the model families: one record each, looked up by everything else.

A new family is a new record in FAMILIES, and its architecture as JSON in kron_formats/architectures/.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kron_formats.errors import KroneckerError

# Ends of the names of the attention projections, in diffusers' UNets and in CLIP's text encoders
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")

# Component -> the classes of diffusers and transformers for which files have names
COMPONENT_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
COMPONENTS = tuple(COMPONENT_CLASSES)
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # of the text encoders, in pipelines


@dataclass(frozen=True)
class TextEncoder:
    """One of a family's text encoders."""

    component: str  # "text_encoder" or "text_encoder_2"
    prefix: str  # what kohya's names of its layers begin with, in the files that we write
    clip: str  # what ComfyUI calls it
    checkpoint: str  # where it lies in a single-file checkpoint
    open_clip: bool = False  # whether it has OpenCLIP's names there, which stack q, k and v
    other_prefixes: tuple[str, ...] = ()  # what kohya's names begin with in files of other tools


@dataclass(frozen=True)
class Family:
    name: str
    title: str  # as people call it
    base_version: str  # kohya's metadata ss_base_model_version
    base_version_v: str  # the same of models that predict the velocity
    v2: bool  # kohya's metadata ss_v2
    model_spec: str  # architecture in the Stability model spec
    model_spec_v: str  # the same of models that predict the velocity
    context_width: int  # of the text embeddings that the UNet attends to
    sgm_names: bool  # whether tools expect the UNet's layers by their place in the tree of Stability's own code
    a1111_needs_version: bool  # whether A1111 hides files without ss_base_model_version
    text_encoders: tuple[TextEncoder, ...]
    published: str  # the model whose architecture is known
    repository: str  # that model's name on the Hub
    pipeline: str  # diffusers' class
    architecture: str  # its file in kron_formats/architectures/, without .json

    def text_encoder(self, component: str) -> TextEncoder:
        """Return the record of a text encoder. Raises KroneckerError if the family has no such component."""
        for text_encoder in self.text_encoders:
            if text_encoder.component == component:
                return text_encoder
        known = ", ".join(text_encoder.component for text_encoder in self.text_encoders)
        raise KroneckerError(f"{self.title} has no {component}; its text encoders are: {known}")


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    base_version="sd_v1",
    base_version_v="sd_v1_v",
    v2=False,
    model_spec="stable-diffusion-v1",
    model_spec_v="stable-diffusion-v1",
    context_width=768,
    sgm_names=False,
    a1111_needs_version=False,
    text_encoders=(
        TextEncoder("text_encoder", "lora_te", "clip_l", "cond_stage_model.transformer.", other_prefixes=("lora_te1",)),
    ),
    published="SD 1.5",
    repository="stable-diffusion-v1-5/stable-diffusion-v1-5",
    pipeline="StableDiffusionPipeline",
    architecture="sd15",
)
SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    base_version="sd_v2",
    base_version_v="sd_v2_v",
    v2=True,
    model_spec="stable-diffusion-v2-512",
    model_spec_v="stable-diffusion-v2-768-v",
    context_width=1024,
    sgm_names=False,
    a1111_needs_version=False,
    text_encoders=(
        TextEncoder("text_encoder", "lora_te", "clip_h", "cond_stage_model.model.", True, other_prefixes=("lora_te1",)),
    ),
    published="SD 2.1",
    repository="stabilityai/stable-diffusion-2-1",
    pipeline="StableDiffusionPipeline",
    architecture="sd21",
)
SDXL = Family(
    name="sdxl",
    title="SDXL",
    base_version="sdxl_base_v1-0",
    base_version_v="sdxl_base_v1-0",
    v2=False,
    model_spec="stable-diffusion-xl-v1-base",
    model_spec_v="stable-diffusion-xl-v1-base",
    context_width=2048,
    sgm_names=True,
    a1111_needs_version=True,
    text_encoders=(
        TextEncoder("text_encoder", "lora_te1", "clip_l", "conditioner.embedders.0.transformer."),
        TextEncoder("text_encoder_2", "lora_te2", "clip_g", "conditioner.embedders.1.model.", True),
    ),
    published="SDXL",
    repository="stabilityai/stable-diffusion-xl-base-1.0",
    pipeline="StableDiffusionXLPipeline",
    architecture="sdxl",
)
FAMILIES = (SD1, SD2, SDXL)
DIFFUSERS_CONDITIONING = {None: (SD1, SD2), "text_time": (SDXL,)}  # addition_embed_type in a UNet's configuration


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Return the family of diffusers' UNet2DConditionModel by its configuration.

    A width of text embeddings that no published model has, as small models for tests have, counts as the first family
    with its conditioning. Raises KroneckerError if no family is conditioned as this UNet is.
    """
    conditioning = config.get("addition_embed_type")
    families = DIFFUSERS_CONDITIONING.get(conditioning)
    if families is None:
        raise KroneckerError(
            f"the UNet has addition_embed_type {conditioning!r} and belongs to none of the families that files have "
            f"names for: {', '.join(family.title for family in FAMILIES)}"
        )
    width = config.get("cross_attention_dim")
    return next((family for family in families if family.context_width == width), families[0])


def family_of_components(components: Mapping[str, Any]) -> Family:
    """Return the first family whose text encoders include those among `components`: for models without a UNet."""
    given = components.keys() - {"unet"}
    return next(family for family in FAMILIES if given <= {encoder.component for encoder in family.text_encoders})


def family_of_version(base_version: str | None) -> Family | None:
    """Return the family that kohya's metadata ss_base_model_version names."""
    return next((f for f in FAMILIES if base_version in (f.base_version, f.base_version_v)), None)


def family_of_width(context_width: int | None) -> Family | None:
    """Return the family whose UNet attends to text embeddings of this width."""
    return next((family for family in FAMILIES if family.context_width == context_width), None)
