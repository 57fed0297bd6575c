"""The native file: full-factor LoKr under kohya's names, the one layout for Kronecker factors that other tools read.

    <layer>.lokr_w1    A (a1, a2), every strength folded in
    <layer>.lokr_w2    B (b1, b2), of a convolution (b1, b2, k, k)
    <layer>.alpha      1.0: LyCORIS fails without one, newer ComfyUI divides by zero at 0, and 1 is safe everywhere

Nothing else is in it: Forge refuses a file for 13 keys that it does not know. Factors in the row order of the paper's
code are <layer>.kron_a and .kron_b instead, so that tools which would read them wrongly do not read them at all.
"""

import json
import os
from collections.abc import Mapping

import torch
from safetensors.torch import save_file
from torch import Tensor

from kron_formats.matching import FAMILY_OF_VERSION
from kron_formats.names import Family, KroneckerError, Layer
from kron_formats.reading import METADATA_PREFIX, Factors

FORMAT_VERSION = "1"
LAYOUT_KEYS = ("format_version", "layers", "a1", "a2", "factors", "rows")  # what `shape_metadata` writes
FOREIGN = ("modelspec.", "ss_")  # what metadata keys of other tools begin with
ARCHITECTURES = {  # of the Stability model spec
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}


def write_native(
    path: str | os.PathLike,
    layers: Mapping[Layer, Factors],
    made_for: Family | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    kohya_names: bool = False,
) -> None:
    """Write factors with their metadata. Entries of `metadata` go under our prefix, but for modelspec.* and ss_*.

    `kohya_names` keeps diffusers' block names for SDXL too. Raises KroneckerError where `dtype` cannot hold a factor.
    """
    if not layers:
        raise KroneckerError("there are no Kronecker adapters to save")
    tensors, by_name = {}, {}
    for layer, factors in layers.items():
        key = layer.kohya if kohya_names else layer.native
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
    write_file(path, tensors, file_metadata({**metadata, **own}, made_for, network))


def shape_metadata(layers: Mapping[str, Factors]) -> dict[str, str]:
    """Return what tells the number of layers, the factors' shapes, once for all if they are the same, and row order."""
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
    """Return A and B as they lie in files, in `dtype`: a convolution's B with the sides of its kernel.

    Both are first brought to one RMS where `dtype` loses bits: A·s, B/s is free.
    """
    A, B = factors.A.detach().cpu(), factors.B.detach().cpu()
    if dtype != torch.float32 and A.any() and B.any():
        balance = (B.square().mean() / A.square().mean()).sqrt().sqrt()
        A, B = A * balance, B / balance
    A, B = A.to(dtype).contiguous(), B.to(dtype).unflatten(1, (-1, *layer.kernel)).contiguous()
    if not (A.isfinite().all() and B.isfinite().all()):
        raise KroneckerError(f"the factors of {layer.native} are not all finite in {dtype}; nothing was written")
    return A, B


def file_metadata(metadata: Mapping[str, str], made_for: Family | None, network: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file: ours under our prefix, and what other tools show or filter by."""
    entries = {
        **network,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": metadata.get("title") or metadata.get("instance_prompt") or "Kronecker adapter",
        "modelspec.description": "Kronecker adapter (DiffuseKronA): W + A x B for every adapted layer",
    }
    if made_for:
        (version,) = (version for version, name in FAMILY_OF_VERSION.items() if name == made_for)
        entries |= {
            "ss_base_model_version": version,
            "ss_v2": str(made_for == "sd2"),
            "modelspec.architecture": f"{ARCHITECTURES[made_for]}/lora",
        }
    if prompt := metadata.get("instance_prompt"):
        entries |= {
            "modelspec.trigger_phrase": prompt,
            "ss_tag_frequency": json.dumps({"instance images": {prompt: 1}}),
        }
    return entries | prefixed(metadata)


def prefixed(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries under our prefix, but for those that have a tool's own."""
    return {key if key.startswith(FOREIGN) else METADATA_PREFIX + key: value for key, value in metadata.items()}


def write_file(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file under another name first, so that an earlier one stays until the new one is whole, and
    on the disk."""
    unfinished = f"{os.fspath(path)}.tmp"
    try:
        save_file(dict(tensors), unfinished, metadata=dict(metadata))
        _sort_metadata(unfinished)
        flush(unfinished)
        os.replace(unfinished, path)
        flush(os.path.dirname(path) or ".")
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _sort_metadata(path: str) -> None:
    """Put a file's metadata, which safetensors writes in an order by chance, in that of their names: the same content
    makes the same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def flush(path: str | os.PathLike) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
