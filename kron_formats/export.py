"""Adapters in the layouts of diffusers, peft and LoRA tools. writing.py has the native one."""

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from kron_formats.changes import Factors, LowRank
from kron_formats.errors import KroneckerError
from kron_formats.families import Family
from kron_formats.lora import kronecker_to_lora
from kron_formats.names import Layer
from kron_formats.reading import PEFT_WEIGHTS
from kron_formats.strength import PEFT_PREFIX
from kron_formats.writing import cast, file_metadata, file_names, prefixed, shape_metadata, write_tensors

Layers = Mapping[Layer, Factors]


def square_factor(layers: Layers) -> int:
    """Return the side a of A (a, a), the same for all layers.

    peft creates LoKr layers from one number, the smaller side of both factorisations d = a·b: diffusers and peft can
    load nothing else. Raises KroneckerError, which says what works instead, if the factors have other shapes.
    """
    for layer, factors in layers.items():
        (a1, a2), (b1, b2) = factors.A.shape, factors.B.shape
        if factors.transposed_rows:
            what = "the rows are in the order of the paper's code"
        elif layer.kernel:
            what = "the layer is a convolution"
        elif len({a for other in layers.values() for a in other.A.shape}) > 1:
            what = f"A is {a1} x {a2}, and not the same square for every layer"
        elif a1 > b1 or a2 > b2:
            what = f"A is {a1} x {a2}, larger than B with {b1} x {b2}"
        else:
            continue
        raise KroneckerError(
            f"diffusers and peft cannot load this adapter as LoKr: in {layer.dotted}, {what}. What works: --to lora, "
            "which pipe.load_lora_weights takes; attach_to_diffusers(pipe, path, name) from kron_adapter; the native "
            "file in ComfyUI, A1111 and Forge" + (" (not with rows in that order)" if factors.transposed_rows else "")
        )
    return next(iter(layers.values())).A.shape[0]


def write_diffusers(path: Path, layers: Layers, metadata: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write unet.<module path>.lokr_w1 and .lokr_w2, for `load_lora_adapter` of diffusers 0.42 and later."""
    square_factor(layers)
    tensors = {}
    for layer, factors in layers.items():
        tensors[f"{layer.dotted}.lokr_w1"], tensors[f"{layer.dotted}.lokr_w2"] = cast(layer, factors, dtype)
    shapes = shape_metadata({layer.dotted: factors for layer, factors in layers.items()})
    write_tensors(path, tensors, prefixed({**metadata, **shapes}))


def write_peft(folder: Path, layers: Layers, base_model: str | None, dtype: torch.dtype) -> None:
    """Write folder/<component>/adapter_config.json and adapter_model.safetensors, for `PeftModel.from_pretrained`.

    peft multiplies full factors by alpha / r, and makes low-rank ones if r is below half of B's larger side.
    """
    from peft import LoKrConfig

    a = square_factor(layers)
    r = max(side for factors in layers.values() for side in factors.B.shape)
    for component in _components(layers):
        part = {layer: factors for layer, factors in layers.items() if layer.component == component}
        tensors = {}
        for layer, factors in part.items():
            key = f"{PEFT_PREFIX}{layer.path}"
            tensors[f"{key}.lokr_w1"], tensors[f"{key}.lokr_w2"] = cast(layer, factors, dtype)
        (folder / component).mkdir(parents=True)
        LoKrConfig(
            r=r,
            alpha=r,
            decompose_factor=a,
            target_modules=[layer.path for layer in part],
            base_model_name_or_path=base_model,
            inference_mode=True,
        ).save_pretrained(str(folder / component))
        write_tensors(folder / component / PEFT_WEIGHTS, tensors, {})


def lora_bytes(layers: Layers, rank: int | None, dtype: torch.dtype) -> int:
    """Return the bytes of the LoRA's tensors, before it is made."""
    size = 0
    for factors in layers.values():
        full = min(factors.A.shape) * min(factors.B.shape)
        size += min(rank or full, full) * sum(factors.size) * dtype.itemsize
    return size


def dense_bytes(layers: Layers, dtype: torch.dtype) -> int:
    """Return the bytes of the weights that the adapter changes."""
    return sum(prod(factors.size) for factors in layers.values()) * dtype.itemsize


def write_lora(
    path: Path,
    layers: Layers,
    family: Family | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    rank: int | None = None,
    kohya_names: bool = False,
) -> dict[Layer, tuple[int, float]]:
    """Write a LoRA under kohya's names; return each layer's rank and relative error."""
    low_rank, report = {}, {}
    for layer, factors in layers.items():
        low_rank[layer], error = kronecker_to_lora(factors, rank)
        report[layer] = (low_rank[layer].down.shape[0], error)
    shapes = shape_metadata({key: layers[layer] for key, layer in file_names(layers, kohya_names).items()})
    write_equal_alphas(path, low_rank, family, {**metadata, **shapes}, dtype, kohya_names)
    return report


def write_equal_alphas(
    path: Path,
    layers: Mapping[Layer, LowRank],
    family: Family | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    kohya_names: bool = False,
) -> None:
    """Write a LoRA with layers of several ranks under kohya's names.

    Every alpha is 1, with √r in both sides instead: diffusers mis-scales silently if alphas differ between layers.
    """
    roots = {layer: lora.down.shape[0] ** 0.5 for layer, lora in layers.items()}
    scaled = {layer: LowRank(lora.up * roots[layer], lora.down * roots[layer]) for layer, lora in layers.items()}
    write_low_rank(path, scaled, 1.0, family, metadata, dtype, kohya_names)


def write_low_rank(
    path: Path,
    layers: Mapping[Layer, LowRank],
    alpha: float,
    family: Family | None,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
    kohya_names: bool = False,
) -> None:
    """Write a LoRA of which every tool takes alpha / r · up · down, under kohya's names.

    Raises KroneckerError, with nothing written, if `dtype` cannot hold it.
    """
    tensors = {}
    for key, layer in file_names(layers, kohya_names).items():
        up, down = (side.detach().cpu().to(dtype).contiguous() for side in (layers[layer].up, layers[layer].down))
        up, down = up[(..., *[None] * len(layer.kernel))], down.unflatten(1, (-1, *layer.kernel))
        if not (up.isfinite().all() and down.isfinite().all()):
            raise KroneckerError(f"the LoRA of {key} is not finite in {dtype}; nothing was written")
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=dtype)
    network = {"ss_network_module": "networks.lora", "ss_network_alpha": str(alpha)}
    network["ss_network_dim"] = str(max(lora.down.shape[0] for lora in layers.values()))
    write_tensors(path, tensors, file_metadata(metadata, family, network))


