"""The libraries' warnings: needless ones are dropped, all others are shown, once, in the main process."""

import logging
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SAY = """
import logging
from dreambooth.runtime.library_warnings import show_library_warnings

show_library_warnings()
from transformers import CLIPImageProcessor  # warns if torchvision is missing

SD = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"

def say():
    logging.getLogger(SD).warning("You have disabled the safety checker for x")
    logging.getLogger(SD).warning("the weights are wrong")
    logging.getLogger("transformers.tokenization_utils_base").warning("Token indices sequence length is longer than 77")
    logging.getLogger("transformers.tokenization_utils_base").warning("some other thing")
    for names in ("[]", "['norm']"):
        text = f"There are modules in UNet that should be kept in float32: {names}"
        logging.getLogger("diffusers.models.modeling_utils").warning(text)
    logging.getLogger("huggingface_hub.utils").warning("no network")
    logging.getLogger("dreambooth.elsewhere").warning("our own")

say()
say()
show_library_warnings(is_main_process=False)
logging.getLogger("transformers.modeling_utils").warning("said by another process")
logging.getLogger("transformers.modeling_utils").error("broken")
"""


KEPT = "There are modules in UNet that should be kept in float32: ['norm']"


def test_unknown_warnings_are_shown_once_in_the_main_process_and_needless_ones_never():
    result = subprocess.run([sys.executable, "-c", SAY], cwd=ROOT, capture_output=True, text=True, check=True)
    warnings = ["the weights are wrong", "some other thing", KEPT, "no network", "our own", "our own"]
    assert result.stderr.splitlines() == [*(f"WARNING {text}" for text in warnings), "ERROR broken"]


@pytest.mark.parametrize("main", [True, False])
def test_training_leaves_the_libraries_warnings_on(main, monkeypatch, fresh_accelerator, tmp_path):
    from dreambooth.runtime import accelerator
    from train_dreambooth_kronecker import Config

    shown = []
    monkeypatch.setattr(accelerator, "show_library_warnings", shown.append)
    monkeypatch.setattr(accelerator.Accelerator, "is_main_process", property(lambda _: main))
    config = Config(pretrained_model_name_or_path="base", instance_prompt="sks", output_dir=str(tmp_path))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        accelerator.start_accelerator(config)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    assert shown == [main]
