"""The native file: full-factor LoKr under kohya's names, the one layout for Kronecker factors that other tools read.

    <layer>.lokr_w1    A (a1, a2), every strength folded in
    <layer>.lokr_w2    B (b1, b2), of a convolution (b1, b2, k, k)
    <layer>.alpha      1.0: LyCORIS fails without one, newer ComfyUI divides by zero at 0, and 1 is safe everywhere

It holds nothing else: Forge refuses a file with 13 unknown keys. Factors in the row order of the paper's code are
<layer>.kron_a and .kron_b instead, so that tools that would misread them do not read them at all.
"""

import json
import os
from collections.abc import Iterable, Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from kron_formats.changes import Factors
from kron_formats.errors import KroneckerError
from kron_formats.families import Family
from kron_formats.files import whole_file
from kron_formats.layout import FORMAT_VERSION, LAYOUT_KEYS, METADATA_PREFIX, NEEDED_KEYS
from kron_formats.names import Layer
from kron_formats.paths import shared_metadata
from kron_formats.reading import AdapterFile

FOREIGN = ("modelspec.", "ss_")  # what metadata keys of other tools begin with
VELOCITY = "v"  # modelspec.prediction_type of models that predict the velocity
CARRIED = (  # metadata of other tools that stays true in another layout
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.resolution", "modelspec.thumbnail",
    "modelspec.trigger_phrase", "ss_tag_frequency", "modelspec.prediction_type", "ss_zero_terminal_snr",
)  # fmt: skip


def write_native(
    path: str | os.PathLike,
    layers: Mapping[Layer, Factors],
    family: Family | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    kohya_names: bool = False,
) -> None:
    """Write factors with their metadata. Entries of `metadata` get our prefix, except modelspec.* and ss_*.

    `kohya_names` keeps diffusers' block names for SDXL too. Raises KroneckerError if `dtype` cannot hold a factor.
    """
    if not layers:
        raise KroneckerError("there are no Kronecker adapters to save")
    tensors, by_name = {}, {}
    for key, layer in file_names(layers, kohya_names).items():
        factors = layers[layer]
        A, B = cast(layer, factors, dtype)
        names = ("kron_a", "kron_b") if factors.transposed_rows else ("lokr_w1", "lokr_w2")
        tensors |= {f"{key}.{names[0]}": A, f"{key}.{names[1]}": B}
        if not factors.transposed_rows:
            tensors[f"{key}.alpha"] = torch.tensor(1.0, dtype=dtype)
        by_name[key] = factors
    own = shape_metadata(by_name)
    arguments = {"algo": "lokr", "full_matrix": "True"}
    if own.get("a1", "") == own.get("a2"):
        arguments["factor"] = own["a1"]
    network = {"ss_network_module": "lycoris.kohya", "ss_network_alpha": "1.0"}
    network["ss_network_args"] = json.dumps(arguments)
    write_tensors(path, tensors, file_metadata({**metadata, **own}, family, network))


def file_names(layers: Iterable[Layer], kohya_names: bool = False) -> dict[str, Layer]:
    """Return name in the file -> layer. Raises KroneckerError if two layers would have the same name."""
    names = {}
    for layer in layers:
        name = layer.kohya if kohya_names else layer.native
        if name in names:
            raise KroneckerError(f"{names[name].dotted} and {layer.dotted} would both be {name} in the file")
        names[name] = layer
    return names


def shape_metadata(layers: Mapping[str, Factors]) -> dict[str, str]:
    """Return the metadata about the number of layers, the shapes of A (one if all are the same) and the row order."""
    shapes = {key: tuple(factors.A.shape) for key, factors in layers.items()}
    own = {"format_version": FORMAT_VERSION, "layers": str(len(layers))}
    if len(set(shapes.values())) == 1:
        own["a1"], own["a2"] = map(str, next(iter(shapes.values())))
    else:
        own["factors"] = json.dumps(shapes)
    if any(factors.transposed_rows for factors in layers.values()):
        own["rows"] = "transposed"
    return own


def cast(layer: Layer, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B as files hold them, in `dtype`: a convolution's B with the sides of its kernel.

    If `dtype` loses bits, both are first brought to one RMS: A·s, B/s is the same product.
    """
    A, B = factors.A.detach().cpu(), factors.B.detach().cpu()
    if dtype != torch.float32 and A.any() and B.any():
        balance = (B.square().mean() / A.square().mean()).sqrt().sqrt()
        A, B = A * balance, B / balance
    A, B = A.to(dtype).contiguous(), B.to(dtype).unflatten(1, (-1, *layer.kernel)).contiguous()
    if not (A.isfinite().all() and B.isfinite().all()):
        raise KroneckerError(f"the factors of {layer.native} are not all finite in {dtype}; nothing was written")
    return A, B


def file_metadata(metadata: Mapping[str, str], family: Family | None, network: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file: ours under our prefix, and what other tools show or filter by.

    If `metadata` say nothing but what tools need, what they show is left out too.
    """
    entries, velocity = {**network}, metadata.get("modelspec.prediction_type") == VELOCITY
    if family:
        version = family.base_version_v if velocity else family.base_version
        entries |= {"ss_base_model_version": version, "ss_v2": str(family.v2)}
    if is_bare(metadata):
        return entries | prefixed(metadata)
    entries |= {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": metadata.get("title") or metadata.get("instance_prompt") or "Kronecker adapter",
        "modelspec.description": "Kronecker adapter (DiffuseKronA): W + A x B for every adapted layer",
    }
    if family:
        entries["modelspec.architecture"] = f"{family.model_spec_v if velocity else family.model_spec}/lora"
    if prompt := metadata.get("instance_prompt"):
        entries |= {
            "modelspec.trigger_phrase": prompt,
            "ss_tag_frequency": json.dumps({"instance images": {prompt: 1}}),
        }
    return entries | prefixed(metadata)


def is_bare(metadata: Mapping[str, str]) -> bool:
    """Whether metadata say nothing but what tools need."""
    return set(metadata) <= {*NEEDED_KEYS}


def carried_metadata(file: AdapterFile) -> dict[str, str]:
    """Return what a file says about its training, for a file made from it; not what it says about its layers.

    The folders of the computer that it was trained on, which earlier versions wrote, are left out.
    """
    own = shared_metadata({key: value for key, value in file.own_metadata.items() if key not in LAYOUT_KEYS})
    return own | {key: file.metadata[key] for key in CARRIED if key in file.metadata}


def prefixed(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries under our prefix, except those that have another tool's."""
    return {key if key.startswith(FOREIGN) else METADATA_PREFIX + key: value for key, value in metadata.items()}


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all, and wait until it is on the disk."""
    with whole_file(path, durable=True) as unfinished:
        save_file(dict(tensors), unfinished, metadata=dict(metadata))
        _sort_metadata(unfinished)


def _sort_metadata(path: os.PathLike) -> None:
    """Sort a file's metadata by name, which safetensors writes in random order: equal content gives equal bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))
