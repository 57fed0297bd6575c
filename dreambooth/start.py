"""--init_adapter: training starts from the factors in a file, or from the nearest ones to a LoRA."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dreambooth.errors import UserError
from dreambooth.options.kronecker import KroneckerOptions
from kron_adapter import KroneckerLinear
from kron_formats.changes import LowRank
from kron_formats.families import COMPONENTS
from kron_formats.lora import lora_to_kronecker
from kron_formats.matching import MatchedAdapter, match_layers
from kron_formats.names import Layer, component_of
from kron_formats.reading import AdapterFile, not_kronecker_error, read_adapter

logger = logging.getLogger(__name__)

Layers = Mapping[str, Mapping[str, KroneckerLinear]]  # component -> path -> layer


def read_start(models: Mapping[str, nn.Module], config: KroneckerOptions) -> MatchedAdapter:
    """Return the adapter in --init_adapter, matched with the models that train. Reads none of their weights.

    Raises KroneckerError if it is neither a Kronecker adapter nor a LoRA or does not fit, UserError if it adapts what
    does not train, or other options say which layers a Kronecker adapter has.
    """
    assert config.init_adapter is not None
    file = read_adapter(config.init_adapter)
    if not (file.is_kronecker or file.is_lora):
        raise not_kronecker_error(file)
    if file.is_kronecker and (given := config.shape_options_given()):
        raise UserError(
            f"--init_adapter {file.path} is a Kronecker adapter and decides which layers are adapted and the sizes of "
            f"their factors: leave out --{', --'.join(given)}"
        )
    _check_components(file, models)
    start = match_layers(file, models)
    if convolutions := [layer for layer in start.layers if layer.kernel]:
        raise UserError(
            f"--init_adapter {file.path} adapts {len(convolutions)} convolutions, such as {convolutions[0].dotted}; "
            "only linear layers can be trained"
        )
    return start


def _check_components(file: AdapterFile, models: Mapping[str, nn.Module]) -> None:
    """Raise UserError if a file adapts a component that does not train."""
    adapted = {component_of(name) for name in file.layers}
    if idle := [component for component in COMPONENTS if component in adapted - models.keys()]:
        raise UserError(f"--init_adapter {file.path} adapts the {' and the '.join(idle)} too: add --train_text_encoder")


def shapes_of(start: MatchedAdapter, component: str) -> dict[str, tuple[int, int]]:
    """Return path -> (a1, a2) of the layers that a Kronecker adapter has in a component; none of a LoRA."""
    if start.file.is_lora:
        return {}
    own = {layer: factors for layer, factors in start.factors.items() if layer.component == component}
    return {layer.path: (factors.A.shape[0], factors.A.shape[1]) for layer, factors in own.items()}


@torch.no_grad()
def start_from_adapter(layers: Layers, start: MatchedAdapter, config: KroneckerOptions) -> None:
    """Set A and B to those of a Kronecker adapter, or to the nearest to a LoRA; layers that it lacks stay untrained.

    Layers without weights get nothing. Raises UserError if a LoRA changes a layer that is not adapted.
    """
    adapted = {layer: layers[layer.component].get(layer.path) for layer in start.layers}
    _check_adapted([layer for layer, wrapper in adapted.items() if wrapper is None], start.file, config)
    lost = total = 0.0  # squares of norms
    for layer, wrapper in adapted.items():
        if wrapper is None or wrapper.A.is_meta:
            continue
        change, error = start.layers[layer], 0.0
        if isinstance(change, LowRank):
            factors, error = lora_to_kronecker(change, wrapper.A.shape[0], wrapper.A.shape[1])
            size = change.dense().square().sum().item()
            lost, total = lost + error**2 * size, total + size
        else:
            factors = start.factors[layer]
            wrapper.target, wrapper.transposed_rows = start.target(layer), factors.transposed_rows
        wrapper.A.copy_(factors.A / wrapper.gain)  # exact: the gain is a power of two
        wrapper.B.copy_(factors.B)
    if total:
        logger.info(
            "%d layers start with the nearest factors to %s, a LoRA; relative error of all together: %.2g",
            *(len(adapted), start.file.path, (lost / total) ** 0.5),
        )


def _check_adapted(missing: Sequence[Layer], file: AdapterFile, config: KroneckerOptions) -> None:
    if missing:
        raise UserError(
            f"--init_adapter {file.path} changes {len(missing)} layers that --kron_targets "
            f"{' '.join(config.kron_targets)} does not name, for example {missing[0].dotted}"
        )
