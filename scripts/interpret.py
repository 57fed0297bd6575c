"""Say what adapters did to a model: where, how, and with a base model and photos, what each of their parts is for.

    python scripts/interpret.py outputs/dog/pytorch_kronecker_weights.safetensors --output_dir outputs/interpretation
    python scripts/interpret.py outputs/dog outputs/dog-lora --output_dir outputs/interpretation    # folders of runs
    python scripts/interpret.py outputs/dog/pytorch_kronecker_weights.safetensors \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dtype fp16 \\
        --instance_data_dir photos/dog --class_noun dog --prompts configs/prompts/live_subjects.txt \\
        --keep 0.9 --output_dir outputs/interpretation

The ADAPTERs come first: files, also as FILE:SCALE, or folders of runs, whose checkpoints are shown as a film strip.

From files alone, in seconds: norms of ΔW, singular values, effective ranks, what the nearest LoRA holds, on a map of
the UNet, and the factors as heat maps. A ⊗ B is never formed. With --pretrained_model_name_or_path, changes are related
to the base model's weights; base models other than SD 1.5, SD 2.1 and SDXL have to be named. SVDiff's shifts need the
base model unless its decomposition is kept, and Custom Diffusion and whole models always do.

With photos and prompts too, Kronecker adapters and LoRAs are drawn whole and without each block, kind of attention,
projection and singular pair, from the same seeds. The change in scores says which part holds the subject and which
costs the class. Photos are denoised to see at which timesteps the adapter helps. --keep 0.9 writes the smallest adapter
that holds 90 % of the likeness. These options are those of scripts/evaluate.py.

Writes interpretation.html, which needs no network, interpretation.json with every number, plots/, images/ and, with
--keep, pruned.safetensors.
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

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import readable_errors
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from dreambooth.runtime.library_warnings import show_library_warnings
from dreambooth.scoring.inputs import read_asked, read_photos
from interpretation.options import FileOptions, InterpretationOptions, split_arguments


def main() -> None:
    arguments, scored = split_arguments(sys.argv[1:])
    config = parse_options(InterpretationOptions if scored else FileOptions, __doc__, arguments)
    check_folder(config.output_dir, "--output_dir")
    inputs = (read_asked(config), read_photos(config)) if isinstance(config, InterpretationOptions) else None

    show_library_warnings()

    from interpretation.program import interpret  # after the arguments, since torch takes seconds

    print(interpret(config, inputs))


if __name__ == "__main__":
    with readable_errors():
        main()
