"""What the layers of a pipeline are called in files.

    diffusers   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q        text_encoder.text_model...
    kohya       lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q   lora_te_text_model_encoder_...
    SGM         lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q             (SDXL's UNet, kohya's prefix)
    ComfyUI     diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q       text_encoders.clip_l...

Names are never parsed: every layer of the model at hand is spelled in all ways, and a file's names are looked up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch import nn

from kron_formats.errors import KroneckerError as KroneckerError

Models = nn.Module | Mapping[str, nn.Module] | Any  # a UNet, {"unet": ..., "text_encoder": ...}, a diffusers pipeline
Family = Literal["sd1", "sd2", "sdxl"]
FAMILY_NAMES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
WRAPPERS = ("base", "base_layer")  # where KroneckerLinear and peft's layers keep the layer that they wrap
SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SGM_WITHIN = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}  # places in a block of the tree
SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
CLIPS = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",)}  # ComfyUI's names; clip_h is SD 2's


@dataclass(frozen=True)
class Layer:
    """A linear layer or a convolution of a pipeline."""

    component: str  # "unet", "text_encoder" or "text_encoder_2"
    name: str  # diffusers' path in the component; a text encoder's always begins with "text_model."
    path: str  # where the module is found now: under wrappers, or without "text_model"
    module: nn.Linear | nn.Conv2d
    sgm: str  # its path in the tree of Stability's own code; a text encoder's is its name
    native: str  # its name in the files that we write
    kohya: str  # its name under diffusers' block names, dots as underscores

    @property
    def dotted(self) -> str:
        return f"{self.component}.{self.name}"

    @property
    def kernel(self) -> tuple[int, ...]:
        """(k, k) of a convolution, () of a linear layer."""
        return self.module.kernel_size if isinstance(self.module, nn.Conv2d) else ()

    @property
    def size(self) -> tuple[int, int]:
        """(d_out, d_in) of its weight as a matrix."""
        return matrix_size(self.module)

    def spellings(self) -> tuple[str, ...]:
        """Return every name under which a file may mean this layer."""
        parent, _, projection = self.name.removesuffix(".0").rpartition(".")
        reference = f"{parent}.processor.{projection}_lora"
        return (
            self.native,
            self.kohya,
            self.kohya.replace("lora_te_", "lora_te1_"),
            f"lycoris_{self.name.replace('.', '_')}",
            self.dotted,
            f"{self.component}.{self.path}",
            f"{self.component}.{reference}",
            f"{self.dotted}.lora_linear_layer",
            f"{self.dotted}.lora_layer",
            *self._comfy_spellings(),
            self.name,
            self.path,
        )

    def _comfy_spellings(self) -> list[str]:
        """Names as ComfyUI has its modules, and as OneTrainer writes them in its formats Comfy, Original and OMI."""
        if self.component == "unet":
            prefixes = ("diffusion_model.", "unet.", "")
            return [f"lora_unet_{self.sgm.replace('.', '_')}", *(f"{prefix}{self.sgm}" for prefix in prefixes)]
        clips = CLIPS[self.component]
        return [f"{prefix}.{self.name}" for clip in clips for prefix in (f"text_encoders.{clip}.transformer", clip)]


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
    """Return the linear layers and convolutions of a model, a mapping of models or a pipeline, in its order."""
    parts = components(models)
    is_sdxl = family(parts) == "sdxl" or "text_encoder_2" in parts
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if is_sdxl else "lora_te", "text_encoder_2": "lora_te2"}
    layers = []
    for component, model in parts.items():
        for path, name, module in modules_of(model, (nn.Linear, nn.Conv2d)):
            if component != "unet" and name.startswith("encoder."):
                name = f"text_model.{name}"  # transformers 5 dropped that level from CLIPTextModel; files keep it
            sgm = sgm_name(name, model) if component == "unet" else name
            kohya = f"{prefixes[component]}_{name.replace('.', '_')}"
            native = f"lora_unet_{sgm.replace('.', '_')}" if component == "unet" and is_sdxl else kohya
            layers.append(Layer(component, name, path, module, sgm, native, kohya))
    return layers


def linear_modules(model: nn.Module) -> list[tuple[str, str, nn.Linear]]:
    """Return (path, name, module) of every `nn.Linear`: a name is a path without wrappers around the layer or model."""
    return modules_of(model, (nn.Linear,))


def modules_of(model: nn.Module, types: tuple[type[nn.Module], ...]) -> list[tuple[str, str, nn.Module]]:
    """Return (path, name, module) of every module of these types: a name is a path without wrappers."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, types):
            words = [word for word in path.removeprefix("base_model.model.").split(".") if word != "_orig_mod"]
            while words[-1] in WRAPPERS and len(words) > 1:
                words.pop()
            found.append((path, ".".join(words), module))
    return found


def matrix_size(module: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a layer's weight as a matrix: a kernel (c_out, c_in, k, k) is (c_out, c_in·k·k)."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * prod(module.kernel_size)
    return module.out_features, module.in_features


def sgm_name(name: str, unet: nn.Module) -> str:
    """Return the name of a UNet's layer in the tree of Stability's own code.

    Each block of the tree holds one resnet and its attention, or a sampler; a level has layers_per_block + 1 of them:
        down_blocks.i.resnets.j  -> input_blocks.(1+3i+j).0      mid_block.resnets.j    -> middle_block.(2j)
        down_blocks.i.attentions.j -> input_blocks.(1+3i+j).1    mid_block.attentions.0 -> middle_block.1
        up_blocks.i.attentions.j -> output_blocks.(3i+j).1       (3 at two layers per block)
        samplers end the last block of their level
    """
    words = name.split(".")
    config = getattr(unet, "config", None) or {}
    if words[0] == "mid_block" and words[1] in ("resnets", "attentions"):
        (kind, index), rest = words[1:3], words[3:]
        block = f"middle_block.{2 * int(index) if kind == 'resnets' else 1}"
    elif words[0] in ("down_blocks", "up_blocks") and words[2] in SGM_WITHIN and "layers_per_block" in config:
        (level, kind, index), rest = words[1:4], words[4:]
        blocks, within = config["layers_per_block"] + 1, SGM_WITHIN[kind]
        if kind == "upsamplers" and "CrossAttn" not in config["up_block_types"][int(level)]:
            within = 1
        number = blocks * int(level) + (blocks - 1 if kind.endswith("samplers") else int(index))
        tree, number = ("input_blocks", 1 + number) if words[0] == "down_blocks" else ("output_blocks", number)
        block = f"{tree}.{number}.{within}"
    else:
        return SGM_OUTSIDE.get(name, name)
    first = {"resnets": SGM_RESNET, "downsamplers": {"conv": "op"}}.get(kind, {}).get(rest[0], rest[0])
    return ".".join([block, first, *rest[1:]])


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
