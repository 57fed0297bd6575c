"""Method: what trains. Training, the loop, checkpoints and the optimizer never ask which method it is.

A method is a value without state. `attach` puts it into a loaded base model and returns what trains.
tests/integration/test_methods.py tests every method against what these docstrings promise.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dreambooth.base_model.prompts import PromptStates
from dreambooth.data.photos import Photo
from dreambooth.family import Family
from dreambooth.options.kronecker import TextEncoderOptions


@dataclass(frozen=True)
class Host:
    """A base model, as far as methods see it: before they are attached, and after."""

    family: Family
    models: Mapping[str, nn.Module]  # component -> model that may train, the denoiser first
    tokenizers: Mapping[str, Any]  # text encoder -> its tokenizer

    @property
    def denoiser(self) -> nn.Module:
        return self.models[self.family.denoiser]


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    title: str  # in the model card
    parameters: list[nn.Parameter]
    learning_rate: float  # after warm-up, before --scale_lr
    weight_decay: float
    flat: bool = (
        True  # whether an optimizer may make one vector of them: fast for many small ones, a copy of large ones
    )


@dataclass(frozen=True)
class Description:
    """What the model card says about a result, in Markdown."""

    noun: str  # what it is called: "Kronecker adapter"
    summary: str  # "`W + A ⊗ B` on ...": completes "A NOUN (DreamBooth) for BASE: SUMMARY."
    usage: str  # how to load it
    contents: tuple[str, ...]  # paragraphs: its size, a table of its layers
    tags: tuple[str, ...]  # on the Hub
    relation: str = "adapter"  # to the base model, in the Hub's words


class Attached(Protocol):
    """A method in a base model: what trains, and how to disable, checkpoint and save it."""

    @property
    def groups(self) -> Sequence[Group]:
        """What trains: always the same parameters, those of the denoiser first if any of them train."""
        ...

    def without(self) -> AbstractContextManager[None]:
        """Inside this context the models are the base models, bit for bit.

        Raises UserError if the method cannot restore them.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what trains as nested dicts of tensors, from which `load_state` restores it exactly."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Raises ValueError, with nothing changed, if names or shapes differ."""
        ...

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write the result for other tools to `path`, whole or not at all."""
        ...

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        """Return what the model card says about the result saved in `path`. `prompt` is an example to draw."""
        ...


@runtime_checkable
class Corrected(Protocol):
    """What an Attached also has if it corrects its parameters after every optimizer step."""

    def after_step(self) -> None:
        """Correct them in place, without waiting for the device."""
        ...


@runtime_checkable
class LargeResult(Protocol):
    """What an Attached also has if its result is a whole model: checkpoints then hold only the parts that train."""

    def save_parts(self, folder: Path, dtype: torch.dtype) -> None:
        """Write each component that trains to the folder of its name in `folder`, as diffusers loads it."""
        ...

    def result_sizes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Return how large what `save_parts` and what `save` write are, bytes."""
        ...


class Method(Protocol):
    """A way to personalise a base model. `config` is always an instance of both `options` and TrainingConfig."""

    @property
    def name(self) -> str:
        """Its name on the command line and in checkpoints."""
        ...

    @property
    def options(self) -> type:
        """The dataclass of its own flags."""
        ...

    @property
    def weights_name(self) -> str:
        """The name of the result in the output folder."""
        ...

    def trains_text(self, config: Any) -> bool:
        """Whether embeddings of prompts change in training, and so must be computed at every step."""
        ...

    @property
    def whole_precision(self) -> bool:
        """Whether the base model's weights must be fp32: what trains begins with them, or is defined by them."""
        ...

    def check(self, host: Host, photos: Sequence[Photo], config: Any) -> None:
        """Raise UserError or KroneckerError if the method cannot train these models, without weights, on these photos.

        Changes the host as `attach` does, so that later checks see the words that prompts may have.
        """
        ...

    def attach(self, host: Host, config: Any, states: PromptStates | None = None) -> Attached:
        """Freeze the host's models and add what trains; its tokenizers learn the words that are added.

        `states` are of the run's prompts; they are None where only the parameters' number counts, not their values. All
        randomness comes from config.seed, so the same start can be had again; several processes all begin with the main
        one's.
        """
        ...


def trained_parameters(attached: Attached) -> list[nn.Parameter]:
    """Return all that trains, group after group."""
    return [parameter for group in attached.groups for parameter in group.parameters]


def check_state(own: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless both states, component -> name -> tensor, have the same names and shapes."""
    for component, tensors in own.items():
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in given.get(component, {}).items()}:
            raise ValueError(f"the state does not fit what trains in {component}")


def adapter_groups(
    family: Family, parameters: Mapping[str, list[nn.Parameter]], config: TextEncoderOptions, flat: bool = True
) -> list[Group]:
    """Return the groups of a method that trains parameters in every model: the denoiser's, then the text encoders'."""
    parameters = dict(parameters)
    own, decay = parameters.pop(family.denoiser), config.adam_weight_decay
    groups = [Group(family.component_titles[family.denoiser], own, config.learning_rate, decay, flat)]
    if text := [parameter for added in parameters.values() for parameter in added]:
        groups.append(Group("text encoders", text, config.text_encoder_learning_rate, decay, flat))
    return groups
