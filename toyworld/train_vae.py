"""Train the autoencoder of both base models: 64x64 px to 16x16 latents of 8 channels, and back.

    python -m toyworld.train_vae --output_dir outputs/toyworld/vae

Writes OUTPUT_DIR/vae, which AutoencoderKL.from_pretrained loads, and OUTPUT_DIR/sheet.png: held-out renders above their
reconstructions. If started again, it continues from its last save. Its latents have zero mean and unit variance in
every channel: the scale is part of quant_conv and post_quant_conv.
"""

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dreambooth.errors import readable_errors
from toyworld.fitting import build_parser, device, fit
from toyworld.pictures import render_batch, sample
from toyworld.tiny_pipeline import vae_blocks

HELD_OUT = 256  # pictures
KL_WEIGHT = 1e-4  # of the mean over the latents' elements
Vae = Any  # an AutoencoderKL; diffusers annotates its methods more narrowly than they are


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        **vae_blocks(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        latent_channels=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def vae_loss(vae: Vae, pixels: Tensor, masks: Tensor) -> Tensor:
    """Return L1 + MSE + L1 of differences between neighbours, weighted three times inside the character, + KL."""
    posterior = vae.encode(pixels).latent_dist
    error = vae.decode(posterior.sample()).sample.float() - pixels
    weights = 1 + 2 * masks
    loss = (weights * (error.abs() + error.square())).mean()
    for dim in (-1, -2):
        loss = loss + (weights.narrow(dim, 1, 63) * error.diff(dim=dim).abs()).mean()
    return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


@torch.no_grad()
def whiten(vae: Vae, pixels: Tensor) -> Vae:
    """Return the same autoencoder with latents of mean 0 and variance 1 per channel over `pixels`."""
    vae = copy.deepcopy(vae)
    latents = encode(vae, pixels)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[channels:] -= 2 * std.log()  # these are the log-variances
    return vae


@torch.no_grad()
def encode(vae: Vae, pixels: Tensor) -> Tensor:
    """Return the posterior means (n, channels, height, width) of pictures (n, 3, 64, 64)."""
    return torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean for part in pixels.split(64)])


@torch.no_grad()
def decode(vae: Vae, latents: Tensor) -> Tensor:
    return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in latents.split(64)])


def psnr(vae: Vae, pixels: Tensor) -> float:
    """Return the mean PSNR of reconstructions in dB, over pictures in [-1, 1] (peak to peak 2)."""
    error = decode(vae, encode(vae, pixels)) - pixels.to(vae.device)
    return (10 * torch.log10(4 / error.square().mean((1, 2, 3)))).mean().item()


def to_image(pixels: Tensor) -> Image.Image:
    """pixels: (3, height, width) in [-1, 1]"""
    array = (127.5 * (pixels.float().clamp(-1, 1) + 1)).round().byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())


def draw_sheet(vae: Vae, pixels: Tensor, columns: int = 16) -> Image.Image:
    rebuilt = decode(vae, encode(vae, pixels))
    sheet = Image.new("RGB", (columns * 132, len(pixels) // columns * 268), "white")
    for i, pair in enumerate(zip(pixels, rebuilt)):
        for row, picture in enumerate(pair):
            place = i % columns * 132, i // columns * 268 + row * 132
            sheet.paste(to_image(picture).resize((128, 128), Image.Resampling.NEAREST), place)
    return sheet


def main() -> None:
    options = build_parser(__doc__, steps=2600, batch_size=32, learning_rate=0.01).parse_args()
    torch.manual_seed(options.seed)
    held_out = render_batch([sample("held out", i) for i in range(HELD_OUT)]).pixels

    def loss_of(vae: Vae, step: int) -> Tensor:
        numbers = range(step * options.batch_size, (step + 1) * options.batch_size)
        pictures = render_batch([sample(f"vae {options.seed}", i) for i in numbers])
        pixels = pictures.pixels.to(device(), memory_format=torch.channels_last)
        return vae_loss(vae, pixels, pictures.masks.to(device()))

    def save(vae: Vae, steps: int) -> None:
        white = whiten(vae, held_out)
        print(f"\n{steps} steps: PSNR {psnr(white, held_out):.2f} dB on {HELD_OUT} held-out renders")
        draw_sheet(white, held_out[:64]).save(options.output_dir / "sheet.png")
        white.to(torch.float16).save_pretrained(options.output_dir / "vae")

    fit(build_vae(), loss_of, save, options)


if __name__ == "__main__":
    with readable_errors():
        main()
