"""Train a base model of the toy world: text encoders and UNet, on renders with captions.

    python -m toyworld.train_base sd --output_dir outputs/toyworld/sd
    python -m toyworld.train_base sdxl --output_dir outputs/toyworld/sdxl
    python -m toyworld.train_base sd-wide --output_dir outputs/toyworld/sd-wide

Writes OUTPUT_DIR/pipeline, which DiffusionPipeline.from_pretrained loads, and sheets: described.png, 32 prompts that
describe a character; named.png, characters as rendered above what their names alone draw. Pictures are encoded once,
into OUTPUT_DIR/latents.safetensors. If started again, it continues from its last save.
"""

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dreambooth.base_model.process import DiscreteProcess, build_sampler
from dreambooth.drawing.draw import draw_images
from dreambooth.errors import readable_errors
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.options.paths import path_argument
from dreambooth.options.prompts import CHUNK_LENGTH
from toyworld.base_models import build_base, place_reserved_words, take_over
from toyworld.fitting import batches, build_parser, device, fit
from toyworld.pictures import render_batch, sample
from toyworld.render import contact_sheet, covering_pairs, render
from toyworld.train_vae import encode
from toyworld.world import Look, Scene, caption, named_characters

MODELS = Path(__file__).resolve().parent / "models"
FAMILIES = {"sd": SD, "sd-wide": SD, "sdxl": SDXL}
CAPTION_DROPOUT = 0.1  # so that classifier-free guidance works
SNR_GAMMA = 5.0  # of the min-SNR weights
GUIDANCE, SAMPLER_STEPS = 4.0, 20  # of the sheets
PIXELS = 64


@dataclass(frozen=True)
class Examples:
    """latents: (n, 8, 16, 16) fp16    sizes: (n, 6), as SDXL is told them    pairs: what each shows"""

    latents: Tensor
    sizes: Tensor
    pairs: list[tuple[Look, Scene]]


# ---- the pictures ----


def load_examples(kind: str, vae: AutoencoderKL, count: int, file: Path) -> Examples:
    """Return `count` encoded pictures, from `file` if it exists; otherwise encode and save them."""
    pairs = [sample("base", i) for i in range(count)]
    if not file.exists():
        latents, sizes = [], []
        for numbers in tqdm(list(batches(count, 64)), desc="encoding pictures", mininterval=10):
            pixels, size = zip(*(_picture(kind, pairs[i], random.Random(f"size {i}")) for i in numbers))
            with torch.autocast(device().type, torch.bfloat16):
                latents.append(encode(vae, torch.cat(pixels)).half().cpu())
            sizes += size
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents).contiguous(), "sizes": torch.tensor(sizes)}, file)
    tensors = load_file(file)
    return Examples(tensors["latents"], tensors["sizes"], pairs)


def _picture(kind: str, pair: tuple[Look, Scene], rng: random.Random) -> tuple[Tensor, list[int]]:
    """Return a picture (1, 3, 64, 64) and its sizes in px: original, top left of the crop, target, height first.

    Half of SDXL's are crops of pictures of other sizes, blurred if the original was small.
    """
    if kind != "sdxl" or rng.random() < 0.5:
        return render_batch([pair], PIXELS).pixels, [PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]
    original, enlarged = rng.choice((24, 32, 48, 96, 128)), rng.choice((64, 64, 72, 80))
    top, left = rng.randint(0, enlarged - PIXELS), rng.randint(0, enlarged - PIXELS)
    pixels = F.interpolate(
        render_batch([pair], original).pixels, (enlarged, enlarged), mode="bicubic", antialias=True
    ).clamp(-1, 1)
    cut = pixels[..., top : top + PIXELS, left : left + PIXELS]
    return cut, [original, original, top, left, PIXELS, PIXELS]


# ---- training ----


class Models(nn.Module):
    """The parts of a pipeline that train.

    SDXL's text encoders stay as contrastive training left them: rescaled, their weights are so small that the UNet's
    learning rate would wipe out what they know.
    """

    def __init__(self, pipeline: DiffusionPipeline, kind: str):
        super().__init__()
        names = ("unet",) if kind == "sdxl" else ("unet", "text_encoder")
        self.parts = nn.ModuleDict({name: pipeline.components[name] for name in names})
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.requires_grad_(name in names)


