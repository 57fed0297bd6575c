"""Train a Kronecker adapter for Stable Diffusion 1.x or 2.x on a few photos of a subject (DreamBooth).

    W + scale · (A ⊗ B) on the attention projections of the UNet; W stays frozen.       DiffuseKronA, arXiv 2402.17412

On a CPU, in minutes, with the small model that the quickstart makes:
    accelerate launch train_dreambooth_kronecker.py --config configs/quickstart.yaml

On one GPU:
    accelerate launch --mixed_precision bf16 train_dreambooth_kronecker.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images/dog --class_prompt "a photo of dog" \\
        --output_dir outputs/dog --max_train_steps 800

On several GPUs: accelerate launch --multi_gpu --num_processes 4 train_dreambooth_kronecker.py ...

Writes OUTPUT_DIR/pytorch_kronecker_weights.safetensors, checkpoint-*/, samples/*.png, config.yaml and logs/.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from torch import Tensor

from dreambooth.checkpoint import find_start, load_checkpoint, prepare_output, save_checkpoint, save_weights
from dreambooth.config import TrainingConfig, parse_config, readable_errors
from dreambooth.data import Batch, DreamBoothDataset, build_loader, distinct_prompts, read_photos
from dreambooth.models import empty_unet, free_text_encoders
from dreambooth.prior import ensure_class_images
from dreambooth.report import Progress, closing_line
from dreambooth.training import (
    build_lr_scheduler,
    build_optimizer,
    count_steps,
    start_accelerator,
    train_steps,
    weight_dtype,
)
from dreambooth.validation import draw_samples, save_samples, validation_due
from kron_adapter import KroneckerError, inject_kronecker, kronecker_parameters

Pipeline = StableDiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """The shared options, with Stable Diffusion's defaults."""


def load_models(config: Config, accelerator: Accelerator) -> Pipeline:
    """Return the frozen base model on the device."""
    pipeline = Pipeline.from_pretrained(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        dtype=weight_dtype(accelerator),
        safety_checker=None,
        requires_safety_checker=False,
    )
    return pipeline.to(accelerator.device)


@torch.no_grad()
def encode_prompts(pipeline: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Return one row for each prompt, under the names of the pipeline's arguments: prompt_embeds (prompts, 77, 768)."""
    prompt_embeds, _ = pipeline.encode_prompt(prompts, pipeline.device, 1, do_classifier_free_guidance=False)
    return {"prompt_embeds": prompt_embeds}


def unet_condition(embeddings: dict[str, Tensor], batch: Batch) -> dict[str, Any]:
    """Return the UNet's keyword arguments for a batch: encoder_hidden_states (rows, 77, 768)."""
    return {"encoder_hidden_states": embeddings["prompt_embeds"][batch.prompt_rows]}


def main() -> None:
    config = parse_config(Config, __doc__)
    accelerator = start_accelerator(config)
    inject = functools.partial(
        inject_kronecker, a1=config.kron_a1, a2=config.kron_a2, targets=config.kron_targets,
        factors=config.factors_by_target(), init=config.kron_init,
    )  # fmt: skip

    # What can be refused is refused before any weights are read
    start = find_start(config)
    photos = read_photos(config.instance_data_dir, "--instance_data_dir", config.instance_prompt, config)
    inject(empty_unet(config.pretrained_model_name_or_path, config.revision, Pipeline))

    # The frozen model: class images, then every distinct prompt once, then the text encoders go
    pipeline = load_models(config, accelerator)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    class_photos = ensure_class_images(pipeline, config, accelerator) if config.with_prior_preservation else []
    prompts = distinct_prompts([*photos, *class_photos], *config.validation_prompt, "")
    embeddings = encode_prompts(pipeline, prompts)
    free_text_encoders(pipeline)

    # What trains
    inject(pipeline.unet)
    factors = kronecker_parameters(pipeline.unet)
    total_steps = count_steps(len(photos), config, accelerator.num_processes)
    optimizer = build_optimizer(factors, config, accelerator.num_processes)
    lr_scheduler = build_lr_scheduler(optimizer, config, total_steps)
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if config.enable_xformers_memory_efficient_attention:
        pipeline.unet.enable_xformers_memory_efficient_attention()
    pipeline.unet.train()
    unet, optimizer = accelerator.prepare(pipeline.unet, optimizer)

    prepare_output(config, start, accelerator)
    first_step = load_checkpoint(start, accelerator, pipeline.unet, optimizer, lr_scheduler) if start else 0
    dataset = DreamBoothDataset(photos, class_photos, prompts, config)
    batches = build_loader(dataset, config, accelerator.process_index, accelerator.num_processes, first_step)
    condition = functools.partial(unet_condition, embeddings)
    reports = train_steps(
        accelerator, unet, pipeline.vae, noise_scheduler, condition, batches, optimizer, lr_scheduler, config
    )

    progress = Progress(accelerator, config, first_step, total_steps)
    for step, report in zip(range(first_step + 1, total_steps + 1), reports):
        progress.update(step, report)
        if step % config.checkpointing_steps == 0:
            save_checkpoint(accelerator, pipeline.unet, optimizer, lr_scheduler, step, config)
        if validation_due(step, total_steps, len(photos), config, accelerator):
            save_samples(accelerator, draw_samples(pipeline, embeddings, prompts, config), step, config)
    if accelerator.is_main_process:
        path = save_weights(pipeline.unet, config.output_dir, total_steps, config)
        progress.say(closing_line(factors, total_steps - first_step, progress.seconds, path, accelerator.device))
    progress.close()


if __name__ == "__main__":
    with readable_errors(KroneckerError):
        main()
