"""Every feature in both scripts: Stable Diffusion and SDXL, on small pipelines of the real classes."""

import dataclasses
import gc
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image

import dreambooth.train as training
import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.base_model.process import DiscreteProcess
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.loop.steps import Denoiser
from scripts import generate, merge
from tests.conftest import WEIGHTS, assert_same, draw_photos, factors, metrics


@pytest.fixture(params=["sd", "sdxl"])
def twin(request, options, tmp_path_factory):
    """A script with options that suit it: the dog for Stable Diffusion, the cartoon for SDXL."""
    script, family = {"sd": (sd, SD), "sdxl": (sdxl, SDXL)}[request.param]
    base = request.getfixturevalue(f"tiny_{request.param}")
    photos = options["instance_data_dir"] if script is sd else draw_photos(tmp_path_factory.mktemp("cartoon"), 4)
    options = {**options, "pretrained_model_name_or_path": base, "instance_data_dir": photos}
    return SimpleNamespace(script=script, family=family, base=base, options=options, name=request.param)


def change_family(twin, monkeypatch, **functions) -> None:
    """Have the script train with other functions of its family."""
    changed = dataclasses.replace(twin.family, **functions)
    monkeypatch.setattr(f"dreambooth.families.{twin.name}.{twin.name.upper()}", changed)


def finite(output) -> bool:
    return all(np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]) for row in metrics(output))


def moved(output) -> float:
    """How far training has moved the second factors from zero."""
    return max(tensor.abs().max().item() for name, tensor in factors(output).items() if name.endswith("w2"))


FEATURES = {
    "snr_gamma": {"snr_gamma": 5.0},
    "noise": {"noise_offset": 0.1, "min_timestep": 100, "max_timestep": 900},
    "huber": {"loss_type": "huber", "huber_c": 0.1},
    "nf4": {"base_precision": "nf4"},
    "int8": {"base_precision": "int8"},
    "bf16 base": {"base_precision": "bf16", "vae_precision": "bf16"},
    "bf16": {"mixed_precision": "bf16", "validation_prompt": "sks dog", "validation_num_inference_steps": 2},
    "memory": {"gradient_checkpointing": True, "channels_last": True, "allow_tf32": True},
    "buckets": {"aspect_ratio_buckets": True, "resolution": 128, "random_flip": True, "train_batch_size": 2},
    "data": {"repeats": 2, "random_flip": True, "center_crop": True, "caption_dropout_probability": 0.3},
    "factors": {"kron_a1": 8, "kron_a2": 8, "kron_factors": ["to_k=4,32"], "kron_init": "reference"},
    "adafactor": {"optimizer": "Adafactor"},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "ScheduleFreeAdamW", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1},
    "8-bit": {"use_8bit_adam": True},
    "cosine": {"lr_scheduler": "cosine_with_restarts", "lr_warmup_steps": 1, "lr_num_cycles": 2},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_trains_with_prior_preservation(feature, twin, prior, run_main):
    run_main(twin.script, **{**twin.options, **prior, **FEATURES[feature], "max_train_steps": 2})
    output = twin.options["output_dir"]
    assert finite(output) and moved(output) > 0
    assert metrics(output)[0]["prior_loss"] > 0


def test_compiled_training_is_the_same_training(twin, prior, run_main, tmp_path, monkeypatch):
    """The graphs are captured whole, as for a GPU; only the minute of generating C++ for them is left out."""
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    compiled = []

    def capture(unet, **options):
        compiled.append(options)
        compile_blocks(unet, backend="aot_eager", **options)

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", capture)
    common = {**twin.options, **prior, "max_train_steps": 2}
    run_main(twin.script, **common)
    run_main(twin.script, **{**common, "compile": True, "output_dir": tmp_path / "compiled"})
    assert compiled == [{"fullgraph": True}]
    assert_same(factors(twin.options["output_dir"]), factors(tmp_path / "compiled"), tolerance=1e-5)


# ---- prompts, sizes, latents ----


