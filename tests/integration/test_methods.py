"""The contract of the seam Method, over all methods and families. What each call means is in dreambooth/method.py."""

import re
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.training import SDXLTrainingConfig, TrainingConfig, config_class
from dreambooth.train import train
from kron_formats.architectures import load_architecture
from methods.lora import LORA
from methods.readers import READERS
from methods.svdiff import SVDIFF
from methods.train import METHODS
from tests.conftest import ROOT, flags, launch, metrics

FAMILIES = {"sd": (SD, TrainingConfig), "sdxl": (SDXL, SDXLTrainingConfig)}
PROMPT = "a photo of sks dog"
EVERY_METHOD = pytest.mark.parametrize("method", [KRONECKER, LORA, SVDIFF], ids=lambda method: method.name)
EVERY_FAMILY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def base(name, request):
    """The folder of a tiny base model of the family."""
    return request.getfixturevalue(f"tiny_{name}")


@pytest.fixture
def pipeline(base):
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def configure(method, name, base, **options):
    defaults = {"pretrained_model_name_or_path": str(base), "instance_prompt": PROMPT, "train_text_encoder": True}
    return config_class(FAMILIES[name][1], method.options)(**{**defaults, **options})


def attach(method, name, pipeline, base, **options):
    family, config = FAMILIES[name][0], configure(method, name, base, **options)
    models = family.trained_models(pipeline.components, method.trains_text(config))
    return models, method.attach(family, models, family.present_tokenizers(pipeline.components), config)


def parameters_of(attached):
    return [parameter for group in attached.groups for parameter in group.parameters]


