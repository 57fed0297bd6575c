"""Train a Kronecker adapter for SDXL on a few photos of a subject (DreamBooth).

    W + scale · (A ⊗ B) on the attention projections of the UNet; W stays frozen.       DiffuseKronA, arXiv 2402.17412

On a CPU, with a small random model, to see it run:
    python -m toyworld.tiny_pipeline sdxl outputs/tiny-sdxl
    accelerate launch train_dreambooth_kronecker_sdxl.py --pretrained_model_name_or_path outputs/tiny-sdxl \\
        --instance_data_dir toyworld/photos/robot --instance_prompt "a photo of sks robot" --resolution 64 \\
        --max_train_steps 20 --output_dir outputs/tiny-sdxl-robot

On one GPU:
    accelerate launch --mixed_precision bf16 train_dreambooth_kronecker_sdxl.py \\
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" \\
        --output_dir outputs/dog --max_train_steps 1000

On several GPUs: accelerate launch --multi_gpu --num_processes 4 train_dreambooth_kronecker_sdxl.py ...

Writes OUTPUT_DIR/pytorch_kronecker_weights.safetensors, checkpoint-*/, samples/*.png, metrics.jsonl, training.png,
README.md (the model card), config.yaml and logs/.
"""

import functools
from dataclasses import dataclass
from typing import Any

from dreambooth.errors import readable_errors
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.parsing import parse_options
from dreambooth.options.training import SDXLTrainingConfig
from dreambooth.startup import after_imports, before_imports


@dataclass(frozen=True, kw_only=True)
class Config(SDXLTrainingConfig, KroneckerOptions):
    """Options of train_dreambooth_kronecker_sdxl.py."""


if __name__ == "__main__":
    parse_options(Config, __doc__)  # --help and wrong options are answered before the imports below, which take seconds
    before_imports()

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from dreambooth.adapters import inject_adapters, without_adapters
from dreambooth.card import push_to_hub, save_card
from dreambooth.checkpoint import check_room, load_checkpoint, save_checkpoint, save_result
from dreambooth.data import DreamBoothDataset, build_loader, prompts_of, samples_per_pass
from dreambooth.diffusion import build_noise_scheduler, build_sampler
from dreambooth.folder import find_start, hold_folder, prepare_output
from dreambooth.identity import identify_run
from dreambooth.memory import explain_out_of_memory
from dreambooth.models import empty_models, load_pipeline, prepare_training, trained_models
from dreambooth.noise import noise_drawer
from dreambooth.optimizers import build_lr_scheduler, build_optimizer, check_optimizer
from dreambooth.photos import read_instance_photos
from dreambooth.prior import ensure_class_images
from dreambooth.ranks import explain_lost_process
from dreambooth.report import Progress, save_curves
from dreambooth.stopping import Stop
from dreambooth.text import prompt_encoder
from dreambooth.training import Denoiser, count_steps, start_accelerator, train_steps
from dreambooth.vae import latent_source
from dreambooth.validation import validate
from kron_adapter import KroneckerError

Pipeline = StableDiffusionXLPipeline


def load_models(config: Config, accelerator: Accelerator) -> Pipeline:
    """Return the frozen base model on the device, VAE and text encoders still to be read."""
    return load_pipeline(Pipeline, config, accelerator, add_watermarker=False)


