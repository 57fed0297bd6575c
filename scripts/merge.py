"""Merge adapter files of every method into a base model, and write it as a plain diffusers pipeline folder.

    python scripts/merge.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors --output_dir outputs/dog-merged

The folder loads with `DiffusionPipeline.from_pretrained`, without this project.
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
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.field import option
from dreambooth.options.parsing import parse_options
from dreambooth.options.paths import check_folder
from dreambooth.runtime.library_warnings import show_library_warnings


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions):
    """The merged pipeline."""

    adapter: list[str] = option("Adapter files to merge, as FILE or FILE:SCALE.", path=True)
    output_dir: str = option("Folder for the merged pipeline; new or empty.", path=True)


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once
    check_folder(config.output_dir, "--output_dir")
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output_dir {output} is not empty; choose another folder")

    show_library_warnings()

    from dreambooth.drawing.pipelines import load_pipeline_with, merge_adapters, read_adapters
    from kron_formats.fused import save_pipeline
    from methods.readers import READERS

    adapters = read_adapters(config, READERS)
    pipeline = load_pipeline_with(adapters, config, READERS)
    merge_adapters(pipeline, READERS)
    save_pipeline(pipeline, output)
    changed = {parameter for adapter in adapters for parameter in adapter.matched.layers}
    print(f"Merged {len(changed)} layers into {output}")


if __name__ == "__main__":
    with readable_errors():
        main()
