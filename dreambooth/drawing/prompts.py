"""Prompts of images that are drawn, encoded as in training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.family import Family

FAMILIES = (SD, SDXL)


@torch.no_grad()
def embedding_arguments(
    pipeline: Any, prompts: Sequence[str], negative_prompts: Sequence[str | None], max_token_length: int
) -> dict[str, Tensor]:
    """Return the embeddings of prompts and negative prompts by the names of the pipeline's arguments, a row for each.

    Each prompt is encoded alone, so that its images do not depend on the others. Without a negative prompt, None, its
    embeddings are those of the empty one, or zero if the base model was trained that way.
    """
    family = family_of(pipeline)

    def encode(text: str | None) -> dict[str, Tensor]:
        embeddings = family.encode_prompts(pipeline, [text or ""], max_token_length)
        if text is None and pipeline.config.get("force_zeros_for_empty_prompt"):
            return {name: torch.zeros_like(tensor) for name, tensor in embeddings.items()}
        return embeddings

    rows = {text: encode(text) for text in dict.fromkeys([*prompts, *negative_prompts])}
    arguments = {}
    for prefix, texts in (("", prompts), ("negative_", negative_prompts)):
        for name in rows[texts[0]]:
            arguments[f"{prefix}{name}"] = torch.cat([rows[text][name] for text in texts])
    return arguments


def family_of(pipeline: Any) -> Family:
    """Return the family that has the pipeline's text encoders. Raises UserError if there is none."""
    encoders = {part for part in pipeline.components if part.startswith("text_encoder")}
    for family in FAMILIES:
        if encoders == set(family.text_encoders):
            return family
    titles = " or ".join(family.title for family in FAMILIES)
    raise UserError(f"--pretrained_model_name_or_path is a {type(pipeline).__name__}; prompts are encoded for {titles}")
