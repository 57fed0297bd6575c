"""--base_adapter: a base model with adapters merged into its weights, wherever these are read."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreambooth.base_model.configurations import Configurations, file_states
from dreambooth.base_model.weights import Weights
from dreambooth.errors import UserError
from dreambooth.options.base_model import split_scale
from kron_formats.changes import Change
from kron_formats.families import COMPONENTS
from kron_formats.matching import match_layers
from kron_formats.merging import check_strength, merge_changes
from kron_formats.names import Layer
from kron_formats.reading import AdapterFile, read_adapter


@dataclass(frozen=True)
class AdaptedWeights:
    """The weights of a base model, changed by adapters of any method. See Weights in dreambooth/base_model/weights.py.

    What changes is read in fp32 and rounded once, with the changes in it, to the dtype that is asked for.
    """

    plain: Weights
    configurations: Configurations
    entries: tuple[str, ...]  # FILE or FILE:SCALE

    def check(self, parts: Iterable[str]) -> None:
        """Raises KroneckerError if an adapter does not fit, too."""
        self.plain.check(parts)
        self._changes()

    def load(self, part: str, dtype: torch.dtype) -> Any:
        changes = self._changes()
        return self._load(part, dtype, changes[part]) if part in changes else self.plain.load(part, dtype)

    def load_for_pipeline(self, parts: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        parts, changes = list(parts), self._changes()
        loaded = {part: self._load(part, dtype, changes[part]) for part in parts if part in changes}
        return self.plain.load_for_pipeline([part for part in parts if part not in changes], dtype) | loaded

    def state(self, parts: Iterable[str]) -> Any:
        paths = [Path(split_scale(entry)[0]) for entry in self.entries]
        files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
        return self.plain.state(parts), self.entries, file_states(files)

    def _load(self, part: str, dtype: torch.dtype, changes: Mapping[Layer, list[Change]]) -> Any:
        model = self.plain.load(part, torch.float32)
        merge_changes({part: model}, changes)
        return model.to(dtype)

    def _changes(self) -> Mapping[str, Mapping[Layer, list[Change]]]:
        """Return component -> what the adapters change in it, each at its strength. Reads their files."""
        present = [part for part in COMPONENTS if part in self.configurations.classes]
        models = {part: self.configurations.empty(part) for part in present}
        changes: dict[str, dict[Layer, list[Change]]] = defaultdict(lambda: defaultdict(list))
        for entry in self.entries:
            path, scale = split_scale(entry)
            strength = check_strength(scale, f"--base_adapter {entry}: the strength")
            matched = match_layers(read_adapter(path), models)
            _check_weights_alone(matched.file)
            for layer, change in matched.layers.items():
                changes[layer.component][layer].append(change.scaled(strength))
        return changes


def _check_weights_alone(file: AdapterFile) -> None:
    if file.words:
        words = ", ".join(word.text for word in file.words)
        raise UserError(f"--base_adapter {file.path} holds the word {words}, and a base model's weights have no words")
