"""Where the weights of a base model are: beside their configurations in diffusers' layout, or in one file.

A file's tensors have the names of Stability's code. diffusers' converters rename them; here they are given tensors
without content first, so that what does not fit a configuration is known before any weights are read.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.loaders import single_file_utils as converters
from safetensors import SafetensorError
from torch import Tensor

from dreambooth.base_model.configurations import Configurations, file_states
from dreambooth.errors import UserError
from kron_formats.errors import KroneckerError
from kron_formats.families import Family
from kron_formats.files import excerpt, open_safetensors, reason
from kron_formats.single_file import UNET, VAE, SingleFile

Tensors = dict[str, Tensor]
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
UNUSED = re.compile(r"(text_model\.)?embeddings\.position_ids|logit_scale|text_projection(\.weight)?")  # of CLIP
NAMES = ("diffusion_pytorch_model", "pytorch_model", "model")  # of weight files in diffusers' layout
SHARD = re.compile(r"-\d{5}-of-\d{5}")


class Weights(Protocol):
    """Where the weights of components are."""

    def check(self, parts: Iterable[str]) -> None:
        """Raise UserError if weights of these components are missing, or do not fit. Reads none of them."""
        ...

    def load(self, part: str, dtype: torch.dtype) -> Any:
        """Return a component, on the CPU. Raises UserError if it cannot be read."""
        ...

    def load_for_pipeline(self, parts: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        """Return the arguments of a pipeline's from_pretrained for what it cannot read from the configurations."""
        ...

    def state(self, parts: Iterable[str]) -> Any:
        """Return a value that changes whenever a file of these components changes. Reads none."""
        ...


# ---- in diffusers' layout ----


