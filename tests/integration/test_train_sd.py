"""A training run as users start it, on a small Stable Diffusion pipeline of the real classes."""

import json
from pathlib import Path

import pytest
import torch
import wandb
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageChops
from safetensors import safe_open

import train_dreambooth_kronecker as sd
from kron_adapter import kronecker_layers, load_kronecker
from tests.conftest import WEIGHTS, assert_same, factors, launch, metrics, save_tiny_pipeline


@pytest.mark.parametrize("subject, resolution, mixed_precision", [("clock", 128, "no"), ("dog", 64, "bf16")])
def test_trains_on_photos_and_the_loss_falls(
    subject, resolution, mixed_precision, options, prior, request, run_main, tiny_sd, tmp_path
):
    """The same samples without a learning rate are the control: what falls is due to training alone."""
    common = {
        **options,
        **prior,
        "instance_data_dir": request.getfixturevalue(f"{subject}_photos"),
        "resolution": resolution,
        "mixed_precision": mixed_precision,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 20,
    }
    trained, control = tmp_path / "trained", tmp_path / "control"
    run_main(sd, **{**common, "output_dir": trained, "learning_rate": 1e-2})
    run_main(sd, **{**common, "output_dir": control, "learning_rate": 0})
    for loss in ("loss", "instance_loss", "prior_loss"):
        ours, base = (sum(row[loss] for row in metrics(output)[-5:]) for output in (trained, control))
        assert ours < 0.97 * base, loss
    assert metrics(trained)[0]["loss"] == metrics(control)[0]["loss"]

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    load_kronecker(pipeline, trained / WEIGHTS)
    assert len(kronecker_layers(pipeline.unet)) == 32
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a photo of sks dog", height=64, width=64, num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_the_real_command_line_says_what_it_did(options, prior, tmp_path):
    result = launch("train_dreambooth_kronecker.py", **options, **prior)
    assert result.returncode == 0, result.stderr
    assert "Training: 100%" in result.stderr and "loss=" in result.stderr and "lr=5.00e-04" in result.stderr
    for words in ("Trained 9,024 parameters (35.25 KiB", "4 steps", "peak memory", str(tmp_path / "out" / WEIGHTS)):
        assert words in result.stdout
    assert "Class images: 100%" in result.stderr
    assert "WARNING" not in result.stderr and "[transformers]" not in result.stderr


def test_a_config_file_gives_the_same_run(options, run_main, tmp_path):
    run_main(sd, **options)
    again = tmp_path / "again"
    run_main(sd, config=options["output_dir"] / "config.yaml", output_dir=again)
    assert_same(factors(options["output_dir"]), factors(again))


