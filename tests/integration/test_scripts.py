"""scripts/generate.py and scripts/merge.py on the file that training would write."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from kron_adapter import inject_kronecker, kronecker_parameters, save_kronecker
from scripts import generate, merge
from tests.conftest import ROOT, flags


@pytest.fixture(scope="module")
def adapter(tiny_sd, tmp_path_factory):
    unet = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    inject_kronecker(unet, 4, 64)
    for parameter in kronecker_parameters(unet):
        parameter.data += 0.3 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("adapter") / "pytorch_kronecker_weights.safetensors"
    save_kronecker(unet, path, {"instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog"})
    return path


@pytest.fixture
def draw(run_main, tiny_sd, tmp_path):
    """Run generate.py with two prompts and two images each; return {file name: pixels}."""

    def run(name, **options):
        base = {"pretrained_model_name_or_path": tiny_sd, "height": 64, "width": 64, "num_inference_steps": 2}
        prompts = {"prompt": ["a photo of sks dog", "sks dog in snow"], "num_images": 2}
        run_main(generate, **{**base, **prompts, **options}, output_dir=tmp_path / name)
        return {path.name: np.asarray(Image.open(path), int) for path in (tmp_path / name).iterdir()}

    return run


def test_generate_writes_images_and_a_labelled_grid(draw, adapter):
    images = draw("images", adapter=adapter, seed=5)
    assert set(images) == {"00-5.png", "00-6.png", "01-5.png", "01-6.png", "grid.png"}
    assert images["00-5.png"].shape == (64, 64, 3)
    assert images["grid.png"].shape[0] > 2 * 192 and images["grid.png"].shape[1] > 2 * 192
    assert np.abs(images["00-5.png"] - images["00-6.png"]).mean() > 1
    assert np.abs(images["00-5.png"] - images["01-5.png"]).mean() > 0.1


def test_an_image_depends_on_its_seed_and_the_scale_alone(draw, adapter):
    images = draw("a", adapter=adapter, seed=5)
    assert (draw("b", adapter=adapter, seed=6, num_images=1)["00-6.png"] == images["00-6.png"]).mean() > 0.99
    base = draw("base", seed=5)
    assert np.abs(base["00-5.png"] - images["00-5.png"]).mean() > 1
    assert np.abs(draw("zero", adapter=adapter, seed=5, adapter_scale=0.0)["00-5.png"] - base["00-5.png"]).max() <= 1


def test_generate_names_prompts_that_are_cut_and_reads_them_whole_if_told_to(draw, adapter, caplog):
    prompts = {
        "prompt": ["very " * 18 + "now red dog", "very " * 18 + "now red sks"],
        "adapter": adapter,
        "num_images": 1,
    }
    cut = draw("cut", **prompts, negative_prompt="x" * 76)
    (text,) = (record.getMessage() for record in caplog.records)
    lines = text.splitlines()[1:]
    assert "--prompt, number 2: 81 tokens, without 'red sks'; this loses the subject's own 'sks'" in lines[0]
    assert any("--prompt, number 1: 81 tokens" in line for line in lines)
    assert any("--negative_prompt: 76 tokens" in line for line in lines)
    whole = draw("whole", **prompts, negative_prompt="x" * 76, max_token_length=150)
    assert len(caplog.records) == 1
    assert (cut["00-0.png"] == cut["01-0.png"]).all() and (whole["00-0.png"] != whole["01-0.png"]).any()


def test_a_merged_pipeline_draws_the_same_without_this_project(draw, run_main, adapter, tiny_sd, tmp_path):
    merged = tmp_path / "merged"
    run_main(merge, pretrained_model_name_or_path=tiny_sd, adapter=adapter, output_dir=merged)
    adapted, plain = draw("adapted", adapter=adapter), draw("plain", pretrained_model_name_or_path=merged)
    for name in adapted:
        assert np.abs(adapted[name] - plain[name]).max() <= 1
    unet = StableDiffusionPipeline.from_pretrained(merged).unet
    assert not [name for name in unet.state_dict() if name.endswith((".A", ".B")) or ".base." in name]
    with pytest.raises(ValueError, match="is not empty"):
        run_main(merge, pretrained_model_name_or_path=tiny_sd, adapter=adapter, output_dir=merged)


@pytest.mark.parametrize("script", [generate, merge])
def test_what_does_not_fit_is_refused_before_weights_are_read(script, run_main, adapter, tiny_sd, tiny_sdxl, tmp_path):
    options = {"output_dir": tmp_path / "out"} | ({"prompt": "sks"} if script is generate else {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(ValueError, match="does not fit this model: .* the model's layer maps 128 to 64"):
            run_main(script, **options, pretrained_model_name_or_path=tiny_sdxl, adapter=adapter)
        weights = tiny_sd / "unet" / "diffusion_pytorch_model.safetensors"
        with pytest.raises(ValueError, match="cannot be used as an adapter: it holds a UNet's own weights"):
            run_main(script, **options, pretrained_model_name_or_path=tiny_sd, adapter=weights)
        with pytest.raises(ValueError, match="nowhere is not a base model"):
            run_main(script, **options, pretrained_model_name_or_path="nowhere", adapter=adapter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["generate", "merge", "evaluate"])
@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--adapter_scale", "nan"], 2)])
def test_help_and_wrong_options_are_answered_without_heavy_imports(script, arguments, code):
    program = f"""
