"""The seam Method: what trains. Training, the loop, checkpoints and the optimizer never ask which method it is.

A method is a value without state. `attach` puts it into a loaded base model and returns what trains. CONTRIBUTING.md
says when each of these is called; tests/integration/test_methods.py holds every method to it.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dreambooth.family import Family
from dreambooth.options.kronecker import TextEncoderOptions


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay."""

    title: str  # in the model card
    parameters: list[nn.Parameter]
    learning_rate: float  # after warm-up, before --scale_lr
    weight_decay: float


@dataclass(frozen=True)
class Description:
    """What the model card says of a result, in Markdown."""

    noun: str  # what it is called: "Kronecker adapter"
    summary: str  # "`W + A ⊗ B` on ...": completes the sentence "A NOUN (DreamBooth) for BASE: SUMMARY"
    usage: str  # how to load it
    contents: tuple[str, ...]  # paragraphs: its size in words, a table
    tags: tuple[str, ...]  # on the Hub


class Attached(Protocol):
    """A method in a base model: what trains, and how to leave it out, keep it and save it."""

    @property
    def groups(self) -> Sequence[Group]:
        """What trains. Lasts: the same parameters every time."""
        ...

    def without(self) -> AbstractContextManager[None]:
        """Inside this context the models are the base models, bit for bit.

        Raises UserError if the method cannot do that.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return nested dicts of tensors from which `load_state` restores the training exactly."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned. Raises ValueError, with nothing changed, if it does not fit."""
        ...

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write the result for other tools to `path`, whole or not at all."""
        ...

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        """Return what the model card says of the saved result. `prompt` is an example for the base model's pipeline."""
        ...


class Method(Protocol):
    """A way to personalise a base model. `config` is always an instance of `options` and of TrainingConfig."""

    @property
    def name(self) -> str:
        """The word for it on the command line and in checkpoints."""
        ...

    @property
    def options(self) -> type:
        """The dataclass of its own flags."""
        ...

    @property
    def weights_name(self) -> str:
        """The result's name in the output folder."""
        ...

    def trains_text(self, config: Any) -> bool:
        """Whether prompts mean something else after every step, so that they are encoded anew at each."""
        ...

    def check(self, family: Family, models: Mapping[str, nn.Module], config: Any) -> None:
        """Raise UserError or KroneckerError if the method cannot train these models, which have no weights yet."""
        ...

    def attach(self, family: Family, models: Mapping[str, nn.Module], config: Any) -> Attached:
        """Freeze the models, component -> model, the denoiser first, and put into them what trains.

        What is random depends on config.seed alone, so that all processes begin alike.
        """
        ...


def check_state(own: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless a state, component -> name -> tensor, has exactly the names and shapes of one's own."""
    for component, tensors in own.items():
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes != {name: tensor.shape for name, tensor in given.get(component, {}).items()}:
            raise ValueError(f"the state does not fit what trains in the {component}")


def adapter_groups(
    family: Family, parameters: Mapping[str, list[nn.Parameter]], config: TextEncoderOptions
) -> list[Group]:
    """Return the groups of a method that adds parameters to each model: the denoiser's, then all text encoders'."""
    parameters = dict(parameters)
    own = parameters.pop(family.denoiser)
    groups = [Group(family.component_titles[family.denoiser], own, config.learning_rate, config.adam_weight_decay)]
    if text := [parameter for added in parameters.values() for parameter in added]:
        groups.append(Group("text encoders", text, config.text_encoder_learning_rate, config.adam_weight_decay))
    return groups
