"""Train the evaluators of the toy world: a CLIPModel and a DINO-like ViTModel, small ones of the stock classes.

    python -m toyworld.train_evaluators clip --output_dir outputs/toyworld/clip
    python -m toyworld.train_evaluators dino --output_dir outputs/toyworld/dino

clip learns which caption belongs to which picture. dino sees no captions: it learns which two pictures show the same
character, in two scenes, among others of its class in the same two scenes. [CLS] has to tell who it is, not where.

Writes OUTPUT_DIR/model, which from_pretrained loads, processors included. Every save prints how well it separates
held-out renders. clip: how often the nearest of 32 captions is a picture's own. dino: how often the same look in
another scene is closer than another look of its class in the same scene. If started again, it continues from its last
save.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from dreambooth.errors import readable_errors
from toyworld.base_models import build_tokenizer
from toyworld.fitting import build_parser, device, fit
from toyworld.pictures import render_batch
from toyworld.tiny_pipeline import TEXT_LENGTH
from toyworld.world import Look, Scene, caption, sample_look, sample_scene

Pair = tuple[Look, Scene]
SIZE, PATCH, WIDTH, LAYERS, HEADS = 64, 8, 128, 4, 4
GROUP = 8  # characters that share a scene, so that the scene tells nothing
TEMPERATURE = 0.1  # of dino's softmax
HELD_OUT = 1024  # pictures, or triples


# ---- clip ----


def build_clip() -> CLIPModel:
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "num_hidden_layers": 2,
    }
    vision = {"image_size": SIZE, "patch_size": PATCH, "num_hidden_layers": LAYERS}
    both = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": HEADS}
    both["projection_dim"] = WIDTH
    return CLIPModel(CLIPConfig(text_config=both | text, vision_config=both | vision, projection_dim=WIDTH))


def caption_pairs(stream: str, step: int, count: int) -> list[tuple[Pair, str]]:
    """Return pictures with captions, half of them in groups that share a scene; some captions name only the class."""
    rng = random.Random(f"{stream} {step}")
    found = []
    for i in range(count):
        if i % GROUP == 0 or i < count // 2:
            scene = sample_scene(rng)
        look = sample_look(rng)
        short = f"{rng.choice(('a photo of a', 'a', 'a picture of a'))} {look.kind}"
        found.append(((look, scene), short if rng.random() < 0.1 else caption(look, scene, rng)))
    return found


def clip_loss(clip: CLIPModel, pixels: Tensor, captions: list[str], tokenizer) -> Tensor:
    """Return the symmetric contrastive loss (arXiv 2103.00020); pictures with one caption count as equally right."""
    numbers = {text: i for i, text in enumerate(captions)}
    same = torch.tensor([numbers[text] for text in captions], device=pixels.device)
    same = (same[:, None] == same[None]).float()
    same = same / same.sum(1, keepdim=True)
    tokens = tokenizer(captions, padding="longest", return_tensors="pt").to(pixels.device)
    logits = clip(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels
    ).logits_per_image
    logits = logits.float()
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.t(), same)) / 2


@torch.no_grad()
def retrieval(clip: CLIPModel, tokenizer, among: int = 32) -> float:
    """Return how often a held-out picture's own caption is the nearest of 32."""
    right = 0
    for step in range(HELD_OUT // among):
        rng = random.Random(f"held out captions {step}")
        pairs, captions = [], []
        while len(pairs) < among:  # 32 different captions
            pair = (sample_look(rng, named=0), sample_scene(rng))
            if caption(*pair) not in captions:
                pairs.append(pair)
                captions.append(caption(*pair))
        tokens = tokenizer(captions, padding="longest", return_tensors="pt").to(clip.device)
        logits = clip(**tokens, pixel_values=render_batch(pairs).pixels.to(clip.device)).logits_per_image
        right += (logits.argmax(1).cpu() == torch.arange(among)).sum().item()
    return right / (HELD_OUT // among * among)


# ---- dino ----


def build_dino() -> ViTModel:
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
    )
    return ViTModel(config, add_pooling_layer=False)


def two_views(stream: str, step: int, count: int) -> tuple[list[Pair], list[Pair]]:
    """Return `count` characters, each in one scene and again in another; groups of a class share both scenes."""
    rng = random.Random(f"{stream} {step}")
    here, there = [], []
    for _ in range(count // GROUP):
        first, second = sample_scene(rng), sample_scene(rng)
        looks = [sample_look(rng)]
        while len(looks) < GROUP:
            look = replace(sample_look(rng), kind=looks[0].kind)
            if all(_appearance(look) != _appearance(other) for other in looks):
                looks.append(look)
        here += [(look, first) for look in looks]
        there += [(look, second) for look in looks]
    return here, there


def _appearance(look: Look) -> Look:
    return replace(look, name="", recoloured=False)


def embed(dino: ViTModel, pixels: Tensor) -> Tensor:
    """Return [CLS] (n, 128), of length 1."""
    return F.normalize(dino(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=1)


def dino_loss(dino: ViTModel, here: Tensor, there: Tensor) -> Tensor:
    """Return the contrastive loss of two views (arXiv 2002.05709): all other pictures of the batch are wrong."""
    views = embed(dino, torch.cat([here, there]))
    similarity = views @ views.t() / TEMPERATURE
    similarity.fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(views), device=views.device).roll(len(here)))


@torch.no_grad()
def triples(dino: ViTModel) -> float:
    """Return how often a look is closer to itself in another scene than to another of its class in the same scene."""
    here, there = two_views("held out triples", 0, HELD_OUT)
    first, second = (
        torch.cat([embed(dino, render_batch(part[i : i + 64]).pixels.to(dino.device)) for i in range(0, HELD_OUT, 64)])
        for part in (here, there)
    )
    itself = (first * second).sum(1)
    other = (first * first.view(-1, GROUP, WIDTH).roll(1, 1).flatten(0, 1)).sum(1)
    return (itself > other).float().mean().item()


# ---- the programs ----


def _pixels(pairs: Sequence[Pair]) -> Tensor:
    return render_batch(pairs).pixels.to(device())


def train_clip(options) -> None:
    tokenizer = build_tokenizer()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )

    def loss_of(clip: CLIPModel, step: int) -> Tensor:
        pairs, captions = zip(*caption_pairs(f"clip {options.seed}", step, options.batch_size))
        return clip_loss(clip, _pixels(pairs), list(captions), tokenizer)

    def save(clip: CLIPModel, steps: int) -> None:
        print(
            f"\n{steps} steps: the right one of 32 captions for {retrieval(clip, tokenizer):.1%} of {HELD_OUT} renders"
        )
        copy.deepcopy(clip).half().save_pretrained(options.output_dir / "model")
        CLIPProcessor(processor, tokenizer).save_pretrained(options.output_dir / "model")

    fit(build_clip(), loss_of, save, options)


def train_dino(options) -> None:
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )

    def loss_of(dino: ViTModel, step: int) -> Tensor:
        here, there = two_views(f"dino {options.seed}", step, options.batch_size // 2)
        return dino_loss(dino, _pixels(here), _pixels(there))

    def save(dino: ViTModel, steps: int) -> None:
        print(f"\n{steps} steps: {triples(dino):.1%} of {HELD_OUT} triples in the right order")
        copy.deepcopy(dino).half().save_pretrained(options.output_dir / "model")
        processor.save_pretrained(options.output_dir / "model")

    fit(build_dino(), loss_of, save, options)


def main() -> None:
    parser = build_parser(__doc__, steps=900, batch_size=128, learning_rate=1e-2, save_every=250)
    parser.add_argument("model", choices=("clip", "dino"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    {"clip": train_clip, "dino": train_dino}[options.model](options)


if __name__ == "__main__":
    with readable_errors():
        main()