def encode_prompts(pipeline: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
    """Return one row for each prompt, under the names of the pipeline's arguments: prompt_embeds (prompts, 77, 2048)
    of both text encoders, pooled_prompt_embeds (prompts, 1280) of the second.

    The empty prompt is all zeros where the base model was trained so.
    """
    prompt_embeds, _, pooled_prompt_embeds, _ = pipeline.encode_prompt(
        prompts, device=pipeline.device, do_classifier_free_guidance=False
    )
    keep = torch.tensor([bool(prompt) or not pipeline.config.force_zeros_for_empty_prompt for prompt in prompts])
    keep = keep.to(prompt_embeds)[:, None]
    return {
        "prompt_embeds": prompt_embeds * keep[:, :, None],
        "pooled_prompt_embeds": pooled_prompt_embeds * keep,
    }


def unet_condition(embeddings: dict[str, Tensor], size_conditions: Tensor) -> dict[str, Any]:
    """Return the UNet's keyword arguments: encoder_hidden_states (rows, 77, 2048), text_embeds (rows, 1280), and
    time_ids (rows, 6): every row's own original size, crop and target size, px."""
    text_embeds = embeddings["pooled_prompt_embeds"]
    return {
        "encoder_hidden_states": embeddings["prompt_embeds"],
        "added_cond_kwargs": {"text_embeds": text_embeds, "time_ids": size_conditions.to(text_embeds)},
    }


@explain_lost_process()
def main() -> None:
    config = parse_options(Config, __doc__)
    accelerator = start_accelerator(config)
    with (
        Stop(config, accelerator) as stop,
        hold_folder(config, accelerator),
        explain_out_of_memory(config, accelerator),
    ):
        # What can be refused is refused before any weights are read
        start = find_start(config, accelerator)
        check_optimizer(config)
        photos = read_instance_photos(config)
        inject_adapters(trained_models(empty_models(config, Pipeline), config), config)

        # The frozen model: class images, latents, every distinct prompt once; what of it has nothing to do is not read
        pipeline = load_models(config, accelerator)
        noise_scheduler = build_noise_scheduler(pipeline.scheduler, config)
        pipeline.scheduler = build_sampler(pipeline.scheduler)
        class_photos = ensure_class_images(pipeline, config, accelerator) if config.uses_class_images else []
        run = identify_run(start, photos, class_photos, config, accelerator)
        prompts = prompts_of(photos, class_photos, config)
        dataset = DreamBoothDataset(photos, class_photos, prompts, config)
        latents_of = latent_source(pipeline, dataset, config, accelerator)
        encode = prompt_encoder(encode_prompts, pipeline, prompts, config, accelerator)

        # What trains
        models = trained_models(pipeline.components, config)
        groups = inject_adapters(models, config)
        prepare_training(pipeline, config, accelerator)
        samples = samples_per_pass(photos, config)
        total_steps = count_steps(samples, config, accelerator.num_processes)
        optimizer = build_optimizer(groups, config, accelerator.num_processes)
        lr_scheduler = build_lr_scheduler(optimizer, config, total_steps)
        optimizer = accelerator.prepare_optimizer(optimizer)
        denoiser = Denoiser(pipeline.unet, encode, unet_condition)

        check_room(models, config)
        prepare_output(config, start, accelerator)
        first_step = load_checkpoint(start, accelerator, models, optimizer, lr_scheduler) if start else 0
        draw = noise_drawer(pipeline, noise_scheduler, config)
        batches = build_loader(dataset, draw, config, accelerator.process_index, accelerator.num_processes, first_step)
        base_model = functools.partial(without_adapters, models)
        reports = train_steps(
            accelerator, denoiser, latents_of, noise_scheduler, base_model, batches, optimizer, lr_scheduler, config
        )

        progress = Progress(accelerator, dataset, config, first_step, total_steps)
        show = functools.partial(validate, progress, pipeline, encode, prompts, optimizer, samples, config)
        save = functools.partial(save_checkpoint, accelerator, models, optimizer, lr_scheduler, run, config)
        show(step=first_step)  # a resumed run may have been cut off while it drew them
        stop.only_between_steps()
        for step in progress.steps(reports):
            stopping = stop.asked()
            if stopping or step % config.checkpointing_steps == 0:
                progress.read()
                save(step=step, stopping=stopping)
            if stopping:
                progress.close()
                stop.leave(step)
            show(step=step)
        path = save_result(accelerator, models, optimizer, total_steps, config)
        if accelerator.is_main_process:
            save_curves(config)
            save_card(path, Pipeline, total_steps, config)
            progress.say_closing_line(groups, path)
        progress.close()
        if accelerator.is_main_process:
            push_to_hub(path, config)  # last, so that no other process waits for it


if __name__ == "__main__":
    after_imports()
    with readable_errors(KroneckerError):
        main()
