"""Of which model encodings are that are kept for later runs: part of the names of their files."""

import torch

from dreambooth.base_model.source import base_source, vae_source
from dreambooth.family import Family
from dreambooth.options.base_model import FrozenModelOptions
from kron_formats.kept import key_of


def vae_identity(config: FrozenModelOptions) -> bytes:
    """Return a digest of everything but the image that the VAE's moments depend on, without reading its weights."""
    state = vae_source(config).weights.state(["vae"])
    return key_of(b"vae", repr((state, config.vae_precision)).encode()).encode()


def text_identity(family: Family, config: FrozenModelOptions, dtype: torch.dtype) -> bytes:
    """Return a digest of everything but the prompt that embeddings depend on, without reading the encoders' weights."""
    parts = [*family.text_encoders, *family.tokenizers, "model_index.json"]
    state = base_source(config).weights.state(parts)
    return key_of(b"text", repr((state, dtype, config.max_token_length)).encode()).encode()