import runpy, sys
sys.argv = ["{script}.py", *{arguments}]
try:
    runpy.run_path("scripts/{script}.py", run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "diffusers", "accelerate"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy else end.code)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr


@pytest.mark.parametrize("script", ["generate", "merge"])
def test_errors_of_the_command_line_are_one_line(script, tmp_path, adapter):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--pretrained_model_name_or_path", "nowhere"]
    command += ["--adapter", str(adapter), "--output_dir", "x", *(["--prompt", "sks"] if script == "generate" else [])]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "error: --pretrained_model_name_or_path nowhere is not a base model"
    )


def test_a_merged_pipeline_does_not_say_where_its_base_model_is(run_main, adapter, tiny_sd, tmp_path):
    run_main(merge, pretrained_model_name_or_path=tiny_sd, adapter=adapter, output_dir=tmp_path / "merged")
    files = [path for path in (tmp_path / "merged").rglob("*.json") if path.stat().st_size < 2**16]
    assert len(files) > 5 and not [path for path in files if str(tiny_sd.parent) in path.read_text(encoding="utf-8")]


def test_an_output_folder_that_is_a_file_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for script, options in ((generate, ["--prompt", "sks"]), (merge, ["--adapter", "a"])):
        argv = ["x", "--pretrained_model_name_or_path", "nowhere", "--output_dir", str(tmp_path / "file"), *options]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(ValueError, match="--output_dir .*file is a file"):
            script.main()


def test_training_resuming_and_drawing_need_neither_unix_nor_utf_8(options, tmp_path):
    """In one process, with the prompt and the folder in characters that its output lacks."""
    options = {
        **options,
        "output_dir": "犬",
        "instance_prompt": "sks 犬",
        "checkpointing_steps": 1,
        "max_train_steps": 2,
        "no_metadata": True,
    }
    train = shlex.join(["train_dreambooth_kronecker.py", *flags(options)])
    adapter = "犬/pytorch_kronecker_weights.safetensors"
    drawing = {"adapter": adapter, "prompt": "sks 犬", "height": 64, "width": 64, "num_inference_steps": 1}
    drawing |= {"pretrained_model_name_or_path": options["pretrained_model_name_or_path"], "num_images": 1}
    draw = shlex.join(["scripts/generate.py", *flags({**drawing, "output_dir": "images"})])
    command = [sys.executable, ROOT / "tests" / "without_unix.py"]
    command += [train, f"{train} --resume_from_checkpoint checkpoint-1", draw]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    said = result.stdout.decode("ascii")
    assert result.returncode == 0, result.stderr.decode()
    assert said.count("the result is \\u72ac") == 2 and "peak memory" in said and "Wrote 1 images" in said
    with safe_open(tmp_path / adapter, "pt") as file:
        told = [key for key in file.metadata() if "modelspec" in key or "prompt" in key or "config" in key]
    assert told == ["modelspec.prediction_type"]  # which tools need
    assert (tmp_path / "images" / "grid.png").exists() and not (tmp_path / "犬" / ".lock").exists()