@pytest.fixture
def captioned(tmp_path, dog_photos):
    """Three photos of different sizes, each with a caption of its own."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i, path in enumerate(sorted(dog_photos.glob("*.jpg"))[:3]):
        image = Image.open(path).convert("RGB").resize((96 + 16 * i, 80 + 8 * i))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"sks dog number {i}")
    return folder


@pytest.mark.parametrize("batch_size", [1, 2, 3])
@pytest.mark.parametrize("prior_source", ["images", "base_model"])
def test_every_row_gets_its_own_prompt_and_size(
    twin, prior, captioned, batch_size, prior_source, run_main, monkeypatch
):
    """What reaches the UNet, row by row: the instance rows' captions first, then the class prompt."""
    seen = []
    condition = twin.family.condition

    def watch(embeddings, size_conditions):
        seen.append((embeddings["prompt_embeds"].clone(), size_conditions.clone()))
        return condition(embeddings, size_conditions)

    change_family(twin, monkeypatch, condition=watch)
    prior = {**prior, "prior_source": prior_source}
    if prior_source == "base_model":
        prior = {name: prior[name] for name in ("with_prior_preservation", "class_prompt", "prior_source")}
    options = {**twin.options, "instance_data_dir": captioned, "train_batch_size": batch_size, "snr_gamma": 5.0}
    run_main(twin.script, **options, **prior)

    pipeline = DiffusionPipeline.from_pretrained(twin.base)
    captions = [f"sks dog number {i}" for i in range(3)]
    with torch.no_grad():
        known = twin.family.encode_prompts(pipeline, [*captions, "a photo of dog"])["prompt_embeds"]
    full_batches = [entry for entry in seen if len(entry[0]) == 2 * batch_size]
    assert len(full_batches) == 4
    for embeddings, sizes in full_batches:
        nearest = torch.cdist(embeddings.flatten(1), known.flatten(1)).argmin(1).tolist()
        assert all(row < 3 for row in nearest[:batch_size]) and nearest[batch_size:] == [3] * batch_size
        for row, caption in enumerate(nearest[:batch_size]):
            assert sizes[row, :2].tolist() == [80 + 8 * caption, 96 + 16 * caption]
        own = 64 if prior_source == "images" else None
        for row in range(batch_size):
            expected = [own, own] if own else sizes[row, :2].tolist()
            assert sizes[batch_size + row, :2].tolist() == expected


def test_the_loss_is_the_sum_done_by_hand(twin, prior, run_main, monkeypatch):
    """At step 1, where the adapter is still the base model, from what the UNet was given and gave."""
    seen = {}
    forward, make_noise = Denoiser.__call__, DiscreteProcess.noise

    def watch(self, noisy_latents, timesteps, prompt_rows, size_conditions):
        prediction = forward(self, noisy_latents, timesteps, prompt_rows, size_conditions)
        seen.setdefault("call", (noisy_latents, timesteps, prediction.detach()))
        return prediction

    def remember_noise(self, latents, noise, timesteps):
        seen.setdefault("noise", noise)
        return make_noise(self, latents, noise, timesteps)

    monkeypatch.setattr(Denoiser, "__call__", watch)
    monkeypatch.setattr(DiscreteProcess, "noise", remember_noise)
    options = {**twin.options, "train_batch_size": 2, "prior_loss_weight": 0.5, "snr_gamma": 5.0, "max_train_steps": 1}
    run_main(twin.script, **options, **prior)

    _, timesteps, prediction = seen["call"]
    alphas = DiffusionPipeline.from_pretrained(twin.base).scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    rows = (prediction - seen["noise"]).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr
    row = metrics(options["output_dir"])[0]
    assert row["instance_loss"] == pytest.approx(rows[:2].mean().item(), rel=1e-5)
    assert row["prior_loss"] == pytest.approx(rows[2:].mean().item(), rel=1e-5)
    assert row["loss"] == pytest.approx(row["instance_loss"] + 0.5 * row["prior_loss"], rel=1e-5)


def test_cached_latents_change_no_bit_and_a_second_run_encodes_nothing(twin, prior, run_main, tmp_path, monkeypatch):
    common = {**twin.options, **prior, "center_crop": True, "random_flip": True}
    outputs = {}
    for name, extra in {
        "encoded": {"cache_latents": "off"},
        "cached": {},
        "disk": {"cache_latents_to_disk": tmp_path / "latents"},
    }.items():
        outputs[name] = tmp_path / name
        run_main(twin.script, **{**common, **extra, "output_dir": outputs[name]})
        assert_same(factors(outputs[name]), factors(outputs["encoded"]))
    monkeypatch.setattr("diffusers.AutoencoderKL.encode", lambda *_: pytest.fail("a photo was encoded again"))
    again = {**common, "cache_latents_to_disk": tmp_path / "latents", "output_dir": tmp_path / "again"}
    run_main(twin.script, **again)
    assert_same(factors(tmp_path / "again"), factors(outputs["encoded"]))


