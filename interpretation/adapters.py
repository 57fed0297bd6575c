"""The adapters that are interpreted: files as FILE or FILE:SCALE, or the folder of a run with its checkpoints."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.conversion import named_models
from dreambooth.errors import UserError
from dreambooth.layout import TENSORS_NAME, checkpoint_step, list_checkpoints
from dreambooth.options.base_model import split_scale
from interpretation.options import FileOptions
from kron_formats.architectures import load_architecture, match_published
from kron_formats.errors import naming
from kron_formats.matching import MatchedAdapter, match_layers
from kron_formats.merging import check_strength
from kron_formats.reading import AdapterFile, read_adapter


@dataclass(frozen=True)
class Interpreted:
    """An adapter that was read and matched, at a strength, with the checkpoints of its run."""

    label: str
    matched: MatchedAdapter
    scale: float
    models: dict[str, Any]  # that it was matched with, without weights
    steps: "dict[int, Interpreted]"  # optimizer steps -> the adapter after them; {} of a file


def read_interpreted(config: FileOptions) -> list[Interpreted]:
    """Return the adapters, each matched with the base model, or the published model that it fits. Reads no weights.

    Raises UserError or KroneckerError if one is no adapter, changes no weights, or fits no model.
    """
    labels = _labels(config.adapter)
    base = named_models(config.base) if config.base else None
    return [_read_entry(entry, label, config, base) for entry, label in zip(config.adapter, labels)]


def _labels(entries: Sequence[str]) -> list[str]:
    """Return the shortest ends of the paths that tell the adapters apart, and their strengths."""
    parts = [(Path(path).absolute().parts, scale) for path, scale in map(split_scale, entries)]
    ends, most = [], max(len(path) for path, _ in parts)
    for length in range(1, most + 1):
        ends = ["/".join(path[-length:]) + ("" if scale == 1 else f" at {scale:g}") for path, scale in parts]
        if len(set(ends)) == len(ends):
            return ends
    raise UserError(f"an ADAPTER is given twice: {max(ends, key=ends.count)}")


def _read_entry(entry: str, label: str, config: FileOptions, base: dict[str, Any] | None) -> Interpreted:
    path, scale = split_scale(entry)
    scale = check_strength(scale * config.adapter_scale, f"{entry}: the strength")
    checkpoints = list_checkpoints(Path(path))
    if not checkpoints:
        return _match(read_adapter(path, config.allow_pickle), label, scale, base, {})
    files = {checkpoint_step(folder): _file_in(folder) for folder in checkpoints}
    steps = {step: _match(read_adapter(file), f"step {step}", scale, base, {}) for step, file in files.items()}
    last = files[max(files)]
    result = Path(path) / last.name
    return _match(read_adapter(result if result.is_file() else last), label, scale, base, steps)


def _file_in(checkpoint: Path) -> Path:
    """Return the adapter in a checkpoint. Raises UserError if it has none, as of a method whose result is a folder."""
    state = Path(TENSORS_NAME).stem
    found = [path for path in checkpoint.glob("*.safetensors") if not path.name.startswith(state)]
    if len(found) != 1:
        raise UserError(f"{checkpoint} holds no adapter in one file: name the files to interpret themselves")
    return found[0]


def _match(
    file: AdapterFile, label: str, scale: float, base: dict[str, Any] | None, steps: dict[int, Interpreted]
) -> Interpreted:
    if not file.layers:
        raise UserError(f"{file.path} is {file.noun} and changes no weights: there is nothing to interpret in it")
    if base is not None:
        return Interpreted(label, match_layers(file, base), scale, base, steps)
    with naming("without a base model"):
        matched = match_published(file)
    assert matched.family, "published models are of a family"
    models = load_architecture(matched.family.architecture)
    return Interpreted(label, match_layers(file, models), scale, models, steps)
