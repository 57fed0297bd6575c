"""Base models of the published sizes with random weights, made on the device: their speed and memory are the real ones.

    python benchmarks/random_models.py sdxl outputs/random-sdxl          # a pipeline folder in bf16, 7 GB
    python benchmarks/random_models.py tiny-sdxl outputs/random-tiny     # the same in little, for a try on a CPU

The folder loads with `from_pretrained`. Its tokenizers have one token per byte.
"""

import argparse
import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dreambooth.errors import readable_errors
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.family import Family
from dreambooth.options.paths import path_argument
from kron_formats.architectures import ARCHITECTURES, load_architecture
from toyworld.tiny_pipeline import build_pipeline, build_scheduler, build_tokenizer, vae_blocks

TINY = {"tiny": "sd", "tiny-sdxl": "sdxl"}  # those of toyworld/tiny_pipeline.py
CHOICES = [*ARCHITECTURES.values(), *TINY]
VAE: dict[str, Any] = {**vae_blocks(128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
VAE_OF_FAMILY = {
    "sd": {"sample_size": 512, "scaling_factor": 0.18215},
    "sdxl": {"sample_size": 1024, "scaling_factor": 0.13025},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=CHOICES)
    parser.add_argument("folder", type=path_argument)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    pipeline = random_pipeline(arguments.architecture, torch.device(arguments.device), torch.bfloat16)
    pipeline.save_pretrained(arguments.folder)
    print(f"Wrote {arguments.folder}")


def family_of(architecture: str) -> Family:
    return SDXL if architecture in ("sdxl", "tiny-sdxl") else SD


def random_unet(architecture: str, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return a UNet of the real configuration with random weights."""
    if architecture in TINY:
        pipeline: Any = build_pipeline(TINY[architecture])
        return pipeline.unet.to(device, dtype).train()
    unet: Any = load_architecture(architecture)["unet"].to(dtype).to_empty(device=device).train()
    for parameter in unet.parameters():
        fan_in = parameter.numel() / len(parameter)
        nn.init.normal_(parameter, std=fan_in**-0.5 if parameter.dim() > 1 else 0.1)
    return unet


def random_encoders(architecture: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return component -> text encoder, with the random weights that its class begins with."""
    if architecture in TINY:
        pipeline = build_pipeline(TINY[architecture])
        encoders = {name: getattr(pipeline, name) for name in family_of(architecture).text_encoders}
        return {name: encoder.to(device, dtype) for name, encoder in encoders.items()}
    _, *encoders = load_architecture(architecture).items()
    with device:
        return {name: type(encoder)(encoder.config).to(dtype) for name, encoder in encoders}


def random_pipeline(architecture: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a whole pipeline, as it is published but for its weights and tokenizers."""
    family = family_of(architecture)
    if architecture in TINY:
        return build_pipeline(TINY[architecture]).to(device, dtype)
    with device:
        vae: Any = AutoencoderKL(**VAE, **VAE_OF_FAMILY[family.name])
    models = {
        "unet": random_unet(architecture, device, dtype).eval(),
        **random_encoders(architecture, device, dtype),
        "vae": vae.to(dtype).eval(),
        "scheduler": build_scheduler("epsilon"),
    }
    return pipeline_of(family, models)


def pipeline_of(family: Family, models: dict[str, Any]) -> Any:
    """Return a pipeline of the models, with a tokenizer of its own for every text encoder, and nothing else."""
    needed = inspect.signature(family.pipeline_class).parameters.values()
    absent = {part.name: None for part in needed if part.default is part.empty}
    tokenizers = {name: build_tokenizer() for name in family.tokenizers}
    return family.pipeline_class(**{**absent, **family.loading, **models, **tokenizers})


def shared(base: dict[str, Any]) -> dict[str, Any]:
    """Return copies of models whose parameters are others, on the same memory.

    What trains in place changes that memory for all of them, which changes no time.
    """
    parameters = (parameter for model in base.values() for parameter in model.parameters())
    known = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in parameters}
    return copy.deepcopy(base, known)


if __name__ == "__main__":
    with readable_errors():
        main()
