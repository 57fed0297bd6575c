"""Images of a base model that are kept for later: the same model draws the same images from the same seeds.

Each is a PNG of its own, complete or absent, with a checksum of its pixels. Its name has a digest of everything that
its pixels depend on. So any number of processes may share a folder, what is damaged is drawn anew, and what is not
wanted any more can be removed at any time.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dreambooth.base_model.process import build_sampler
from dreambooth.base_model.source import base_source, load_scheduler, vae_source
from dreambooth.errors import warn_only
from dreambooth.options.evaluation import EvaluationOptions
from kron_formats.families import COMPONENTS, TOKENIZERS
from kron_formats.files import whole_file
from kron_formats.kept import key_of

WAY = 1  # of drawing: to be raised when this project draws other images from the same options
LIBRARIES = ("torch", "diffusers", "transformers")
CHECKSUM, PROMPT = "sha256", "prompt"  # texts in the images; the prompt is for people who look
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)  # what Pillow raises


def drawing_identity(config: EvaluationOptions, device: torch.device) -> bytes:
    """Return a digest of everything but prompt and seeds that a base model's images depend on. Reads no weights.

    The batch size, the device, the CPU's threads and the libraries' versions count too: they change the last bits.
    """
    source = base_source(config)
    parts = [part for part in (*COMPONENTS, *TOKENIZERS.values()) if part in source.configurations.classes]
    files = source.weights.state([*parts, "model_index.json"]), vae_source(config).weights.state(["vae"])
    sampler = build_sampler(load_scheduler(config))
    settings = [entry for entry in sampler.config.items() if not entry[0].startswith("_")]  # a set, in any order
    noise = type(sampler).__name__, sorted(settings)
    arguments = config.common_arguments(), config.batch_size, config.dtype
    versions = [version(library) for library in LIBRARIES]
    return key_of(b"base images", repr((WAY, files, noise, arguments, _machine(device), versions)).encode()).encode()


def _machine(device: torch.device) -> tuple[str, ...]:
    if device.type == "cuda":
        return device.type, torch.cuda.get_device_name(device)
    return device.type, torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())


def load_or_draw(
    folder: Path, identity: bytes, prompt: str, seeds: Sequence[int], draw: Callable[[], list[Image.Image]]
) -> list[Image.Image]:
    """Return the images of a prompt, one for each seed. If one of them is missing or damaged, draw and keep them all.

    `identity` is what `drawing_identity` returns. A folder in which they cannot be kept is warned of.
    """
    key = key_of(identity, repr((prompt, list(seeds))).encode())[:32]
    paths = [folder / f"base-{key}-{seed}.png" for seed in seeds]
    kept = [image for path in paths if (image := _load(path)) is not None]
    if len(kept) == len(paths):
        return kept
    images = draw()
    with warn_only(f"images of the base model were not kept in {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            _save(image, prompt, path)
    return images


def _save(image: Image.Image, prompt: str, path: Path) -> None:
    texts = PngInfo()
    texts.add_itxt(CHECKSUM, _checksum(image))
    texts.add_itxt(PROMPT, prompt)
    with whole_file(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=texts)


def _load(path: Path) -> Image.Image | None:
    """Return what `_save` wrote, or None if it is missing or damaged."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            image = Image.frombytes(file.mode, file.size, file.tobytes())
            return image if file.info.get(CHECKSUM) == _checksum(image) else None
    except DAMAGED:
        return None


def _checksum(image: Image.Image) -> str:
    return key_of(repr((image.mode, image.size)).encode(), image.tobytes())
