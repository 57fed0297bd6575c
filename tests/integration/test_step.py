"""The step itself: it waits for the device only where losses are read, and no loss that is not finite spoils a run."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dreambooth.report.progress as progress
import dreambooth.train as training
import train_dreambooth_kronecker as sd
from dreambooth.loop.steps import Denoiser
from tests.conftest import WEIGHTS, assert_same, factors, launch, metrics

NAMES = "item tolist numpy cpu nonzero unique __bool__ __float__ __int__ __index__ __array__ __repr__ __format__"
READING = {getattr(torch.Tensor, name) for name in NAMES.split()}


class Waits(TorchFunctionMode):
    """Counts what has the host wait for the device, in Python and under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function in READING:
            self.names.append(function.__name__)
        return function(*arguments, **options or {})


class ScalarReads(TorchDispatchMode):
    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.names.append(function.name())
        return function(*arguments, **options or {})


@contextmanager
def waits():
    with Waits() as mode, ScalarReads(mode.names):
        yield mode.names


@pytest.mark.parametrize("act", [torch.Tensor.item, torch.Tensor.tolist, bool, float, torch.Tensor.numpy, str])
def test_a_wait_is_noticed(act):
    with waits() as names:
        act(torch.ones(1))
    assert names


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"snr_gamma": 5.0, "noise_offset": 0.1, "random_flip": True, "center_crop": True},
        {"loss_type": "huber", "gradient_accumulation_steps": 2, "train_batch_size": 2, "gradient_checkpointing": True},
        {"mixed_precision": "bf16", "optimizer": "ScheduleFreeAdamW", "lr_scheduler": "constant"},
        {"use_8bit_adam": True},
    ],
)
@pytest.mark.parametrize("prior_source", ["images", "base_model"])
def test_no_step_waits_but_where_losses_are_read(extra, prior_source, options, prior, run_main, monkeypatch):
    """Steps 1 to 7, read after 3, 6 and 7."""
    if prior_source == "base_model":
        prior = {name: prior[name] for name in ("with_prior_preservation", "class_prompt")}
        prior["prior_source"] = "base_model"
    train_steps = training.train_steps
    in_steps, in_reading = [], []

    def watched_steps(*arguments):
        reports = train_steps(*arguments)
        while True:
            with waits() as names:
                report = next(reports)
            in_steps.append(list(names))
            yield report

    def watched_reading(reports):
        with waits() as names:
            rows = read(reports)
        in_reading.append((len(reports), list(names)))
        return rows

    read = progress.read_reports
    monkeypatch.setattr(training, "train_steps", watched_steps)
    monkeypatch.setattr(progress, "read_reports", watched_reading)
    run_main(sd, **{**options, **extra, **prior, "max_train_steps": 7, "logging_steps": 3})
    assert in_steps[0] == ["item", "aten::_local_scalar_dense"]  # the DataLoader's seed, once, on the CPU
    assert in_steps[1:] == [[]] * 6
    assert in_reading == [(3, ["tolist"]), (3, ["tolist"]), (1, ["tolist"])]
    assert [row["step"] for row in metrics(options["output_dir"])] == list(range(1, 8))


def test_how_often_losses_are_read_changes_nothing(options, run_main, tmp_path):
    runs = {}
    for logging_steps in (1, 3, 10):
        output = tmp_path / str(logging_steps)
        run_main(sd, **{**options, "output_dir": output, "logging_steps": logging_steps, "checkpointing_steps": 2})
        runs[logging_steps] = [{**row, "step_time": 0} for row in metrics(output)], factors(output)
    for rows, trained in runs.values():
        assert rows == runs[1][0] and len(rows) == 4
        assert_same(trained, runs[1][1])


