"""Sample images: when they are due, which they are, and that none of it ends training."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from dreambooth.loop.steps import steps_per_pass
from dreambooth.options.training import TrainingConfig
from dreambooth.report.samples import draw_samples, save_samples, validate, validation_due
from dreambooth.seeds import Stream, seed_of

PROMPTS = ["a photo of a cat", "", "sks dog in snow"]


@pytest.fixture
def config(tmp_path) -> TrainingConfig:
    return TrainingConfig(
        pretrained_model_name_or_path="base",
        instance_data_dir="photos",
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path),
        resolution=64,
        validation_prompt=["sks dog in snow", "a photo of a cat"],
        num_validation_images=2,
        validation_num_inference_steps=2,
        validation_steps=100,
    )


@pytest.fixture
def accelerator():
    return SimpleNamespace(is_main_process=True, num_processes=1, trackers=[], device=torch.device("cpu"))


# ---- when ----


@pytest.mark.parametrize(
    "change, due",
    [
        ({}, [0, 100, 200, 250]),
        ({"validation_steps": None, "validation_epochs": 30}, [0, 60, 120, 180, 240, 250]),  # 2 steps in an epoch
        ({"validation_prompt": []}, []),
    ],
)
def test_samples_are_due_before_the_first_step_now_and_then_and_after_the_last(change, due, config):
    config = dataclasses.replace(config, train_batch_size=3, **change)
    assert [step for step in range(251) if validation_due(step, 250, steps_per_pass(5, config, 1), config)] == due


def test_one_process_draws(config, accelerator, tmp_path):
    accelerator.is_main_process = False
    run_validate(FakePipeline(), config, accelerator)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("is_main_process", [True, False])
def test_steps_are_read_before_samples_and_on_all_processes(is_main_process, config, accelerator):
    accelerator.is_main_process = is_main_process
    read = [run_validate(FakePipeline(), config, accelerator, step) for step in (0, 50, 100)]
    assert read == [[0], [], [100]]


# ---- which ----


def encode(pipeline) -> dict[str, torch.Tensor]:
    if isinstance(pipeline, StableDiffusionXLPipeline):
        prompts, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompts, "pooled_prompt_embeds": pooled}
    return {"prompt_embeds": pipeline.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)[0]}


@pytest.mark.parametrize(
    "pipeline_class, base", [(StableDiffusionPipeline, "tiny_sd"), (StableDiffusionXLPipeline, "tiny_sdxl")]
)
def test_images_are_those_that_diffusers_draws_for_the_prompts(pipeline_class, base, config, request):
    pipeline = pipeline_class.from_pretrained(request.getfixturevalue(base))
    with torch.no_grad():
        rows = draw_samples(pipeline, encode(pipeline), PROMPTS, config)
    assert [len(row) for row in rows] == [2, 2]
    for number, prompt in enumerate(config.validation_prompt):
        for i in range(2):
            theirs = pipeline(
                prompt,
                height=64,
                width=64,
                num_inference_steps=2,
                guidance_scale=7.5,
                generator=torch.Generator().manual_seed(seed_of(config.seed, Stream.VALIDATION, 2 * number + i)),
            ).images[0]
            difference = np.abs(np.asarray(rows[number][i], float) - np.asarray(theirs, float))
            assert difference.max() <= 1, (prompt, i)
    again = draw_samples(pipeline, encode(pipeline), PROMPTS, dataclasses.replace(config, num_validation_images=1))
    assert np.abs(np.asarray(again[0][0], float) - np.asarray(rows[0][0], float)).max() <= 1  # whatever else is drawn


class FakePipeline:
    """Draws flat images of one colour a call, and remembers with what."""

    config: dict = {}

    def __init__(self):
        self.calls = []
        self.vae = torch.nn.Linear(1, 1)  # it is moved to the device and back
        self.vae.device, self.vae.dtype, self.vae.config = torch.device("cpu"), torch.float32, {"scaling_factor": 1.0}
        self.vae.decode = lambda latents: SimpleNamespace(sample=latents)
        self.image_processor = VaeImageProcessor()

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, **arguments):
        self.calls.append(arguments)
        colour = torch.tensor([40 * len(self.calls) / 127.5 - 1, -1, -1])
        return SimpleNamespace(images=colour[None, :, None, None].expand(len(arguments["generator"]), 3, 64, 64))


def test_every_embedding_goes_under_its_own_name_with_its_own_row(config):
    embeddings = {"prompt_embeds": torch.tensor([[1.0], [2.0], [3.0]]), "pooled": torch.tensor([[4.0], [5.0], [6.0]])}
    rows = draw_samples(pipeline := FakePipeline(), embeddings, PROMPTS, config)
    assert [len(row) for row in rows] == [2, 2]
    names = ("prompt_embeds", "pooled", "negative_prompt_embeds", "negative_pooled")
    snow, cat = (3.0, 6.0, 2.0, 5.0), (1.0, 4.0, 2.0, 5.0)
    assert [tuple(call[name].item() for name in names) for call in pipeline.calls] == [snow, cat]
    assert len({generator.initial_seed() for call in pipeline.calls for generator in call["generator"]}) == 4


@pytest.mark.parametrize("batch_size, drawn", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_samples_of_a_prompt_are_drawn_together_as_many_as_fit(batch_size, drawn, config):
    config = dataclasses.replace(
        config, sample_batch_size=batch_size, num_validation_images=5, validation_prompt=["a photo of a cat"]
    )
    (row,) = draw_samples(pipeline := FakePipeline(), {"prompt_embeds": torch.zeros(3, 1)}, PROMPTS, config)
    assert len(row) == 5
    assert [call["num_images_per_prompt"] for call in pipeline.calls] == drawn
    seeds = [generator.initial_seed() for call in pipeline.calls for generator in call["generator"]]
    assert seeds == [seed_of(config.seed, Stream.VALIDATION, i) for i in range(5)]


# ---- and none of it ends training ----


def some_embeddings(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.zeros(len(rows), 1)}


def run_validate(pipeline, config, accelerator, step=0, encode=some_embeddings):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    progress = SimpleNamespace(accelerator=accelerator, total_steps=250, settle_steps=lambda: read.append(step))
    read = []
    validate(progress, pipeline, encode, PROMPTS, optimizer, 5, config, step)
    return read


def test_the_sheet_is_written_and_sent_to_the_trackers(config, accelerator, tmp_path):
    sent = []
    tracker = SimpleNamespace(name="wandb", log_images=lambda values, step: sent.append((values, step)))
    accelerator.trackers.append(tracker)
    for step in range(251):
        run_validate(FakePipeline(), config, accelerator, step)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    page, *names = names
    assert page == "index.html" and names == [
        "step-000000.png",
        "step-000100.png",
        "step-000200.png",
        "step-000250.png",
    ]
    assert [step for _, step in sent] == [0, 100, 200, 250]
    written = np.asarray(Image.open(tmp_path / "samples" / names[0]))
    assert np.array_equal(np.asarray(sent[0][0]["samples"][0]), written)


def test_embeddings_are_made_when_they_are_needed_and_without_gradients(config, accelerator):
    made = []

    def embed(rows):
        made.append(torch.is_grad_enabled())
        return some_embeddings(rows)

    for step in (0, 1, 99, 100):
        run_validate(FakePipeline(), config, accelerator, step, embed)
    assert made == [False, False]


@pytest.mark.parametrize("what", ["draw", "embed", "disk"])
def test_a_failure_is_a_warning(what, config, accelerator, tmp_path, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    pipeline, embed = FakePipeline(), some_embeddings
    if what == "draw":
        FailingPipeline = type("FailingPipeline", (FakePipeline,), {"__call__": lambda self, **_: fail()})
        pipeline = FailingPipeline()
    elif what == "embed":
        embed = fail
    else:
        (tmp_path / "samples").write_text("a file where the folder should be")
    run_validate(pipeline, config, accelerator, 100, embed)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.text.count("no samples of step 100") == 1


def test_a_failing_tracker_does_not_cost_the_sheet(config, accelerator, tmp_path, caplog):
    def fail(*_, **__):
        raise ConnectionError("the network is down")

    accelerator.trackers.append(SimpleNamespace(name="wandb", log_images=fail))
    path = save_samples(accelerator, [[Image.new("RGB", (64, 64))]], 5, config)
    assert path == tmp_path / "samples" / "step-000005.png" and path.exists()
    assert "--report_to wandb failed" in caplog.text and accelerator.trackers == []
