"""Train one of the compared methods on a few photos of a subject, exactly as the Kronecker scripts train theirs.

    accelerate launch methods/train.py METHOD FAMILY [options]

    METHOD    lora                 W + B A of rank r on the attention projections
              dreambooth           all weights of the UNet
              svdiff               shifts of the singular values of all weights
              custom_diffusion     W' for W in K and V of cross-attention, and a new word before the noun
              textual_inversion    the embedding of a new word, which stands for the noun
    FAMILY    sd                   Stable Diffusion 1.x or 2.x
              sdxl                 SDXL

On a CPU, in minutes, with the toy world's small model:
    accelerate launch methods/train.py lora sd --pretrained_model_name_or_path toyworld/models/sd \\
        --instance_data_dir toyworld/photos/dog --instance_prompt "a photo of sks dog" --resolution 64 \\
        --max_train_steps 400 --output_dir outputs/quickstart/lora

On one GPU:
    accelerate launch --mixed_precision bf16 methods/train.py lora sd \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir photos/dog --instance_prompt "a photo of sks dog" \\
        --learning_rate 1e-4 --output_dir outputs/dog-lora --max_train_steps 500

On several GPUs: accelerate launch --multi_gpu --num_processes 4 methods/train.py ...

All options:  methods/train.py METHOD FAMILY --help

The steps of a run are listed in dreambooth/train.py.

Writes OUTPUT_DIR/pytorch_lora_weights.safetensors (lora), pipeline/ (dreambooth), spectral_shifts.safetensors (svdiff),
pytorch_custom_diffusion_weights.safetensors (custom_diffusion) or learned_embeds.safetensors (textual_inversion),
checkpoint-*/, samples/*.png, metrics.jsonl, training.png, README.md (the model card), config.yaml and logs/.
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

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.parsing import parse_options
from dreambooth.options.training import SDXLTrainingConfig, TrainingConfig, config_class
from dreambooth.runtime.startup import lean_imports
from methods.options import (
    CustomDiffusionOptions,
    DreamBoothOptions,
    LoraOptions,
    SvdiffOptions,
    TextualInversionOptions,
)


@dataclass(frozen=True)
class Entry:
    """A row of the tables below: the options, and the module and name of the value, which takes seconds to import."""

    options: type
    module: str
    value: str

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.value)


METHODS = {
    "lora": Entry(LoraOptions, "methods.lora", "LORA"),
    "dreambooth": Entry(DreamBoothOptions, "methods.dreambooth", "DREAMBOOTH"),
    "svdiff": Entry(SvdiffOptions, "methods.svdiff", "SVDIFF"),
    "custom_diffusion": Entry(CustomDiffusionOptions, "methods.custom_diffusion", "CUSTOM_DIFFUSION"),
    "textual_inversion": Entry(TextualInversionOptions, "methods.textual_inversion", "TEXTUAL_INVERSION"),
}
FAMILIES = {
    "sd": Entry(TrainingConfig, "dreambooth.families.sd", "SD"),
    "sdxl": Entry(SDXLTrainingConfig, "dreambooth.families.sdxl", "SDXL"),
}


def main() -> None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    method, family = chosen(words)
    config = parse_options(config_class(method.options, family.options), __doc__, words[2:])
    with lean_imports():
        from dreambooth.train import train

        family, method = family.load(), method.load()
    train(family, method, config)


def chosen(words: Sequence[str]) -> tuple[Entry, Entry]:
    """Return the method and the family that a command line begins with. Raises UserError if it does not."""
    for place, (kind, table) in enumerate({"METHOD": METHODS, "FAMILY": FAMILIES}.items()):
        given = words[place] if place < len(words) else "missing"
        if given not in table:
            raise UserError(
                f"{kind} is {given}; choose from {', '.join(table)}: methods/train.py METHOD FAMILY [options]"
            )
    return METHODS[words[0]], FAMILIES[words[1]]


if __name__ == "__main__":
    with readable_errors():
        main()
