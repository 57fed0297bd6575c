"""Metrics, their picture, trackers side by side, what happens when one fails, and what none of them may see."""

import dataclasses
import json
import logging
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreambooth.errors import UserError
from dreambooth.loop.health import StepReport, read_reports, what_to_try
from dreambooth.options.checking import check_options
from dreambooth.options.field import declarations, option, public_options
from dreambooth.options.training import TrainingConfig
from dreambooth.options.yaml_file import save_config
from dreambooth.report.closing import closing_line, compile_seconds
from dreambooth.report.curves import draw_curves
from dreambooth.report.figures import COLOURS, running_mean, tick_label
from dreambooth.report.metrics import read_metrics, save_curves
from dreambooth.report.progress import Progress
from dreambooth.report.trackers import log_image, log_values, start_trackers
from tests.conftest import ROOT

SECRET = "hf_nobodyMayReadThis"


@pytest.fixture
def config(tmp_path) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="base",
        instance_data_dir="photos",
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path),
        report_to=["none"],
        hub_token=SECRET,
    )


@pytest.fixture
def accelerate(tmp_path, fresh_accelerator):
    """Return an accelerator that logs to the named trackers, in this test's folder."""

    def start(*names: str) -> Accelerator:
        return Accelerator(cpu=True, log_with=list(names) or None, project_dir=str(tmp_path))

    return start


class FakeTracker:
    """A tracker that remembers what it is told, or fails at one of the verbs."""

    def __init__(self, name: str = "fake", fails_at: str = ""):
        self.name, self.fails_at, self.told = name, fails_at, []

    def __getattr__(self, verb):
        def act(*arguments, **options):
            self.told.append((verb, *arguments, options.get("step")))
            if verb == self.fails_at:
                raise ConnectionError("the network is down")

        return act

    def verbs(self):
        return [entry[0] for entry in self.told]


def reports(*losses: float, grad_norm: float = 0.5):
    return (StepReport(torch.tensor([loss, loss, 0.0, grad_norm]), 1e-3) for loss in losses)


class Photos:
    """What Progress asks of a dataset."""

    def paths_of_step(self, step, num_ranks):
        return [Path(f"photos/{step}.jpg"), Path(f"class/{step}.png")]


def start(accelerator, config, first_step, total_steps):
    return Progress(accelerator, Photos(), config, first_step, total_steps)


def train(accelerator, config, first_step, *losses, **numbers):
    progress = start(accelerator, config, first_step, first_step + len(losses))
    list(progress.steps(reports(*losses, **numbers)))
    progress.close()
    return progress


# ---- metrics.jsonl ----


def test_every_step_is_one_line(config, accelerate, tmp_path):
    train(accelerate(), config, 0, 0.5, 0.25)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert list(first) == [
        "step", "loss", "instance_loss", "prior_loss", "learning_rate", "grad_norm", "step_time",
    ]  # fmt: skip
    assert (first["step"], first["loss"]) == (1, 0.5) and (second["step"], second["loss"]) == (2, 0.25)
    assert (first["learning_rate"], first["grad_norm"]) == (1e-3, 0.5)


