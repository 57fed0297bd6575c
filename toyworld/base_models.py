"""The base models of the toy world, untrained: stock classes in the layouts of Stable Diffusion and SDXL.

Attention projections have 64 or 128 features in the UNets and 128 in the text encoders, so that (4, 64), (8, 64),
(64, 8) and square factors up to 64 fit; in "sd-wide" all of the UNet's have 320, the least that real models have.
Latents are 16 x 16 with 8 channels for pictures of 64 x 64 px.
"""

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from toyworld.pictures import sample
from toyworld.tiny_pipeline import TEXT_LENGTH, WITHOUT_CHECKER, build_scheduler, byte_vocabulary
from toyworld.world import RESERVED, caption, named_characters

HIDDEN_SIZE = 128  # of each text encoder
TIME_IDS_SIZE = 32  # features of each of SDXL's six sizes


def build_base(kind: str, vae: AutoencoderKL, clip: Path) -> DiffusionPipeline:
    """Return a pipeline of a kind (sd, sd-wide, sdxl) with a trained autoencoder and the text encoder of a CLIPModel.

    The UNet is untrained, but gets meaningful text features from the first step, as it did in the original models.
    """
    if kind == "sdxl":
        return _build_sdxl(vae, clip)
    return _build_sd(vae, clip, {"sd": _build_unet, "sd-wide": _build_wide_unet}[kind])


def _build_sd(
    vae: AutoencoderKL, clip: Path, build_unet: Callable[..., UNet2DConditionModel]
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(clip, dtype=torch.float32),
        tokenizer=build_tokenizer(),
        unet=build_unet(cross_attention_dim=HIDDEN_SIZE),
        scheduler=build_scheduler("v_prediction"),
        **WITHOUT_CHECKER,
    )


def _build_sdxl(vae: AutoencoderKL, clip: Path) -> StableDiffusionXLPipeline:
    tokenizer = build_tokenizer()
    text_encoder = deepen(CLIPTextModel.from_pretrained(clip, dtype=torch.float32), tokenizer)
    text_encoder_2 = deepen(CLIPTextModelWithProjection.from_pretrained(clip, dtype=torch.float32), tokenizer)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=build_tokenizer(),
        unet=_build_unet(
            cross_attention_dim=2 * HIDDEN_SIZE,
            addition_embed_type="text_time",
            addition_time_embed_dim=TIME_IDS_SIZE,
            projection_class_embeddings_input_dim=HIDDEN_SIZE + 6 * TIME_IDS_SIZE,
            use_linear_projection=True,
        ),
        scheduler=build_scheduler("v_prediction"),
        force_zeros_for_empty_prompt=False,  # training without a caption uses the empty one
        add_watermarker=False,
    )


def _build_unet(
    widths: Sequence[int] = (64, 128, 128), attention: Sequence[bool] = (True, True, False), **options
) -> UNet2DConditionModel:
    """widths: features at 16 x 16, 8 x 8 and 4 x 4 latents    attention: whether they have it; the middle block has"""
    down = tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention)
    up = tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention))
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=tuple(widths),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=16,
        **options,
    )


def _build_wide_unet(**options) -> UNet2DConditionModel:
    return _build_unet(widths=(64, 128, 320), attention=(False, False, True), **options)


TextEncoder = TypeVar("TextEncoder", CLIPTextModel, CLIPTextModelWithProjection)


@torch.no_grad()
def deepen(encoder: TextEncoder, tokenizer: CLIPTokenizer) -> TextEncoder:
    """Return the encoder with one more layer, which adds nothing: the states before the last layer, which SDXL reads,
    are then the encoder's final ones.

    These states are scaled to a standard deviation of 1. They have not passed a norm, and contrastive training leaves
    them at 20 to 30, too much for the UNet's attention to learn from. Everything that adds to them is divided; the next
    norm undoes that.
    """
    config = copy.deepcopy(encoder.config)
    config.num_hidden_layers += 1
    deeper = type(encoder)(config).eval()
    deeper.load_state_dict(encoder.state_dict(), strict=False)
    for name, weights in deeper.named_parameters():
        if re.search(rf"layers\.{config.num_hidden_layers - 1}\..*(out_proj|fc2)\.(weight|bias)$", name):
            weights.zero_()
    captions = [caption(*sample("scale", i), random.Random(i)) for i in range(64)]
    tokens = tokenizer(captions, padding="longest", return_tensors="pt")
    scale = deeper(**tokens, output_hidden_states=True).hidden_states[-2].std().item()
    for name, weights in deeper.named_parameters():
        if re.search(r"(embedding|out_proj|fc2)\.(weight|bias)$", name):
            weights /= scale
    config.layer_norm_eps /= scale**2
    for module in deeper.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.layer_norm_eps
    return deeper


@torch.no_grad()
def take_over(sdxl: StableDiffusionXLPipeline, sd: StableDiffusionPipeline) -> None:
    """Initialise SDXL from Stable Diffusion: its first text encoder, and its UNet, which has the same blocks.

    Inputs that only SDXL's layers have, such as the second text encoder's features, start with weight 0.
    """
    sdxl.register_modules(text_encoder=deepen(sd.text_encoder, sd.tokenizer))
    given = sd.unet.state_dict()
    for name, weights in sdxl.unet.state_dict().items():
        if name in given:
            known = given[name].reshape(given[name].shape[: weights.dim()])  # a 1 x 1 convolution is a linear layer
            weights.zero_()[tuple(map(slice, known.shape))] = known


# ---- words ----


def build_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer with a token for every word of the toy world and every reserved word, bytes for others.

    Without merges of its own, "sks" would be three letters that also occur in other words.
    """
    model = Tokenizer(BPE(end_of_word_suffix="</w>"))
    letters = sorted(letter for letter in byte_vocabulary() if len(letter) == 1)
    trainer = BpeTrainer(
        vocab_size=100_000,  # no limit: merge until every word is one token
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    model.train_from_iterator(sorted(_words()), trainer)
    merges: list[Any] = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    vocabulary = byte_vocabulary()
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH)


def _words() -> set[str]:
    rng = random.Random(0)
    captions = [caption(*sample("words", i), rng) for i in range(10_000)]
    return {word for text in captions for word in text.replace(",", " ").split()} | {*RESERVED, *named_characters()}


@torch.no_grad()
def place_reserved_words(tokenizer: CLIPTokenizer, embedding: nn.Embedding) -> None:
    """Give each word that training never saw an embedding of its own, distributed as those of the made-up names.

    A real text encoder has seen its rare tokens a few times: they lie among other names and mean little.
    """
    index = {word: tokenizer(word).input_ids[1] for word in (*RESERVED, *named_characters())}
    names = embedding.weight[[index[name] for name in named_characters()]]
    generator = torch.Generator().manual_seed(0)
    for word in RESERVED:
        direction = torch.randn(names.shape[1], generator=generator).to(names)
        embedding.weight[index[word]] = names.mean(0) + names.std(0) * direction
