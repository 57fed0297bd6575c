"""Base models, photos and a way to run the training script, for all tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the Hub; a wrong name must not wait for it either

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image, ImageDraw
from safetensors.torch import load_file

pytest_plugins = ["tests.faults.runs"]

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "pytorch_kronecker_weights.safetensors"
TINY_TRANSFORMER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=13, help="SIGKILLs for each scenario of tests/faults/test_kills.py.")
    parser.addoption("--kill_seed", type=int, help="Seed of the moments of those kills. Default: another every time.")


def pytest_runtest_setup(item):
    on_cpu = os.environ.get("KRON_GPU_TESTS") == "cpu"  # as far as a CPU can: see tests/gpu/conftest.py
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() or on_cpu):
        pytest.skip("needs a CUDA device; KRON_GPU_TESTS=cpu runs it on a CPU")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A Stable Diffusion pipeline of the real classes, with random weights."""
    return save_tiny_pipeline("sd", tmp_path_factory.mktemp("tiny-sd"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory) -> Path:
    """An SDXL pipeline of the real classes, with random weights."""
    return save_tiny_pipeline("sdxl", tmp_path_factory.mktemp("tiny-sdxl"))


def save_tiny_pipeline(kind: str, folder: Path, **options) -> Path:
    from toyworld.tiny_pipeline import build_pipeline

    build_pipeline(kind, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """A CLIP of the real class for images of 64 px, with random weights; all that its folder on the Hub has."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from toyworld.tiny_pipeline import build_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("tiny-clip"), build_tokenizer()
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = {"vocab_size": len(tokenizer), **marks, **TINY_TRANSFORMER}
    vision = {"image_size": 64, "patch_size": 8, **TINY_TRANSFORMER}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dino(tmp_path_factory) -> Path:
    """A DINO of the real class for images of 64 px, with random weights, and no pooler, as on the Hub."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("tiny-dino")
    torch.manual_seed(0)
    config = ViTConfig(image_size=64, patch_size=8, initializer_range=0.2, **TINY_TRANSFORMER)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dog_photos(tmp_path_factory) -> Path:
    """Five photos, wider than high, of different sizes."""
    return draw_photos(tmp_path_factory.mktemp("dog"), 5)


@pytest.fixture(scope="session")
def clock_photos(tmp_path_factory) -> Path:
    """Six photos."""
    return draw_photos(tmp_path_factory.mktemp("clock"), 6)


def draw_photos(folder: Path, count: int) -> Path:
    for i in range(count):
        image = Image.new("RGB", (160 + 8 * i, 120), (30 * i, 90, 200 - 30 * i))
        ImageDraw.Draw(image).ellipse((20 + 5 * i, 20, 100 + 5 * i, 100), fill=(220, 160, 40), outline="black")
        image.save(folder / f"{i:02d}.jpg")
    return folder


@pytest.fixture
def options(tiny_sd, dog_photos, tmp_path) -> dict:
    """A short run on the five photos of the dog, without prior preservation."""
    return {
        "pretrained_model_name_or_path": tiny_sd,
        "instance_data_dir": dog_photos,
        "instance_prompt": "a photo of sks dog",
        "output_dir": tmp_path / "out",
        "resolution": 64,
        "max_train_steps": 4,
        "report_to": "none",
    }


@pytest.fixture
def prior(tmp_path) -> dict:
    return {
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a photo of dog",
        "num_class_images": 4,
        "prior_num_inference_steps": 2,
    }


@pytest.fixture
def offline_wandb(monkeypatch, tmp_path):
    """wandb without the network, its files in tmp_path. It reads its settings once in a process, unless torn down."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps its state in class attributes; a second run in one process needs it cleared."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def quick_evaluation(tiny_sd, tiny_clip, tiny_dino) -> dict[str, Any]:
    """Options of scripts/evaluate.py on the tiny models: an image of each prompt, in one step."""
    return {
        "pretrained_model_name_or_path": tiny_sd,
        "num_images": 1,
        "num_class_images": 1,
        "num_inference_steps": 1,
        "height": 64,
        "width": 64,
        "clip_model": tiny_clip,
        "dino_model": tiny_dino,
    }


@pytest.fixture
def run_main(monkeypatch, fresh_accelerator):
    """Run a script's main() in this process: `run_main(script, resolution=64, center_crop=True, ...)`."""

    def run(script, **options) -> None:
        monkeypatch.setattr(sys, "argv", [script.__name__, *flags(options)])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        script.main()

    return run


def flags(options: dict) -> list[str]:
    """{"resolution": 64, "prompt": ["a", "b"]} -> ["--resolution", "64", "--prompt", "a", "b"]"""
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def launch(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run `accelerate launch` as a command line does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, *flags(options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def factors(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / WEIGHTS)


def assert_same(left: dict, right: dict, tolerance: float = 0.0) -> None:
    assert left.keys() == right.keys()
    worst = max((left[name] - right[name]).abs().max().item() for name in left)
    assert worst <= tolerance
