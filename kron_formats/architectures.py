"""Base models without weights, for what names and sizes alone can answer."""

import json
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = {"SD 1.5": "sd15", "SD 2.1": "sd21", "SDXL": "sdxl"}
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def load_architecture(file: str) -> dict[str, nn.Module]:
    """Return {"unet": ..., "text_encoder": ..., (SDXL) "text_encoder_2": ...}, on the meta device."""
    parts = json.loads((ROOT / "configs" / "architectures" / f"{file}.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(parts.pop("unet"))
        return {"unet": unet} | {name: CLIPTextModel(CLIPTextConfig(**values)) for name, values in parts.items()}