def test_a_masked_photo_trains_on_the_subject_alone(options, run_main, tmp_path, dog_photos):
    """What lies outside the mask may be painted over without any effect on the loss's target region."""
    folder = tmp_path / "masked"
    folder.mkdir()
    image = Image.open(sorted(dog_photos.glob("*.jpg"))[0]).convert("RGB").resize((64, 64))
    image.save(folder / "a.png")
    run_main(sd, **{**options, "instance_data_dir": folder, "output_dir": tmp_path / "plain"})
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    mask.save(folder / "a.mask.png")
    run_main(sd, **{**options, "instance_data_dir": folder, "output_dir": tmp_path / "masked-out"})
    run_main(sd, **{**options, "instance_data_dir": folder, "output_dir": tmp_path / "even", "unmasked_weight": 1.0})
    assert_same(factors(tmp_path / "even"), factors(tmp_path / "plain"), tolerance=1e-5)
    assert metrics(tmp_path / "masked-out")[0]["loss"] != metrics(tmp_path / "plain")[0]["loss"]


def test_a_dataset_on_disk_trains_with_its_captions(twin, run_main, captioned, tmp_path, monkeypatch):
    lines = [f'{{"file_name": "{i}.png", "words": "sks dog number {i}"}}' for i in range(3)]
    for path in captioned.glob("*.txt"):
        path.unlink()
    (captioned / "metadata.jsonl").write_text("\n".join(lines))
    known, encode = [], twin.family.encode_prompts
    change_family(twin, monkeypatch, encode_prompts=lambda pipeline, p, n: (known.extend(p), encode(pipeline, p, n))[1])
    options = {name: value for name, value in twin.options.items() if name != "instance_data_dir"}
    run_main(twin.script, **options, dataset_name=captioned, caption_column="words")
    assert {f"sks dog number {i}" for i in range(3)} <= set(known)
    assert finite(options["output_dir"]) and moved(options["output_dir"]) > 0


def test_a_long_caption_is_read_to_its_end_if_it_may_be_and_what_is_cut_is_said_first(
    twin, prior, captioned, run_main, monkeypatch, capfd
):
    (captioned / "1.txt").write_text("a photo of a street with many people and cars " * 2 + "now sks dog")
    lengths, condition = set(), twin.family.condition

    def measure(embeddings, sizes):
        lengths.add(embeddings["prompt_embeds"].shape[1])
        return condition(embeddings, sizes)

    change_family(twin, monkeypatch, condition=measure)
    samples = {"validation_prompt": "sks dog", "validation_num_inference_steps": 1, "num_validation_images": 1}
    options = {**twin.options, **prior, **samples, "instance_data_dir": captioned, "train_text_encoder": True}
    options |= {"max_train_steps": 1, "checkpointing_steps": 1}
    run_main(twin.script, **options)
    said = capfd.readouterr().err
    assert said.index("1.png: 81 tokens, without 'sks dog'") < said.index("Drawing 4 class images")
    assert lengths == {77} and "no samples" not in said
    with pytest.raises(UserError, match="max_token_length +75 +150"):
        run_main(twin.script, **options, max_token_length=150, resume_from_checkpoint="latest")
    shutil.rmtree(prior["class_data_dir"])
    run_main(twin.script, **options, max_token_length=150, overwrite_output_dir=True)
    said = capfd.readouterr().err
    assert lengths == {77, 154} and "tokens, without" not in said and "no samples" not in said
    assert "--max_token_length 150" in (options["output_dir"] / "README.md").read_text()


# ---- priors and text encoders ----


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_the_base_model_as_prior_starts_at_zero_loss_and_pulls_back(twin, run_main, train_text_encoder):
    options = {
        **twin.options,
        "with_prior_preservation": True,
        "prior_source": "base_model",
        "class_prompt": "a photo of dog",
        "learning_rate": 5e-3,
        "train_text_encoder": train_text_encoder,
    }
    run_main(twin.script, **options)
    rows = metrics(options["output_dir"])
    assert rows[0]["prior_loss"] < 1e-12, "with B = 0 the adapted model is the base model"
    assert rows[-1]["prior_loss"] > 1e-9, "the base model must not move along"


