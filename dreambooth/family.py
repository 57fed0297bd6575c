"""The seam Family: in what base models differ, as data and functions.

A new family is one record, in a module of its own in dreambooth/families/, beside its record in
kron_formats/families.py, which says how its layers are called in files.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

Embeddings = dict[str, Tensor]  # by the names of the pipeline's arguments, one row for each prompt


@dataclass(frozen=True)
class Family:
    """One kind of base model."""

    name: str  # on the command line: methods/train.py METHOD FAMILY
    title: str  # in messages
    tag: str  # on the Hub
    pipeline_class: type[DiffusionPipeline]
    denoiser: str  # the component that predicts
    text_encoders: tuple[str, ...]  # components
    targets: Mapping[str, tuple[str, ...]]  # component -> the ends of the paths of its attention projections
    component_titles: Mapping[str, str]  # component -> what people call it

    # Called with prompts, on any component dtype; returns one row for each prompt, in their order.
    encode_prompts: Callable[[DiffusionPipeline, list[str]], Embeddings]

    # Called with embeddings and sizes at every step: sizes (rows, 6) are original height and width, crop top and left,
    # target height and width, px. Returns the denoiser's keyword arguments.
    condition: Callable[[Embeddings, Tensor], dict[str, Any]]

    # Further arguments of pipeline_class.from_pretrained
    loading: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    def trained_models(self, components: Mapping[str, Any], with_text: bool) -> dict[str, nn.Module]:
        """Return the components a method may train: the denoiser first, then the text encoders `with_text`."""
        encoders = [name for name in self.text_encoders if with_text and components.get(name)]
        return {name: components[name] for name in [self.denoiser, *encoders]}
