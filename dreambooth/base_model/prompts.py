"""Prompts to embeddings: at every step if text encoders train, else once, and kept in a folder for later runs.

Also what the denoiser's cross-attention reads in them, for methods that start from it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dreambooth.base_model.cache import text_identity
from dreambooth.base_model.loading import BaseModel
from dreambooth.errors import UserError
from dreambooth.family import Embeddings, Family
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


@dataclass(frozen=True)
class PromptStates:
    """What the denoiser's cross-attention reads before anything trains: token states, (tokens, width), on the CPU.

    Those of all tokens, padding included, as training has them. Computed when they are asked for.
    """

    encode: Encode
    prompts: Sequence[str]  # whose rows `encode` takes
    instance_prompts: Sequence[Sequence[str]]  # of each subject's photos
    class_prompts: Sequence[Sequence[str]]  # for each subject, of the rows of its prior, or its class prompt
    family: Family
    device: torch.device

    def of_instances(self) -> list[Tensor]:
        """Those of each subject."""
        return [self._states([own]) for own in self.instance_prompts]

    def of_class(self) -> Tensor:
        return self._states(self.class_prompts)

    @torch.no_grad()
    def _states(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Return the states of distinct prompts times √(how often each occurs / the mean of that).

        Their mean squares along any direction are then those of all prompts. Every subject's prompts weigh the same.
        """
        shares: dict[str, Fraction] = defaultdict(Fraction)  # of all samples
        for own in prompts:
            for prompt in own:
                shares[prompt] += Fraction(1, len(own) * len(prompts))
        rows = torch.tensor([self.prompts.index(prompt) for prompt in shares], device=self.device)
        sizes = torch.zeros(len(rows), 6, device=self.device)
        states = self.family.condition(self.encode(rows), sizes)["encoder_hidden_states"].float().cpu()
        weights = torch.tensor([float(share * len(shares)) for share in shares.values()]).sqrt()
        return (states * weights[:, None, None]).flatten(0, 1)
