"""Train a Kronecker adapter for Stable Diffusion 1.x or 2.x on a few photos of a subject (DreamBooth).

    W + scale · (A ⊗ B) on the attention projections of the UNet; W stays frozen.       DiffuseKronA, arXiv 2402.17412

On a CPU, in minutes, with the toy world's small model:
    accelerate launch train_dreambooth_kronecker.py --config configs/quickstart.yaml

On one GPU:
    accelerate launch --mixed_precision bf16 train_dreambooth_kronecker.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir class_images/dog --class_prompt "a photo of dog" \\
        --output_dir outputs/dog --max_train_steps 800

On several GPUs: accelerate launch --multi_gpu --num_processes 4 train_dreambooth_kronecker.py ...

The steps of a run are listed in dreambooth/train.py.

Writes OUTPUT_DIR/pytorch_kronecker_weights.safetensors, checkpoint-*/, samples/*.png, metrics.jsonl, training.png,
README.md (the model card), config.yaml and logs/.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2",
#     "bitsandbytes==0.50.2", "safetensors==0.8.0", "datasets==5.2.0", "filelock==4.3.1", "psutil==7.2.2",
#     "numpy==2.4.6", "pillow==13.0.0", "PyYAML==6.0.3", "Jinja2==3.1.6", "matplotlib==3.11.2", "tqdm==4.70.1",
#     "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///

from dataclasses import dataclass

from dreambooth.errors import readable_errors
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.parsing import parse_options
from dreambooth.options.training import TrainingConfig
from dreambooth.runtime.startup import lean_imports


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig, KroneckerOptions):
    """The options of a training run, and those of the adapter."""


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once
    with lean_imports():
        from dreambooth.families.sd import SD
        from dreambooth.kronecker import KRONECKER
        from dreambooth.train import train
    train(SD, KRONECKER, config)


if __name__ == "__main__":
    with readable_errors():
        main()
