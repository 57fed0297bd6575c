"""Convert an adapter file into the layout that a tool reads, or say what a file is.

    python scripts/convert.py outputs/dog/pytorch_kronecker_weights.safetensors --to lora --output dog-lora.safetensors
    python scripts/convert.py lokr.safetensors --to native --output dog.safetensors
    python scripts/convert.py --inspect dog.safetensors

INPUT is a Kronecker adapter of any tool (kohya, LyCORIS, ai-toolkit, OneTrainer, diffusers, peft, the paper's own code)
or a LoRA.  FORMAT:

    native      what training writes: ComfyUI, A1111, Forge, LyCORIS, sd-scripts, this project
    diffusers   for load_lora_adapter of diffusers 0.42 and later; square factors
    peft        a folder per component for PeftModel.from_pretrained; square factors
    lora        every LoRA tool; exact, or with --rank the best of that rank, and then the error is printed
    fused       a base model with the adapter in its weights; a folder, or one file where the base is one file

Names are looked up in the base model. SD 1.5, SD 2.1 and SDXL are known; another one has to be named.
"""

import argparse
import sys
from pathlib import Path

from dreambooth.options.base_model import AdaptedModelOptions

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusers import DiffusionPipeline
from torch import nn

from dreambooth.base_model.loading import DTYPES, empty_models
from dreambooth.errors import UserError, readable_errors
from kron_formats.architectures import ARCHITECTURES, load_architecture
from kron_formats.export import (
    dense_bytes,
    lora_bytes,
    square_factor,
    total_error,
    write_diffusers,
    write_lora,
    write_peft,
)
from kron_formats.fused import checkpoint_family, fuse_checkpoint, fuse_pipeline
from kron_formats.inspection import inspect
from kron_formats.lora import lora_to_kronecker
from kron_formats.matching import file_family, match_layers
from kron_formats.names import FAMILY_NAMES, KroneckerError, Layer, family
from kron_formats.reading import AdapterFile, Factors, LowRank, read_adapter
from kron_formats.writing import LAYOUT_KEYS, write_native

Models = dict[str, nn.Module]
FORMATS = ("native", "diffusers", "peft", "lora", "fused")
CARRIED = (  # metadata of other tools that stays true in another layout
    "modelspec.title", "modelspec.author", "modelspec.license", "modelspec.resolution", "modelspec.thumbnail",
    "modelspec.trigger_phrase", "ss_tag_frequency",
)  # fmt: skip
FILES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}  # family -> configs/architectures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("input", nargs="?", type=Path, metavar="INPUT", help="adapter file, or a folder of peft's")
    parser.add_argument("--inspect", type=Path, metavar="FILE", help="say what a file is and who can load it")
    parser.add_argument("--to", choices=FORMATS, metavar="FORMAT", help="one of " + ", ".join(FORMATS))
    parser.add_argument("--output", type=Path, metavar="PATH", help="what to write; must not exist")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        help="base model: a name on the Hub, a folder in diffusers' layout, or for fused a .safetensors checkpoint",
    )
    parser.add_argument("--rank", type=int, help="lora: largest rank of a layer; default: exact")
    parser.add_argument(
        "--sdxl_names",
        choices=("sgm", "diffusers"),
        default="sgm",
        help="SDXL's block names in native and lora files; default: sgm",
    )
    parser.add_argument(
        "--save_precision",
        choices=tuple(DTYPES),
        default="fp32",
        help="precision of what is written; default: fp32. A checkpoint that is one file keeps its own",
    )
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read a .bin of the paper's code as well: tensors alone, nothing in it is run",
    )
    parser.add_argument("--kron_a1", type=int, help="rows of A, for a LoRA that this project did not make")
    parser.add_argument("--kron_a2", type=int, help="columns of A, for a LoRA that this project did not make")
    arguments = parser.parse_args(argv)
    if arguments.inspect is None and not (arguments.input and arguments.to and arguments.output):
        parser.error("give INPUT, --to and --output, or --inspect FILE")
    if arguments.rank is not None and (arguments.to != "lora" or arguments.rank < 1):
        parser.error("--rank is for --to lora, and at least 1")
    if (arguments.kron_a1 is None) != (arguments.kron_a2 is None):
        parser.error("--kron_a1 and --kron_a2 go together")
    if arguments.to == "fused" and not arguments.pretrained_model_name_or_path:
        parser.error("--to fused needs --pretrained_model_name_or_path, the base model to fuse into")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.inspect is not None:
        print(inspect(read_adapter(arguments.inspect, arguments.allow_pickle)))
        return
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output} is there already; choose another path")
    file = read_adapter(arguments.input, arguments.allow_pickle)
    base = arguments.pretrained_model_name_or_path
    models = empty_base(base) if base else recognise(file)
    matched = match_layers(file, models)
    layers = matched if arguments.to == "fused" else as_factors(matched, file, arguments)
    arguments.output.absolute().parent.mkdir(parents=True, exist_ok=True)
    {"native": to_native, "diffusers": to_diffusers, "peft": to_peft, "lora": to_lora, "fused": to_fused}[arguments.to](
        layers, file, models, arguments
    )