def test_the_clock_counts_the_steps_and_not_what_comes_between(config, accelerate, tmp_path, monkeypatch):
    """Steps that are read together share their time, that of waiting for them included."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("dreambooth.report.progress.time.monotonic", lambda: now.time)

    def slow_steps():
        for seconds in (2.0, 3.0, 4.0):
            now.time += seconds
            yield from reports(0.1)

    def slow_reading(steps):
        now.time += 0.5
        return read_reports(steps)

    monkeypatch.setattr("dreambooth.report.progress.read_reports", slow_reading)
    progress = start(accelerate(), dataclasses.replace(config, logging_steps=2), 0, 3)
    for _ in progress.steps(slow_steps()):
        now.time += 50.0  # samples, a checkpoint
    assert [row["step_time"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.75, 2.75, 4.5]
    assert progress.seconds == 160.0


# ---- when steps are read ----


@pytest.mark.parametrize(
    "logging_steps, after", [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [0, 0, 3, 3, 3, 6, 7]), (10, [0] * 6 + [7])]
)
def test_steps_are_read_together_now_and_then_and_after_the_last(logging_steps, after, config, accelerate, tmp_path):
    progress = start(accelerate(), dataclasses.replace(config, logging_steps=logging_steps), 0, 7)
    lines = [len(read_metrics(tmp_path / "metrics.jsonl")) for _ in progress.steps(reports(*[0.5] * 7))]
    assert lines == after


@pytest.mark.parametrize("logging_steps", [1, 4, 100])
def test_the_same_is_told_of_every_step_however_often_they_are_read(logging_steps, config, accelerate, tmp_path):
    accelerator = accelerate()
    accelerator.trackers.append(tracker := FakeTracker())
    losses = [0.1 * step for step in range(9)]
    train(accelerator, dataclasses.replace(config, logging_steps=logging_steps), 0, *losses)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row["loss"] for row in rows] == pytest.approx(losses)
    told = [(entry[-1], entry[1]["loss"]) for entry in tracker.told if entry[0] == "log"]
    assert told == [(row["step"], row["loss"]) for row in rows]


def test_reading_on_demand_leaves_nothing_unread_and_writes_nothing_twice(config, accelerate, tmp_path):
    progress = start(accelerate(), config, 0, 5)
    for step in progress.steps(reports(0.1, 0.2, 0.3, 0.4, 0.5)):
        if step == 3:  # a checkpoint
            progress.settle_steps()
            progress.settle_steps()
            assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


# ---- steps that are not finite ----


@pytest.mark.parametrize("losses, numbers", [((0.5, math.nan, math.inf), {}), ((0.5, 0.5), {"grad_norm": math.inf})])
def test_the_first_step_that_is_not_finite_ends_training_and_is_named(losses, numbers, config, accelerate, tmp_path):
    first = 2 if not numbers else 1
    words = (
        f"step {first} is not finite: .* it trained on photos/{first}.jpg, class/{first}.png. .*lower --learning_rate"
    )
    with pytest.raises(UserError, match=words):
        train(accelerate(), config, 0, *losses, **numbers)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(losses)  # what was computed is not lost


def test_as_many_as_are_tolerated_are_warned_of(config, accelerate, tmp_path, caplog):
    config = dataclasses.replace(config, skip_nonfinite=2)
    train(accelerate(), config, 0, 0.5, math.nan, 0.5, math.inf, 0.5)
    assert caplog.text.count("it was skipped, number ") == 2
    with pytest.raises(UserError, match="step 5 is not finite: its loss is nan"):
        train(accelerate(), config, 0, 0.5, math.nan, 0.5, math.inf, math.nan, math.nan)


def test_gradients_that_a_scaler_made_overflow_are_no_error(config, accelerate):
    accelerator = accelerate()
    accelerator.scaler = torch.amp.GradScaler("cpu")
    train(accelerator, config, 0, 0.5, 0.5, grad_norm=math.inf)
    with pytest.raises(UserError, match="step 2 is not finite"):
        train(accelerator, config, 0, 0.5, math.nan)


@pytest.mark.parametrize(
    "options, words, others",
    [
        ({}, ["lower --learning_rate than 0.0005", "--snr_gamma 5", "--skip_nonfinite"], ["bf16", "vae"]),
        ({"mixed_precision": "fp16", "snr_gamma": 5.0}, ["--mixed_precision bf16"], ["--snr_gamma 5"]),
        ({"vae_precision": "fp16"}, ["--vae_precision fp32", "madebyollin/sdxl-vae-fp16-fix"], []),
    ],
)
def test_advice_is_what_is_left_to_do(options, words, others, config):
    advice = what_to_try(dataclasses.replace(config, **options))
    assert all(word in advice for word in words) and not any(word in advice for word in others)


# ---- from step to step ----


def test_no_step_is_computed_beyond_the_last(config, accelerate):
    source = reports(0.1, 0.2, 0.3)
    list(start(accelerate(), config, 5, 7).steps(source))
    assert next(source).numbers[0].item() == pytest.approx(0.3)


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', "\0\0\0", "\n\n"])
def test_resuming_keeps_the_lines_up_to_its_step_by_their_number(torn, config, accelerate, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": float(step)} for step in (2, 3, 4, 5)]  # no line of step 1
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    train(accelerate(), config, 3, 0.5)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(2, 2.0), (3, 3.0), (4, 0.5)]
    assert path.read_text().count("\n") == 3


def test_a_new_run_drops_an_earlier_one_s_lines(config, accelerate, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    train(accelerate(), config, 0, 0.5)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0.5]


def test_a_full_disk_is_one_warning_and_training_goes_on(config, accelerate, caplog):
    progress = start(accelerate(), config, 0, 3)
    progress.metrics.file = open("/dev/full", "w")
    for _ in progress.steps(reports(0.5, 0.4, 0.3)):
        progress.settle_steps()
    progress.close()
    assert caplog.text.count("metrics.jsonl was not written, training continues: [Errno 28]") == 1


def test_numbers_that_json_lacks_become_null(config, accelerate, tmp_path):
    with pytest.raises(UserError):
        train(accelerate(), config, 0, math.nan, math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] for line in text.splitlines()] == [None, None]


# ---- training.png ----


def curve_rows(count: int, **values) -> list[dict]:
    return [{"step": step, **{name: value(step) for name, value in values.items()}} for step in range(1, count + 1)]


def has_colour(picture: Image.Image, colour: str, top: int, bottom: int) -> bool:
    """Whether a thick stroke of the colour is there: at least at half its strength on white, thin ones are paler."""
    full = 255.0 - np.array(ImageColor.getrgb(colour))
    found = 255.0 - np.asarray(picture)[top:bottom]
    strength = (found @ full) / (full @ full)
    return bool(((np.abs(found - strength[..., None] * full).max(-1) < 8) & (strength > 0.5)).any())


def test_running_mean_is_that_of_the_last_values_that_there_are():
    assert running_mean(np.array([1.0, 2.0, 6.0, np.nan, 10.0]), 2).tolist() == [1.0, 1.5, 4.0, 6.0, 10.0]
    assert np.isnan(running_mean(np.array([np.nan, 1.0]), 1)).tolist() == [True, False]


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0"), (0.25, "0.25"), (3 * 0.1, "0.3"), (5e-4, "5e-4"), (20000.0, "20,000"), (1e7, "1e7"), (-0.5, "-0.5")],
)
def test_tick_labels_are_short(value, text):
    assert tick_label(value) == text


def test_each_metric_that_a_run_has_is_drawn_and_no_other():
    plain = curve_rows(40, loss=lambda s: 1 / s, learning_rate=lambda s: 1e-3)
    alone = draw_curves([{**row, "instance_loss": row["loss"], "prior_loss": 0.0} for row in plain])
    assert has_colour(alone, COLOURS[0], 0, 260) and not has_colour(alone, COLOURS[1], 0, alone.height)
    both = draw_curves([{**row, "instance_loss": 0.1, "prior_loss": 0.2} for row in plain])
    assert all(has_colour(both, colour, 40, 230) for colour in COLOURS[:3])
    with_norm = draw_curves([{**row, "grad_norm": 1.0} for row in plain])
    assert with_norm.height > alone.height == both.height


def test_scores_of_checkpoints_are_dots_joined_by_lines_and_break_no_curve():
    plain = curve_rows(100, loss=lambda s: 0.5)
    scored = [{"step": step, "held_out_loss": 0.4 + step / 1000} for step in (20, 60, 100)]
    picture = draw_curves([*plain[:20], scored[0], *plain[20:60], scored[1], *plain[60:], scored[2]])
    assert (
        picture.crop((0, 0, picture.width, 260)).tobytes()
        == draw_curves(plain).crop((0, 0, picture.width, 260)).tobytes()
    )
    left, right = picture.crop((480, 0, 500, picture.height)), picture.crop((800, 0, 820, picture.height))
    assert has_colour(left, COLOURS[0], 360, 460) and has_colour(right, COLOURS[0], 310, 380)
    with_drift = draw_curves([*plain, {"step": 100, "held_out_loss": 0.4, "drift": 0.01}])
    assert with_drift.height - picture.height == picture.height - draw_curves(plain).height


def test_a_curve_goes_where_its_values_are():
    """A loss that falls in the middle of the run: left half near the top of the frame, right half near its bottom."""
    picture = draw_curves(curve_rows(200, loss=lambda s: 1.0 if s <= 100 else 0.1))
    upper, lower = (46, 120), (190, 226)
    left, right = (picture.crop((200, 0, 400, 260)), picture.crop((800, 0, 1000, 260)))
    assert has_colour(left, COLOURS[0], *upper) and not has_colour(left, COLOURS[0], *lower)
    assert has_colour(right, COLOURS[0], *lower) and not has_colour(right, COLOURS[0], *upper)


def test_the_same_metrics_make_the_same_bytes_and_programs_that_draw_nothing_do_not_wait_for_it():
    program = """
