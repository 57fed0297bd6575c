"""A base model in one file, through the programs: what comes out is what the folder with the same weights gives."""

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.base_model.weights import FolderWeights
from scripts import convert, generate, merge
from tests.conftest import WEIGHTS, assert_same, factors, save_tiny_pipeline
from tests.one_file import save_one_file
from toyworld.tiny_pipeline import build_pipeline


@pytest.fixture
def aligned(monkeypatch):
    """Tensors of folders are views of their files, and a CPU's last bits depend on where in memory a matrix begins."""
    load = FolderWeights.load

    def copied(*arguments):
        model = load(*arguments)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    monkeypatch.setattr(FolderWeights, "load", copied)


@pytest.mark.parametrize("family, kind, script", [("sd1", "sd", sd), ("sdxl", "sdxl", sdxl)])
def test_a_run_on_one_file_is_the_run_on_the_folder(
    family, kind, script, options, run_main, request, tmp_path, aligned
):
    """The file says that it predicts the velocity; the folder with its configuration and tokenizers does not."""
    folder = save_tiny_pipeline(kind, tmp_path / "folder", prediction_type="v_prediction")
    file = save_one_file(build_pipeline(kind), tmp_path / "base.safetensors", family, markers=["v_pred"])
    plain = request.getfixturevalue(f"tiny_{kind}")
    options = {**options, "max_train_steps": 2, "validation_prompt": "sks dog", "validation_num_inference_steps": 1,
               "num_validation_images": 1, "train_text_encoder": True}  # fmt: skip
    outputs = tmp_path / "from-folder", tmp_path / "from-file"
    run_main(script, **{**options, "pretrained_model_name_or_path": folder, "output_dir": outputs[0]})
    of_file = {"pretrained_model_name_or_path": file, "base_config": plain}
    run_main(script, **{**options, **of_file, "output_dir": outputs[1]})
    assert_same(factors(outputs[0]), factors(outputs[1]))
    sheets = [(output / "samples" / "step-000002.png").read_bytes() for output in outputs]
    assert sheets[0] == sheets[1]
    with safe_open(outputs[1] / WEIGHTS, "pt") as adapter:
        assert adapter.metadata()["modelspec.prediction_type"] == "v"
    assert f'from_single_file("{file.name}"' in (outputs[1] / "README.md").read_text()
    if kind == "sd":
        check_the_other_programs(file, of_file, folder, outputs[1] / WEIGHTS, run_main, tmp_path)


def check_the_other_programs(file, of_file, folder, adapter, run_main, tmp_path):
    drawing = {"adapter": adapter, "prompt": "sks dog", "num_images": 1, "num_inference_steps": 1}
    run_main(generate, **of_file, **drawing, output_dir=tmp_path / "drawn")
    run_main(generate, pretrained_model_name_or_path=folder, **drawing, output_dir=tmp_path / "drawn-too")
    assert (tmp_path / "drawn" / "00-0.png").read_bytes() == (tmp_path / "drawn-too" / "00-0.png").read_bytes()

    run_main(merge, **of_file, adapter=adapter, output_dir=tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert merged.scheduler.config.prediction_type == "v_prediction"

    base = ["--pretrained_model_name_or_path", str(file), "--base_config", str(folder)]
    convert.main([str(adapter), "--to", "fused", "--output", str(tmp_path / "fused.safetensors"), *base])
    fused = load_file(tmp_path / "fused.safetensors")
    again = save_one_file(merged, tmp_path / "again.safetensors", "sd1", markers=["v_pred"])
    for name, tensor in load_file(again).items():
        torch.testing.assert_close(fused[name], tensor, rtol=0, atol=1e-7)
