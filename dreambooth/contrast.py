"""--kron_init contrast: cross-attention starts from what tells the photos' prompts from those of the class."""

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from dreambooth.data.dataset import class_prompts_of, instance_prompts_of
from dreambooth.data.photos import Photo
from dreambooth.errors import UserError
from dreambooth.tokens import tokens_read
from kron_adapter import KroneckerLinear, start_from_contrast
from kron_formats.errors import naming
from kron_formats.files import printable

logger = logging.getLogger(__name__)


def text_projections(denoiser: nn.Module) -> list[KroneckerLinear]:
    """Return the adapted keys and values of cross-attention whose A sees whole token states: a2 = d_in."""
    attentions = [module for module in denoiser.modules() if getattr(module, "is_cross_attention", False)]
    projections = [projection for attention in attentions for projection in (attention.to_k, attention.to_v)]
    return [layer for layer in projections if isinstance(layer, KroneckerLinear) and layer.B.shape[1] == 1]


def set_contrast(layers: Sequence[KroneckerLinear], instances: Sequence[Tensor], of_class: Tensor) -> None:
    """Set A by the states of prompts, and say how clearly the (first) subject stands out in them."""
    with naming("--kron_init contrast, of the photos' prompts with the class's"):
        start_from_contrast(layers, instances, of_class)
    first = layers[0].A.detach()[0].cpu()
    of_subject, of_others = ((states @ first).square().mean().sqrt() for states in (instances[0], of_class))
    logger.info(
        "%d layers start with an A that answers %.1f times as strongly to the photos' prompts as to the class's",
        *(len(layers), of_subject / of_others),
    )


def check_contrast(denoiser: Any, tokenizers: Collection[Any], photos: Sequence[Photo], config: Any) -> None:
    """Raise UserError if no layer can start from the contrast of prompts, or all photos have prompts of the class."""
    if not text_projections(denoiser):
        raise UserError(
            "--kron_init contrast is for keys and values of cross-attention whose A has a column for each of their "
            "input features, and no layer is one: --kron_targets attn2.to_k attn2.to_v are such layers, and without "
            "--kron_factors of their own they have such an A"
        )

    def read(prompts: Iterable[str]) -> set[tuple]:
        return {tokens_read(prompt, tokenizers, config.max_token_length) for prompt in set(prompts)}

    of_photos = zip(instance_prompts_of(photos), class_prompts_of(photos, [], config), config.all_subjects)
    for own, of_class, subject in of_photos:
        if read(own) <= read(of_class):
            raise UserError(
                f"--kron_init contrast: every photo's prompt, for example '{printable(own[0])}', reads like one of the "
                f"class's ({subject.source('class_prompt')} {printable(subject.class_prompt or '')}); give the subject "
                "a rare word that the class lacks"
            )
