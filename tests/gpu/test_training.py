"""Training as users start it, on the device: every way to save memory and time trains, and resumes bit for bit."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile, record_function

import dreambooth.train as training
import train_dreambooth_kronecker as sd
import train_dreambooth_kronecker_sdxl as sdxl
from dreambooth.layout import TENSORS_NAME
from dreambooth.output.checkpoint import read_state
from tests.conftest import assert_same, factors, metrics
from tests.gpu.traces import STEP, read_events, steps_in, waits_in
from tests.integration.test_step import use_scaler

pytestmark = pytest.mark.gpu

BF16 = {"mixed_precision": "bf16"}
LARGE = {"kron_a1": 1, "kron_a2": 1}  # B has as many numbers as W: 4,096, from which 8-bit optimizers use 8 bits
RUNS = {
    "fp32": {},
    "bf16": BF16,
    "fp16": {"mixed_precision": "fp16"},
    "8-bit optimizer": {**BF16, **LARGE, "use_8bit_adam": True},
    "nf4": {**BF16, "base_precision": "nf4"},
    "int8": {**BF16, "base_precision": "int8"},
    "checkpointing": {**BF16, "gradient_checkpointing": True},
    "channels_last": {**BF16, "channels_last": True},
    "text encoder": {**BF16, "train_text_encoder": True},
}


@pytest.fixture
def prior() -> dict:
    return {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of dog"}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_trains_and_resumes_bit_for_bit(run, options, prior, run_main, deterministic):
    common = {**options, **prior, **RUNS[run], "checkpointing_steps": 2}
    run_main(sd, **common)
    output = options["output_dir"]
    uninterrupted = factors(output)
    assert all(np.isfinite(row["loss"]) for row in metrics(output))
    assert run == "fp16" or all(np.isfinite(row["grad_norm"]) for row in metrics(output))  # whose first may overflow
    assert max(tensor.abs().max().item() for name, tensor in uninterrupted.items() if name.endswith("w2")) > 1e-4
    run_main(sd, **common, resume_from_checkpoint="checkpoint-2")
    assert_same(factors(output), uninterrupted)
    assert [row["step"] for row in metrics(output)] == [1, 2, 3, 4]


def test_sdxl_trains_in_bf16(tiny_sdxl, options, prior, run_main):
    run_main(sdxl, **{**options, **prior, **BF16, "pretrained_model_name_or_path": tiny_sdxl})
    assert all(np.isfinite([row["loss"], row["grad_norm"]]).all() for row in metrics(options["output_dir"]))


def test_fp16_scales_gradients_and_keeps_the_scale(options, run_main, device, monkeypatch):
    if device.type == "cpu":  # where accelerate scales nothing
        use_scaler(monkeypatch, 2.0**10)
    run_main(sd, **options, mixed_precision="fp16", checkpointing_steps=2)
    scaler = read_state(options["output_dir"] / "checkpoint-2")["scaler"]
    assert 2**6 <= scaler["scale"] <= 2**16 and scaler["_growth_tracker"] in (1, 2)  # the first step may overflow


def test_the_8_bit_optimizer_keeps_its_state_in_8_bits(options, run_main):
    run_main(sd, **options, **RUNS["8-bit optimizer"], checkpointing_steps=2)
    state = load_file(options["output_dir"] / "checkpoint-2" / TENSORS_NAME)
    assert sum(tensor.dtype == torch.uint8 for tensor in state.values()) >= 2 * 32  # two moments of every B


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantised_base_predicts_nearly_the_same(precision, options, run_main, tmp_path):
    """At step 1, where the adapter is still the base model."""
    common = {**options, **BF16, "max_train_steps": 1}
    run_main(sd, **common)
    run_main(sd, **{**common, "base_precision": precision, "output_dir": tmp_path / precision})
    plain, quantised = (metrics(output)[0]["loss"] for output in (options["output_dir"], tmp_path / precision))
    assert quantised != plain and quantised == pytest.approx(plain, rel=0.1)


# ---- what a step waits for ----


def profiler() -> profile:
    return profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])


@pytest.mark.parametrize("run", ["bf16", "fp16", "8-bit optimizer", "nf4", "checkpointing"])
def test_no_step_waits_for_the_gpu(cuda, run, options, prior, run_main, tmp_path, monkeypatch):
    """Steps 3 to 7 of 9, whose losses are read after the last."""
    train_steps, profiled = training.train_steps, profiler()

    def watched_steps(*arguments):
        reports = train_steps(*arguments)
        for number in itertools.count(1):
            if number == 3:
                torch.cuda.synchronize()
                profiled.start()
            with record_function(STEP):
                report = next(reports)
            if number == 7:
                torch.cuda.synchronize()
                profiled.stop()
            yield report

    monkeypatch.setattr(training, "train_steps", watched_steps)
    common = {"max_train_steps": 9, "logging_steps": 100, "center_crop": True}
    run_main(sd, **{**options, **prior, **RUNS[run], **common})
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = read_events(tmp_path / "trace.json")
    assert len(steps_in(events)) == 5
    assert any("Pinned -> Device" in event["name"] for event in events), "batches are not pinned"
    assert waits_in(events) == []


@pytest.mark.parametrize(
    "act",
    [
        lambda tensor: tensor.item(),
        lambda tensor: tensor.cpu(),
        lambda tensor: torch.cuda.synchronize(),
        lambda tensor: torch.ones(4096).to(tensor.device),
    ],
    ids=["item", "cpu", "synchronize", "not pinned"],
)
def test_a_wait_is_noticed(cuda, act, tmp_path):
    tensor = torch.ones(1, device=cuda)
    torch.cuda.synchronize()
    with profiler() as profiled, record_function(STEP):
        act(tensor)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    assert waits_in(read_events(tmp_path / "trace.json"))