def test_metadata_says_what_the_file_is(options, run_main, tiny_sd):
    run_main(sd, **options, kron_factors=["to_k=8,16", "attn2.to_v=1,d_in"])
    with safe_open(options["output_dir"] / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["kronecker.format_version"] == "1"
    assert metadata["kronecker.base_model"] == tiny_sd.name
    assert metadata["kronecker.instance_prompt"] == "a photo of sks dog"
    assert metadata["kronecker.step"] == "4"
    shapes = {tuple(shape) for shape in json.loads(metadata["kronecker.factors"]).values()}
    assert {"to_k", "attn2.to_v"} < set(json.loads(metadata["kronecker.targets"])) and {(8, 16), (1, 64)} < shapes
    assert "attn2.to_v=1,d_in" in (options["output_dir"] / "config.yaml").read_text()
    assert '"learning_rate": 0.0005' in metadata["kronecker.config"]


def test_resuming_ends_with_the_same_bytes_as_never_stopping(options, prior, run_main, tmp_path):
    common = {**options, **prior, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "max_train_steps": 5}
    run_main(sd, **common, checkpointing_steps=2, checkpoints_total_limit=2)
    uninterrupted = factors(options["output_dir"])
    assert sorted(path.name for path in options["output_dir"].glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    for start in (options["output_dir"] / "checkpoint-2", "latest", "checkpoint-4"):
        run_main(sd, **common, resume_from_checkpoint=start)
        assert_same(factors(options["output_dir"]), uninterrupted)
        assert [row["step"] for row in metrics(options["output_dir"])] == [1, 2, 3, 4, 5]


def test_resume_latest_with_nothing_to_resume_starts_and_says_so(options, run_main, capfd):
    run_main(sd, **options, resume_from_checkpoint="latest")
    printed = capfd.readouterr()
    assert "holds no checkpoint; starting from the beginning" in printed.err
    assert "5 photos; 4 steps = 0.8 passes" in printed.out
    assert len(metrics(options["output_dir"])) == 4


def test_accumulating_two_batches_is_one_batch_of_double_size(options, prior, run_main, tmp_path):
    common = {**options, **prior, "learning_rate": 1e-3}
    one, two = tmp_path / "one", tmp_path / "two"
    run_main(sd, **{**common, "output_dir": one, "train_batch_size": 4})
    run_main(sd, **{**common, "output_dir": two, "train_batch_size": 2, "gradient_accumulation_steps": 2})
    # Adam divides by the gradient's size: a factor lost or won in accumulation shows in the norm, not in the factors.
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert {**ours, "step_time": 0} == pytest.approx({**theirs, "step_time": 0}, rel=1e-4)
    assert_same(factors(one), factors(two), tolerance=1e-5)
    assert max(tensor.abs().max().item() for name, tensor in factors(one).items() if name.endswith("w2")) > 1e-3


WHOLE = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
SPLIT = ("--config_file", "configs/accelerate/fsdp.yaml", "--num_processes", "2", "--mixed_precision", "no")


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("launcher", [WHOLE, SPLIT], ids=["whole", "split"])
def test_two_ranks_train_as_one_with_the_same_global_batch(launcher, with_prior, options, prior, run_main, tmp_path):
    """Without prior preservation the text encoder trains along: its gradients have to be shared too."""
    extra = {**prior, "sample_batch_size": 1} if with_prior else {"train_text_encoder": True}
    drawing = {"validation_prompt": "sks dog", "validation_num_inference_steps": 2, "num_validation_images": 1}
    steps = {"max_train_steps": 3, "learning_rate": 1e-2, "adam_epsilon": 1e-3}  # in proportion to small gradients
    common = {**options, **extra, **drawing, **steps}
    script = Path(__file__).with_name("rank_report.py")
    result = launch(*launcher, str(script), str(tmp_path), **common)
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert_same(ranks[0]["factors"], ranks[1]["factors"])
    assert [rank["share"] for rank in ranks] == ([1, 1] if launcher == WHOLE else pytest.approx([0.5, 0.5], abs=0.05))
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "class").glob("*.png")}
    assert len(drawn) == len(set(drawn.values())) == (4 if with_prior else 0)

    alone = tmp_path / "alone"
    run_main(sd, **{**common, "output_dir": alone, "train_batch_size": 2})
    assert_same(factors(options["output_dir"]), factors(alone), tolerance=1e-5)
    assert max(tensor.abs().max().item() for name, tensor in factors(alone).items() if name.endswith("w2")) > 1e-3
    sheets = [Image.open(output / "samples" / "step-000003.png") for output in (options["output_dir"], alone)]
    difference = ImageChops.difference(*sheets)
    assert max(high for _, high in difference.getextrema()) <= 2


def test_class_images_are_topped_up_and_strays_do_not_count(options, prior, run_main, tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "class-000001.png").write_bytes(b"damaged")
    Image.new("RGB", (80, 64), "red").save(folder / "mine.jpg")
    run_main(sd, **options, **{**prior, "num_class_images": 3})
    first = {path.name: path.read_bytes() for path in folder.glob("class-*.png")}
    assert set(first) == {"class-000000.png", "class-000001.png"} and first["class-000001.png"] != b"damaged"
    run_main(sd, **options, **{**prior, "num_class_images": 6}, overwrite_output_dir=True)
    second = {path.name: path.read_bytes() for path in folder.glob("class-*.png")}
    assert len(second) == 5 and len(set(second.values())) == 5
    assert first.items() <= second.items()


def test_v_prediction_is_read_from_the_scheduler(options, run_main, tmp_path):
    losses = {}
    for prediction_type in ("epsilon", "v_prediction"):
        base = save_tiny_pipeline("sd", tmp_path / prediction_type, prediction_type=prediction_type)
        output = tmp_path / f"out-{prediction_type}"
        run_main(sd, **{**options, "pretrained_model_name_or_path": base, "output_dir": output, "max_train_steps": 1})
        losses[prediction_type] = metrics(output)[0]["loss"]
    assert losses["epsilon"] != losses["v_prediction"]


def test_options_that_change_how_but_not_what_is_trained(options, run_main, tmp_path):
    run_main(sd, **options)
    plain = factors(options["output_dir"])
    variations = {
        "gradient_checkpointing": {"gradient_checkpointing": True},
        "workers": {"dataloader_num_workers": 2},
        "8-bit": {"use_8bit_adam": True},  # bitsandbytes keeps the state of tensors as small as these in 32 bits
    }
    for name, extra in variations.items():
        run_main(sd, **{**options, **extra, "output_dir": tmp_path / name})
        assert_same(factors(tmp_path / name), plain, tolerance=1e-5)


