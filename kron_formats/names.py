"""What the layers and the other parameters of a pipeline are called in files.

    diffusers   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q        text_encoder.text_model...
    kohya       lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q   lora_te_text_model_encoder_...
    SGM         lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q             (SDXL's UNet, kohya's prefix)
    ComfyUI     diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q       text_encoders.clip_l...

Names are never parsed: every layer of the model at hand is spelled in all ways, and a file's names are looked up. A
parameter's name is that of its module with ".weight" or ".bias"; the name of a module alone means its weight.
Models for which files have no names are refused.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, Protocol, TypeVar

from torch import nn

from kron_formats.changes import Size, size_of
from kron_formats.errors import KroneckerError
from kron_formats.families import (
    COMPONENT_CLASSES,
    COMPONENTS,
    FAMILIES,
    Family,
    TextEncoder,
    family_of_components,
    family_of_config,
)

M = TypeVar("M", bound=nn.Module)

Models = nn.Module | Mapping[str, Any] | Any  # a UNet, {"unet": ..., "text_encoder": ...}, a diffusers pipeline
WITHOUT_NAMES = ("vae", "safety_checker", "image_encoder", "controlnet", "adapter")  # a pipeline's other models
LIBRARIES = ("diffusers", "transformers")
WRAPPERS = ("base", "base_layer")  # where KroneckerLinear and peft's layers keep the layer that they wrap
IN_TEXT_MODEL = ("embeddings.", "encoder.", "final_layer_norm")  # what CLIPTextModel has
UNET_PREFIX = "lora_unet"  # what kohya's names of a UNet's layers begin with
REGULAR = "re:"  # what a regular expression begins with, among selections of layers
COMFY_UNET_PREFIXES = ("diffusion_model.", "unet.", "")
SGM_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
SGM_WITHIN = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}  # places in a block of the tree
SGM_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


class LinearLike(Protocol):
    """An `nn.Linear`, or a layer around one."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


# ---- layers ----


