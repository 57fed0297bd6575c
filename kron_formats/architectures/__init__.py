"""The families' base models without weights, for questions that names and sizes answer."""

import json
from pathlib import Path

import torch
from torch import nn

from kron_formats.errors import KroneckerError
from kron_formats.families import FAMILIES
from kron_formats.matching import MatchedAdapter, file_family, match_layers
from kron_formats.reading import AdapterFile

ARCHITECTURES = {family.published: family.architecture for family in FAMILIES}  # as people call it -> file


def load_architecture(file: str) -> dict[str, nn.Module]:
    """Return {"unet": ..., "text_encoder": ..., (SDXL) "text_encoder_2": ...}, on the meta device."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text_encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}

    parts = json.loads(Path(__file__).with_name(f"{file}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        models: dict[str, nn.Module] = {"unet": UNet2DConditionModel(**parts.pop("unet"))}
        return models | {name: text_encoders[name](CLIPTextConfig(**values)) for name, values in parts.items()}


def match_published(file: AdapterFile) -> MatchedAdapter:
    """Return an adapter file matched with the published model that it fits. Raises KroneckerError if it fits none."""
    likely, problems = file_family(file), []
    for family in sorted(FAMILIES, key=lambda family: family != likely):
        try:
            return match_layers(file, load_architecture(family.architecture))
        except KroneckerError as error:
            problems.append(str(error))
    raise KroneckerError(
        f"{file.path} fits none of {', '.join(ARCHITECTURES)}: name its base model with "
        f"--pretrained_model_name_or_path ({problems[0]})"
    )
