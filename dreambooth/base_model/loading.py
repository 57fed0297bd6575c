"""The base model: loaded component by component in the wanted precision, and freed again."""

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import nn

from dreambooth.base_model.quantise import quantise
from dreambooth.base_model.source import base_source, load_scheduler, vae_source
from dreambooth.errors import UserError
from dreambooth.family import Embeddings, Family
from dreambooth.options.base_model import FrozenModelOptions
from dreambooth.runtime.ranks import split_frozen, splits_models

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTISED = ("nf4", "int8")
VERSIONS = 128  # of one compiled block


class BaseModel:
    """The base model on the device: in fp32 with `whole_precision`, else as the options say.

    VAE and text encoders are loaded when first needed, and can be freed.
    """

    def __init__(self, family: Family, whole_precision: bool, config: FrozenModelOptions, accelerator: Accelerator):
        self.family, self.config, self.accelerator = family, config, accelerator
        self.device: torch.device = accelerator.device
        self.dtype = torch.float32 if whole_precision else _frozen_dtype(config, accelerator)
        self.source, self.vae_source = base_source(config), vae_source(config)
        # Including defaults: it says how latents are scaled
        self.vae_config: dict[str, Any] = dict(self.vae_source.configurations.empty("vae").config)
        self.pipeline = self._load_pipeline()

    @property
    def denoiser(self) -> Any:
        """The component that predicts, from noisy latents."""
        return getattr(self.pipeline, self.family.denoiser)

    def _load_pipeline(self) -> Any:
        """Return the pipeline without its VAE and text encoders."""
        family, config, configurations = self.family, self.config, self.source.configurations
        absent = dict.fromkeys(configurations.classes.keys() - family.tokenizers)
        pipeline = family.pipeline_class.from_pretrained(
            configurations.name,
            variant=config.variant,
            **configurations.hub,
            **absent
            | dict(family.loading)
            | {"scheduler": load_scheduler(config)}
            | {family.denoiser: self.source.weights.load(family.denoiser, self.dtype)},
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
        vae = self.vae_source.weights.load("vae", DTYPES[self.config.vae_precision])
        if self.config.channels_last:
            vae.to(memory_format=torch.channels_last)
        self.pipeline.register_modules(vae=vae.to(self.device))
        return vae

    def load_text_encoders(self) -> None:
        """Load the text encoders that are not loaded yet."""
        present = self.source.configurations.classes
        for part in self.family.text_encoders:
            if getattr(self.pipeline, part) is None and part in present:
                text_encoder = self.source.weights.load(part, self.dtype)
                self.pipeline.register_modules(**{part: text_encoder.to(self.device)})

    def encode_prompts(self, prompts: list[str]) -> Embeddings:
        """Return the embeddings of prompts, one row each, on the device."""
        self.load_text_encoders()
        return self.family.encode_captions(self.pipeline, prompts, self.config.max_token_length)

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
                    getattr(self.pipeline, name).activation_checkpointing_enable({"use_reentrant": False})
        if self.config.compile:
            compile_blocks(self.denoiser)
        if splits_models():
            split_frozen(models.values(), self.accelerator)
        self.denoiser.train()


def compile_blocks(denoiser: Any) -> None:
    """Compile a denoiser's repeated blocks, each whole, in as many versions as are needed.

    A version is for one width, one batch size, and one of: training, the base model's prediction, samples. That is soon
    more than the 8 that PyTorch allows by default.
    """
    import torch._dynamo  # slow, and most runs do not compile

    torch._dynamo.config.recompile_limit = VERSIONS
    denoiser.compile_repeated_blocks(fullgraph=True)


def _frozen_dtype(config: FrozenModelOptions, accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the frozen weights that are not quantised."""
    if config.base_precision in DTYPES:
        return DTYPES[config.base_precision]
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


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