@dataclass(frozen=True)
class Layer:
    """A parameter of a pipeline: mostly the weight of a linear layer or a convolution.

    Those with the same component, name and parameter are equal.
    """

    component: str  # "unet", "text_encoder" or "text_encoder_2"
    name: str  # diffusers' path of its module in the component; what CLIPTextModel has is in "text_model."
    path: str = field(compare=False)  # where the module is found now: under wrappers, or without "text_model"
    module: Any = field(compare=False)  # an nn.Linear, an nn.Conv2d, or whatever has the parameter
    sgm: str = field(compare=False)  # its path in the tree of Stability's own code; a text encoder's is its name
    native: str = field(compare=False)  # its name in the files that we write
    kohya: str = field(compare=False)  # its name under diffusers' block names, dots as underscores
    text_encoder: TextEncoder | None = field(compare=False)  # None in the UNet
    parameter: str = "weight"  # its name in the module

    @property
    def dotted(self) -> str:
        """The component and diffusers' path of the module, and the parameter if it is not the weight."""
        return f"{self.component}.{self.name}" + ("" if self.parameter == "weight" else f".{self.parameter}")

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer or a convolution."""
        return self.parameter == "weight" and isinstance(self.module, (nn.Linear, nn.Conv2d))

    @property
    def kernel(self) -> tuple[int, ...]:
        """(k, k) of a convolution, () of a linear layer."""
        return self.module.kernel_size if isinstance(self.module, nn.Conv2d) else ()

    @property
    def size(self) -> Size:
        """(d_out, d_in) of a weight as a matrix, (n,) of a vector."""
        return matrix_size(self.module) if self.is_matrix else size_of(getattr(self.module, self.parameter).shape)

    def spellings(self) -> list[str]:
        """Return every name under which a file may mean this parameter."""
        parent, _, projection = self.name.removesuffix(".0").rpartition(".")
        custom = f"{parent}.processor.{projection}_custom_diffusion{'.0' if self.name.endswith('.0') else ''}"
        modules = [f"{self.component}.{self.name}", f"{self.component}.{self.path}", self.name, self.path, custom]
        if self.text_encoder is None:
            modules.append(f"model.diffusion_model.{self.sgm}")
        names = [f"{module}.{self.parameter}" for module in modules]
        return [*self._module_spellings(), *names] if self.parameter == "weight" else names

    def _module_spellings(self) -> tuple[str, ...]:
        """Names of the module, as adapters have them."""
        parent, _, projection = self.name.removesuffix(".0").rpartition(".")
        reference = f"{parent}.processor.{projection}_lora"
        flat = self.name.replace(".", "_")
        return (
            self.native,
            self.kohya,
            *self._other_spellings(flat),
            f"lycoris_{flat}",
            self.dotted,
            f"{self.component}.{self.path}",
            f"{self.component}.{reference}",
            f"{self.dotted}.lora_linear_layer",
            f"{self.dotted}.lora_layer",
            self.name,
            self.path,
        )

    def _other_spellings(self, flat: str) -> list[str]:
        """Names as ComfyUI has its modules, and as OneTrainer writes them in its formats Comfy, Original and OMI."""
        if self.text_encoder is None:
            prefixed = [f"{prefix}{self.sgm}" for prefix in COMFY_UNET_PREFIXES]
            return [f"{UNET_PREFIX}_{self.sgm.replace('.', '_')}", *prefixed]
        return [
            *(f"{prefix}_{flat}" for prefix in self.text_encoder.other_prefixes),
            *(f"{prefix}{self.name}" for prefix in _comfy_prefixes(self.text_encoder)),
        ]


def _comfy_prefixes(text_encoder: TextEncoder) -> tuple[str, str]:
    return f"text_encoders.{text_encoder.clip}.transformer.", f"{text_encoder.clip}."


def find_layers(models: Models) -> list[Layer]:
    """Return the weights of the linear layers and convolutions of a model, a mapping of models or a pipeline, in order.

    Raises KroneckerError as `components` does.
    """
    return list(_named(models, (nn.Linear, nn.Conv2d), lambda module: ("weight",)))


def find_parameters(models: Models) -> list[Layer]:
    """Return every parameter of a model, a mapping of models or a pipeline: biases, norms and embeddings too.

    Raises KroneckerError as `components` does.
    """
    return list(_named(models, (nn.Module,), lambda module: dict(module.named_parameters(recurse=False))))


def _named(
    models: Models, types: tuple[type[nn.Module], ...], parameters: Callable[[nn.Module], Iterable[str]]
) -> Iterator[Layer]:
    parts = components(models)
    spelled_as = family(parts) or family_of_components(parts)
    for component, model in parts.items():
        text_encoder = None if component == "unet" else spelled_as.text_encoder(component)
        for path, name, module in modules_of(model, types):
            if not (own := parameters(module)):
                continue
            if text_encoder and name.startswith(IN_TEXT_MODEL):
                name = f"text_model.{name}"  # transformers 5 dropped that level from CLIPTextModel; files keep it
            sgm = name if text_encoder else sgm_name(name, model)
            kohya = f"{text_encoder.prefix if text_encoder else UNET_PREFIX}_{name.replace('.', '_')}"
            native = kohya
            if text_encoder is None and spelled_as.sgm_names:
                native = f"{UNET_PREFIX}_{sgm.replace('.', '_')}"
            for parameter in own:
                yield Layer(component, name, path, module, sgm, native, kohya, text_encoder, parameter)


def spelling_index(layers: Sequence[Layer]) -> dict[str, Layer]:
    """Return every spelling -> layer. If two layers share a bare path, the earlier component has it."""
    index = {}
    for layer in layers:
        for spelling in layer.spellings():
            index.setdefault(spelling, layer)
    return index


def component_of(name: str) -> str | None:
    """Return the component that a layer's name in a file suggests by its beginning; None if it suggests none."""
    return next((component for component, starts in _beginnings().items() if name.startswith(starts)), None)