def empty_base(name: str) -> Models:
    """Return the base model without weights. Raises UserError or KroneckerError where it is none."""
    if Path(name).is_file():
        return load_architecture(FILES[checkpoint_family(Path(name))])
    return empty_models(AdaptedModelOptions(pretrained_model_name_or_path=name), DiffusionPipeline)


def recognise(file: AdapterFile) -> Models:
    """Return the known architecture that a file fits. Raises KroneckerError where it fits none."""
    likely, problems = FILES.get(file_family(file)), []
    for architecture in sorted(ARCHITECTURES.values(), key=lambda name: name != likely):
        models = load_architecture(architecture)
        try:
            match_layers(file, models)
            return models
        except KroneckerError as error:
            problems.append(str(error))
    raise KroneckerError(
        f"{file.path} fits none of {', '.join(ARCHITECTURES)}: name its base with --pretrained_model_name_or_path "
        f"({problems[0]})"
    )


def as_factors(
    matched: dict[Layer, Factors | LowRank], file: AdapterFile, arguments: argparse.Namespace
) -> dict[Layer, Factors]:
    """Return the entries as Kronecker factors; a LoRA's are the nearest ones, and their error is printed."""
    if not file.is_lora:
        return matched
    if arguments.to != "native":
        raise KroneckerError(f"{file.path} is a LoRA; it can become a Kronecker adapter (--to native) or be fused")
    worst, layers = 0.0, {}
    for layer, entry in matched.items():
        a1, a2 = factor_shape(layer, file, arguments)
        if isinstance(entry, LowRank):
            entry, error = lora_to_kronecker(entry, a1, a2, file.own_metadata.get("rows") == "transposed")
            worst = max(worst, error)
        layers[layer] = entry
    print(f"Nearest Kronecker product of every layer: largest relative error {worst:.2g}")
    return layers


def factor_shape(layer: Layer, file: AdapterFile, arguments: argparse.Namespace) -> tuple[int, int]:
    """Return (a1, a2) from the command line, or from the metadata of a LoRA that was converted from factors."""
    if arguments.kron_a1 and arguments.kron_a2:
        return arguments.kron_a1, arguments.kron_a2
    if shape := file.layout.shape_of(layer.native) or file.layout.shape_of(layer.kohya):
        return shape
    raise KroneckerError(f"{file.path} is a LoRA: say with --kron_a1 and --kron_a2 which factors to find")


# ---- the formats ----


def to_native(layers: dict[Layer, Factors], file: AdapterFile, models: Models, arguments: argparse.Namespace) -> None:
    dtype, kohya_names = DTYPES[arguments.save_precision], arguments.sdxl_names == "diffusers"
    write_native(arguments.output, layers, family(models), carried_metadata(file), dtype, kohya_names)
    announce(arguments.output, layers, models)
    if any(factors.transposed_rows for factors in layers.values()):
        print(
            "Its rows have the order of the paper's code: load_kronecker honours that; for other tools use --to lora."
        )


