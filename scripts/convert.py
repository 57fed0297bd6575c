"""Convert an adapter file into the layout that a tool reads, or say what a file is.

    python scripts/convert.py outputs/dog/pytorch_kronecker_weights.safetensors --to lora --output dog-lora.safetensors
    python scripts/convert.py lokr.safetensors --to native --output dog.safetensors
    python scripts/convert.py --inspect dog.safetensors

INPUT is a LoRA or a Kronecker adapter of any tool (kohya, LyCORIS, ai-toolkit, OneTrainer, diffusers, peft, the
paper's own code). FORMAT:

    native      what training writes: for ComfyUI, A1111, Forge, LyCORIS, sd-scripts and this project
    diffusers   for load_lora_adapter of diffusers 0.42 and later; square factors only
    peft        a folder per component for PeftModel.from_pretrained; square factors only
    lora        for every LoRA tool: exact, or with --rank the best of that rank, and then the error is printed
    fused       a base model with the adapter in its weights: a folder, or one file if the base is one file

Layers are looked up in the base model. SD 1.5, SD 2.1 and SDXL are known; name any other one.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.runtime.library_warnings import drop_needless_warnings

drop_needless_warnings()  # before the imports that cause some

import torch

from dreambooth.base_model.checks import empty_models
from dreambooth.base_model.loading import DTYPES
from dreambooth.base_model.source import base_source
from dreambooth.errors import UserError, readable_errors
from dreambooth.options.base_model import BaseModelOptions
from dreambooth.options.paths import path_argument, path_or_name
from kron_formats.architectures import load_architecture, match_published
from kron_formats.changes import LowRank
from kron_formats.export import (
    dense_bytes,
    diffusers_snippet,
    lora_bytes,
    lora_snippet,
    peft_snippet,
    total_error,
    write_diffusers,
    write_lora,
    write_peft,
)
from kron_formats.families import COMPONENTS
from kron_formats.fused import checkpoint_family, fuse_checkpoint, fuse_pipeline
from kron_formats.inspection import inspect
from kron_formats.layout import NEEDED_KEYS
from kron_formats.lora import lora_to_kronecker
from kron_formats.matching import MatchedAdapter, match_layers
from kron_formats.names import Layer
from kron_formats.paths import shared_name
from kron_formats.reading import AdapterFile, not_kronecker_error, read_adapter
from kron_formats.writing import carried_metadata, write_native

DEFAULT_PRECISION = "fp32"
FLAG_IS_FOR = {  # flag -> the formats that it has a meaning for
    "rank": ("lora",),
    "sdxl_names": ("native", "lora"),
    "kron_a1": ("native",),
    "kron_a2": ("native",),
    "no_metadata": ("native", "diffusers", "peft", "lora"),
}


# ---- the command line ----


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments. Wrong ones end the program before anything is read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("input", nargs="?", type=path_argument, metavar="INPUT", help="adapter file, or a folder that peft wrote")
    add("--inspect", type=path_argument, metavar="FILE", help="print what a file is and what can load it, and exit")
    add("--to", choices=tuple(FORMATS), metavar="FORMAT", help=f"one of {', '.join(FORMATS)}")
    add("--output", type=path_argument, metavar="PATH", help="file or folder to write; must not exist")
    add(
        "--pretrained_model_name_or_path",
        type=path_or_name,
        metavar="BASE",
        help="base model: a name on the Hub, a folder in diffusers' layout, or one .safetensors file",
    )
    add(
        "--base_config",
        metavar="CONFIG",
        help="for a base model in one file: a folder or name on the Hub with its configuration; default: SD 1.5's, SD "
        "2.1's or SDXL's, whichever it is like",
    )
    add("--rank", type=positive, help="lora: largest rank of a layer; default: exact")
    add("--sdxl_names", choices=("sgm", "diffusers"), help="native, lora: SDXL's block names; default: sgm")
    add(
        "--save_precision",
        choices=tuple(DTYPES),
        help=f"precision of what is written; default: {DEFAULT_PRECISION}. A checkpoint that is one file keeps its own",
    )
    add(
        "--allow_pickle",
        action="store_true",
        help="also read a .bin of the paper's code: only its tensors; no code in it is run",
    )
    add(
        "--no_metadata",
        action="store_true",
        help="leave out what tools do not need: prompts, options, the base model's name, thumbnail",
    )
    add("--kron_a1", type=positive, help="native: rows of A, for a LoRA that this project did not make")
    add("--kron_a2", type=positive, help="native: columns of A, for a LoRA that this project did not make")
    arguments = parser.parse_args(argv)
    if problem := inconsistency(arguments):
        parser.error(problem)
    return arguments


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def inconsistency(arguments: argparse.Namespace) -> str | None:
    """Return what is wrong with the arguments, naming the flags to change; None if nothing is."""
    if arguments.inspect is not None:
        given = {name: value for name, value in vars(arguments).items() if name not in ("inspect", "allow_pickle")}
        if extra := [name for name, value in given.items() if value not in (None, False)]:
            flags = ", ".join("INPUT" if name == "input" else f"--{name}" for name in extra)
            return f"--inspect FILE cannot be combined with {flags}"
        return None
    if not (arguments.input and arguments.to and arguments.output):
        return "give INPUT, --to and --output, or --inspect FILE"
    for flag, formats in FLAG_IS_FOR.items():
        if getattr(arguments, flag) not in (None, False) and arguments.to not in formats:
            return f"--{flag} is for --to {' and --to '.join(formats)}, not for --to {arguments.to}"
    if (arguments.kron_a1 is None) != (arguments.kron_a2 is None):
        return "--kron_a1 and --kron_a2 must be given together"
    if arguments.output.exists():
        return f"--output {arguments.output} exists already; choose another path"
    if arguments.base_config is not None and not Path(arguments.pretrained_model_name_or_path or "").is_file():
        return f"--base_config {arguments.base_config} is for a --pretrained_model_name_or_path that is one file"
    if arguments.to == "fused":
        return fused_inconsistency(arguments)
    return None


def fused_inconsistency(arguments: argparse.Namespace) -> str | None:
    base = arguments.pretrained_model_name_or_path
    if not base:
        return "--to fused needs --pretrained_model_name_or_path, the base model to fuse into"
    one_file = Path(base).is_file()
    if one_file and arguments.save_precision:
        return f"--save_precision: {base} is one file, whose weights keep their own precision"
    if one_file != (arguments.output.suffix == ".safetensors"):
        kinds = ("one file", "one .safetensors file") if one_file else ("a folder", "a folder")
        return f"--output {arguments.output}: a base that is {kinds[0]} is fused into {kinds[1]}"
    return None


# ---- from a file to layers ----


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.inspect is not None:
        print(inspect(read_adapter(arguments.inspect, arguments.allow_pickle)))
        return
    file = read_adapter(arguments.input, arguments.allow_pickle)
    if file.needs_weights and arguments.to != "fused":
        raise not_kronecker_error(file)
    adapter = match(file, arguments)
    if arguments.to != "fused":
        adapter = as_kronecker(adapter, arguments)
    arguments.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    FORMATS[arguments.to](adapter, arguments)


def match(file: AdapterFile, arguments: argparse.Namespace) -> MatchedAdapter:
    """Return the file matched with its base model, of which no weights are read.

    Raises UserError if that is not a base model, KroneckerError if the file does not fit it.
    """
    base, base_config = arguments.pretrained_model_name_or_path, arguments.base_config
    if base is None:
        return match_published(file)
    config = BaseModelOptions(pretrained_model_name_or_path=base, base_config=base_config)
    if (
        family := base_source(config).family
    ) and base_config is None:  # a published architecture needs no configuration
        return match_layers(file, load_architecture(family.architecture))
    return match_layers(file, empty_models(config, COMPONENTS))


def as_kronecker(adapter: MatchedAdapter, arguments: argparse.Namespace) -> MatchedAdapter:
    """Return the adapter with the nearest Kronecker factors for the layers of a LoRA, whose error is printed."""
    file = adapter.file
    if not file.is_lora:
        if arguments.kron_a1:
            raise UserError(f"--kron_a1, --kron_a2: {file.path} is not a LoRA; its factors keep their shape")
        return adapter
    if arguments.to != "native":
        raise UserError(f"--to {arguments.to}: {file.path} is a LoRA; it can be converted --to native or --to fused")
    layers, transposed_rows, worst = dict(adapter.layers), file.own_metadata.get("rows") == "transposed", 0.0
    for layer, entry in layers.items():
        if isinstance(entry, LowRank):
            layers[layer], error = lora_to_kronecker(entry, *factor_shape(layer, file, arguments), transposed_rows)
            worst = max(worst, error)
    print(f"Nearest Kronecker product of every layer: largest relative error {worst:.2g}")
    return replace(adapter, layers=layers)


def factor_shape(layer: Layer, file: AdapterFile, arguments: argparse.Namespace) -> tuple[int, int]:
    """Return (a1, a2) from the command line, or from the metadata of a LoRA that was converted from factors."""
    if arguments.kron_a1:
        return arguments.kron_a1, arguments.kron_a2
    if shape := file.layout.shape_of(layer.native) or file.layout.shape_of(layer.kohya):
        return shape
    raise UserError(f"{file.path} is a LoRA: give the shape (a1, a2) of the factors with --kron_a1 and --kron_a2")


# ---- the formats: each writes, and prints what the user should know ----


def to_native(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    metadata, kohya_names = metadata_for(adapter, arguments), arguments.sdxl_names == "diffusers"
    write_native(arguments.output, adapter.factors, adapter.family, metadata, dtype_of(arguments), kohya_names)
    announce(adapter, arguments)
    if any(factors.transposed_rows for factors in adapter.factors.values()):
        print("Its rows are in the order of the paper's code, which load_kronecker reads; for other tools: --to lora")


def to_diffusers(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    write_diffusers(arguments.output, adapter.factors, metadata_for(adapter, arguments), dtype_of(arguments))
    announce(adapter, arguments)
    print(f"\nIn diffusers 0.42 and later:\n\n{diffusers_snippet(arguments.output, adapter.factors)}")


def to_peft(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    base = arguments.pretrained_model_name_or_path or adapter.file.own_metadata.get("base_model")
    name = shared_name(base) if base and not arguments.no_metadata else None
    write_peft(arguments.output, adapter.factors, name, dtype_of(arguments))
    announce(adapter, arguments)
    print(f"\nIn peft:\n\n{peft_snippet(arguments.output, adapter.factors)}")


def to_lora(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    layers, dtype, rank = adapter.factors, dtype_of(arguments), arguments.rank
    size, changed = lora_bytes(layers, rank, dtype), dense_bytes(layers, dtype)
    print(f"The LoRA takes {size / 2**20:,.1f} MiB in {arguments.save_precision or DEFAULT_PRECISION}", end="")
    if size >= changed:
        print(f", the weights that it changes {changed / 2**20:,.1f}: use a small --rank, or --to fused", end="")
    print(flush=True)
    metadata, kohya_names = metadata_for(adapter, arguments), arguments.sdxl_names == "diffusers"
    report = write_lora(arguments.output, layers, adapter.family, metadata, dtype, rank, kohya_names)
    if rank:
        for layer, (r, error) in report.items():
            print(f"    rank {r:4d}  relative error {error:.2e}  {layer.dotted}")
    print(f"Relative error of all layers together: {total_error(layers, report):.2e}")
    announce(adapter, arguments)
    print(f"\nIn diffusers:\n\n{lora_snippet(arguments.output)}")


def to_fused(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    base, output = arguments.pretrained_model_name_or_path, arguments.output
    if Path(base).is_file():
        fuse_checkpoint(Path(base), output, adapter.layers, checkpoint_family(Path(base)))
    else:
        fuse_pipeline(base, output, adapter.layers, dtype_of(arguments))
    announce(adapter, arguments)


FORMATS: dict[str, Callable[[MatchedAdapter, argparse.Namespace], None]] = {
    "native": to_native,
    "diffusers": to_diffusers,
    "peft": to_peft,
    "lora": to_lora,
    "fused": to_fused,
}


def dtype_of(arguments: argparse.Namespace) -> torch.dtype:
    return DTYPES[arguments.save_precision or DEFAULT_PRECISION]


def metadata_for(adapter: MatchedAdapter, arguments: argparse.Namespace) -> dict[str, str]:
    carried = carried_metadata(adapter.file)
    return {key: carried[key] for key in NEEDED_KEYS if key in carried} if arguments.no_metadata else carried


def announce(adapter: MatchedAdapter, arguments: argparse.Namespace) -> None:
    made_for = adapter.family.title if adapter.family else "this model"
    print(f"Wrote {len(adapter.layers)} layers for {made_for} to {arguments.output}")


if __name__ == "__main__":
    with readable_errors():
        main()
