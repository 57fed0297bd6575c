"""A page in the browser: a prompt drawn by the base model and with adapters, side by side, from the same seed.

    pip install --no-deps -r scripts/demo-requirements.txt
    python scripts/demo.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --adapter outputs/dog/pytorch_kronecker_weights.safetensors --dtype fp16 --prompt "a photo of sks dog"

The page has a slider for the strength of each adapter, prompt, negative prompt, seed, steps and guidance. It draws with
the adapters that are named here, Kronecker adapters and LoRAs, and can name no others. It loads nothing from the
network, and only this computer can open it, unless --host says otherwise. One drawing is made at a time, others wait.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import UserError, readable_errors
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.drawing import DemoOptions
from dreambooth.options.parsing import parse_options
from dreambooth.runtime.library_warnings import show_library_warnings


@dataclass(frozen=True, kw_only=True)
class Config(AdaptedModelOptions, DemoOptions):
    """What to draw with, and where the page is."""

    def check(self) -> None:
        if not self.adapter:
            raise UserError("--adapter: name at least one file, whose strength the page can change")


def main() -> None:
    config = parse_options(Config, __doc__)  # before the imports, which take seconds: --help and errors come at once

    show_library_warnings()

    import torch

    from dreambooth.demo.page import check_address, import_gradio, serve
    from dreambooth.demo.pair import Pair, check_first
    from dreambooth.drawing.pipelines import check_adjustable, load_pipeline_with, prepare_sampling, read_adapters
    from methods.readers import READERS

    import_gradio()
    check_address(config)
    adapters = read_adapters(config, READERS)
    check_adjustable(adapters)
    check_first(adapters, config)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    pipeline = load_pipeline_with(adapters, config, READERS).to(device)
    prepare_sampling(pipeline)
    names = ["/".join(adapter.matched.file.path.absolute().parts[-2:]) for adapter in adapters]  # many share the last
    serve(Pair(pipeline, adapters, READERS, config), names, config)


if __name__ == "__main__":
    with readable_errors():
        main()
