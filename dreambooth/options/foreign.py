"""Flags of other trainers and launchers, and what to use here instead.

From diffusers' examples (DreamBooth, Custom Diffusion, Textual Inversion, advanced) and kohya's sd-scripts. An entry
is used only if the script lacks the flag and has every flag that the sentence names. What only a method can answer is
the attribute `foreign` of its options.
"""

import difflib
import re
from typing import TYPE_CHECKING

from dreambooth.options.field import option_names

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Flags, separated by spaces, and the answer to each of them
TABLE: tuple[tuple[str, str], ...] = (
    # ---- the adapter ----
    (
        "lora_dropout network_dropout rank_dropout module_dropout",
        "the adapter has no dropout; fewer --max_train_steps or a lower --learning_rate overfit less",
    ),
    ("base_weights base_weights_multiplier", "use --base_adapter FILE:SCALE"),
    ("use_ema offload_ema foreach_ema", "use --ema_decay 0.99, which saves the average beside the result"),
    # ---- the base model ----
    (
        "tokenizer_name",
        "the tokenizer is that of --pretrained_model_name_or_path",
    ),
    ("tokenizer_max_length", "use --max_token_length, which does not count the marks of start and end"),
    ("tokenizer_cache_dir", "--cache_dir is the folder for all downloads"),
    (
        "v2 do_edm_style_training sdxl",
        "not needed: it is read from the base model, --pretrained_model_name_or_path",
    ),
    ("v_parameterization", "use --prediction_type v_prediction, unless the base model says so itself"),
    ("zero_terminal_snr", "use --rescale_betas_zero_snr, unless the base model says so itself"),
    ("original_config original_config_file", "use --base_config with a folder or a name on the Hub"),
    ("vae vae_path", "use --pretrained_vae_model_name_or_path"),
    ("no_half_vae", "not needed: the VAE is in fp32 unless --vae_precision says otherwise"),
    ("clip_skip", "there is no CLIP skip; the text encoders of --pretrained_model_name_or_path are used as they are"),
    (
        "text_encoder_use_attention_mask class_labels_conditioning",
        "only for DeepFloyd IF; --pretrained_model_name_or_path must be Stable Diffusion or SDXL",
    ),
    (
        "full_fp16 full_bf16",
        "frozen weights follow --mixed_precision or --base_precision; what trains stays fp32, at little cost",
    ),
    ("fp8_base fp8_base_unet", "use --base_precision int8 or nf4"),
    ("disable_mmap_load_safetensors", "not needed: weights are read once, part by part"),
    # ---- photos and captions ----
    (
        "train_data_dir train_dir data_dir image_dir",
        "use --instance_data_dir with --instance_prompt; a number in a folder's name means nothing here: use --repeats",
    ),
    ("reg_data_dir", "use --class_data_dir with --with_prior_preservation and --class_prompt"),
    ("dataset_repeats num_repeats", "use --repeats"),
    (
        "concepts_list",
        "use --subjects with a YAML file, or put the same below subjects: in the file of --config",
    ),
    ("dataset_config in_json dataset_class", "use --instance_data_dir; captions are in photo.txt or metadata.jsonl"),
    (
        "caption_extension caption_extention",
        "captions in --instance_data_dir are photo.txt or photo.caption beside photo.jpg",
    ),
    (
        "shuffle_caption keep_tokens keep_tokens_separator caption_separator secondary_separator enable_wildcard "
        "caption_prefix caption_suffix weighted_captions token_warmup_min token_warmup_step",
        "captions are used as they are written; --instance_prompt is for photos without one",
    ),
    (
        "caption_dropout_rate caption_tag_dropout_rate caption_dropout_every_n_epochs",
        "use --caption_dropout_probability, which drops the whole caption of a sample",
    ),
    ("flip_aug hflip", "use --random_flip"),
    ("random_crop noaug", "crops are random unless --center_crop is given"),
    ("color_aug face_crop_aug_range", "images are only cropped and, with --random_flip, mirrored"),
    ("enable_bucket", "use --aspect_ratio_buckets"),
    (
        "min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale",
        "--aspect_ratio_buckets chooses the shapes: sides are multiples of 64 px, the area is --resolution²",
    ),
    ("resize_interpolation", "use --image_interpolation_mode"),
    ("size height width", "use --resolution"),
    (
        "masked_loss alpha_mask conditioning_data_dir",
        "put a mask beside the photo, photo.mask.png; --unmasked_weight is the weight outside it",
    ),
    ("vae_batch_size skip_cache_check", "--cache_latents encodes each photo once, and checks what it finds on disk"),
    (
        "pre_compute_text_embeddings cache_text_encoder_outputs cache_text_encoder_outputs_to_disk "
        "text_encoder_batch_size",
        "not needed: prompts are encoded once unless --train_text_encoder is given; --cache_latents_to_disk keeps "
        "them for later runs",
    ),
    # ---- prior ----
    ("prior_generation_precision", "class images are drawn in the precision of --base_precision"),
    ("real_prior", "put real photos into --class_data_dir; only missing class images are drawn"),
    # ---- words and text encoders ----
    (
        "modifier_token placeholder_token initializer_token token_abstraction num_new_tokens_per_abstraction "
        "num_vectors learnable_property train_text_encoder_ti train_text_encoder_ti_frac",
        "this script does not learn new words: use a rare one in --instance_prompt, for example sks, or "
        "methods/train.py textual_inversion",
    ),
    ("train_text_encoder_frac", "with --train_text_encoder, the text encoders train to the end"),
    (
        "network_train_unet_only train_unet_only",
        "not needed: only the UNet is adapted unless --train_text_encoder is given",
    ),
    ("network_train_text_encoder_only", "the UNet is always adapted; --train_text_encoder adds the text encoders"),
    (
        "adam_weight_decay_text_encoder",
        "--adam_weight_decay applies to everything that trains",
    ),
    (
        "learning_rate_te learning_rate_te1 learning_rate_te2",
        "use --text_encoder_lr, which applies to all text encoders",
    ),
    # ---- loss ----
    ("min_snr_gamma", "use --snr_gamma"),
    ("offset_noise", "use --noise_offset with its strength, for example 0.1"),
    (
        "noise_offset_random_strength adaptive_noise_scale multires_noise_iterations multires_noise_discount "
        "ip_noise_gamma ip_noise_gamma_random_strength",
        "the only change to the noise is --noise_offset",
    ),
    (
        "huber_schedule huber_scale",
        "--loss_type huber is scheduled over the noise levels, with --huber_c at the highest",
    ),
    (
        "scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss weighting_scheme",
        "the only weighting of timesteps is --snr_gamma",
    ),
    # ---- batches, steps, optimizer ----
    ("max_train_epochs", "use --num_train_epochs"),
    ("optimizer_type", "use --optimizer"),
    ("use_lion_optimizer", "Lion is not a choice of --optimizer"),
    ("optimizer_args", "use --adam_beta1, --adam_beta2, --adam_weight_decay and --adam_epsilon"),
    (
        "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup",
        "--optimizer Prodigy has decoupled weight decay, bias correction and safeguarded warm-up, and its own beta 3",
    ),
    ("unet_lr", "use --learning_rate"),
    ("lr_scheduler_num_cycles", "use --lr_num_cycles"),
    ("lr_scheduler_power", "use --lr_power"),
    (
        "lr_scheduler_type lr_scheduler_args lr_decay_steps lr_scheduler_timescale lr_scheduler_min_lr_ratio",
        "use one of the schedules of --lr_scheduler, with --lr_warmup_steps, --lr_num_cycles and --lr_power",
    ),
    (
        "set_grads_to_none fused_backward_pass",
        "not needed: only the adapter has gradients; --gradient_checkpointing saves more memory",
    ),
    ("max_data_loader_n_workers", "use --dataloader_num_workers"),
    ("persistent_data_loader_workers", "not needed: the processes of --dataloader_num_workers run as long as training"),
    # ---- memory and speed ----
    (
        "xformers",
        "use --enable_xformers_memory_efficient_attention; PyTorch's attention, the default, needs as little memory",
    ),
    (
        "sdpa mem_eff_attn enable_flash_attention attn_mode",
        "not needed: PyTorch's memory-efficient attention is the default; the other choice is "
        "--enable_xformers_memory_efficient_attention",
    ),
    ("torch_compile", "use --compile"),
    (
        "lowram highvram blocks_to_swap cpu_offload_checkpointing",
        "to use less memory, add --gradient_checkpointing, --use_8bit_adam and --base_precision nf4",
    ),
    (
        "num_processes num_machines machine_rank main_process_ip main_process_port multi_gpu gpu_ids use_fsdp "
        "use_deepspeed dynamo_backend num_cpu_threads_per_process",
        "an option of accelerate launch: put it before the script's name",
    ),
    (
        "deepspeed zero_stage offload_optimizer_device offload_param_device ddp_timeout ddp_gradient_as_bucket_view "
        "ddp_static_graph",
        "accelerate launch sets up distributed training: see configs/accelerate",
    ),
    # ---- checkpoints and output ----
    ("save_steps save_every_n_steps save_state save_state_on_train_end", "use --checkpointing_steps"),
    (
        "save_every_n_epochs save_n_epoch_ratio",
        "use --checkpointing_steps, which is in optimizer steps",
    ),
    (
        "save_last_n_steps save_last_n_epochs save_last_n_steps_state save_last_n_epochs_state",
        "use --checkpoints_total_limit",
    ),
    (
        "resume initial_epoch initial_step skip_until_initial_step",
        "use --resume_from_checkpoint with a checkpoint folder or latest",
    ),
    ("output_name", "name the folder with --output_dir; the file in it always has the same name"),
    (
        "save_model_as use_safetensors no_safe_serialization",
        "the file in --output_dir is safetensors; scripts/convert.py writes other layouts",
    ),
    (
        "output_kohya_format save_as_full_pipeline skip_save_text_encoder",
        "the file in --output_dir loads in ComfyUI, A1111 and Forge as it is; scripts/merge.py writes a full pipeline",
    ),
    (
        "training_comment metadata_title metadata_author",
        "the metadata of the file in --output_dir say how it was trained, unless --no_metadata; nothing can be added",
    ),
    # ---- samples, logs, the Hub ----
    ("sample_prompts validation_prompts", "use --validation_prompt, which takes several prompts"),
    ("sample_every_n_steps", "use --validation_steps"),
    ("sample_every_n_epochs", "use --validation_epochs"),
    ("sample_at_first", "not needed: with --validation_prompt, samples are drawn before the first step too"),
    ("sample_sampler validation_scheduler", "--validation_prompt is drawn with DPM-Solver++"),
    ("validation_images", "only for models that take an image; --validation_prompt draws from text alone"),
    (
        "validation_split validation_seed validate_every_n_steps validate_every_n_epochs max_validation_steps",
        "there is no validation loss: judge the samples of --validation_prompt, or run scripts/evaluate.py",
    ),
    ("log_with", "use --report_to"),
    (
        "log_prefix log_tracker_config log_config",
        "logs are in --logging_dir or where --report_to sends them, with the tracker's own settings",
    ),
    ("log_tracker_name tracker_name wandb_project project_name", "use --tracker_project_name"),
    ("wandb_run_name run_name", "use --tracker_run_name"),
    ("wandb_group", "use --tracker_group"),
    ("wandb_api_key", "run `wandb login` once, or set WANDB_API_KEY, and use --report_to wandb"),
    ("huggingface_repo_id hub_repo_id", "use --push_to_hub and --hub_model_id"),
    ("huggingface_token use_auth_token", "run `hf auth login` once, or use --hub_token"),
    (
        "huggingface_repo_type huggingface_path_in_repo huggingface_repo_visibility async_upload "
        "save_state_to_huggingface resume_from_huggingface",
        "--push_to_hub uploads the adapter and its card at the end of the run",
    ),
    ("config_file output_config", "use --config with a YAML file; every run writes its own as config.yaml"),
)


def answers_of(config_class: type) -> dict[str, str]:
    """Return flag -> answer: those of the table, and those of the groups that a class of options is made of."""
    tables = [TABLE, *(vars(group).get("foreign", ()) for group in config_class.__mro__)]
    return {flag: sentence for table in tables for flags, sentence in table for flag in flags.split()}


def explain_unknown(name: str, config_class: type["DataclassInstance"]) -> str:
    """Return what to use instead of an option that a class does not have: a sentence that does not repeat its name."""
    names, answer = option_names(config_class), answers_of(config_class).get(name)
    if answer is not None and set(flags_in(answer)) <= {*names, "config"}:
        return answer
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.75):
        return f"did you mean --{near[0]}?"
    return "there is no such option"


def flags_in(sentence: str) -> list[str]:
    """Return the names of the flags in a sentence, without their dashes."""
    return re.findall(r"--(\w+)", sentence, re.ASCII)
