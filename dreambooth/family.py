"""The seam Family: how kinds of base models differ, as data and functions.

A new family is one record in a new module in dreambooth/families/, and one in kron_formats/families.py, which says
what its layers are called in files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

Embeddings = dict[str, Tensor]  # by the names of the pipeline's arguments, one row per prompt


@dataclass(frozen=True)
class Family:
    """One kind of base model."""

    name: str  # on the command line: methods/train.py METHOD FAMILY
    title: str  # in messages
    tag: str  # on the Hub
    pipeline_class: type[DiffusionPipeline]
    denoiser: str  # the component that predicts
    text_encoders: tuple[str, ...]  # components
    tokenizers: tuple[str, ...]  # components
    targets: Mapping[str, tuple[str, ...]]  # component -> its attention projections, by the ends of their paths
    component_titles: Mapping[str, str]  # component -> its name in messages and on the model card

    # (pipeline, prompts, max_token_length) -> their embeddings, in order. The text encoders may have any dtype.
    encode_prompts: Callable[[Any, list[str], int], Embeddings]

    # (embeddings, sizes) -> the denoiser's keyword arguments, at every step. Sizes (rows, 6), px: original height,
    # width, crop top, left, target height, width.
    condition: Callable[[Embeddings, Tensor], dict[str, Any]]

    # Additional arguments of pipeline_class.from_pretrained
    loading: Mapping[str, Any] = field(default_factory=dict)

    def encode_captions(self, pipeline: Any, captions: list[str], max_token_length: int) -> Embeddings:
        """Return what the denoiser is trained with: embeddings, zero for the empty caption if the base model was
        trained that way."""
        embeddings = self.encode_prompts(pipeline, captions, max_token_length)
        if not pipeline.config.get("force_zeros_for_empty_prompt"):
            return embeddings
        keep = torch.tensor([bool(caption) for caption in captions])
        return {
            name: tensor * keep.to(tensor).view(-1, *[1] * (tensor.ndim - 1)) for name, tensor in embeddings.items()
        }

    def trained_models(self, components: Mapping[str, Any], with_text: bool) -> dict[str, nn.Module]:
        """Return the components that a method may train: the denoiser, then, if `with_text`, the text encoders."""
        encoders = [name for name in self.text_encoders if with_text and components.get(name)]
        return {name: components[name] for name in [self.denoiser, *encoders]}

    def present_tokenizers(self, components: Mapping[str, Any]) -> dict[str, Any]:
        """Return text encoder -> its tokenizer, for the tokenizers among the components."""
        pairs = zip(self.text_encoders, self.tokenizers)
        return {encoder: components[name] for encoder, name in pairs if components.get(name)}
