"""Embeddings of images and texts by CLIP and DINO, and cosines between them.

What counts as DINO's embedding is the class token after the last layer norm, which its authors evaluate with:

    vit                      DINO           its [CLS] token
    dinov2                   DINOv2         the same, x_norm_clstoken in the authors' code
    dinov2_with_registers    DINOv2         the same; the registers, which come after it, are left out
    dinov3_vit               DINOv3         the same; its processor needs torchvision

Images go through the model's own processor. DINO's in transformers squashes them to squares, where its authors crop;
here they are cropped to their central squares first. The later ones' processors crop by themselves.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from dreambooth.errors import UserError
from dreambooth.options.prompts import CHUNK_LENGTH
from dreambooth.tokens import cut_prompt

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLIP_TYPES = ("clip",)
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # whose first token is [CLS]
PROBE = (80, 64)  # px, of an image that shows whether an evaluator works


# ---- cosines ----


def pairwise_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of every row of a with every row of b.

    a: (n, features)    b: (m, features)    ->    (n, m)
    """
    return normalize(a, dim=-1) @ normalize(b, dim=-1).T


def paired_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row of a with the same row of b.

    a: (n, features)    b: (n, features)    ->    (n,)
    """
    return (normalize(a, dim=-1) * normalize(b, dim=-1)).sum(-1)


def distinct_cosine(a: Tensor) -> Tensor:
    """Return the cosines of all pairs of different rows of a.

    a: (n, features)    ->    (n·(n - 1)/2,)
    """
    rows, columns = torch.triu_indices(len(a), len(a), offset=1)
    return pairwise_cosine(a, a)[rows, columns]


def pairwise_diversity(a: Tensor) -> float | None:
    """Return the mean of 1 - cosine over all pairs of different rows: 0 if all are alike, None if there is one row.

    DreamBooth's DIV (arXiv 2208.12242, sec. 4.3) is the same mean of LPIPS distances, which would need another package;
    its values cannot be compared with these.
    """
    return 1 - distinct_cosine(a).mean().item() if len(a) > 1 else None


# ---- embeddings ----


@dataclass(frozen=True)
class Evaluators:
    """CLIP and DINO with their own preprocessing. Embeddings are fp32, of unit length, on the CPU."""

    clip: Any  # CLIPModel, whose annotations allow for outputs and configurations that it never has here
    clip_processor: Any
    tokenizer: Any
    dino: PreTrainedModel
    dino_processor: Any
    batch_size: int = 16  # images or texts embedded at once

    def clip_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return CLIP's projected embeddings of images, (images, features)."""
        return self._embed(images, self._clip_image_features)

    def clip_texts(self, texts: Sequence[str]) -> Tensor:
        """Return CLIP's projected embeddings of texts, (texts, features). Long texts are cut."""
        return self._embed(texts, self._clip_text_features)

    def warn_of_cut_texts(self, texts: Iterable[tuple[str, str]]) -> None:
        """Log one warning that names the texts that CLIP cannot read whole. `texts` are (where it comes from, text)."""
        cut = [source for source, text in texts if cut_prompt(text, [self.tokenizer], CHUNK_LENGTH)]
        if cut:
            logger.warning("CLIP-T is computed with the first %d tokens of %s", CHUNK_LENGTH, "; ".join(cut))

    def dino_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return DINO's class tokens of images, (images, features). What is outside their centres does not count."""
        crops = getattr(self.dino_processor, "do_center_crop", False)
        return self._embed(images if crops else [_central_square(image) for image in images], self._dino_features)

    def _clip_image_features(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.clip_processor(images, return_tensors="pt").to(self.clip.device)
        return self.clip.get_image_features(**pixels).pooler_output

    def _clip_text_features(self, texts: Sequence[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output

    def _dino_features(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = self.dino_processor(images, return_tensors="pt").to(self.dino.device)
        return self.dino(**pixels).last_hidden_state[:, 0]

    @torch.no_grad()
    def _embed(self, entries: Sequence[T], features: Callable[[Sequence[T]], Tensor]) -> Tensor:
        batches = [features(batch) for batch in _batches(entries, self.batch_size)]
        return normalize(torch.cat(batches).float().cpu(), dim=-1)


def _batches(entries: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(entries), size):
        yield list(entries[start : start + size])


def _central_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def load_evaluators(clip: str, dino: str, device: torch.device, batch_size: int = 16) -> Evaluators:
    """Return the evaluators of two names on the Hub, or folders. Raises UserError if one is not such a model."""
    with _readable("--clip_model", clip, "CLIP"):
        _check_type(clip, CLIP_TYPES)
        clip_processor, tokenizer = _load_processor(clip), AutoTokenizer.from_pretrained(clip)
        clip_model = _load_model(clip, device)
    with _readable("--dino_model", dino, "DINO"):
        _check_type(dino, DINO_TYPES)
        dino_processor, dino_model = _load_processor(dino), _load_model(dino, device)
    evaluators = Evaluators(clip_model, clip_processor, tokenizer, dino_model, dino_processor, batch_size)
    with _readable("--clip_model", clip, "CLIP"):
        _probe(evaluators.clip_images)
    with _readable("--dino_model", dino, "DINO"):
        _probe(evaluators.dino_images)
    return evaluators


@contextmanager
def _readable(flag: str, name: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag} {name} is not a {kind} model: {reason}") from error


def _check_type(name: str, types: Sequence[str]) -> None:
    """Raise ValueError unless a model is of one of the types. Reads its config.json alone."""
    config = AutoConfig.from_pretrained(name)
    if config.model_type not in types:
        raise ValueError(f"its config.json says {config.model_type}, expected {' or '.join(types)}")
    trained_as = (config.architectures or ["ViTModel"])[0]
    if config.model_type == "vit" and trained_as != "ViTModel":  # of the same layers, but with another embedding
        raise ValueError(f"its config.json says {trained_as}, expected ViTModel, which DINO is")


def _load_processor(name: str) -> Any:
    return AutoImageProcessor.from_pretrained(name, backend="pil")  # the default one needs torchvision


def _load_model(name: str, device: torch.device) -> PreTrainedModel:
    """Return a model. Raises ValueError if weights are missing: it would score at random."""
    is_vit = AutoConfig.from_pretrained(name).model_type == "vit"
    unused = {"add_pooling_layer": False} if is_vit else {}  # DINO has none; ViTModel would add one
    model, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **unused)
    if missing := report["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(missing)[:3])}")
    return model.eval().to(device)


def _probe(embed: Callable[[Sequence[Image.Image]], Tensor]) -> None:
    """Raise ValueError or RuntimeError if an image cannot be embedded, as when processor and model do not fit."""
    if not embed([Image.linear_gradient("L").resize(PROBE).convert("RGB")]).isfinite().all():
        raise ValueError("what it makes of an image is not finite")
