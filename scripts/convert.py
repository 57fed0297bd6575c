"""Convert an adapter file into the layout that a tool reads, or say what a file is.

    python scripts/convert.py outputs/dog/pytorch_kronecker_weights.safetensors --to lora --output dog-lora.safetensors
    python scripts/convert.py lokr.safetensors --to native --output dog.safetensors
    python scripts/convert.py --inspect dog.safetensors

INPUT is a Kronecker adapter or a LoRA of any tool (kohya, LyCORIS, ai-toolkit, OneTrainer, diffusers, peft, the paper's
own code), or spectral shifts (SVDiff), Custom Diffusion's weights, or the folder of a model that was trained in full.
FORMAT:

    native      Kronecker adapters: for ComfyUI, A1111, Forge, LyCORIS, sd-scripts and this project
    diffusers   Kronecker adapters with square factors: for load_lora_adapter of diffusers 0.42 and later
    peft        the same: a folder per component for PeftModel.from_pretrained
    lora        all, for every LoRA tool: with --rank the nearest of that rank, and its error is printed; a Kronecker
                adapter also exactly
    fused       all: a base model with the changes in its weights; a folder, or one file if the base is one file
    custom_diffusion   Custom Diffusion: the folder that diffusers' own training writes

Layers are looked up in the base model. SD 1.5, SD 2.1 and SDXL are known; name any other one.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2",
#     "bitsandbytes==0.50.2", "safetensors==0.8.0", "datasets==5.2.0", "filelock==4.3.1", "psutil==7.2.2",
#     "numpy==2.4.6", "pillow==13.0.0", "PyYAML==6.0.3", "Jinja2==3.1.6", "matplotlib==3.11.2", "tqdm==4.70.1",
#     "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.runtime.library_warnings import drop_needless_warnings

drop_needless_warnings()  # before the imports that cause some

from dreambooth.base_model.loading import DTYPES
from dreambooth.conversion import DEFAULT_PRECISION, FORMATS, convert
from dreambooth.errors import readable_errors
from dreambooth.options.kronecker import size_argument
from dreambooth.options.paths import path_argument, path_or_name
from kron_formats.inspection import inspect
from kron_formats.reading import read_adapter

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
    add(
        "input",
        nargs="?",
        type=path_argument,
        metavar="INPUT",
        help="a file of any method, or a folder of peft or of a model",
    )
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
    add("--rank", type=positive, help="lora: largest rank of a layer; default: exact, which needs factors")
    add("--sdxl_names", choices=("sgm", "diffusers"), help="native, lora: SDXL's block names; default: sgm")
    add(
        "--save_precision",
        choices=tuple(DTYPES),
        help=f"precision of what is written; default: {DEFAULT_PRECISION}. A checkpoint that is one file keeps its own",
    )
    add(
        "--allow_pickle",
        action="store_true",
        help="also read a pickle (.bin): only its tensors; no code in it is run",
    )
    add(
        "--no_metadata",
        action="store_true",
        help="leave out what tools do not need: prompts, options, the base model's name, thumbnail",
    )
    for_loras = "for a LoRA that this project did not make"
    add("--kron_a1", type=size_argument("a1"), help=f"native: rows of A, or d_out, d_out/8, {for_loras}")
    add("--kron_a2", type=size_argument("a2"), help=f"native: columns of A, or d_in, d_in/8, {for_loras}")
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


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.inspect is not None:
        print(inspect(read_adapter(arguments.inspect, arguments.allow_pickle)))
        return
    file = read_adapter(arguments.input, arguments.allow_pickle)
    convert(file, arguments)


if __name__ == "__main__":
    with readable_errors():
        main()