def is_kohya(name: str) -> bool:
    """Whether a layer's name in a file has one of kohya's prefixes."""
    encoders = (encoder for family in FAMILIES for encoder in family.text_encoders)
    prefixes = {prefix for encoder in encoders for prefix in (encoder.prefix, *encoder.other_prefixes)}
    return name.startswith(tuple(f"{prefix}_" for prefix in {UNET_PREFIX, *prefixes}))


@cache
def _beginnings() -> dict[str, tuple[str, ...]]:
    starts = {component: [f"{component}."] for component in reversed(COMPONENTS)}  # the UNet's are the shortest
    for text_encoder in (encoder for family in FAMILIES for encoder in family.text_encoders):
        prefixes = (f"{prefix}_" for prefix in (text_encoder.prefix, *text_encoder.other_prefixes))
        starts[text_encoder.component] += [*prefixes, *_comfy_prefixes(text_encoder)]
    starts["text_encoder"] += ["lycoris_text_model_", "text_model.", "encoder.layers."]
    starts["text_encoder"] += IN_TEXT_MODEL
    blocks = ("down_blocks.", "mid_block.", "up_blocks.", "input_blocks.", "middle_block.", "output_blocks.")
    blocks += ("conv_", "time_embedding.", "add_embedding.", "model.diffusion_model.")
    starts["unet"] += [f"{UNET_PREFIX}_", "lycoris_", "diffusion_model.", *blocks]
    return {component: tuple(beginnings) for component, beginnings in starts.items()}


# ---- models ----


def components(models: Models) -> dict[str, nn.Module]:
    """Return component -> model for all that files have names for: the UNet and the text encoders.

    A bare module counts as the UNet. Modules of classes outside diffusers and transformers are taken as they are.

    Raises KroneckerError if there is anything else among the models that an adapter could be for (a transformer, a
    third text encoder, a T5): its layers would be left out, or written under names that mean others.
    """
    if isinstance(models, nn.Module):
        _check_class("unet", models)
        return {"unet": models}
    given = given_modules(models)
    if unknown := [name for name in given if name not in (*COMPONENTS, *WITHOUT_NAMES)]:
        raise _unknown(", ".join(f"{name} ({type(given[name]).__name__})" for name in unknown))
    parts = {name: given[name] for name in COMPONENTS if name in given}
    if not parts:
        raise _unknown(f"a {type(models).__name__} with {', '.join(given) or 'no models'}")
    for name, model in parts.items():
        _check_class(name, model)
    return parts


def given_modules(models: Models) -> dict[str, nn.Module]:
    """Return name -> module for everything in a model, a mapping of models or a pipeline, known to files or not."""
    if isinstance(models, nn.Module):
        return {"unet": models}
    parts = models if isinstance(models, Mapping) else getattr(models, "components", None)
    if parts is None:
        raise KroneckerError(f"a {type(models).__name__} is not a model, a mapping of models or a diffusers pipeline")
    names = dict.fromkeys((*COMPONENTS, *parts))  # those that files know come first
    return {name: parts[name] for name in names if isinstance(parts.get(name), nn.Module)}


def _check_class(component: str, model: nn.Module) -> None:
    """Raise KroneckerError if a model is one of diffusers or transformers, but not one that files have names for."""
    classes = type(unwrapped(model)).__mro__
    of_a_library = any(c.__module__.partition(".")[0] in LIBRARIES for c in classes)
    if of_a_library and not {c.__name__ for c in classes} & {*COMPONENT_CLASSES[component]}:
        raise _unknown(f"a {classes[0].__name__} as {component}")