def perturb(attached):
    """Make it look trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters_of(attached):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def unused_parameters(models):
    """SDXL takes its prompts from the last layer but one of the first text encoder."""
    if "text_encoder_2" not in models:
        return set()
    unused = f"layers.{len(models['text_encoder'].encoder.layers) - 1}.", "final_layer_norm."
    return {id(p) for path, p in models["text_encoder"].named_parameters() if any(part in path for part in unused)}


def draw(pipeline):
    (image,) = draw_images(pipeline, [0], 1, prompt=PROMPT, num_inference_steps=2, height=64, width=64)
    return torch.from_numpy(np.array(image)).float()


def denoise(family, pipeline):
    """Return a prediction of the denoiser for the prompt, a function of the text encoders too."""
    embeddings = family.encode_prompts(pipeline, [PROMPT])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = getattr(pipeline, family.denoiser)
    return denoiser(latents, torch.tensor([500]), **family.condition(embeddings, sizes)).sample


@EVERY_METHOD
@EVERY_FAMILY
def test_step_0_is_the_base_model_bit_for_bit(method, name, pipeline, base):
    before = denoise(FAMILIES[name][0], pipeline)
    attach(method, name, pipeline, base)
    assert torch.equal(denoise(FAMILIES[name][0], pipeline), before)


@EVERY_METHOD
@EVERY_FAMILY
def test_without_is_the_base_model_bit_for_bit_and_only_inside(method, name, pipeline, base):
    family = FAMILIES[name][0]
    before = denoise(family, pipeline)
    _, attached = attach(method, name, pipeline, base)
    perturb(attached)
    trained = denoise(family, pipeline)
    assert not torch.equal(trained, before)
    with attached.without():
        assert torch.equal(denoise(family, pipeline), before)
    assert torch.equal(denoise(family, pipeline), trained)
    assert all(parameter.requires_grad for parameter in parameters_of(attached))


@EVERY_METHOD
@EVERY_FAMILY
def test_all_that_trains_gets_a_gradient_and_nothing_else_moves(method, name, pipeline, base):
    family = FAMILIES[name][0]
    models, attached = attach(method, name, pipeline, base)
    perturb(attached)  # at B = 0, A would have none
    training = parameters_of(attached)
    assert len({*map(id, training)}) == len(training)
    assert all(parameter.dtype == torch.float32 for parameter in training)
    frozen = {
        (component, path): parameter.detach().clone()
        for component, model in models.items()
        for path, parameter in model.named_parameters()
        if not any(parameter is other for other in training)
    }
    denoise(family, pipeline).square().mean().backward()
    unused = unused_parameters(models)
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in training if id(parameter) not in unused
    )
    torch.optim.AdamW(training, lr=1e-2).step()
    for (component, path), value in frozen.items():
        parameter = models[component].get_parameter(path)
        assert parameter.grad is None and torch.equal(parameter, value), path


@EVERY_METHOD
@EVERY_FAMILY
def test_what_begins_depends_on_the_seed_alone(method, name, base):
    def values(seed, drawn_before):
        torch.manual_seed(drawn_before)
        return parameters_of(attach(method, name, DiffusionPipeline.from_pretrained(base), base, seed=seed)[1])

    first, same, other = values(1, 0), values(1, 5), values(2, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    differ = not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert differ or not any(a.any() for a in first)  # what begins at zero has no seed


@EVERY_METHOD
@EVERY_FAMILY
def test_a_state_restores_the_training_exactly(method, name, pipeline, base):
    _, attached = attach(method, name, pipeline, base)
    perturb(attached)
    state = {part: {key: value.clone() for key, value in tensors.items()} for part, tensors in attached.state().items()}
    trained = [parameter.detach().clone() for parameter in parameters_of(attached)]
    with torch.no_grad():
        for parameter in parameters_of(attached):
            parameter.zero_()
    attached.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(attached), trained, strict=True))
    with pytest.raises(ValueError):
        attached.load_state({})
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(attached), trained, strict=True))


@EVERY_METHOD
@EVERY_FAMILY
def test_a_fresh_pipeline_draws_the_same_from_the_file(method, name, pipeline, base, tmp_path):
    plain = draw(pipeline)
    _, attached = attach(method, name, pipeline, base)
    perturb(attached)
    trained = draw(pipeline)
    path = tmp_path / method.weights_name
    attached.save(path, {"instance_prompt": PROMPT}, torch.float32)
    fresh = load_adapted_pipeline(
        AdaptedModelOptions(pretrained_model_name_or_path=str(base), adapter=[str(path)]), READERS
    )
    fresh.set_progress_bar_config(disable=True)
    assert (draw(fresh) - trained).abs().max() <= 1  # of 255
    assert (plain - trained).abs().mean() > 2
    description = attached.describe(path, str(base), PROMPT)
    count = sum(parameter.numel() for parameter in parameters_of(attached))
    assert f"{count:,} parameters" in " ".join(description.contents)


@pytest.mark.parametrize("method", [KRONECKER, LORA], ids=lambda method: method.name)  # SVDiff has none in Python
@EVERY_FAMILY
def test_the_card_s_snippet_runs(method, name, pipeline, base, tmp_path, monkeypatch):
    """Word for word, but for the GPU and its precision."""
    _, attached = attach(method, name, pipeline, base)
    perturb(attached)
    attached.save(tmp_path / method.weights_name, {}, torch.float32)
    usage = attached.describe(tmp_path / method.weights_name, str(base), PROMPT).usage
    snippet = re.search("```python\n(.*?)```", usage, re.DOTALL)[1]
    for old, new in {"cuda": "cpu", "float16": "float32", ").images": ", num_inference_steps=1).images"}.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    assert (draw(names["pipeline"]) - draw(pipeline)).abs().max() <= 1  # of 255


@pytest.mark.parametrize("name", ["sd"])
def test_alpha_over_rank_multiplies_a_lora_in_training_and_for_diffusers_own_loader(pipeline, base, tmp_path):
    _, attached = attach(LORA, "sd", pipeline, base, rank=2, lora_alpha=3.0)
    perturb(attached)
    trained = draw(pipeline)
    layer = next(module for module in pipeline.unet.modules() if hasattr(module, "lora_A"))
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * B @ A)
    attached.save(tmp_path / "lora.safetensors", {}, torch.float32)
    fresh = DiffusionPipeline.from_pretrained(base)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert (draw(fresh) - trained).abs().max() <= 1  # of 255


# ---- the exact numbers of trained parameters, of the real architectures ----

COUNTS = {  # method, options, architecture -> UNet alone, with text encoders
    ("kronecker", "sd15"): (398_048, 520_928),
    ("kronecker", "sdxl"): (3_874_560, None),
    ("lora", "sd15"): (797_184, 1_092_096),
    ("lora", "sd21"): (829_952, 1_583_616),
    ("lora", "sdxl"): (5_806_080, 7_411_712),
    # 1,280 of them in the projection of the second text encoder, which counts of the encoder alone leave out
    ("svdiff", "sd15"): (322_856, 397_352),
    ("svdiff", "sd21"): (325_928, 515_368),
    ("svdiff", "sdxl"): (1_203_880, 1_608_616),
}


@pytest.mark.parametrize("case", COUNTS, ids="-".join)
def test_the_parameters_are_those_that_the_papers_print(case):
    (method,) = (method for method in (KRONECKER, LORA, SVDIFF) if method.name == case[0])
    name = "sdxl" if case[1] == "sdxl" else "sd"
    for with_text, expected in enumerate(COUNTS[case]):
        if expected is None:
            continue
        models = FAMILIES[name][0].trained_models(load_architecture(case[1]), bool(with_text))
        attached = method.attach(FAMILIES[name][0], models, {}, configure(method, name, ""))
        assert sum(parameter.numel() for parameter in parameters_of(attached)) == expected


# ---- through the training itself ----


def script(method, name):
    """The command line that trains a method on a family."""
    if method.name in METHODS:
        return [str(ROOT / "methods" / "train.py"), method.name, name]
    return [str(ROOT / f"train_dreambooth_kronecker{'' if name == 'sd' else '_sdxl'}.py")]


@EVERY_METHOD
@EVERY_FAMILY
def test_resuming_ends_where_an_uninterrupted_run_does(method, name, base, dog_photos, tmp_path, fresh_accelerator):
    def run(folder, **options):
        given = {"instance_data_dir": str(dog_photos), "resolution": 64, "report_to": ["none"], "center_crop": True}
        config = configure(method, name, base, **given, output_dir=str(tmp_path / folder), **options)
        train(FAMILIES[name][0], method, config)
        return load_file(tmp_path / folder / method.weights_name), metrics(tmp_path / folder)

    expected, told = run("whole", max_train_steps=4)
    run("parts", max_train_steps=2, checkpointing_steps=2)
    resumed, continued = run("parts", max_train_steps=4, resume_from_checkpoint="latest")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert [row["loss"] for row in continued] == [row["loss"] for row in told]


@EVERY_METHOD
@EVERY_FAMILY
def test_two_processes_train_what_one_does(method, name, base, dog_photos, tmp_path, fresh_accelerator):
    options = {
        "instance_data_dir": str(dog_photos),
        "resolution": 64,
        "max_train_steps": 2,
        "report_to": ["none"],
        "with_prior_preservation": True,
        "prior_source": "base_model",
        "class_prompt": "a photo of dog",
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # a step in proportion to small gradients, not to their signs, which rounding decides
    }
    one, two = tmp_path / "one", tmp_path / "two"
    train(FAMILIES[name][0], method, configure(method, name, base, **options, train_batch_size=2, output_dir=str(one)))
    options |= {"pretrained_model_name_or_path": base, "instance_prompt": PROMPT, "train_text_encoder": True}
    processes = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    result = launch(*processes, *script(method, name), **options, output_dir=two)
    assert result.returncode == 0, result.stderr
    expected, trained = (load_file(folder / method.weights_name) for folder in (one, two))
    assert expected.keys() == trained.keys()
    assert all(torch.allclose(trained[key], expected[key], atol=1e-5) for key in expected)
    assert (
        max(tensor.abs().max() for key, tensor in trained.items() if key.endswith(("w2", "lora_up.weight", "delta")))
        > 1e-4
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        (["svd"], "METHOD is svd; choose from lora"),
        (["lora", "sd4"], "FAMILY is sd4; choose from sd, sdxl"),
        (["lora"], "FAMILY is --instance_prompt"),
        (["lora", "sd", "--kron_a1", "4"], "--kron_a1"),
        (["lora", "sd", "--rank", "0"], "--rank is 0"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_loaded(words, expected, monkeypatch, capsys):
    import methods.train
    from dreambooth.errors import readable_errors

    monkeypatch.setattr(
        sys,
        "argv",
        [
            "methods/train.py",
            *words,
            *flags({"instance_prompt": PROMPT, "pretrained_model_name_or_path": "x", "instance_data_dir": "y"}),
        ],
    )
    with pytest.raises(SystemExit) as ending, readable_errors():
        methods.train.main()
    assert ending.value.code == 2
    assert expected in capsys.readouterr().err