def to_diffusers(
    layers: dict[Layer, Factors], file: AdapterFile, models: Models, arguments: argparse.Namespace
) -> None:
    write_diffusers(arguments.output, layers, carried_metadata(file), DTYPES[arguments.save_precision])
    announce(arguments.output, layers, models)
    folder, name = arguments.output.absolute().parent, arguments.output.name
    components = list(dict.fromkeys(layer.component for layer in layers))
    print("\nIn diffusers 0.42 and later:\n")
    if "unet" in components:
        print(f'    pipe.unet.load_lora_adapter("{folder}", weight_name="{name}", prefix="unet")')
    if encoders := [component for component in components if component != "unet"]:
        r = max(side for factors in layers.values() for side in factors.B.shape)
        print(TEXT_ENCODER_SNIPPET.format(path=folder / name, encoders=encoders, r=r, a=square_factor(layers)))


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


def to_peft(layers: dict[Layer, Factors], file: AdapterFile, models: Models, arguments: argparse.Namespace) -> None:
    base = arguments.pretrained_model_name_or_path or file.own_metadata.get("base_model")
    write_peft(arguments.output, layers, base, DTYPES[arguments.save_precision])
    announce(arguments.output, layers, models)
    print("\nIn peft:\n\n    from peft import PeftModel")
    for component in dict.fromkeys(layer.component for layer in layers):
        print(f'    pipe.{component} = PeftModel.from_pretrained(pipe.{component}, "{arguments.output / component}")')


def to_lora(layers: dict[Layer, Factors], file: AdapterFile, models: Models, arguments: argparse.Namespace) -> None:
    dtype, kohya_names = DTYPES[arguments.save_precision], arguments.sdxl_names == "diffusers"
    size = lora_bytes(layers, arguments.rank, dtype)
    print(f"The LoRA takes {size / 2**20:,.1f} MiB in {arguments.save_precision}", end="")
    if size >= (dense := dense_bytes(layers, dtype)):
        print(f", the weights that it changes {dense / 2**20:,.1f}: it makes no sense without a small --rank", end="")
    print(flush=True)
    report = write_lora(
        arguments.output, layers, family(models), carried_metadata(file), dtype, arguments.rank, kohya_names
    )
    if arguments.rank:
        for layer, (r, error) in report.items():
            print(f"    rank {r:4d}  relative error {error:.2e}  {layer.dotted}")
    print(f"Relative error of all layers together: {total_error(layers, report):.2e}")
    announce(arguments.output, layers, models)
    folder = arguments.output.absolute().parent
    print(f'\nIn diffusers:\n\n    pipe.load_lora_weights("{folder}", weight_name="{arguments.output.name}")')


def to_fused(
    layers: dict[Layer, Factors | LowRank], file: AdapterFile, models: Models, arguments: argparse.Namespace
) -> None:
    base = arguments.pretrained_model_name_or_path
    one_file = Path(base).is_file()
    if one_file != (arguments.output.suffix == ".safetensors"):
        raise UserError(
            f"--output {arguments.output}: a base that is {'one file' if one_file else 'a folder'} is fused into "
            f"{'one .safetensors file' if one_file else 'a folder'}"
        )
    if one_file:
        fuse_checkpoint(Path(base), arguments.output, layers, checkpoint_family(Path(base)))
    else:
        fuse_pipeline(base, arguments.output, layers, DTYPES[arguments.save_precision])
    announce(arguments.output, layers, models)


def carried_metadata(file: AdapterFile) -> dict[str, str]:
    """Return what a file says about its training, for the file made of it; what its layout says is written anew."""
    own = {key: value for key, value in file.own_metadata.items() if key not in LAYOUT_KEYS}
    return own | {key: file.metadata[key] for key in CARRIED if key in file.metadata}


def announce(path: Path, layers: dict, models: Models) -> None:
    made_for = family(models)
    print(f"Wrote {len(layers)} layers for {FAMILY_NAMES.get(made_for, 'this model')} to {path}")


if __name__ == "__main__":
    with readable_errors():
        main()
