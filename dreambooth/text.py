"""Prompts to embeddings: at every step where text encoders train, otherwise once, and kept in a folder for later."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

from dreambooth.cache import key_of, load_or_make, text_identity
from dreambooth.config import TrainingConfig, UserError
from dreambooth.models import base_dtype, ensure_text_encoders, free_components

Encode = Callable[[Tensor], dict[str, Tensor]]
EncodePrompts = Callable[[DiffusionPipeline, list[str]], dict[str, Tensor]]


def prompt_encoder(
    encode: EncodePrompts,
    pipeline: DiffusionPipeline,
    prompts: list[str],
    config: TrainingConfig,
    accelerator: Accelerator,
) -> Encode:
    """Return a function from rows of `prompts` (rows,) to their embeddings.

    Text encoders that train encode at every call, each distinct prompt once. Frozen ones encode here, once for the
    whole run, and are freed; those that have nothing to encode are not read at all.
    """
    if config.train_text_encoder:
        ensure_text_encoders(pipeline, config, accelerator)

        def encode_rows(rows: Tensor) -> dict[str, Tensor]:
            distinct, inverse = rows.unique(return_inverse=True)
            embeddings = encode(pipeline, [prompts[row] for row in distinct.tolist()])
            return {name: tensor[inverse] for name, tensor in embeddings.items()}

        return encode_rows
    embeddings = _encode_once(encode, pipeline, prompts, config, accelerator)
    free_components(pipeline, [name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer"))])
    return lambda rows: {name: tensor[rows] for name, tensor in embeddings.items()}


@torch.no_grad()
def _encode_once(
    encode: EncodePrompts,
    pipeline: DiffusionPipeline,
    prompts: list[str],
    config: TrainingConfig,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    """Return a row for each prompt, on the device. Each is encoded alone, so that no other has a part in its bits."""

    def encode_alone(prompt: str) -> dict[str, Tensor]:
        ensure_text_encoders(pipeline, config, accelerator)
        return {name: tensor.cpu() for name, tensor in encode(pipeline, [prompt]).items()}

    if config.cache_latents_to_disk:
        folder, identity = Path(config.cache_latents_to_disk), text_identity(config, base_dtype(config, accelerator))
        paths = [folder / f"{key_of(identity, prompt.encode())}.safetensors" for prompt in prompts]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            rows = [load_or_make(path, partial(encode_alone, prompt)) for path, prompt in zip(paths, prompts)]
        except OSError as error:
            raise UserError(f"--cache_latents_to_disk {folder}: {error}") from error
    else:
        rows = [encode_alone(prompt) for prompt in prompts]
    return {name: torch.cat([row[name] for row in rows]).to(accelerator.device) for name in rows[0]}