@dataclass(frozen=True)
class FolderWeights:
    """Weights beside their configurations."""

    configurations: Configurations
    variant: str | None

    def check(self, parts: Iterable[str]) -> None:
        """Folders only: what the Hub has is known when it is downloaded."""
        folders = [folder for part in parts if (folder := self.configurations.folder_of(part))]
        found = {folder: variants_in(folder) for folder in folders}
        for folder, variants in found.items():
            if not variants:
                raise UserError(f"{self.configurations.flag} has no weights in {folder.name}/")
            if self.variant not in variants and None not in variants:
                there = ", ".join(f"--variant {variant}" for variant in sorted(filter(None, variants)))
                asked = f"no {self.variant} weights" if self.variant else "no weights without a variant"
                raise UserError(f"{self.configurations.flag} has {asked} in {folder.name}/; those in it need {there}")
        if self.variant and found and not any(self.variant in variants for variants in found.values()):
            raise UserError(
                f"--variant {self.variant}: {self.configurations.flag} has no weights of that variant; leave it out"
            )

    def load(self, part: str, dtype: torch.dtype) -> Any:
        configurations = self.configurations
        model_class, place = configurations.class_of(part), configurations.place_of(part)
        try:
            return model_class.from_pretrained(
                configurations.name, **place, dtype=dtype, variant=self._variant_of(part)
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: other shapes
            raise UserError(f"{configurations.flag} cannot be loaded: {part}: {_first_line(error)}") from error

    def _variant_of(self, part: str) -> str | None:
        """Return the variant to read, as pipelines do: a component without it is read without a variant."""
        folder = self.configurations.folder_of(part)
        return self.variant if folder is None or self.variant in variants_in(folder) else None

    def load_for_pipeline(self, parts: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        return {}

    def state(self, parts: Iterable[str]) -> Any:
        return self.configurations.state(parts), self.variant


def variants_in(folder: Path) -> set[str | None]:
    """Return the variants of the weight files in a component's folder; None stands for files without one."""
    variants = set()
    for path in folder.glob("*"):
        name, _, rest = path.name.partition(".")
        middle, _, suffix = rest.rpartition(".")
        if SHARD.sub("", name) in NAMES and suffix in ("safetensors", "bin"):
            variants.add(SHARD.sub("", middle) or None)
    return variants


# ---- in one file ----


@dataclass(frozen=True)
class FileWeights:
    """Weights in one file, which is a base model of a family or, without one, a VAE."""

    file: SingleFile
    configurations: Configurations
    flag: str  # what messages call the file
    family: Family | None = None

    def check(self, parts: Iterable[str]) -> None:
        for part in parts:
            tensors = {key: torch.empty(self.file.shapes[key], device="meta") for key in self._keys(part)}
            self._renamed(part, tensors, self.configurations.empty(part))

    def load(self, part: str, dtype: torch.dtype) -> Any:
        model = self.configurations.empty(part)
        try:
            with open_safetensors(self.file.path) as file:
                # Copies: the tensors of safetensors are views of the file, wherever in it they lie
                tensors = {key: file.get_tensor(key).to(dtype, copy=True) for key in self._keys(part)}
        except (KroneckerError, SafetensorError) as error:
            raise UserError(f"{self.flag} cannot be loaded: {reason(error)}") from error
        model.load_state_dict(self._renamed(part, tensors, model), assign=True)
        return model.eval()

    def load_for_pipeline(self, parts: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
        """Return the components, and None for those that files do not hold, such as the safety checker."""
        wanted = list(parts)
        read_elsewhere = {"scheduler", "tokenizer", "tokenizer_2"}
        index = {part for part, entry in self.configurations.index.items() if isinstance(entry, (list, tuple))}
        components = dict.fromkeys(index - {*wanted, *read_elsewhere})
        checker = {"requires_safety_checker": False} if "safety_checker" in index else {}
        return {**components, **checker, **{part: self.load(part, dtype) for part in wanted}}

    def state(self, parts: Iterable[str]) -> Any:
        return file_states([self.file.path]), self.configurations.state(parts)

    def _keys(self, part: str) -> list[str]:
        """Return the names of a component's tensors in the file. Raises UserError if it has none."""
        if self.family is None and not self.file.has(VAE):
            keys = [key for key in self.file.shapes if key.startswith(VAE_PARTS)]
        else:
            prefix = self._prefix(part)
            keys = [key for key in self.file.shapes if key.startswith(prefix)]
        if not keys and part == "vae" and self.family:
            raise UserError(f"{self.flag} has no VAE; name one with --pretrained_vae_model_name_or_path")
        if not keys:
            raise UserError(f"{self.flag} has no {part}")
        return keys

    def _prefix(self, part: str) -> str:
        if part in ("unet", "vae") or self.family is None:
            return UNET if part == "unet" else VAE
        return self.family.text_encoder(part).checkpoint

    def _renamed(self, part: str, tensors: Tensors, model: Any) -> Tensors:
        """Return a component's tensors by their names in `model`. Raises UserError unless they are the model's."""
        convert = self._converter(part)
        try:
            renamed = convert(tensors, model)
        except (KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
            raise UserError(f"{self._misfit(part)}: {type(error).__name__}: {_first_line(error)}") from error
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in renamed.items() if not UNUSED.fullmatch(name)}
        given |= {name: tuple(renamed[name].shape) for name in own.keys() & renamed.keys()}
        if absent := sorted(own.keys() - given.keys()):
            raise UserError(f"{self._misfit(part)}: it lacks {len(absent)} weights, for example {absent[0]}")
        if extra := sorted(given.keys() - own.keys()):
            raise UserError(f"{self._misfit(part)}: it has {len(extra)} weights more, for example {excerpt(extra[0])}")
        if other := [name for name in own if own[name] != given[name]]:
            name = other[0]
            raise UserError(
                f"{self._misfit(part)}: {name} is {given[name]} in the file, but {own[name]} by the configuration"
            )
        return {name: renamed[name] for name in own}

    def _misfit(self, part: str) -> str:
        return f"{self.flag} does not fit the {part} of {self.configurations.flag}"

    def _converter(self, part: str) -> Callable[[Tensors, Any], Tensors]:
        if part == "unet":
            return lambda tensors, model: converters.convert_ldm_unet_checkpoint(tensors, _config(model))
        if part == "vae" or self.family is None:
            return _rename_vae
        encoder = self.family.text_encoder(part)
        if encoder.open_clip:
            return lambda tensors, model: _clip_names(
                converters.convert_open_clip_checkpoint(model, tensors, prefix=encoder.checkpoint), model
            )
        return lambda tensors, model: _clip_names(
            {key.removeprefix(encoder.checkpoint): tensor for key, tensor in tensors.items()}, model
        )


def _rename_vae(tensors: Tensors, model: Any) -> Tensors:
    """Return a VAE's tensors by diffusers' names, which they may have already."""
    inside = {key.removeprefix(VAE): tensor for key, tensor in tensors.items()}
    if any(key.startswith("encoder.down_blocks.") for key in inside):
        return inside
    return converters.convert_ldm_vae_checkpoint(inside, _config(model))


def _clip_names(tensors: Tensors, model: Any) -> Tensors:
    """Return a text encoder's tensors by the model's own names: with or without text_model before all but the
    projection, as the release of transformers has them. Files have both, too."""
    wrapped = any(name.startswith("text_model.") for name in model.state_dict())
    plain = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    outside = ("text_projection", "logit_scale")
    return {
        f"text_model.{name}" if wrapped and not name.startswith(outside) else name: tensor
        for name, tensor in plain.items()
    }


def _config(model: Any) -> Mapping[str, Any]:
    return dict(model.config)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
