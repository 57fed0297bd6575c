"""The base model: looked at before it is loaded, loaded in the precision asked for, let go of piece by piece."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from dreambooth.base_model.quantise import quantise
from dreambooth.errors import UserError
from dreambooth.family import Embeddings, Family
from dreambooth.options.base_model import BaseModelOptions, FrozenModelOptions
from dreambooth.runtime.ranks import split_frozen, splits_models

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTISED = ("nf4", "int8")


# ---- before loading ----


def empty_models(config: BaseModelOptions, components: Sequence[str]) -> dict[str, nn.Module]:
    """Return those of a base model's components that it has, without weights, for checks that come before loading.

    The first component has to be there. Raises UserError if the base model cannot be found or read.
    """
    name, hub = config.pretrained_model_name_or_path, hub_arguments(config)
    denoiser, *encoders = components
    with _readable_base(name):
        index = DiffusionPipeline.load_config(name, **hub)
        classes = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and entry[0]}
        if denoiser not in classes:
            raise ValueError(f"it has no {denoiser}")
        denoiser_class = getattr(diffusers, classes[denoiser])
        denoiser_config = denoiser_class.load_config(name, subfolder=denoiser, **hub)
        encoder_configs = {
            part: transformers.AutoConfig.from_pretrained(name, subfolder=part, **hub)
            for part in encoders
            if part in classes
        }
    if "quantization_config" in denoiser_config:
        raise UserError(
            f"--pretrained_model_name_or_path {name} was saved quantised; take the base model that it was made of, "
            "with --base_precision nf4 or int8"
        )
    with init_empty_weights():
        models: dict[str, nn.Module] = {denoiser: denoiser_class.from_config(denoiser_config)}
        for part, encoder_config in encoder_configs.items():
            models[part] = getattr(transformers, classes[part])(encoder_config)
    return models


def check_family(family: Family, config: BaseModelOptions) -> None:
    """Raise UserError if the base model is not of the family: they differ in what their denoisers are conditioned on,
    and other tasks' denoisers take other latents."""
    name, expected = config.pretrained_model_name_or_path, family.pipeline_class.__name__
    with _readable_base(name):
        found = DiffusionPipeline.load_config(name, **hub_arguments(config)).get("_class_name")
    if found != expected:
        raise UserError(f"--pretrained_model_name_or_path {name} is a {found}, but this script trains a {expected}")


@contextmanager
def _readable_base(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name} is not a base model: {reason}") from error


def hub_arguments(config: BaseModelOptions) -> dict[str, Any]:
    """Return the arguments of from_pretrained and load_config that say where on the Hub, and where it is kept."""
    return {"revision": config.revision, "cache_dir": config.cache_dir}


# ---- loading ----


