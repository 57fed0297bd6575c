"""What a run reads and imports before it trains: nothing that it has no use for, and nothing twice."""

import json
import shutil
import subprocess
import sys

import pytest
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.base_model.loading import BaseModel
from kron_formats.kept import load_tensors
from tests.conftest import ROOT, assert_same, factors, flags

PARTS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}


@pytest.fixture(params=["sd", "sdxl"])
def twin(request, options):
    """A script, its options for photos of fixed crops, and the text encoders that it has."""
    base = request.getfixturevalue(f"tiny_{request.param}")
    options = {**options, "pretrained_model_name_or_path": base, "center_crop": True, "max_train_steps": 2}
    text = ["text_encoder"] if request.param == "sd" else ["text_encoder", "text_encoder_2"]
    return {"sd": sd, "sdxl": sdxl}[request.param], options, text


@pytest.fixture
def read(monkeypatch):
    """The parts of base models whose weights are read, in their order."""
    parts = []

    def watch(part, model_class):
        from_pretrained = model_class.from_pretrained.__func__

        def spy(cls, *arguments, **options):
            parts.append(part)
            return from_pretrained(cls, *arguments, **options)

        monkeypatch.setattr(model_class, "from_pretrained", classmethod(spy))

    for part, model_class in PARTS.items():
        watch(part, model_class)
    return parts


def test_each_part_is_read_once(twin, prior, run_main, read):
    script, options, text = twin
    run_main(script, **options, **prior)
    assert sorted(read) == sorted(["unet", "vae", *text])


def test_with_class_images_and_a_full_cache_only_the_unet_is_read(twin, prior, run_main, read, tmp_path):
    script, options, text = twin
    options = {**options, **prior, "cache_latents_to_disk": tmp_path / "cache", "random_flip": True}
    run_main(script, **{**options, "cache_latents_to_disk": tmp_path / "unused", "output_dir": tmp_path / "uncached"})
    run_main(script, **options)
    read.clear()
    again = {**options, "output_dir": tmp_path / "again"}
    run_main(script, **again)
    assert read == ["unet"]
    for output in (options["output_dir"], tmp_path / "uncached"):
        assert_same(factors(tmp_path / "again"), factors(output))

    read.clear()
    run_main(script, **{**again, "instance_prompt": "another photo of sks dog", "output_dir": tmp_path / "prompt"})
    assert read == ["unet", *text]
    read.clear()
    run_main(script, **{**again, "resolution": 56, "output_dir": tmp_path / "size"})
    assert read == ["unet", "vae"]


def test_samples_need_the_vae_and_trained_text_encoders_are_read(twin, run_main, read, tmp_path):
    script, options, text = twin
    options = {**options, "cache_latents_to_disk": tmp_path / "cache"}
    drawing = {"validation_prompt": "sks dog", "validation_num_inference_steps": 1, "num_validation_images": 1}
    run_main(script, **options, **drawing)
    read.clear()
    run_main(script, **options, **drawing, overwrite_output_dir=True)
    assert read == ["unet", "vae"]
    assert (options["output_dir"] / "samples" / "step-000002.png").exists()
    read.clear()
    run_main(script, **options, train_text_encoder=True, overwrite_output_dir=True)
    assert read == ["unet", *text]


def test_a_damaged_embedding_is_made_anew(options, run_main, read, tmp_path):
    options = {**options, "cache_latents_to_disk": tmp_path / "cache", "center_crop": True}
    run_main(sd, **options)
    before = factors(options["output_dir"])
    path = next(path for path in (tmp_path / "cache").iterdir() if "prompt_embeds" in load_tensors(path))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    read.clear()
    run_main(sd, **options, overwrite_output_dir=True)
    assert read == ["unet", "text_encoder"]
    assert_same(factors(options["output_dir"]), before)


def test_a_prompt_s_embedding_does_not_depend_on_the_others(tiny_sd, options, run_main, monkeypatch):
    """What the cache holds of a prompt is used in runs with other prompts."""
    seen = []
    encode_prompts = BaseModel.encode_prompts
    monkeypatch.setattr(BaseModel, "encode_prompts", lambda base, p: (seen.append(p), encode_prompts(base, p))[1])
    run_main(sd, **options)
    assert seen == [["a photo of sks dog"], [""]]


def test_a_vae_of_another_size_whose_configuration_says_little_is_known(options, run_main, tiny_sd, tmp_path):
    """Stable Diffusion 1's says no scaling_factor; the toy world's VAE makes latents of a quarter of the image."""
    base, output = tmp_path / "base", tmp_path / "again"
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    shape = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    pipeline.register_modules(vae=AutoencoderKL(**shape, **blocks))
    pipeline.save_pretrained(base)
    options = {**options, "pretrained_model_name_or_path": base, "max_train_steps": 2, "validation_prompt": "sks dog"}
    drawing = {"validation_num_inference_steps": 1, "num_validation_images": 1}
    run_main(sd, **options, **drawing)
    settings = json.loads((base / "vae" / "config.json").read_text())
    assert settings.pop("scaling_factor") == 0.18215
    (base / "vae" / "config.json").write_text(json.dumps(settings))
    run_main(sd, **{**options, "output_dir": output}, **drawing)
    assert_same(factors(output), factors(options["output_dir"]))
    assert (output / "samples" / "step-000002.png").exists()


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--learning_rate", "fast"], 2)])
@pytest.mark.parametrize("script", ["train_dreambooth_kronecker.py", "train_dreambooth_kronecker_sdxl.py"])
def test_help_and_wrong_options_are_answered_without_heavy_imports(script, arguments, code):
    program = f"""
import runpy, sys
sys.argv = [{script!r}, *{arguments!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    heavy = {{"torch", "diffusers", "accelerate", "matplotlib"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy else end.code)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert "--learning_rate" in result.stdout + result.stderr


@pytest.mark.parametrize("precision, imported", [("fp32", False), ("nf4", True)])
def test_bitsandbytes_is_imported_only_to_quantise(options, precision, imported):
    program = f"""
import gc, runpy, sys
sys.argv = ["train", *{flags({**options, "base_precision": precision})!r}]
runpy.run_path("train_dreambooth_kronecker.py", run_name="__main__")
assert gc.isenabled()
print("imported:", "bitsandbytes" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"imported: {imported}\n")


def test_a_base_model_that_was_saved_quantised_is_refused(tiny_sd, options, run_main, tmp_path):
    shutil.copytree(tiny_sd, tmp_path / "base")
    path = tmp_path / "base" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(ValueError, match="base was saved quantised; .* --base_precision nf4"):
        run_main(sd, **{**options, "pretrained_model_name_or_path": tmp_path / "base"})
