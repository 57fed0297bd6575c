"""The options of the compared methods. Imports no torch, so that --help is instant."""

from dataclasses import dataclass
from typing import Literal

from dreambooth.errors import UserError
from dreambooth.options.field import GIVEN, option
from dreambooth.options.prompts import CHUNK_LENGTH
from dreambooth.options.steps import OptimizerOptions, SeedOptions, TextEncoderOptions

STARTS = (  # the answer to flags of other trainers that start from a file
    "network_weights dim_from_weights init_lora",
    "training starts from --pretrained_model_name_or_path; --base_adapter merges adapters into it before",
)


@dataclass(frozen=True, kw_only=True)
class LoraOptions(TextEncoderOptions):
    """LoRA."""

    rank: int = option("Rank of the update, r.", 4, at_least=1)
    lora_alpha: float | None = option(
        "Alpha: the update is multiplied by alpha / rank, in training and in the file. Default: rank.", None, above=0
    )
    init_lora_weights: Literal["gaussian", "kaiming"] = option(
        "Start of A. gaussian: N(0, 1/r²), as in diffusers' scripts; kaiming: uniform within ±1/√d_in, PEFT's default, "
        "which is many times smaller, depends less on the seed and wants another learning rate.",
        "gaussian",
    )

    foreign = (  # answers to flags of other trainers; see dreambooth/options/foreign.py
        ("network_dim lora_rank lora_r r", "use --rank"),
        ("network_alpha alpha", "use --lora_alpha"),
        ("network_module lora_type algo", "this method is LoRA, whose size is --rank"),
        ("kron_a1 kron_a2 kron_b1 kron_b2 kron_factors", "a LoRA's size is --rank"),
        ("scale_weight_norms", "the update's norm is not limited; a lower --learning_rate keeps it small"),
        STARTS,
    )

    @property
    def alpha(self) -> float:
        """lora_alpha, or the rank if it is not given."""
        return float(self.rank) if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(TextEncoderOptions):
    """DreamBooth."""

    learning_rate: float = 5e-6
    single_file: bool = option(
        "Also write OUTPUT_DIR/pipeline.safetensors: the model in one file, in the layout of Stability's code, for "
        "ComfyUI, AUTOMATIC1111 and Forge.",
        False,
        decides_result=False,
    )

    foreign = (
        (
            "rank network_dim lora_rank lora_r r lora_alpha network_alpha alpha network_module",
            "DreamBooth has no rank: all weights train",
        ),
        ("kron_a1 kron_a2 kron_b1 kron_b2 kron_factors", "DreamBooth has no factors: all weights train"),
        STARTS,
        (
            "save_model_as use_safetensors no_safe_serialization output_kohya_format save_as_full_pipeline",
            "OUTPUT_DIR/pipeline is a diffusers pipeline in safetensors; --single_file also writes one file",
        ),
        ("full_fp16 full_bf16", "weights that train are fp32; --mixed_precision is that of the computation"),
        (
            "set_grads_to_none fused_backward_pass",
            "not needed: gradients are freed after every step; --use_8bit_adam and --gradient_checkpointing save more",
        ),
        (
            "lora_dropout network_dropout rank_dropout module_dropout scale_weight_norms",
            "there is no adapter; fewer --max_train_steps, a lower --learning_rate or --with_prior_preservation "
            "overfit less",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class SvdiffOptions(TextEncoderOptions):
    """SVDiff."""

    learning_rate_1d: float = option(
        "Learning rate of the shifts of one-dimensional weights, those of norms; --learning_rate is that of singular "
        "values.",
        1e-6,
        at_least=0,
    )

    foreign = (
        (
            "rank network_dim lora_rank lora_r r lora_alpha network_alpha alpha",
            "SVDiff has no rank: every singular value trains",
        ),
        ("kron_a1 kron_a2 kron_b1 kron_b2 kron_factors", "SVDiff has no factors: every singular value trains"),
        STARTS,
    )

    def check(self) -> None:
        if self.optimizer_name() == "Prodigy" and self.learning_rate_1d != self.learning_rate:
            raise UserError(
                "--optimizer Prodigy finds a single learning rate: give --learning_rate_1d the value of --learning_rate"
            )


@dataclass(frozen=True, kw_only=True)
class TextualInversionOptions(SeedOptions, OptimizerOptions):
    """Textual Inversion."""

    placeholder_token: str = option('The new word, which stands for the noun: "a photo of a <dog>".', "<dog>")
    initializer_token: str = option("Word of one token that the new word begins as: the noun, for example dog.")
    num_vectors: int = option(
        "Vectors of the new word, each a token of the prompt.", 1, at_least=1, at_most=CHUNK_LENGTH
    )

    foreign = (
        (
            "train_text_encoder text_encoder_lr",
            "Textual Inversion trains nothing but the vectors of --placeholder_token; its rate is --learning_rate",
        ),
        (
            "learnable_property",
            "there are no templates: write the sentence into --instance_prompt, for example 'a painting by <artist>', "
            "or a caption beside each photo",
        ),
        ("modifier_token", "Textual Inversion's word is --placeholder_token"),
        ("token_string", "use --placeholder_token"),
        ("init_word", "use --initializer_token"),
        ("num_vectors_per_token num_new_tokens_per_abstraction", "use --num_vectors"),
        ("save_as_full_pipeline", "only the vectors train; --placeholder_token is in the file that is written"),
        (
            "rank network_dim lora_rank lora_r r lora_alpha network_alpha alpha "
            "kron_a1 kron_a2 kron_b1 kron_b2 kron_factors",
            "nothing but vectors train; their number is --num_vectors",
        ),
    )


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionOptions(SeedOptions, OptimizerOptions):
    """Custom Diffusion."""

    learning_rate: float = 1e-5
    freeze_model: Literal["crossattn_kv", "crossattn"] = option(
        "crossattn_kv: of the UNet, only K and V of cross-attention train; crossattn: all of cross-attention, which is "
        "meant for faces.",
        "crossattn_kv",
    )
    modifier_token: str | None = option(
        'A new word, which stands before the noun: "photo of a <new1> dog". Default: none, only weights train.', None
    )
    initializer_token: str = option(
        "Word of one token that modifier_token begins as: a rare one.", "ktn", needs={"modifier_token": GIVEN}
    )

    foreign = (
        (
            "train_text_encoder text_encoder_lr",
            "Custom Diffusion trains no weights of text encoders; --modifier_token adds a word to them",
        ),
        ("placeholder_token", "Custom Diffusion's word is --modifier_token"),
        ("num_vectors num_vectors_per_token", "--modifier_token has one vector in each text encoder"),
        ("concepts_list", "use --subjects with a YAML file; --modifier_token is a word for one subject alone"),
        ("hflip", "use --random_flip"),
        (
            "rank network_dim lora_rank lora_r r lora_alpha network_alpha alpha "
            "kron_a1 kron_a2 kron_b1 kron_b2 kron_factors",
            "whole weights train; which ones is --freeze_model",
        ),
    )
