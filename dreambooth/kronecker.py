"""This project's own method: Kronecker factors on the attention projections (DiffuseKronA, arXiv 2402.17412)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dreambooth.base_model.prompts import PromptStates
from dreambooth.contrast import check_contrast, set_contrast, text_projections
from dreambooth.data.photos import Photo
from dreambooth.drawing.pipelines import Adapter, BaseLayer, Delta
from dreambooth.errors import UserError
from dreambooth.family import Family
from dreambooth.markdown import loading_lines, python_string, size_in_words
from dreambooth.method import Description, Group, Host, adapter_groups, check_state
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.seeds import Stream, seed_of, torch_seed
from dreambooth.start import read_start, shapes_of, start_from_adapter
from kron_adapter import (
    KroneckerLinear,
    add_kronecker,
    disable_kronecker,
    inject_kronecker,
    kronecker_layers,
    kronecker_parameters,
    kronecker_state_dict,
    load_kronecker_state_dict,
    remove_kronecker,
    save_kronecker,
    set_kronecker_scale,
)
from kron_formats.matching import MatchedAdapter
from kron_formats.names import components, linear_modules, match_selection
from kron_formats.reading import AdapterFile

Layers = Mapping[str, Mapping[str, KroneckerLinear]]  # component -> name -> layer


@dataclass(frozen=True)
class AttachedKronecker:
    """Kronecker factors in a base model. See dreambooth/method.py."""

    host: Host
    layers: Layers
    groups: Sequence[Group]
    largest_norm: float | None = None  # of a layer's ΔW

    def without(self) -> AbstractContextManager[None]:
        return disable_kronecker(self.host.models)

    def state(self) -> dict[str, Any]:
        """Return the factors of every model as trained, the gain not folded in: component -> name -> tensor."""
        return {name: kronecker_state_dict(model) for name, model in self.host.models.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        check_state(self.state(), state)
        for name, model in self.host.models.items():
            load_kronecker_state_dict(model, state[name])

    def save(self, path: Path, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
        save_kronecker(self.host.models, path, metadata, dtype)

    def after_step(self) -> None:
        """Scale down the factors of every layer whose ‖ΔW‖ = gain · ‖A‖ · ‖B‖ is larger than --scale_weight_norms."""
        if self.largest_norm is not None:
            limit_norms([layer for layers in self.layers.values() for layer in layers.values()], self.largest_norm)

    def describe(self, path: Path, base_model: str, prompt: str) -> Description:
        kinds = Counter(self._kinds())
        parameters = sum(count * (a1 * a2 + b1 * b2) for (_, _, a1, a2, b1, b2), count in kinds.items())
        rows = "".join(
            f"| {part} | `{target}` | {a2 * b2:,} → {a1 * b1:,} | ({a1}, {a2}) | ({b1}, {b2}) | {count} |\n"
            for (part, target, a1, a2, b1, b2), count in sorted(kinds.items())
        )
        table = f"| in | layers | features | A | B | number |\n| --- | --- | --- | --- | --- | ---: |\n{rows.rstrip()}"
        return Description(
            noun="Kronecker adapter",
            summary="`W + A ⊗ B` on the attention projections ([DiffuseKronA](https://arxiv.org/abs/2402.17412))",
            usage=_usage(path.name, loading_lines(base_model, self.host.family.pipeline_class.__name__), prompt),
            contents=(size_in_words(path, sum(kinds.values()), parameters), table),
            tags=("kronecker", "lokr"),
        )

    def _kinds(self) -> Iterator[tuple[str, str, int, int, int, int]]:
        """Yield for each layer its component's title, the end of its name that decides, and the shapes of A and B."""
        for component, layers in self.layers.items():
            for layer in layers.values():
                (a1, a2), (b1, b2) = layer.A.shape, layer.B.shape
                yield self.host.family.component_titles[component], layer.target, a1, a2, b1, b2


def _usage(file: str, loading: tuple[str, str], prompt: str) -> str:
    return f"""```python
import torch
{loading[0]}
from kron_adapter import load_kronecker  # pip install . in a checkout of the training suite

{loading[1]}
load_kronecker(pipeline, {python_string(file)}, scale=1.0)  # 0 is the base model, 1 as trained
image = pipeline({python_string(prompt)}).images[0]
```

The file is a LoKr with full factors under kohya's names. ComfyUI, AUTOMATIC1111 and Forge load it like any LoRA: put it
into their LoRA folder."""