import sys
import dreambooth.report.curves as curves
assert "matplotlib" not in sys.modules
picture = curves.draw_curves([{"step": step, "loss": 1 / step} for step in range(1, 90)])
assert "matplotlib.pyplot" not in sys.modules  # it keeps state that threads would share
print(hash(picture.tobytes()))
"""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("count", [1, 2, 3, 500])
def test_any_number_of_steps_is_drawn_with_gaps(count):
    rows = curve_rows(count, loss=lambda s: None if s % 7 == 0 else 0.5, grad_norm=lambda s: 1e-9 * s)
    assert has_colour(draw_curves(rows), COLOURS[0], 30, 260)


def test_without_metrics_there_is_a_warning_and_no_picture(config, tmp_path, caplog):
    save_curves(config)
    assert "training.png was not drawn: ValueError: there are no metrics" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_picture_lies_beside_the_metrics(config, accelerate, tmp_path):
    train(accelerate(), config, 0, 0.5, 0.25)
    save_curves(config)
    assert Image.open(tmp_path / "training.png").width > 1000


# ---- trackers ----


def test_several_trackers_hear_the_same(config, accelerate):
    accelerator = accelerate()
    first, second = FakeTracker("one"), FakeTracker("two")
    accelerator.trackers.extend([first, second])
    log_values(accelerator, {"loss": 0.5}, 3)
    log_image(accelerator, "samples", Image.new("RGB", (8, 8)), 3)
    assert first.told == second.told and first.verbs() == ["log", "log_images"]


@pytest.mark.parametrize("verb", ["start", "store_init_configuration", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_let_go_with_one_warning(verb, config, accelerate, monkeypatch, caplog):
    bad, good = FakeTracker("wandb", fails_at=verb), FakeTracker("tensorboard")
    fakes = {"wandb": lambda *_, **__: bad, "tensorboard": lambda *_, **__: good}
    monkeypatch.setattr("dreambooth.report.trackers.LOGGER_TYPE_TO_CLASS", fakes)
    accelerator = accelerate("wandb", "tensorboard")
    progress = start(accelerator, dataclasses.replace(config, logging_steps=1), 0, 2)
    for step in progress.steps(reports(0.5, 0.25)):
        log_image(accelerator, "samples", Image.new("RGB", (8, 8)), step)
    progress.close()
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "--report_to wandb failed; " in warnings[0] and "ConnectionError: the network is down" in warnings[0]
    assert bad.verbs()[-1] == verb
    assert good.verbs() == ["start", "store_init_configuration", "log", "log_images", "log", "log_images", "finish"]


def scalars(folder) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_shows_each_step_once_after_resuming(config, accelerate, tmp_path):
    train(accelerate("tensorboard"), config, 0, 0.5, 0.25, 0.125)
    folder = next(tmp_path.rglob("events.out.tfevents.*")).parent
    assert scalars(folder) == [(1, 0.5), (2, 0.25), (3, 0.125)]
    train(accelerate("tensorboard"), config, 1, 0.75)
    assert scalars(folder) == [(1, 0.5), (2, 0.75)]


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that starts fake trackers and returns {name: (its project, its keyword arguments)}."""
    monkeypatch.setattr("os.environ", {})

    def start(config, first_step, *names):
        found = {}

        def tracker_class(name):
            def make(project, **keywords):
                found[name] = (project, keywords)
                tracker = FakeTracker(name)
                tracker.run = SimpleNamespace(id="a1", name=keywords.get("name") or "sunny-1")
                return tracker

            return make

        fakes = {name: tracker_class(name) for name in names}
        monkeypatch.setattr("dreambooth.report.trackers.LOGGER_TYPE_TO_CLASS", fakes)
        # accelerate's own drops a tracker whose package is not installed
        accelerator = SimpleNamespace(log_with=names, logging_dir=str(tmp_path / "logs"), trackers=[])
        start_trackers(accelerator, config, first_step)
        assert found.keys() == set(names) == {tracker.name for tracker in accelerator.trackers}
        return found

    return start


