"""Which layer of a model each entry of an adapter file belongs to, and what is wrong where it belongs to none."""

from collections.abc import Iterable

from kron_formats.names import (
    FAMILY_NAMES,
    KroneckerError,
    Layer,
    Models,
    family,
    find_layers,
    match_target,
    spelling_index,
)
from kron_formats.reading import AdapterFile, Factors, LowRank

FAMILY_OF_VERSION = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl_base_v1-0": "sdxl"}  # kohya's ss_base_model_version
FAMILY_OF_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of the text embeddings


def match_layers(file: AdapterFile, models: Models) -> dict[Layer, Factors | LowRank]:
    """Return the model's layer -> its entry in the file.

    Factors that are stored as products are multiplied out, since now their size is known to be a layer's.

    Raises KroneckerError unless every entry has a layer of its size and every target of the file an entry.
    """
    layers = find_layers(models)
    index = spelling_index(layers)
    matched = {index[name]: entry for name, entry in file.layers.items() if name in index}
    touched = {layer.component for layer in matched}
    expected = {x.native for x in layers if x.component in touched and match_target(x.name, file.layout.targets)}
    given = [index[name].native if name in index else name for name in file.layers]
    problems = differences({*expected, *(layer.native for layer in matched)}, given)
    if len(file.layers) < file.layout.number:
        problems.append(f"the file holds {len(file.layers)} of its {file.layout.number} layers")
    if len(given) > len(set(given)):
        problems.append("some layers are there twice, under different names")
    problems += [
        f"{layer.native} holds factors for {entry.size[1]} to {entry.size[0]} features, "
        f"the model's layer maps {layer.size[1]} to {layer.size[0]}"
        for layer, entry in matched.items()
        if entry.size != layer.size
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise KroneckerError(
            f"{file.path} does not fit this model: {_wrong_family(file, models)}" + "; ".join(problems[:3]) + more
        )
    multiplied = {layer: entry.multiplied() for layer, entry in matched.items()}
    if infinite := [layer.native for layer, entry in multiplied.items() if not entry.isfinite()]:
        raise KroneckerError(f"{file.path}: the factors of {infinite[0]} are not all finite when multiplied out")
    return multiplied


def file_family(file: AdapterFile) -> str | None:
    """Return which Stable Diffusion a file was made for, by its metadata or by the width of the text it attends to."""
    widths = {entry.size[1] for name, entry in file.layers.items() if "attn2" in name and "to_k" in name}
    by_width = FAMILY_OF_CONTEXT.get(widths.pop()) if len(widths) == 1 else None
    return FAMILY_OF_VERSION.get(file.metadata.get("ss_base_model_version", ""), by_width)


def _wrong_family(file: AdapterFile, models: Models) -> str:
    made_for, is_for = file_family(file), family(models)
    if made_for is None or is_for is None or made_for == is_for:
        return ""
    return f"it is an adapter for {FAMILY_NAMES[made_for]}, the model is {FAMILY_NAMES[is_for]}; "


def differences(expected: Iterable[str], given: Iterable[str]) -> list[str]:
    """Say in words which names are missing and which are not expected; a few of each, and how many."""
    expected, given = set(expected), set(given)
    problems = []
    for label, names in (("missing", expected - given), ("not in the model", given - expected)):
        if names:
            problems.append(f"{len(names)} {label} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})")
    return problems