def _unknown(what: str) -> KroneckerError:
    known = "; ".join(f"{component} ({' or '.join(classes)})" for component, classes in COMPONENT_CLASSES.items())
    return KroneckerError(
        f"adapter files have no names for the layers of {what}. They have names for: {known}. Pass only those, as in "
        '{"unet": pipeline.unet}; factors of other models can be kept with kronecker_state_dict'
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's and peft's wrappers."""
    while True:
        inside = model._modules.get("_orig_mod")
        if inside is None and (tuner := model._modules.get("base_model")) is not None:
            inside = tuner._modules.get("model")
        if inside is None:
            return model
        model = inside


def family(models: Models) -> Family | None:
    """Return the family of the UNet by its configuration; None without a UNet of diffusers.

    Raises KroneckerError as `components` and `family_of_config` do.
    """
    config = getattr(components(models).get("unet"), "config", None)
    return family_of_config(config) if isinstance(config, Mapping) and "cross_attention_dim" in config else None


def linear_modules(model: nn.Module) -> list[tuple[str, str, nn.Linear]]:
    """Return (path, name, module) of every `nn.Linear`: a name is a path without wrappers around the layer or model."""
    return modules_of(model, (nn.Linear,))


def modules_of(model: nn.Module, types: tuple[type[M], ...]) -> list[tuple[str, str, M]]:
    """Return (path, name, module) of every module of these types: a name is a path without wrappers."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, types):
            words = [word for word in path.removeprefix("base_model.model.").split(".") if word != "_orig_mod"]
            while len(words) > 1 and words[-1] in WRAPPERS:
                words.pop()
            found.append((path, ".".join(words), module))
    return found


def matrix_size(module: nn.Conv2d | LinearLike) -> tuple[int, int]:
    """Return (d_out, d_in) of a layer's weight as a matrix: a kernel (c_out, c_in, k, k) is (c_out, c_in·k·k)."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * prod(module.kernel_size)
    return module.out_features, module.in_features


# ---- names ----


def sgm_name(name: str, unet: nn.Module) -> str:
    """Return the name of a UNet's layer in the tree of Stability's own code.

    Each block of the tree holds one resnet and its attention, or a sampler; a level has layers_per_block + 1 of them:
        down_blocks.i.resnets.j  -> input_blocks.(1+3i+j).0      mid_block.resnets.j    -> middle_block.(2j)
        down_blocks.i.attentions.j -> input_blocks.(1+3i+j).1    mid_block.attentions.0 -> middle_block.1
        up_blocks.i.attentions.j -> output_blocks.(3i+j).1       (3 at two layers per block)
        samplers end the last block of their level
    """
    words = name.split(".")
    config: Any = getattr(unet, "config", None) or {}
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


def match_target(name: str, targets: Sequence[str]) -> str | None:
    """Return the longest target that is the end of a layer's name, in whole words; None if none is."""
    return max((target for target in targets if f".{name}".endswith(f".{target}")), key=len, default=None)


def match_selection(name: str, selections: Sequence[str]) -> str | None:
    """Return the longest selection that a layer's name meets; None if it meets none.

    A selection is some consecutive words of the name: a layer's last ones ("to_k", "attn2.to_k"), or those of a module
    that it is in ("attn2", "up_blocks.1"); or "re:" and a regular expression that the whole name matches. Raises
    KroneckerError if that is not one.
    """
    return max((selection for selection in selections if _selects(selection, name)), key=len, default=None)


def _selects(selection: str, name: str) -> bool:
    if not selection.startswith(REGULAR):
        return f".{selection}." in f".{name}."
    try:
        return re.fullmatch(selection.removeprefix(REGULAR), name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise KroneckerError(f"{selection} is not a regular expression: {error}") from error


def ending(name: str) -> str:
    """Return the last words of a name, those that say what a layer is: "attn1.to_out.0" -> "to_out.0"."""
    words = name.split(".")
    start = len(words) - 1
    while start > 0 and words[start].isdigit():
        start -= 1
    return ".".join(words[start:])