def test_a_run_is_called_what_the_options_say_and_its_files_are_in_the_output_folder(config, started, tmp_path):
    plain = started(config, 0, "tensorboard", "wandb", "trackio")
    assert {project for project, _ in plain.values()} == {"dreambooth-kronecker"}
    config = dataclasses.replace(config, tracker_project_name="dogs", tracker_run_name="rex", tracker_group="pets")
    named = started(config, 0, "tensorboard", "wandb", "trackio")
    assert named["wandb"][0] == named["trackio"][0] == "dogs" and named["tensorboard"][0] == "dogs/rex"
    for name in ("wandb", "trackio"):
        assert (named[name][1]["name"], named[name][1]["group"]) == ("rex", "pets")
    assert named["wandb"][1]["dir"] == named["tensorboard"][1]["logging_dir"] == str(tmp_path / "logs")


def test_a_resumed_run_is_the_same_run_in_every_tracker(config, started):
    identities = {"wandb": "id", "trackio": "name"}
    for first_step, known in ((0, False), (4, True), (0, False)):
        for name, (_, keywords) in started(config, first_step, "wandb", "trackio").items():
            expected = {"wandb": "a1", "trackio": "sunny-1"}[name] if known else None
            assert keywords.get(identities[name]) == expected and keywords.get("resume") == ("allow" if known else None)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"wandb": '])
