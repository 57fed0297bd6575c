"""The base model: checked before it is loaded, loaded in the wanted precision, freed component by component."""

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

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
    """Return the components that a base model has, without weights, for checks before loading.

    The first component is the denoiser, which must exist. Raises UserError if the base model cannot be found or read.
    """
    name, hub = config.pretrained_model_name_or_path, hub_arguments(config)
    denoiser, *encoders = components
    with _readable_base(name):
        index = _load_index(config)
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
            f"--pretrained_model_name_or_path {name} was saved quantised; use the base model that it was made from, "
            "with --base_precision nf4 or int8"
        )
    with init_empty_weights():
        models: dict[str, nn.Module] = {denoiser: denoiser_class.from_config(denoiser_config)}
        for part, encoder_config in encoder_configs.items():
            models[part] = getattr(transformers, classes[part])(encoder_config)
    return models


def check_family(family: Family, config: BaseModelOptions) -> None:
    """Raise UserError if the base model is not of the family.

    Denoisers of other families take other conditions, and those of other tasks, such as inpainting, other latents.
    """
    name, expected = config.pretrained_model_name_or_path, family.pipeline_class.__name__
    with _readable_base(name):
        found = _load_index(config).get("_class_name")
    if found != expected:
        raise UserError(
            f"--pretrained_model_name_or_path {name} is a {found}, but this script trains a {expected} ({family.title})"
        )


def _load_index(config: BaseModelOptions) -> dict[str, Any]:
    """Return the content of model_index.json: component -> (library, class), and the pipeline's class."""
    name = config.pretrained_model_name_or_path
    return _load_config(DiffusionPipeline, pretrained_model_name_or_path=name, **hub_arguments(config))


def _load_config(owner: Any, **arguments: Any) -> dict[str, Any]:
    """Return owner.load_config(**arguments), which diffusers annotates with what it returns for other arguments."""
    return owner.load_config(**arguments)


@contextmanager
def _readable_base(name: str) -> Iterator[None]:
    """Turn errors of reading a base model's configuration into UserErrors."""
    try:
        yield
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--pretrained_model_name_or_path {name} is not a base model: {reason}") from error


def hub_arguments(config: BaseModelOptions) -> dict[str, Any]:
    """Return the arguments of from_pretrained and load_config for the Hub: revision and cache folder."""
    return {"revision": config.revision, "cache_dir": config.cache_dir}


# ---- loading ----


class BaseModel:
    """The frozen base model on the device. VAE and text encoders are loaded when first needed, and can be freed."""

    def __init__(self, family: Family, config: FrozenModelOptions, accelerator: Accelerator):
        self.family, self.config, self.accelerator = family, config, accelerator
        self.device: torch.device = accelerator.device
        self.dtype = _frozen_dtype(config, accelerator)
        self.vae_config = _load_vae_config(config)
        self.pipeline = self._load_pipeline()

    @property
    def denoiser(self) -> Any:
        """The component that predicts, from noisy latents."""
        return getattr(self.pipeline, self.family.denoiser)

    def _load_pipeline(self) -> Any:
        """Return the pipeline without its VAE and text encoders."""
        family, config = self.family, self.config
        with _readable_loading(_base_flag(config)):
            index = _load_index(config)
            components = {part for part, entry in index.items() if isinstance(entry, (list, tuple))}
            absent = dict.fromkeys(components - {family.denoiser, "scheduler", *family.tokenizers})
            pipeline = family.pipeline_class.from_pretrained(
                config.pretrained_model_name_or_path,
                dtype=self.dtype,
                variant=config.variant,
                **hub_arguments(config),
                **absent | dict(family.loading),
            )
        # The pipeline would take it from its VAE, which is not loaded yet.
        pipeline.vae_scale_factor = 2 ** (len(self.vae_config["block_out_channels"]) - 1)
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
        """Return the VAE, in its own precision. Loads it if it is not loaded yet."""
        if self.pipeline.vae is not None:
            return self.pipeline.vae
        with _readable_loading(_vae_flag(self.config)):
            dtype = DTYPES[self.config.vae_precision]
            vae: Any = AutoencoderKL.from_pretrained(**_vae_source(self.config), dtype=dtype)  # its `to` is mistyped
        if self.config.channels_last:
            vae.to(memory_format=torch.channels_last)
        self.pipeline.register_modules(vae=vae.to(self.device))
        return vae

    def load_text_encoders(self) -> None:
        """Load the text encoders that are not loaded yet."""
        config, name = self.config, self.config.pretrained_model_name_or_path
        absent = [part for part in self.family.text_encoders if getattr(self.pipeline, part) is None]
        index = _load_index(config) if absent else {}
        for part in absent:
            library, class_name = index[part]
            if library is None:  # the base model lacks this one
                continue
            with _readable_loading(_base_flag(config)):
                text_encoder = getattr(transformers, class_name).from_pretrained(
                    name, subfolder=part, dtype=self.dtype, variant=config.variant, **hub_arguments(config)
                )
            self.pipeline.register_modules(**{part: text_encoder.to(self.device)})

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """Return the embeddings of prompts, one row each, on the device."""
        self.load_text_encoders()
        return self.family.encode_prompts(self.pipeline, prompts)

    def free(self, names: Iterable[str]) -> None:
        """Drop components and free their memory."""
        self.pipeline.register_modules(**dict.fromkeys(names))
        free_memory()

    def prepare_training(self, models: Mapping[str, nn.Module]) -> None:
        """Enable gradient checkpointing, compilation and FSDP for the models that train, after `Method.attach`."""
        if self.config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
            for name in self.family.text_encoders:
                if name in models:
                    getattr(self.pipeline, name).gradient_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            self.denoiser.compile_repeated_blocks(fullgraph=True)
        if splits_models():
            split_frozen(models.values(), self.accelerator)
        self.denoiser.train()


def _frozen_dtype(config: FrozenModelOptions, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the frozen weights that are not quantised."""
    if config.base_precision in DTYPES:
        return DTYPES[config.base_precision]
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def _load_vae_config(config: FrozenModelOptions) -> dict[str, Any]:
    """Return the VAE's configuration, including defaults. It says how latents are scaled. Reads no weights."""
    source = {name: value for name, value in _vae_source(config).items() if name != "variant"}
    with _readable_loading(_vae_flag(config)), init_empty_weights():
        vae = AutoencoderKL.from_config(_load_config(AutoencoderKL, **source))
    return dict(cast(AutoencoderKL, vae).config)  # from_config returns a tuple only if asked for unused arguments


def _vae_source(config: FrozenModelOptions) -> dict[str, Any]:
    """Return the arguments of from_pretrained that say where the VAE is."""
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


def _base_flag(config: BaseModelOptions) -> str:
    return f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}"


def _vae_flag(config: FrozenModelOptions) -> str:
    """Return the flag that says where the VAE is, with its value."""
    other = config.pretrained_vae_model_name_or_path
    return f"--pretrained_vae_model_name_or_path {other}" if other else _base_flag(config)


@contextmanager
def _readable_loading(flag: str) -> Iterator[None]:
    """Turn errors of loading what `flag` names into UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _enable_xformers(denoiser: Any) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError) as error:
        raise UserError(
            f"--enable_xformers_memory_efficient_attention: {error}; PyTorch's own attention, the default, needs as "
            "little memory"
        ) from error


def free_memory() -> None:
    """Release device memory that is no longer in use."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.get_device_module().empty_cache()  # torch.accelerator's own fails on Apple's GPUs in some versions
