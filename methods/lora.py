"""LoRA-DreamBooth: W + alpha / r · B A of rank r on the attention projections (Hu et al., arXiv 2106.09685).

As diffusers' examples train it, and DiffuseKronA's paper compares with it: peft's layers, A ~ N(0, 1/r²) unless another
start is given, B = 0, alpha = r unless it is given.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dreambooth.base_model.prompts import PromptStates
from dreambooth.data.photos import Photo
from dreambooth.drawing.pipelines import Adapter, BaseLayer, Delta
from dreambooth.markdown import loading_lines, python_string, size_in_words
from dreambooth.method import Description, Group, Host, adapter_groups, check_state, trained_parameters
from dreambooth.seeds import Stream, seed_of, torch_seed
from kron_adapter import KroneckerLinear
from kron_formats.attach import attach_lora
from kron_formats.changes import LowRank
from kron_formats.export import write_low_rank
from kron_formats.names import components, find_layers
from kron_formats.names import family as family_of
from kron_formats.reading import AdapterFile
from kron_formats.writing import is_bare
from methods.options import LoraOptions

ADAPTER = "default"  # the name under which peft keeps what trains


@dataclass(frozen=True)
class AttachedLora:
    """peft's LoRA layers in a base model. See dreambooth/method.py."""

    host: Host
    groups: Sequence[Group]
    alpha: float

    @contextmanager
    def without(self) -> Iterator[None]:
        layers = [layer for model in self.host.models.values() for layer in _trained_layers(model)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def state(self) -> dict[str, Any]:
        return {name: _state_dict(model) for name, model in self.host.models.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_state(self.state(), state)
        for name, model in self.host.models.items():
            set_peft_model_state_dict(model, state[name], ADAPTER)

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        """Write a file under kohya's names, which `pipeline.load_lora_weights` and every LoRA tool read."""
        layers = {}
        for layer in find_layers(self.host.models):
            wrapper = self.host.models[layer.component].get_submodule(layer.path.removesuffix(".base_layer"))
            if isinstance(wrapper, LoraLinear):
                sides = (getattr(wrapper, side)[ADAPTER].weight for side in ("lora_B", "lora_A"))
                layers[layer] = LowRank(*sides)
        if not is_bare(metadata):
            metadata = {"modelspec.description": "LoRA", **metadata}
        write_low_rank(path, layers, self.alpha, family_of(self.host.models), metadata, dtype)

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        kinds = Counter(
            (self.host.family.component_titles[name], layer.in_features, layer.out_features, layer.r[ADAPTER])
            for name, model in self.host.models.items()
            for layer in _trained_layers(model)
        )
        parameters = sum(parameter.numel() for parameter in trained_parameters(self))
        rows = "".join(
            f"| {part} | {d_in:,} → {d_out:,} | {r} | {count} |\n"
            for (part, d_in, d_out, r), count in sorted(kinds.items())
        )
        table = f"| in | features | rank | layers |\n| --- | --- | ---: | ---: |\n{rows.rstrip()}"
        return Description(
            noun="LoRA",
            summary="`W + B A` on the attention projections ([LoRA](https://arxiv.org/abs/2106.09685))",
            usage=_usage(path.name, loading_lines(base_model, self.host.family.pipeline_class.__name__), prompt),
            contents=(size_in_words(path, sum(kinds.values()), parameters), table),
            tags=("lora",),
        )


def _usage(file: str, loading: tuple[str, str], prompt: str) -> str:
    return f"""```python
import torch
{loading[0]}

{loading[1]}
pipeline.load_lora_weights(".", weight_name={python_string(file)})
image = pipeline({python_string(prompt)}).images[0]
```

ComfyUI, AUTOMATIC1111 and Forge load the file too: put it into their LoRA folder."""


@dataclass(frozen=True)
class Lora:
    """W + alpha / r · B A, with W frozen and B = 0 at the start. See dreambooth/method.py."""

    name: str = "lora"
    options: type = LoraOptions
    weights_name: str = "pytorch_lora_weights.safetensors"
    whole_precision: bool = False

    def trains_text(self, config: LoraOptions) -> bool:
        return config.train_text_encoder

    def check(self, host: Host, photos: Sequence[Photo], config: LoraOptions) -> None:
        """Do nothing: every rank fits every layer."""

    def attach(self, host: Host, config: LoraOptions, states: PromptStates | None = None) -> AttachedLora:
        parameters: dict[str, list[nn.Parameter]] = {}
        for number, (name, model) in enumerate(host.models.items()):
            lora = LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] peft takes any number
                init_lora_weights="gaussian" if config.init_lora_weights == "gaussian" else True,  # True: Kaiming
                target_modules=list(host.family.targets[name]),
            )
            with torch_seed(seed_of(config.seed, Stream.FACTORS, number)):
                inject_adapter_in_model(lora, model, ADAPTER)
            parameters[name] = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in parameters[name]:
                parameter.data = parameter.data.float()  # whatever the base's dtype
        return AttachedLora(host, adapter_groups(host.family, parameters, config), config.alpha)


def _trained_layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's LoRA weights under peft's names."""
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


LORA = Lora()


@dataclass(frozen=True)
class LoraReader:
    """LoRA files, of every tool that diffusers supports. See dreambooth/drawing/pipelines.py."""

    def takes(self, file: AdapterFile) -> bool:
        return file.is_lora

    def add(self, pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            attach_lora(pipeline, adapter.matched.layers, adapter.name)
        self.set_strengths(pipeline, {adapter.name: adapter.scale for adapter in adapters})

    def set_strengths(self, pipeline: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
        pipeline.set_adapters([*strengths], [*strengths.values()])

    def deltas(self, pipeline: DiffusionPipeline) -> Iterator[tuple[BaseLayer, Delta]]:
        for layer in _lora_layers(pipeline):
            base: Any = layer.get_base_layer()
            innermost = base.innermost if isinstance(base, KroneckerLinear) else base
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    yield innermost, partial(_dense_delta, layer, adapter)

    def remove(self, pipeline: DiffusionPipeline) -> None:
        if _lora_layers(pipeline):
            pipeline.unload_lora_weights()


def _lora_layers(pipeline: DiffusionPipeline) -> list[LoraLayer]:
    models = components(pipeline).values()
    return [module for model in models for module in model.modules() if isinstance(module, LoraLayer)]


def _dense_delta(layer: Any, adapter: str) -> Tensor:
    return layer.get_delta_weight(adapter).flatten(1)  # some are kernels