@dataclass(frozen=True)
class Kronecker:
    """W + A ⊗ B, with W frozen and B = 0 at the start. See dreambooth/method.py."""

    name: str = "kronecker"
    options: type = KroneckerOptions
    weights_name: str = "pytorch_kronecker_weights.safetensors"
    whole_precision: bool = False

    def trains_text(self, config: KroneckerOptions) -> bool:
        return config.train_text_encoder

    def check(self, host: Host, photos: Sequence[Photo], config: KroneckerOptions) -> None:
        """Raise KroneckerError if a target or factors match no layer, or factors do not divide a layer's sizes.

        Raise UserError if --kron_init contrast concerns no layer, or there is no contrast; and as `read_start` does.
        """
        groups_by_rate(host, self._inject_all(host, config), config)
        if config.kron_init == "contrast":
            check_contrast(host.denoiser, host.tokenizers.values(), photos, config)

    def attach(self, host: Host, config: KroneckerOptions, states: PromptStates | None = None) -> AttachedKronecker:
        layers = self._inject_all(host, config)
        if config.kron_init == "contrast" and states is not None:
            set_contrast(text_projections(host.denoiser), states.of_instances(), states.of_class())
        return AttachedKronecker(host, layers, groups_by_rate(host, layers, config), config.scale_weight_norms)

    def _inject_all(self, host: Host, config: KroneckerOptions) -> dict[str, dict[str, KroneckerLinear]]:
        """Return component -> name -> layer, with A as it is drawn, or both factors as --init_adapter has them."""
        start = read_start(host.models, config) if config.init_adapter else None
        layers = {}
        for number, (name, model) in enumerate(host.models.items()):
            with torch_seed(seed_of(config.seed, Stream.FACTORS, number)):
                layers[name] = self._inject(host.family, name, model, config, start)
        if start:
            start_from_adapter(layers, start, config)
        return layers

    def _inject(
        self, family: Family, name: str, model: nn.Module, config: KroneckerOptions, start: MatchedAdapter | None
    ) -> dict[str, KroneckerLinear]:
        init = "invariant" if config.kron_init == "contrast" else config.kron_init
        if start and (shapes := shapes_of(start, name)):
            return inject_kronecker(model, *config.shape(), list(shapes), shapes, init)
        if name == family.denoiser:
            selected = [path for _, path, _ in linear_modules(model) if match_selection(path, config.kron_targets)]
            of_contrast = config.contrast_factors()
            factors = {x: of_contrast[x] for x in of_contrast if any(match_selection(path, [x]) for path in selected)}
            factors |= config.factors_by_target()
            return inject_kronecker(model, *config.shape(), config.kron_targets, factors, init)
        return inject_kronecker(model, *config.text_encoder_shape(), family.targets[name], init=init)


KRONECKER = Kronecker()


def groups_by_rate(host: Host, layers: Layers, config: KroneckerOptions) -> list[Group]:
    """Return what trains, the denoiser's layers with a learning rate of their own (--kron_lr) in groups of their own.

    Raises UserError if a rate is for none of them.
    """
    rates, denoiser = config.rates_by_target(), host.family.denoiser
    of_target = {name: match_selection(name, list(rates)) for name in layers[denoiser]}
    if idle := [target for target in rates if target not in of_target.values()]:
        raise UserError(
            f"--kron_lr {', '.join(idle)}: no adapted layer takes its rate from this name; of those in a layer's path, "
            "the longest counts"
        )
    parameters = {name: kronecker_parameters(model) for name, model in host.models.items()}
    (whole, *others) = adapter_groups(host.family, parameters, config)
    groups = []
    for target in (None, *rates):
        own = [layer for name, layer in layers[denoiser].items() if of_target[name] == target]
        if factors := [factor for layer in own for factor in (layer.A, layer.B)]:
            title, rate = (f"{whole.title}, {target}", rates[target]) if target else (whole.title, whole.learning_rate)
            groups.append(replace(whole, title=title, parameters=factors, learning_rate=rate))
    return [*groups, *others]


@torch.no_grad()
def limit_norms(layers: Sequence[KroneckerLinear], largest: float) -> None:
    """Scale A and B of layers down, both alike, so that no ‖ΔW‖ is larger. Waits for no device."""
    A: list[Tensor] = [layer.A for layer in layers]
    B: list[Tensor] = [layer.B for layer in layers]
    norms = torch._foreach_mul(torch._foreach_norm(A), [layer.gain for layer in layers])
    torch._foreach_mul_(norms, torch._foreach_norm(B))
    shrink = (largest / torch.stack(norms)).clamp(max=1).sqrt().unbind()
    torch._foreach_mul_(A, shrink)
    torch._foreach_mul_(B, shrink)


@dataclass(frozen=True)
class KroneckerReader:
    """Kronecker adapters in files. See dreambooth/drawing/pipelines.py."""

    def takes(self, file: AdapterFile) -> bool:
        return file.is_kronecker

    def add(self, pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            add_kronecker(pipeline, adapter.matched, adapter.scale, adapter.name)

    def set_strengths(self, pipeline: DiffusionPipeline, strengths: Mapping[str, float]) -> None:
        set_kronecker_scale(pipeline, strengths)

    def deltas(self, pipeline: DiffusionPipeline) -> Iterator[tuple[BaseLayer, Delta]]:
        for model in components(pipeline).values():
            for layer in kronecker_layers(model).values():
                yield layer.innermost, lambda layer=layer: layer.delta_weight

    def remove(self, pipeline: DiffusionPipeline) -> None:
        remove_kronecker(pipeline)