def test_without_a_known_run_a_resumed_one_is_a_new_one(content, config, started, tmp_path):
    if content is not None:
        (tmp_path / "trackers.json").write_text(content)
    assert not started(config, 4, "wandb")["wandb"][1].keys() & {"id", "resume"}


def test_the_run_of_a_sweep_s_agent_and_wandb_s_own_variables_are_respected(config, started, monkeypatch):
    started(config, 0, "wandb")
    for variable in ("WANDB_RUN_ID", "WANDB_SWEEP_ID"):
        monkeypatch.setattr("os.environ", {variable: "b2", "WANDB_PROJECT": "mine", "WANDB_DIR": "there"})
        project, keywords = started(config, 4, "wandb")["wandb"]
        assert project is None and not keywords.keys() & {"id", "resume", "dir"}


def test_wandb_continues_its_run_in_the_output_folder(config, accelerate, offline_wandb, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_DIR")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = dataclasses.replace(config, tracker_run_name="rex", hub_token=None)
    train(accelerate("wandb"), config, 0, 0.5)
    train(accelerate("wandb"), config, 1, 0.25)
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1 < len(files) and not any((tmp_path / "here").iterdir())


def test_trackio_gets_pictures_of_its_own_kind(accelerate, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda image: ("picture", image.size)))
    accelerator = accelerate()
    accelerator.trackers.append(tracker := FakeTracker("trackio"))
    log_image(accelerator, "samples", Image.new("RGB", (8, 4)), 3)
    assert tracker.told == [("log", {"samples": ("picture", (8, 4))}, 3)]