def test_text_encoder_adapters_are_trained_saved_drawn_and_merged_with(twin, run_main, tmp_path):
    output = twin.options["output_dir"]
    run_main(
        twin.script,
        **twin.options,
        train_text_encoder=True,
        text_encoder_lr=1e-2,
        text_encoder_kron_a1=8,
        text_encoder_kron_a2=16,
        gradient_checkpointing=True,
        validation_prompt="sks dog",
        validation_steps=2,
        num_validation_images=1,
        validation_num_inference_steps=2,
    )
    prefixes = {"sd": ["lora_te_"], "sdxl": ["lora_te1_", "lora_te2_"]}[twin.name]
    for prefix in prefixes:
        own = {name: tensor for name, tensor in factors(output).items() if name.startswith(prefix)}
        assert len(own) == 3 * 2 * 4  # three tensors for four projections in two layers
        assert max(tensor.abs().max().item() for name, tensor in own.items() if name.endswith("w2")) > 1e-3
        assert {tuple(tensor.shape) for name, tensor in own.items() if name.endswith("w1")} == {(8, 16)}

    drawing = {"prompt": "sks dog", "num_images": 1, "height": 64, "width": 64, "num_inference_steps": 2}
    model = {"pretrained_model_name_or_path": twin.base, "adapter": output / WEIGHTS}
    run_main(merge, **model, output_dir=tmp_path / "merged")
    run_main(generate, **model, **drawing, output_dir=tmp_path / "a")
    run_main(generate, pretrained_model_name_or_path=tmp_path / "merged", **drawing, output_dir=tmp_path / "b")
    adapted, merged = (np.asarray(Image.open(tmp_path / name / "00-0.png"), int) for name in "ab")
    assert np.abs(adapted - merged).max() <= 1


def test_text_encoder_training_resumes_exactly(twin, run_main):
    common = {**twin.options, "train_text_encoder": True, "checkpointing_steps": 2}
    run_main(twin.script, **common)
    uninterrupted = factors(twin.options["output_dir"])
    run_main(twin.script, **common, resume_from_checkpoint="checkpoint-2")
    assert_same(factors(twin.options["output_dir"]), uninterrupted)


def test_frozen_text_encoders_and_an_unused_vae_are_really_freed(twin, run_main, monkeypatch):
    references = {}
    register_modules, train_steps = DiffusionPipeline.register_modules, training.train_steps

    def register(pipeline, **parts):
        for name, part in parts.items():
            if part is not None and (name.startswith("text_encoder") or name == "vae"):
                references[name] = weakref.ref(part)
        register_modules(pipeline, **parts)

    def steps(*arguments):
        gc.collect()
        alive.extend(name for name, reference in references.items() if reference() is not None)
        return train_steps(*arguments)

    alive = []
    monkeypatch.setattr(DiffusionPipeline, "register_modules", register)
    monkeypatch.setattr(training, "train_steps", steps)
    run_main(twin.script, **twin.options, center_crop=True)
    assert len(references) == {"sd": 2, "sdxl": 3}[twin.name] and not alive


# ---- base models of other kinds ----


def with_scheduler(base, folder, scheduler):
    shutil.copytree(base, folder)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(sigma_max=80.0, sigma_data=0.5),
        EulerDiscreteScheduler(
            beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
    ],
    ids=["edm", "v-prediction, zero terminal SNR"],
)  # fmt: skip
def test_base_models_with_other_schedulers_train_and_draw(scheduler, tiny_sdxl, options, prior, run_main, tmp_path):
    base = with_scheduler(tiny_sdxl, tmp_path / "base", scheduler)
    run_main(
        sdxl, **{**options, "pretrained_model_name_or_path": base, "learning_rate": 5e-3, "max_train_steps": 6},
        **prior, validation_prompt="sks dog", validation_num_inference_steps=2, num_validation_images=1,
    )  # fmt: skip
    assert finite(options["output_dir"]) and moved(options["output_dir"]) > 1e-3
    assert 0.1 < metrics(options["output_dir"])[0]["loss"] < 100
    assert (options["output_dir"] / "samples" / "step-000006.png").exists()


def test_another_vae_is_used_and_its_nan_is_explained(tiny_sdxl, options, run_main, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipeline.vae.save_pretrained(tmp_path / "vae")
    common = {**options, "pretrained_model_name_or_path": tiny_sdxl}
    run_main(sdxl, **common, pretrained_vae_model_name_or_path=tmp_path / "vae")
    for parameter in pipeline.vae.encoder.conv_in.parameters():
        parameter.data.fill_(float("nan"))
    pipeline.vae.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="not finite.*--vae_precision fp32.*madebyollin/sdxl-vae-fp16-fix"):
        run_main(
            sdxl, **{**common, "output_dir": tmp_path / "o2"}, pretrained_vae_model_name_or_path=tmp_path / "broken"
        )


def test_an_sd_model_is_sent_to_the_other_script(tiny_sd, options, run_main):
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline, but this script trains a StableDiffusionXLP"):
        run_main(sdxl, **options)