def test_metrics_are_whole_up_to_the_checkpoint_whenever_a_run_ends(options, run_main, monkeypatch):
    """Killed right after its checkpoint, with steps unread before and after it."""
    common = {**options, "max_train_steps": 7, "checkpointing_steps": 3}
    run_main(sd, **common)
    whole = [{**row, "step_time": 0} for row in metrics(options["output_dir"])]

    def killed(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        forward, calls = Denoiser.__call__, []

        def die_in_step_5(self, *arguments):
            calls.append(1)
            return killed(self) if len(calls) == 5 else forward(self, *arguments)

        patch.setattr(Denoiser, "__call__", die_in_step_5)
        run_main(sd, **common, overwrite_output_dir=True)
    assert [row["step"] for row in metrics(options["output_dir"])] == [1, 2, 3]
    run_main(sd, **common, resume_from_checkpoint="latest")
    assert [{**row, "step_time": 0} for row in metrics(options["output_dir"])] == whole


# ---- losses that are not finite ----


def poison(monkeypatch, steps, value=float("nan")):
    """Have the UNet predict `value` in these optimizer steps, counted from 1."""
    forward, calls = Denoiser.__call__, []

    def poisoned(self, *arguments):
        calls.append(1)
        prediction = forward(self, *arguments)
        return prediction * value if len(calls) in steps else prediction

    monkeypatch.setattr(Denoiser, "__call__", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_before_a_bad_checkpoint(options, run_main, monkeypatch):
    output = options["output_dir"]
    seen = {}

    class Watched(training.DreamBoothDataset):
        def __getitem__(self, k):
            rows = super().__getitem__(k)
            seen[k + 1] = self.photos[self._photo_number(k)].path  # at batch size 1, sample k is step k + 1
            return rows

    monkeypatch.setattr(training, "DreamBoothDataset", Watched)
    poison(monkeypatch, {4})
    with pytest.raises(ValueError, match="step 4 is not finite: its loss is nan") as error:
        run_main(sd, **{**options, "max_train_steps": 9, "checkpointing_steps": 3})
    assert f"it trained on {seen[4]}. " in str(error.value)
    assert "lower --learning_rate" in str(error.value) and "--skip_nonfinite N" in str(error.value)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (output / WEIGHTS).exists()
    assert all(tensor.isfinite().all() for tensor in factors(output / "checkpoint-3").values())
    assert [row["loss"] is None for row in metrics(output)] == [False] * 3 + [True] * 3


def use_scaler(monkeypatch, init_scale):
    """Scale gradients on the CPU as accelerate does on a GPU with fp16."""
    start_accelerator = training.start_accelerator

    def start(config):
        accelerator = start_accelerator(config)
        scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
        return accelerator

    monkeypatch.setattr(training, "start_accelerator", start)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_skipped_steps_leave_the_factors_as_they_were(scaled, value, options, run_main, monkeypatch, capfd):
    """1e30: a loss that overflows, of gradients that do not."""
    if scaled:
        use_scaler(monkeypatch, 2.0**10)
    common = {**options, "checkpointing_steps": 1, "max_train_steps": 5}
    with monkeypatch.context() as patch:
        poison(patch, {2, 4}, value)
        run_main(sd, **common, skip_nonfinite=2)
    output = options["output_dir"]
    assert [row["loss"] is None for row in metrics(output)] == [False, True, False, True, False]
    assert capfd.readouterr().err.count("--skip_nonfinite") == 2
    states = [factors(output / f"checkpoint-{step}") for step in range(1, 6)]
    for step in (2, 4):
        assert_same(states[step - 1], states[step - 2])
    for step in (3, 5):
        assert any(not torch.equal(states[step - 1][name], states[step - 2][name]) for name in states[0])
    poison(monkeypatch, {2, 4}, value)
    with pytest.raises(ValueError, match="step 4 is not finite"):
        run_main(sd, **common, skip_nonfinite=1, overwrite_output_dir=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_overflow_are_a_fault_but_with_a_scaler_which_passes_over_them(
    scaled, options, run_main, monkeypatch
):
    """Of a finite loss, in step 2."""
    forward, calls = Denoiser.__call__, []

    def overflowing(self, *arguments):
        calls.append(1)
        prediction = forward(self, *arguments)
        if len(calls) == 2:
            prediction.register_hook(lambda gradient: gradient * float("inf"))
        return prediction

    monkeypatch.setattr(Denoiser, "__call__", overflowing)
    options = {**options, "checkpointing_steps": 1}
    if not scaled:
        with pytest.raises(ValueError, match="step 2 is not finite: its loss is [0-9.]+, the norm .* nan"):
            run_main(sd, **options)
        return
    use_scaler(monkeypatch, 2.0**10)
    run_main(sd, **options)
    output = options["output_dir"]
    assert [row["grad_norm"] is None for row in metrics(output)] == [False, True, False, False]
    assert all(row["loss"] is not None for row in metrics(output))
    assert_same(factors(output / "checkpoint-2"), factors(output / "checkpoint-1"))
    assert all(tensor.isfinite().all() for tensor in factors(output).values())


def test_through_the_command_line_all_ranks_refuse_a_poisoned_base_in_one_line(tiny_sd, options, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(tiny_sd)
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0, 0, 0, 0] = float("nan")
    pipeline.save_pretrained(tmp_path / "base")
    result = launch(
        "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "train_dreambooth_kronecker.py",
        **{**options, "pretrained_model_name_or_path": tmp_path / "base"}, checkpointing_steps=1,
    )  # fmt: skip
    assert result.returncode == 1
    # One rank's or both: the launcher ends the other as soon as one has ended. A progress bar may stand before it.
    said = [part.strip() for line in result.stderr.splitlines() for part in line.split("error: ")[1:]]
    assert len(set(said)) == 1, result.stderr
    assert said[0].startswith("step 1 is not finite") and "the base model's weights may be damaged" in said[0]
    assert said[0].count(str(Path(options["instance_data_dir"]))) == 2  # the photos of both ranks
    assert not list(options["output_dir"].glob("checkpoint-*"))