def test_trackio_runs(config, accelerate, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="an optional package")
    accelerator = accelerate("trackio")
    start_trackers(accelerator, config, 0)
    log_values(accelerator, {"loss": 0.5}, 1)
    log_image(accelerator, "samples", Image.new("RGB", (8, 4)), 1)
    assert accelerator.trackers  # none was let go
    accelerator.end_training()
    assert any((tmp_path / "trackio").rglob("*.png"))


@pytest.mark.parametrize(
    "names, words",
    [
        (["all"], "--report_to all: .*tensorboard, wandb, trackio, none"),
        (["wandb", "comet_ml"], "--report_to comet_ml: .*tensorboard, wandb, trackio, none"),
        (["none", "wandb"], "--report_to none does not work with other trackers"),
        (["tensorboard", "trackio"], "--report_to trackio needs a package .* pip install trackio"),
    ],
)
def test_a_tracker_that_cannot_be_is_refused(names, words, config, monkeypatch):
    def version(name):
        if name == "trackio":
            raise PackageNotFoundError(name)

    monkeypatch.setattr("dreambooth.options.output.version", version)
    with pytest.raises(UserError, match=words):
        check_options(dataclasses.replace(config, report_to=names))


def test_trackers_go_together(config, monkeypatch):
    monkeypatch.setattr("dreambooth.options.output.version", lambda name: "1.0")
    check_options(dataclasses.replace(config, report_to=["tensorboard", "wandb", "trackio"]))


# ---- what nobody may read ----


def test_tokens_and_keys_are_not_public(config, tmp_path):
    assert public_options(config)["instance_prompt"] == "a photo of sks dog"
    assert set(vars(config)) - set(public_options(config)) == {"hub_token"}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(TrainingConfig):
        wandb_api_key: str = option("Key.", SECRET, secret=True)
        other_token_file: str = option("Token.", SECRET, secret=True)

    assert SECRET not in str(public_options(Config(**vars(config))))
    named_so = {name for name in vars(config) if name.endswith(("token", "key"))}
    assert named_so == {name for name, declared in declarations(TrainingConfig).items() if declared.secret}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Undeclared(TrainingConfig):
        wandb_api_key: str = SECRET

    with pytest.raises(TypeError, match="wandb_api_key"):  # what is not declared is not written either
        public_options(Undeclared(**vars(config)))
    save_config(config, tmp_path / "config.yaml")
    assert SECRET not in (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["instance_prompt"] == "a photo of sks dog"


def test_no_tracker_writes_the_token_not_even_from_the_command_line(
    config, accelerate, offline_wandb, monkeypatch, tmp_path, capfd, caplog
):
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", SECRET])
    train(accelerate("tensorboard", "wandb"), config, 0, 0.5)
    save_config(config, tmp_path / "config.yaml")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".wandb", ".yaml", ".jsonl"} <= {path.suffix for path in files}
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in "".join(capfd.readouterr()) + caplog.text


# ---- the closing line ----


def test_the_closing_line_counts_all_groups(tmp_path):
    groups = [[torch.nn.Parameter(torch.zeros(1000))], [torch.nn.Parameter(torch.zeros(24, 1))]]
    parameters = (parameter for group in groups for parameter in group)
    line = closing_line(parameters, 800, 125.4, 0.0, tmp_path / "a.safetensors", torch.device("cpu"))
    assert line.startswith("Trained 1,024 parameters (4.00 KiB in fp32) for 800 steps in 2 min 5 s; peak memory ")
    assert line.endswith(f"iB on cpu; the result is {tmp_path / 'a.safetensors'}")


def test_the_closing_line_says_how_long_compiling_took(config, tmp_path):
    assert compile_seconds(config) == 0
    line = closing_line([], 800, 125.4, 41.25, tmp_path / "a.safetensors", torch.device("cpu"))
    assert " for 800 steps in 2 min 5 s, 41.2 s of it compiling; peak memory " in line
    before = compile_seconds(dataclasses.replace(config, compile=True))
    torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.ones(1))
    assert compile_seconds(dataclasses.replace(config, compile=True)) > before
