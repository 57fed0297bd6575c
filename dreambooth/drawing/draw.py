"""How all images are drawn: each from its own seed, several at once, decoded one by one."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from dreambooth.base_model.latents import denormalise
from dreambooth.drawing.prompts import embedding_arguments
from dreambooth.options.prompts import CHUNK_LENGTH


def draw_images(pipeline: Any, seeds: Sequence[int], batch_size: int, **arguments) -> list[Image.Image]:
    """Return an image for each seed, drawn `batch_size` at once. `arguments` are those of `draw_batches`.

    The VAE decodes one image at a time, in its own precision, which may differ from the denoiser's. Images that the
    pipeline's safety checker rejects are black; training and scoring use pipelines without one.
    """
    return [image for batch in draw_batches(pipeline, seeds, batch_size, **arguments) for image in batch]


def draw_batches(
    pipeline: Any,
    seeds: Sequence[int],
    batch_size: int,
    *,
    prompt: str | list[str] | None = None,
    negative_prompt: str | list[str] | None = None,
    max_token_length: int = CHUNK_LENGTH,
    **arguments,
) -> Iterator[list[Image.Image]]:
    """Yield the images of `draw_images`, batch by batch.

    Prompt and negative prompt are for all images, or, as lists, one for each. Instead of them, `arguments`, which are
    the pipeline's own, may hold the embeddings of one prompt for all images.
    """
    each = isinstance(prompt, list)
    embeddings = {}
    if prompt is not None and seeds:
        prompts = prompt if isinstance(prompt, list) else [prompt]
        negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt] * len(prompts)
        embeddings = embedding_arguments(pipeline, prompts, negatives, max_token_length)
    for start in range(0, len(seeds), batch_size):
        part = slice(start, start + batch_size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        rows = {name: tensor[part] if each else tensor for name, tensor in embeddings.items()}
        copies = 1 if each else len(generators)
        yield _draw(pipeline, num_images_per_prompt=copies, generator=generators, **rows, **arguments)


@torch.no_grad()
def _draw(pipeline: Any, **arguments) -> list[Image.Image]:
    vae = pipeline.vae
    latents = denormalise(pipeline(**arguments, output_type="latent").images.float(), vae.config).to(vae.dtype)
    images = torch.cat([vae.decode(image).sample for image in latents.split(1)]).float()
    drawn = pipeline.image_processor.postprocess(images, output_type="pil")
    if getattr(pipeline, "safety_checker", None) is None:
        return drawn
    _, rejected = pipeline.run_safety_checker(images, images.device, pipeline.safety_checker.dtype)
    return [Image.new("RGB", image.size) if reject else image for image, reject in zip(drawn, rejected)]