def diffusion_loss(
    pipeline: DiffusionPipeline,
    kind: str,
    process: DiscreteProcess,
    latents: Tensor,
    sizes: Tensor,
    captions: list[str],
) -> Tensor:
    """Return the min-SNR weighted error of the prediction, timesteps spread evenly over the batch."""
    rows = torch.randperm(len(latents), device=latents.device)
    timesteps = ((rows + torch.rand_like(latents[:, 0, 0, 0])) * process.num_timesteps / len(latents)).long()
    noised = process.noise(latents, torch.randn_like(latents), timesteps)
    family = FAMILIES[kind]
    condition = family.condition(family.encode_captions(pipeline, captions, CHUNK_LENGTH), sizes)
    prediction = pipeline.unet(noised.latents, noised.timesteps, **condition).sample
    errors = (prediction.float() - noised.target).square().mean((1, 2, 3))
    return (errors * process.snr_weights(timesteps, SNR_GAMMA)).mean()


def save_base(pipeline: DiffusionPipeline, average: Models, folder: Path) -> DiffusionPipeline:
    """Write the averaged model, with embeddings for the reserved words, in fp16; return it in fp32."""
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    models: dict[str, Any] = copy.deepcopy({**models, **average.parts})
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if encoder in models:
            place_reserved_words(pipeline.components[tokenizer], models[encoder].get_input_embeddings())
    options = {name: value for name, value in pipeline.config.items() if name == "force_zeros_for_empty_prompt"}
    trained = type(pipeline)(**{**pipeline.components, **models}, **options)
    trained.to(torch.float16).save_pretrained(folder)
    return trained.to(torch.float32)


# ---- the sheets ----


def draw(pipeline: DiffusionPipeline, prompts: list[str], seed: int = 0) -> list[Image.Image]:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = build_sampler(pipeline.scheduler)
    seeds = range(seed, seed + len(prompts))
    arguments = {"height": PIXELS, "width": PIXELS, "num_inference_steps": SAMPLER_STEPS, "guidance_scale": GUIDANCE}
    return draw_images(pipeline, seeds, 16, prompt=prompts, negative_prompt=[""] * len(prompts), **arguments)


def described() -> list[str]:
    """Return 32 different prompts that describe a character, of every class, place and style."""
    pairs = [(replace(look, name="", recoloured=False), scene) for look, scene, _ in covering_pairs(32, seed=1)]
    return [caption(*pair) for pair in pairs]


def draw_sheets(pipeline: DiffusionPipeline, folder: Path) -> None:
    prompts = described()
    contact_sheet(list(zip(draw(pipeline, prompts), prompts)), columns=8).save(folder / "described.png")
    looks = list(named_characters().values())[::31]  # of all classes in turn
    named = [(look, Scene("beach", variant=i)) for i, look in enumerate(looks)]
    prompts = [caption(*pair) for pair in named]
    rows = [(render(*pair), prompt) for pair, prompt in zip(named, prompts)]
    rows += list(zip(draw(pipeline, prompts), ["as drawn"] * len(prompts)))
    contact_sheet(rows, columns=len(looks)).save(folder / "named.png")


def main() -> None:
    parser = build_parser(__doc__, steps=6_000, batch_size=32, learning_rate=5e-3)
    parser.add_argument("kind", choices=tuple(FAMILIES))
    parser.add_argument(
        "--vae", type=path_argument, default=MODELS / "vae", help="autoencoder; default: the shipped one"
    )
    parser.add_argument(
        "--clip",
        type=path_argument,
        default=MODELS / "clip",
        help="CLIPModel whose text encoder to use; default: the shipped one",
    )
    parser.add_argument("--sd", help="trained model in Stable Diffusion's layout to initialise sdxl from")
    parser.add_argument("--pictures", type=int, default=48_000, help="renders to learn from; default: 48000")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    vae: Any = AutoencoderKL.from_pretrained(options.vae, dtype=torch.float32)
    vae.to(device()).requires_grad_(False).eval()
    file = options.output_dir / "latents.safetensors"
    examples = load_examples(options.kind, vae, options.pictures, file)
    pipeline: Any = build_base(options.kind, vae, options.clip)
    if options.sd:
        take_over(pipeline, StableDiffusionPipeline.from_pretrained(options.sd, dtype=torch.float32))
    scheduler: Any = DDPMScheduler.from_config(pipeline.scheduler.config)
    process = DiscreteProcess(scheduler)

    def loss_of(models: Models, step: int) -> Tensor:
        rng = random.Random(f"base {options.seed} {step}")
        rows = [rng.randrange(options.pictures) for _ in range(options.batch_size)]
        captions = ["" if rng.random() < CAPTION_DROPOUT else caption(*examples.pairs[row], rng) for row in rows]
        latents, sizes = (tensor[rows].to(device()) for tensor in (examples.latents, examples.sizes))
        return diffusion_loss(pipeline, options.kind, process, latents.float(), sizes, captions)

    def save(average: Models, steps: int) -> None:
        trained = save_base(pipeline, average, options.output_dir / "pipeline")
        draw_sheets(trained, options.output_dir)

    fit(Models(pipeline, options.kind), loss_of, save, options)


if __name__ == "__main__":
    with readable_errors():
        main()
