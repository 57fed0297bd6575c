"""Folders of models whose weights were trained themselves: a diffusers pipeline, or one component of it.

Only headers are read here. The weights stay in their files, of which a model may have several (shards), in any
floating-point precision (variants). What has no names in files, such as the VAE, is left out.
"""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from kron_formats.changes import Replacement
from kron_formats.errors import KroneckerError
from kron_formats.families import COMPONENT_CLASSES, COMPONENTS
from kron_formats.files import excerpt, open_safetensors, read_json

PIPELINE, COMPONENT = "model_index.json", "config.json"  # what says that a folder is one
NAMES = ("diffusion_pytorch_model", "model")  # of weight files
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
FLOATS = ("F64", "F32", "F16", "BF16")  # types of weights, as safetensors call them
BUFFERS = ("position_ids",)  # what older text encoders hold besides their parameters


def is_trained_model(folder: Path) -> bool:
    """Whether a folder says that it is a pipeline or a component."""
    return (folder / PIPELINE).is_file() or (folder / COMPONENT).is_file()


def read_trained_model(folder: Path) -> dict[str, Replacement]:
    """Return "component.parameter" -> its weight, for the UNet and the text encoders. Reads none of the weights.

    Raises KroneckerError if the folder has neither, or if their files are incomplete or quantised.
    """
    weights = {}
    for component, part in _parts(folder).items():
        for name, replacement in _component_weights(part).items():
            weights[f"{component}.{name}"] = replacement
    return weights


def _parts(folder: Path) -> dict[str, Path]:
    """Return component -> its folder."""
    if not (folder / PIPELINE).is_file():
        return {_component(folder): folder}
    index = read_json(folder / PIPELINE)
    there = {name for name, entry in index.items() if isinstance(entry, list) and any(entry)}
    parts = {name: folder / name for name in COMPONENTS if name in there}
    if not parts:
        raise KroneckerError(
            f"{folder} is a {excerpt(str(index.get('_class_name')))} without any of {', '.join(COMPONENTS)}, which "
            "alone have names in files"
        )
    return parts


def _component(folder: Path) -> str:
    """Return which component a folder is, by its name or else by its class."""
    config = read_json(folder / COMPONENT)
    said = config.get("_class_name") or config.get("architectures")
    kind = str(said[0] if isinstance(said, list) and said else said)
    fitting = [component for component, classes in COMPONENT_CLASSES.items() if kind in classes]
    if not fitting:
        known = ", ".join(sorted({name for classes in COMPONENT_CLASSES.values() for name in classes}))
        raise KroneckerError(f"{folder} is a folder of a {excerpt(kind)}; those that have names in files are: {known}")
    if folder.resolve().name in fitting:
        return folder.resolve().name
    return fitting[-1] if kind.endswith("WithProjection") else fitting[0]


def _component_weights(folder: Path) -> dict[str, Replacement]:
    if (config := folder / COMPONENT).is_file() and read_json(config).get("quantization_config"):
        raise KroneckerError(f"{folder} is quantised: its weights cannot replace those of a base model")
    weights = {}
    for path in _weight_files(folder):
        with open_safetensors(path) as file:
            for key in file.keys():
                if key.rpartition(".")[2] in BUFFERS:
                    continue
                stored = file.get_slice(key)
                if stored.get_dtype() not in FLOATS:
                    raise KroneckerError(f"{path}: {excerpt(key)} is of type {stored.get_dtype()}, which no weight has")
                if key in weights:
                    raise KroneckerError(f"{folder}: {excerpt(key)} is in two of its files")
                weights[key] = Replacement(partial(_read, path, key), tuple(stored.get_shape()))
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of one variant, the plain one if there are several. Raises KroneckerError if one is missing."""
    variants = defaultdict(list)
    for path in sorted(folder.glob("*.safetensors")):
        name, _, variant = SHARD.sub("", path.name.removesuffix(".safetensors")).partition(".")
        if name in NAMES:
            variants[variant].append(path)
    if not variants:
        raise KroneckerError(f"{folder} has no weights that can be read: no {' or '.join(NAMES)}.safetensors")
    if len(variants) > 1 and "" not in variants:
        raise KroneckerError(f"{folder} has weights of several variants ({', '.join(variants)}): leave one in it")
    files = variants.get("") or next(iter(variants.values()))
    whole = [path for path in files if not SHARD.search(path.name)]
    if whole:
        return whole[:1]
    number = int(SHARD.findall(files[0].name)[0][1])
    if len(files) != number:
        raise KroneckerError(f"{folder} has {len(files)} of the {number} files of its weights, such as {files[0].name}")
    return files


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as file:  # whose header has been checked
        return file.get_tensor(key)
