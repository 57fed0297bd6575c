"""Prompts to embeddings: at every step if text encoders train, else once, and kept in a folder for later runs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.base_model.cache import text_identity
from dreambooth.base_model.loading import BaseModel
from dreambooth.errors import UserError
from dreambooth.family import Embeddings
from dreambooth.options.photos import CacheOptions
from kron_formats.kept import key_of, load_or_make

Encode = Callable[[Tensor], Embeddings]


def prompt_encoder(base: BaseModel, prompts: list[str], text_trains: bool, config: CacheOptions) -> Encode:
    """Return a function from indices into `prompts`, (rows,), to their embeddings.

    If `text_trains`, every call encodes its distinct prompts. Otherwise all prompts are encoded here, once for the
    whole run, and the text encoders are freed. They are not even loaded if the cache folder has all embeddings.
    """
    if text_trains:
        base.load_text_encoders()

        def encode_rows(rows: Tensor) -> Embeddings:
            distinct, inverse = rows.unique(return_inverse=True)
            embeddings = base.encode_prompts([prompts[row] for row in distinct.tolist()])
            return {name: tensor[inverse] for name, tensor in embeddings.items()}

        return encode_rows
    embeddings = _encode_once(base, prompts, config)
    base.free([*base.family.text_encoders, *base.family.tokenizers])
    return lambda rows: {name: tensor[rows] for name, tensor in embeddings.items()}


@torch.no_grad()
def _encode_once(base: BaseModel, prompts: list[str], config: CacheOptions) -> Embeddings:
    """Return a row for each prompt, on the device. Each is encoded alone: other prompts must not change its bits."""

    def encode_alone(prompt: str) -> Embeddings:
        return {name: tensor.cpu() for name, tensor in base.encode_prompts([prompt]).items()}

    if config.cache_latents_to_disk:
        folder, identity = Path(config.cache_latents_to_disk), text_identity(base.family, base.config, base.dtype)
        paths = [folder / f"{key_of(identity, prompt.encode())}.safetensors" for prompt in prompts]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [load_or_make(path, partial(encode_alone, prompt)) for path, prompt in zip(paths, prompts)]
        except OSError as error:
            raise UserError(f"--cache_latents_to_disk {folder}: {error}") from error
    else:
        rows = [encode_alone(prompt) for prompt in prompts]
    return {name: torch.cat([row[name] for row in rows]).to(base.device) for name in rows[0]}
