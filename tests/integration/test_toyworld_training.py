"""The training programs, a few steps each: they run, save and resume; the result loads."""

import importlib
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from transformers import CLIPModel, ViTModel

from tests.conftest import ROOT


def words(*arguments, steps: int = 2) -> list[str]:
    return ["--steps", str(steps), "--batch_size", "4", "--save_every", "2", *map(str, arguments)]


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a program's main() in this process, its sheets drawn in a step: `run(module, *arguments, steps=2)`."""

    def run_main(module: str, *arguments, steps: int = 2) -> str:
        program = importlib.import_module(f"toyworld.{module}")
        monkeypatch.setattr(sys, "argv", [module, *words(*arguments, steps=steps)])
        monkeypatch.setattr("toyworld.train_base.SAMPLER_STEPS", 1)
        program.main()
        return "".join(capfd.readouterr())

    return run_main


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder with what train_vae writes, from its command line."""
    folder = tmp_path_factory.mktemp("vae")
    command = [sys.executable, "-m", "toyworld.train_vae", *words("--output_dir", folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "PSNR" in result.stdout
    return folder


def test_the_autoencoder_has_white_latents(vae):
    from toyworld.pictures import render_batch, sample
    from toyworld.train_vae import encode

    assert (vae / "sheet.png").is_file()
    model = AutoencoderKL.from_pretrained(vae / "vae", dtype=torch.float32)
    latents = encode(model, render_batch([sample("held out", i) for i in range(256)]).pixels)
    assert latents.mean((0, 2, 3)).abs().max() < 0.05
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_whitening_changes_no_picture():
    from toyworld.train_vae import build_vae, decode, encode, whiten

    torch.manual_seed(0)
    model, pixels = build_vae().eval(), torch.rand(4, 3, 64, 64) * 2 - 1
    white = whiten(model, pixels)
    assert torch.allclose(decode(white, encode(white, pixels)), decode(model, encode(model, pixels)), atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_base_model(kind, vae, run, tmp_path):
    arguments = (kind, "--vae", vae / "vae", "--pictures", 32, "--output_dir", tmp_path)
    run("train_base", *arguments)
    encoded = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    assert " 2/3 " in run("train_base", *arguments, steps=3)  # it resumes
    assert (tmp_path / "latents.safetensors").stat().st_mtime_ns == encoded  # pictures are encoded once
    assert (tmp_path / "described.png").is_file() and (tmp_path / "named.png").is_file()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks robot", num_inference_steps=1, height=64, width=64, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and image.isfinite().all()


@pytest.mark.parametrize("model, kind", [("clip", CLIPModel), ("dino", ViTModel)])
def test_an_evaluator(model, kind, run, tmp_path):
    assert "% of 1024" in run("train_evaluators", model, "--batch_size", 16, "--output_dir", tmp_path)
    kind.from_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "preprocessor_config.json").is_file() or (
        tmp_path / "model" / "processor_config.json"
    ).is_file()
