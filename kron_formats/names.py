"""What the linear layers of a pipeline are called in files.

    diffusers   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q        text_encoder.text_model...
    kohya       lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q   lora_te_text_model_encoder_...
    SGM         lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q             (SDXL's UNet, kohya's prefix)

Names are never parsed: every layer of the model at hand is spelled in all ways, and a file's names are looked up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Models = nn.Module | Mapping[str, nn.Module] | Any  # a UNet, {"unet": ..., "text_encoder": ...}, a diffusers pipeline
Family = Literal["sd1", "sd2", "sdxl"]
FAMILY_NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
WRAPPERS = ("base", "base_layer")  # where KroneckerLinear and peft's layers keep the layer that they wrap


class KroneckerError(ValueError):
    """A request or a file that does not fit the model. The message is meant for the user."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of a pipeline."""

    component: str  # "unet", "text_encoder" or "text_encoder_2"
    name: str  # diffusers' path in the component; a text encoder's always begins with "text_model."
    path: str  # where the module is found now: under wrappers, or without "text_model"
    module: nn.Linear
    native: str  # its name in the files that we write
    kohya: str  # its name under diffusers' block names, dots as underscores

    @property
    def dotted(self) -> str:
        return f"{self.component}.{self.name}"

    def spellings(self) -> tuple[str, ...]:
        """Return every name under which a file may mean this layer."""
        parent, _, projection = self.name.removesuffix(".0").rpartition(".")
        reference = f"{parent}.processor.{projection}_lora"
        return (
            self.native,
            self.kohya,
            self.kohya.replace("lora_te_", "lora_te1_"),
            self.kohya.replace("lora_unet_", "lycoris_"),
            self.dotted,
            f"{self.component}.{self.path}",
            f"{self.component}.{reference}",
            f"{self.dotted}.lora_linear_layer",
            self.name,
            self.path,
        )


def components(models: Models) -> dict[str, nn.Module]:
    """Return component -> model of what can carry adapters."""
    if isinstance(models, nn.Module):
        return {"unet": models}
    parts = models if isinstance(models, Mapping) else models.components
    return {name: parts[name] for name in COMPONENTS if parts.get(name) is not None}


def family(models: Models) -> Family | None:
    """Return which Stable Diffusion the UNet belongs to, as far as its configuration says; None for other models."""
    config = getattr(components(models).get("unet"), "config", None) or {}
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    if "cross_attention_dim" not in config:
        return None
    return "sd2" if config["cross_attention_dim"] == 1024 else "sd1"


def find_layers(models: Models) -> list[Layer]:
    """Return the linear layers of a model, a mapping of models or a pipeline, in its order."""
    parts = components(models)
    is_sdxl = family(parts) == "sdxl" or "text_encoder_2" in parts
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if is_sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    layers = []
    for component, model in parts.items():
        for path, name, module in linear_modules(model):
            if component != "unet" and name.startswith("encoder."):
                name = f"text_model.{name}"  # transformers 5 dropped that level from CLIPTextModel; files keep it
            kohya = f"{prefixes[component]}_{name.replace('.', '_')}"
            native = kohya
            if component == "unet" and is_sdxl:
                native = f"lora_unet_{sgm_name(name, model).replace('.', '_')}"
            layers.append(Layer(component, name, path, module, native, kohya))
    return layers


def linear_modules(model: nn.Module) -> list[tuple[str, str, nn.Linear]]:
    """Return (path, name, module) of every `nn.Linear`: a name is a path without wrappers around the layer or model."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            words = path.removeprefix("_orig_mod.").removeprefix("base_model.model.").split(".")
            while words[-1] in WRAPPERS and len(words) > 1:
                words.pop()
            found.append((path, ".".join(words), module))
    return found


def sgm_name(name: str, unet: nn.Module) -> str:
    """Return the name of a UNet's layer in the tree of Stability's own code; only what lies in attentions has one.

    Each block of the tree holds one resnet or sampler, a level has layers_per_block + 1 of them:
        down_blocks.i.attentions.j -> input_blocks.(1+3i+j).1        mid_block.attentions.0 -> middle_block.1
        up_blocks.i.attentions.j   -> output_blocks.(3i+j).1         (3 at two layers per block)
    """
    words = name.split(".")
    if words[:3] == ["mid_block", "attentions", "0"]:
        return ".".join(["middle_block", "1", *words[3:]])
    if words[0] not in ("down_blocks", "up_blocks") or words[2] != "attentions":
        return name
    level, index = int(words[1]), int(words[3])
    block = (unet.config["layers_per_block"] + 1) * level + index
    tree = f"input_blocks.{1 + block}" if words[0] == "down_blocks" else f"output_blocks.{block}"
    return ".".join([tree, "1", *words[4:]])


def spelling_index(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Return every spelling -> layer. Where two layers share a bare path, the earlier component has it."""
    index = {}
    for layer in layers:
        for spelling in layer.spellings():
            index.setdefault(spelling, layer)
    return index


def match_target(name: str, targets: Sequence[str]) -> str | None:
    """Return the longest target that is the end of a layer's name, in whole words; None where none is."""
    return max((target for target in targets if f".{name}".endswith(f".{target}")), key=len, default=None)


def ending(name: str) -> str:
    """Return the last words of a name, those that say what a layer is: "attn1.to_out.0" -> "to_out.0"."""
    words = name.split(".")
    start = len(words) - 1
    while start > 0 and words[start].isdigit():
        start -= 1
    return ".".join(words[start:])