def test_fp16_trains_with_a_gradient_scaler(options, run_main, tmp_path):
    """Unscaled, or applied to factors in fp16, the gradients would give other losses within a few steps."""
    half = tmp_path / "half"
    run_main(sd, **options)
    run_main(sd, **{**options, "mixed_precision": "fp16", "output_dir": half, "checkpointing_steps": 2})
    run_main(sd, **{**options, "mixed_precision": "fp16", "output_dir": half, "resume_from_checkpoint": "checkpoint-2"})
    assert {tensor.dtype for tensor in factors(half).values()} == {torch.float32}
    for ours, exact in zip(metrics(half), metrics(options["output_dir"]), strict=True):
        assert ours["loss"] == pytest.approx(exact["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)


def test_8_bit_adam_resumes(options, run_main, tmp_path):
    common = {**options, "use_8bit_adam": True, "checkpointing_steps": 2}
    run_main(sd, **common)
    uninterrupted = factors(options["output_dir"])
    run_main(sd, **common, resume_from_checkpoint="checkpoint-2")
    assert_same(factors(options["output_dir"]), uninterrupted)


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_trackers_and_samples(tracker, options, run_main, tmp_path, offline_wandb):
    run_main(
        sd, **{**options, "report_to": tracker}, validation_prompt=["sks dog in snow", "a cat"], validation_steps=2,
        num_validation_images=2, validation_num_inference_steps=2,
    )  # fmt: skip
    sheets = sorted(path.name for path in (options["output_dir"] / "samples").glob("*.png"))
    assert sheets == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert Image.open(options["output_dir"] / "samples" / sheets[0]).width > 2 * 192
    wandb.teardown()  # its service then has written everything
    written = {
        "tensorboard": (options["output_dir"] / "logs").rglob("events.out.tfevents.*"),
        "wandb": tmp_path.rglob("run-*.wandb"),
    }[tracker]
    assert any(path.stat().st_size > 1000 for path in written)


def test_nothing_that_holds_a_result_is_overwritten_by_mistake(options, run_main):
    run_main(sd, **options)
    before = (options["output_dir"] / WEIGHTS).read_bytes()
    for extra in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ValueError, match="holds the results of another run .*--overwrite_output_dir"):
            run_main(sd, **{**options, "seed": 1}, **extra)
    assert (options["output_dir"] / WEIGHTS).read_bytes() == before
    run_main(sd, **{**options, "seed": 1}, overwrite_output_dir=True)
    assert (options["output_dir"] / WEIGHTS).read_bytes() != before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere: there is no such folder"),
        ({"kron_a2": 48}, r"to_q maps 64 to 64 features: a2 = 48 does not divide d_in = 64 \(nearest .* 32 and 64\)"),
        (
            {"kron_b2": 48},
            r"to_q maps 64 to 64 features: b2 = 48 .* does not divide d_in = 64 \(nearest .* 32 and 64\)",
        ),
        ({"kron_factors": ["attn3.to_k=1,d_in"]}, "factors are given for attn3.to_k, but the targets are to_q"),
        ({"kron_targets": ["to_q", "to_w"]}, "no linear layer of UNet2DConditionModel has to_w in its path; .*to_v"),
        (
            {"pretrained_model_name_or_path": "./nowhere"},
            "--pretrained_model_name_or_path ./nowhere is not a base model",
        ),
        ({"resume_from_checkpoint": "checkpoint-7"}, "checkpoint-7: there is no such checkpoint; .* holds: none"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(change, words, options, run_main, monkeypatch):
    monkeypatch.setattr("dreambooth.train.BaseModel", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=words):
        run_main(sd, **{**options, **change})
    assert not options["output_dir"].exists()


def test_a_vae_that_is_not_there_is_refused_under_its_own_flag(options, run_main):
    with pytest.raises(ValueError, match="^--pretrained_vae_model_name_or_path ./nowhere "):
        run_main(sd, **options, pretrained_vae_model_name_or_path="./nowhere")


def test_an_sdxl_model_is_sent_to_the_other_script(options, tiny_sdxl, run_main):
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline, but this script trains a StableDiffusionPip"):
        run_main(sd, **{**options, "pretrained_model_name_or_path": tiny_sdxl})


def test_an_error_ends_the_command_with_one_line_and_exit_code_1(options):
    result = launch("train_dreambooth_kronecker.py", **{**options, "instance_data_dir": "nowhere"})
    assert result.returncode == 1
    assert "error: --instance_data_dir nowhere: there is no such folder" in result.stderr.splitlines()