def total_error(layers: Layers, report: Mapping[Layer, tuple[int, float]]) -> float:
    """Return |Σ layers' errors| / |ΔW| over all layers together."""
    sizes = {layer: (factors.A.double().norm() * factors.B.double().norm()).item() for layer, factors in layers.items()}
    total = sum(size**2 for size in sizes.values()) ** 0.5
    return sum((sizes[layer] * error) ** 2 for layer, (_, error) in report.items()) ** 0.5 / (total or 1.0)


# ---- how to load what was written ----

TEXT_ENCODER_SNIPPET = """
    from peft import LoKrConfig
    from safetensors.torch import load_file

    tensors = load_file("{path}")
    for name in {encoders}:
        encoder = getattr(pipe, name)
        modules = dict(encoder.named_modules())  # transformers 5 has no "text_model" level in CLIPTextModel
        prefix = f"{{name}}."
        part = {{key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}}
        if "text_model" not in modules:
            part = {{key.removeprefix("text_model."): tensor for key, tensor in part.items()}}
        targets = sorted({{key.rpartition(".")[0] for key in part}})
        config = LoKrConfig(r={r}, alpha={r}, decompose_factor={a}, target_modules=targets)
        encoder.load_adapter(peft_config=config, adapter_state_dict=part)"""


def diffusers_snippet(path: Path, layers: Layers) -> str:
    """Return the code that loads what `write_diffusers` wrote into a pipeline `pipe`."""
    folder, components, lines = path.absolute().parent, _components(layers), []
    if "unet" in components:
        lines.append(f'    pipe.unet.load_lora_adapter("{folder}", weight_name="{path.name}", prefix="unet")')
    if encoders := [component for component in components if component != "unet"]:
        a, r = square_factor(layers), max(side for factors in layers.values() for side in factors.B.shape)
        lines.append(TEXT_ENCODER_SNIPPET.format(path=folder / path.name, encoders=encoders, r=r, a=a))
    return "\n".join(lines)


def peft_snippet(folder: Path, layers: Layers) -> str:
    """Return the code that loads what `write_peft` wrote into a pipeline `pipe`."""
    lines = [
        f'    pipe.{component} = PeftModel.from_pretrained(pipe.{component}, "{folder / component}")'
        for component in _components(layers)
    ]
    return "\n".join(["    from peft import PeftModel", *lines])


def lora_snippet(path: Path) -> str:
    """Return the code that loads what `write_lora` wrote into a pipeline `pipe`."""
    return f'    pipe.load_lora_weights("{path.absolute().parent}", weight_name="{path.name}")'


def _components(layers: Layers) -> list[str]:
    return list(dict.fromkeys(layer.component for layer in layers))
