"""DreamBooth: all weights of the UNet train, and those of the text encoders if wanted (Ruiz et al., arXiv 2208.12242).

The weights are fp32, since bf16 and fp16 are too coarse for steps of 5e-6; the computation is in --mixed_precision.
With --prior_source base_model a copy of the weights as they were is kept on the device, for `without`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dreambooth.base_model.process import EDM
from dreambooth.base_model.prompts import PromptStates
from dreambooth.base_model.source import load_scheduler
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError
from dreambooth.markdown import loading_lines, python_string, size_in_words
from dreambooth.method import Description, Group, Host, adapter_groups, check_state, trained_parameters
from kron_formats.files import remove, whole_folder
from methods.options import DreamBoothOptions
from methods.pipeline_folder import (
    base_numbers,
    write_base_parts,
    write_component,
    write_index,
    write_metadata,
    write_single_file,
)
from methods.refusals import refuse_base_precision, refuse_fsdp

State = dict[str, dict[str, Tensor]]  # component -> name -> tensor


@dataclass(frozen=True)
class AttachedDreamBooth:
    """Models that train as a whole. See dreambooth/method.py."""

    host: Host
    weights: Mapping[str, Mapping[str, nn.Parameter]]  # component -> name -> weight
    before: Mapping[nn.Parameter, Tensor] | None  # their values before training
    groups: Sequence[Group]
    config: Any

    @contextmanager
    def without(self) -> Iterator[None]:
        if self.before is None:
            raise UserError("the weights as they were are kept with --prior_source base_model only")
        trained = {parameter: parameter.data for parameter in self.before}
        for parameter, value in self.before.items():
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in trained.items():
                parameter.data = value

    def state(self) -> State:
        return {
            component: {name: parameter.detach() for name, parameter in weights.items()}
            for component, weights in self.weights.items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Any]) -> None:
        check_state(self.state(), state)
        for component, weights in self.weights.items():
            for name, parameter in weights.items():
                parameter.copy_(state[component][name])

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write a diffusers pipeline folder; with --single_file, also the same in one file beside it."""
        with whole_folder(path) as folder:
            self.save_parts(folder, dtype)
            classes = {component: type(model) for component, model in self.host.models.items()}
            classes |= write_base_parts(folder, self.host.family, self.host.models.keys(), dtype, self.config)
            write_index(folder, classes, self.config)
            write_metadata(folder, metadata)
        copy = path.with_suffix(".safetensors")
        if self.config.single_file:
            write_single_file(path, copy, metadata, self.config)
        else:
            remove(copy)  # an earlier one, of other weights

    def save_parts(self, folder: Path, dtype: torch.dtype) -> None:
        for component, model in self.host.models.items():
            write_component(folder / component, model, self.weights[component], dtype)

    def result_sizes(self, dtype: torch.dtype) -> tuple[int, int]:
        parts = sum(parameter.numel() for parameter in trained_parameters(self)) * dtype.itemsize
        whole = parts + base_numbers(self.host.family, self.host.models.keys(), self.config) * dtype.itemsize
        return parts, whole * (2 if self.config.single_file else 1)

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        titles = [self.host.family.component_titles[component] for component in self.host.models]
        layers = [{name.rpartition(".")[0] for name in weights} for weights in self.weights.values()]
        numbers = [sum(weight.numel() for weight in weights.values()) for weights in self.weights.values()]
        rows = "".join(
            f"| {title} | {len(own)} | {number:,} |\n" for title, own, number in zip(titles, layers, numbers)
        )
        return Description(
            noun="fine-tuned model",
            summary=f"all weights of the {' and the '.join(titles)} ([DreamBooth](https://arxiv.org/abs/2208.12242))",
            usage=_usage(path, loading_lines(path.name, self.host.family.pipeline_class.__name__), prompt),
            contents=(
                size_in_words(path, sum(map(len, layers)), sum(numbers)),
                f"| trained | layers | parameters |\n| --- | ---: | ---: |\n{rows.rstrip()}",
            ),
            tags=(),
            relation="finetune",
        )


def _usage(path: Path, loading: tuple[str, str], prompt: str) -> str:
    return f"""In a copy of this folder (`hf download REPOSITORY --local-dir .`):

```python
import torch
{loading[0]}

{loading[1]}
image = pipeline({python_string(prompt)}).images[0]
```"""


@dataclass(frozen=True)
class DreamBooth:
    """All weights, which begin as the base model's. See dreambooth/method.py."""

    name: str = "dreambooth"
    options: type = DreamBoothOptions
    weights_name: str = "pipeline"
    whole_precision: bool = True

    def trains_text(self, config: DreamBoothOptions) -> bool:
        return config.train_text_encoder

    def check(self, host: Host, photos: Sequence[Photo], config: Any) -> None:
        """Raise UserError if weights would be held in less than fp32 or split over processes, or have no one file."""
        steps = f"steps of about --learning_rate {config.learning_rate:g}"
        why = f"all weights train, in {steps}, which less than fp32 rounds away"
        refuse_base_precision("DreamBooth", why, config)
        if config.single_file and type(load_scheduler(config)).__name__ in EDM:
            raise UserError(
                f"--single_file: {config.pretrained_model_name_or_path} was trained with EDM's noise, which tools "
                "recognise in no common way in one file; leave it out: the folder says what the noise is"
            )
        refuse_fsdp(
            "DreamBooth", "it splits frozen weights alone; --gradient_checkpointing and --use_8bit_adam save memory"
        )

    def attach(self, host: Host, config: Any, states: PromptStates | None = None) -> AttachedDreamBooth:
        weights = {
            component: dict(model.requires_grad_(True).named_parameters()) for component, model in host.models.items()
        }
        groups = adapter_groups(
            host.family, {part: list(own.values()) for part, own in weights.items()}, config, flat=False
        )
        before = None
        if config.uses_base_model_prior:
            # What trains is the copy: the base model's own memory, whose alignment decides the last bit, stays its own
            before = {parameter: parameter.data for own in weights.values() for parameter in own.values()}
            for parameter, value in before.items():
                parameter.data = value.clone()
        return AttachedDreamBooth(host, weights, before, groups, config)


DREAMBOOTH = DreamBooth()