class BaseModel:
    """The frozen base model on the device. Its VAE and text encoders are read when something is to be encoded or drawn
    for the first time, and can be freed."""

    def __init__(self, family: Family, config: FrozenModelOptions, accelerator: Accelerator):
        self.family, self.config, self.accelerator = family, config, accelerator
        self.device: torch.device = accelerator.device
        self.dtype = _frozen_dtype(config, accelerator)
        self.vae_config = _load_vae_config(config)
        self.pipeline = self._load_pipeline()

    @property
    def denoiser(self) -> Any:
        """The component that predicts."""
        return getattr(self.pipeline, self.family.denoiser)

    def _load_pipeline(self) -> Any:
        """Return the pipeline without its VAE and text encoders."""
        family, config = self.family, self.config
        with _readable_loading(config.pretrained_model_name_or_path):
            index = family.pipeline_class.load_config(config.pretrained_model_name_or_path, **hub_arguments(config))
            components = {part for part, entry in index.items() if isinstance(entry, (list, tuple))}
            absent = dict.fromkeys(components - {family.denoiser, "scheduler", *family.tokenizers})
            pipeline = family.pipeline_class.from_pretrained(
                config.pretrained_model_name_or_path,
                dtype=self.dtype,
                variant=config.variant,
                **hub_arguments(config),
                **absent | dict(family.loading),
            )
        pipeline.vae_scale_factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)  # it would ask its VAE
        denoiser = getattr(pipeline, family.denoiser)
        if config.base_precision in QUANTISED:
            quantise(denoiser, config.base_precision, self.device)
        pipeline.to(self.device)
        if config.channels_last:
            denoiser.to(memory_format=torch.channels_last)
        if config.enable_xformers_memory_efficient_attention:
            _enable_xformers(denoiser)
        return pipeline

    def load_vae(self) -> AutoencoderKL:
        """Return the VAE, read in its own precision if it is not there yet."""
        if self.pipeline.vae is None:
            with _readable_loading(self.config.pretrained_model_name_or_path):
                vae = AutoencoderKL.from_pretrained(**_vae_source(self.config), dtype=DTYPES[self.config.vae_precision])
            if self.config.channels_last:
                vae.to(memory_format=torch.channels_last)
            self.pipeline.register_modules(vae=vae.to(self.device))
        return self.pipeline.vae

    def load_text_encoders(self) -> None:
        """Read the text encoders that are not there yet."""
        config, name = self.config, self.config.pretrained_model_name_or_path
        absent = [part for part in self.family.text_encoders if getattr(self.pipeline, part) is None]
        index = self.pipeline.load_config(name, **hub_arguments(config)) if absent else {}
        for part in absent:
            library, class_name = index[part]
            if library is None:  # the base model has none
                continue
            with _readable_loading(name):
                text_encoder = getattr(transformers, class_name).from_pretrained(
                    name, subfolder=part, dtype=self.dtype, variant=config.variant, **hub_arguments(config)
                )
            self.pipeline.register_modules(**{part: text_encoder.to(self.device)})

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """Return the embeddings of prompts, one row for each, on the device."""
        self.load_text_encoders()
        return self.family.encode_prompts(self.pipeline, prompts)

    def free(self, names: Iterable[str]) -> None:
        """Drop components, and the memory they held."""
        self.pipeline.register_modules(**dict.fromkeys(names))
        free_memory()

    def prepare_training(self, models: Mapping[str, nn.Module]) -> None:
        """Switch on checkpointing, compilation and splitting of the models that train, once the method is in them."""
        for name, model in models.items() if self.config.gradient_checkpointing else ():
            if name == self.family.denoiser:
                model.enable_gradient_checkpointing()
            else:
                model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            self.denoiser.compile_repeated_blocks(fullgraph=True)
        if splits_models():
            split_frozen(models.values(), self.accelerator)
        self.denoiser.train()


def _frozen_dtype(config: FrozenModelOptions, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the frozen weights, of those that are not quantised."""
    if config.base_precision in DTYPES:
        return DTYPES[config.base_precision]
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def _load_vae_config(config: FrozenModelOptions) -> dict[str, Any]:
    """Return the configuration of the VAE, defaults included, which says how latents are scaled. Reads no weights."""
    source = {name: value for name, value in _vae_source(config).items() if name != "variant"}
    with _readable_loading(config.pretrained_model_name_or_path), init_empty_weights():
        return dict(AutoencoderKL.from_config(AutoencoderKL.load_config(**source)).config)


def _vae_source(config: FrozenModelOptions) -> dict[str, Any]:
    if config.pretrained_vae_model_name_or_path:
        return {
            "pretrained_model_name_or_path": config.pretrained_vae_model_name_or_path,
            "cache_dir": config.cache_dir,
        }
    return {
        "pretrained_model_name_or_path": config.pretrained_model_name_or_path,
        "subfolder": "vae",
        "variant": config.variant,
        **hub_arguments(config),
    }


@contextmanager
def _readable_loading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name} cannot be loaded: {reason}") from error


def _enable_xformers(denoiser: Any) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError) as error:
        raise UserError(
            f"--enable_xformers_memory_efficient_attention: {error}; leave it out: PyTorch's own attention is as lean"
        ) from error


def free_memory() -> None:
    """Give back the device memory that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
