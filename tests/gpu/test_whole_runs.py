"""What takes tens of seconds: compiled training, and a run as the launcher starts it."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

import train_dreambooth_kronecker_sdxl as sdxl
from tests.conftest import launch, metrics

pytestmark = pytest.mark.gpu

PRIOR = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of dog"}


def test_compiled_blocks_are_whole_graphs(tiny_sdxl, options, run_main, tmp_path, device, monkeypatch):
    if device.type == "cpu":  # where generating code takes a minute
        compile_blocks = UNet2DConditionModel.compile_repeated_blocks
        monkeypatch.setattr(
            UNet2DConditionModel,
            "compile_repeated_blocks",
            lambda unet, **options: compile_blocks(unet, backend="aot_eager", **options),
        )
    common = {**options, **PRIOR, "pretrained_model_name_or_path": tiny_sdxl}
    run_main(sdxl, **common)
    torch._dynamo.reset()
    counters.clear()
    run_main(sdxl, **{**common, "compile": True, "output_dir": tmp_path / "compiled"})
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] >= 2  # training, and the prior
    for ours, eager in zip(metrics(tmp_path / "compiled"), metrics(options["output_dir"]), strict=True):
        assert ours["loss"] == pytest.approx(eager["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-2)


def test_the_real_command_line_trains_on_the_device(options, device):
    result = launch("--mixed_precision", "bf16", "train_dreambooth_kronecker.py", **options, **PRIOR)
    assert result.returncode == 0, result.stderr
    assert "4 steps" in result.stdout and f" on {device.type}" in result.stdout
