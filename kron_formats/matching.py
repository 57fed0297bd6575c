"""Which layer of a model each entry of an adapter file belongs to, and what is wrong if it belongs to none."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from kron_formats.changes import Change, Factors, StoredFactors
from kron_formats.errors import KroneckerError
from kron_formats.families import Family, family_of_version, family_of_width
from kron_formats.names import Layer, Models, family, find_parameters, match_target, spelling_index
from kron_formats.reading import AdapterFile, not_kronecker_error
from kron_formats.words import Word


@dataclass(frozen=True)
class MatchedAdapter:
    """A file that fits a model, with the model's parameters for its entries.

    The layers are those of the model that it was matched with, which may have no weights; in another model of the same
    architecture they are found again by component and name, by which layers are equal.
    """

    file: AdapterFile
    family: Family | None  # of the model; None if it is not one of diffusers
    layers: Mapping[Layer, Change]

    @cached_property
    def factors(self) -> Mapping[Layer, Factors]:
        """The layers of a Kronecker adapter. Raises KroneckerError if the file is of another method."""
        factors = {layer: entry for layer, entry in self.layers.items() if isinstance(entry, Factors)}
        if len(factors) < len(self.layers):
            raise not_kronecker_error(self.file)
        return factors

    def target(self, layer: Layer) -> str:
        """Return the target that the file says selected a layer; its name if the file does not say."""
        return match_target(layer.name, self.file.layout.targets) or layer.name


def match_layers(file: AdapterFile, models: Models) -> MatchedAdapter:
    """Return the file with the model's parameter for each of its entries.

    Factors that are stored as products are multiplied out, since now their size is known to be a layer's.

    Raises KroneckerError unless every entry has a parameter of its size, every target of the file has an entry and, of
    a model that was trained in full, every parameter; and as `components` does.
    """
    parameters = find_parameters(models)
    index = spelling_index(parameters)
    matched = {index[name]: entry for name, entry in file.layers.items() if name in index}
    touched = {layer.component for layer in matched}
    expected = {_label(x) for x in parameters if x.component in touched and _must_have(file, x)}
    given = [_label(index[name]) if name in index else name for name in file.layers]
    problems = differences({*expected, *map(_label, matched)}, given)
    if len(file.layers) < file.layout.number:
        problems.append(f"the file holds {len(file.layers)} of its {file.layout.number} layers")
    if len(given) > len(set(given)):
        problems.append("some layers are in it twice, under different names")
    problems += [f"{_label(layer)} {words}" for layer, entry in matched.items() if (words := entry.misfit(layer.size))]
    problems += [problem for word in file.words for problem in _word_problems(word, parameters)]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise KroneckerError(
            f"{file.path} does not fit this model: {_wrong_family(file, models)}" + "; ".join(problems[:3]) + more
        )
    multiplied = {
        layer: entry.multiplied() if isinstance(entry, StoredFactors) else entry for layer, entry in matched.items()
    }
    if infinite := next((layer for layer, entry in multiplied.items() if not entry.isfinite()), None):
        raise KroneckerError(f"{file.path}: what it holds for {_label(infinite)} is not all finite")
    return MatchedAdapter(file, family(models), multiplied)


def _must_have(file: AdapterFile, parameter: Layer) -> bool:
    """Whether a file that changes a component has to have this parameter of it."""
    return file.is_whole or (parameter.is_matrix and match_target(parameter.name, file.layout.targets) is not None)


def _word_problems(word: Word, parameters: Iterable[Layer]) -> list[str]:
    """Return why a word's vectors are not those of the text encoders."""
    embeddings = {layer.component: layer.size[1] for layer in parameters if layer.name.endswith(".token_embedding")}
    widths = {component: vectors.shape[1] for component, vectors in word.vectors.items()}
    return [
        f"{word.text} has vectors of {widths.get(component, 0)} numbers for the {component}, "
        f"the model's has {embeddings.get(component, 0)}"
        for component in sorted(embeddings.keys() | widths.keys())
        if widths.get(component) != embeddings.get(component)
    ]


def _label(parameter: Layer) -> str:
    """Return a parameter's name in messages: a layer's is that in our files."""
    return parameter.native if parameter.is_matrix else parameter.dotted


def file_family(file: AdapterFile) -> Family | None:
    """Return the family that a file was made for, by its metadata or the width of the text that it attends to."""
    if by_version := family_of_version(file.metadata.get("ss_base_model_version")):
        return by_version
    keys = (entry for name, entry in file.layers.items() if "attn2" in name and "to_k" in name)
    widths = {entry.size[1] for entry in keys if entry.size}
    widths |= {sum(vectors.shape[1] for vectors in word.vectors.values()) for word in file.words}
    return family_of_width(widths.pop()) if len(widths) == 1 else None


def _wrong_family(file: AdapterFile, models: Models) -> str:
    made_for, is_for = file_family(file), family(models)
    if made_for is None or is_for is None or made_for == is_for:
        return ""
    return f"it is {file.noun} for {made_for.title}, the model is {is_for.title}; "


def differences(expected: Iterable[str], given: Iterable[str]) -> list[str]:
    """Return in words which names are missing and which are unexpected; a few of each, and how many."""
    expected, given = set(expected), set(given)
    problems = []
    for label, names in (("missing", expected - given), ("not in the model", given - expected)):
        if names:
            problems.append(f"{len(names)} {label} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})")
    return problems
