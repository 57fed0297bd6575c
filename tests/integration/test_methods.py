"""The contract of the seam Method, over all methods and families. What each call means is in dreambooth/method.py."""

import re
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file

from dreambooth.base_model.prompts import PromptStates
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Host
from dreambooth.options.base_model import AdaptedModelOptions
from dreambooth.options.training import SDXLTrainingConfig, TrainingConfig, config_class
from dreambooth.seeds import Stream, seed_of, torch_seed
from dreambooth.train import train
from kron_adapter import contrast_rows
from kron_formats.architectures import load_architecture
from kron_formats.families import ATTENTION_TARGETS
from methods.custom_diffusion import CUSTOM_DIFFUSION
from methods.dreambooth import DREAMBOOTH, AttachedDreamBooth
from methods.lora import LORA
from methods.readers import READERS
from methods.svdiff import SVDIFF
from methods.textual_inversion import TEXTUAL_INVERSION
from methods.train import METHODS
from tests.conftest import ROOT, flags, launch, metrics
from toyworld.tiny_pipeline import build_tokenizer

FAMILIES = {"sd": (SD, TrainingConfig), "sdxl": (SDXL, SDXLTrainingConfig)}
PROMPT = "a photo of sks dog"
METHODS_TESTED = [KRONECKER, LORA, DREAMBOOTH, SVDIFF, CUSTOM_DIFFUSION, TEXTUAL_INVERSION]
OPTIONS = {  # of each method; "a" is a word of one token for the tiny tokenizer
    "kronecker": {"train_text_encoder": True},
    "lora": {"train_text_encoder": True},
    "dreambooth": {"train_text_encoder": True},
    "svdiff": {"train_text_encoder": True},
    "custom_diffusion": {
        "modifier_token": "<new1>",
        "initializer_token": "a",
        "instance_prompt": "a photo of <new1> dog",
    },
    "textual_inversion": {
        "placeholder_token": "<dog>",
        "initializer_token": "a",
        "instance_prompt": "a photo of <dog>",
    },
}
WITHOUT_CHANCE = (
    DREAMBOOTH,
    SVDIFF,
    CUSTOM_DIFFUSION,
    TEXTUAL_INVERSION,
)  # whose beginning does not depend on the seed
BEGIN_AT_0 = ("w2", "lora_up.weight", "delta")  # tensors of those methods whose beginning is 0
STARTS_FROM_PROMPTS = {  # of SDXL's Kronecker adapter beside: keys and values of cross-attention, 2 x 64 wide
    "kron_init": "contrast",
    "class_prompt": "a photo of dog",
    "kron_targets": ["to_q", "to_k", "to_v", "to_out.0", "attn2.to_k", "attn2.to_v"],
    "kron_factors": ["attn2.to_k=1,128", "attn2.to_v=2,128"],
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS_TESTED, ids=lambda method: method.name)
BASE_PRIOR = {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of dog"}
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
    defaults = {"pretrained_model_name_or_path": str(base), "instance_prompt": PROMPT, **options_of(method, name)}
    return config_class(method.options, FAMILIES[name][1])(**{**defaults, **options})


def options_of(method, name):
    return OPTIONS[method.name] | (STARTS_FROM_PROMPTS if (method, name) == (KRONECKER, "sdxl") else {})


def attach(method, name, pipeline, base, **options):
    family, config = FAMILIES[name][0], configure(method, name, base, **options)
    models = family.trained_models(pipeline.components, method.trains_text(config))
    prompts = [PROMPT, "a photo of dog"]
    states = PromptStates(
        lambda rows: family.encode_captions(pipeline, [prompts[row] for row in rows], 75),
        *(prompts, [prompts[:1]], [prompts[1:]], family, torch.device("cpu")),
    )
    return models, method.attach(Host(family, models, family.present_tokenizers(pipeline.components)), config, states)


def read_result(path):
    """The tensors of a result: of a file, or of all components of a folder."""
    files = {"": path} if path.is_file() else {file.parent.name: file for file in path.glob("*/*.safetensors")}
    return {f"{part}/{key}": tensor for part, file in files.items() for key, tensor in load_file(file).items()}


def parameters_of(attached):
    return [parameter for group in attached.groups for parameter in group.parameters]


@torch.no_grad()
def perturb(attached):
    """Make it look trained: all numbers change by about 0.3, those of whole models by about a third of their size."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters_of(attached):
        size = parameter.square().mean().sqrt() if isinstance(attached, AttachedDreamBooth) else 1.0
        parameter.add_(0.3 * size * torch.randn(parameter.shape, generator=generator))


def unused_parameters(models):
    """SDXL takes its prompts from the last layer but one of the first text encoder."""
    if "text_encoder_2" not in models:
        return set()
    unused = f"layers.{len(models['text_encoder'].encoder.layers) - 1}.", "final_layer_norm."
    return {id(p) for path, p in models["text_encoder"].named_parameters() if any(part in path for part in unused)}


def prompt_of(method):
    return OPTIONS[method.name].get("instance_prompt", PROMPT)


def base_prompt(method):
    """What the prompt is before the method has a new word, which begins as the word "a"."""
    return re.sub("<.*>", "a", prompt_of(method))


def draw(pipeline, prompt):
    (image,) = draw_images(pipeline, [0], 1, prompt=prompt, num_inference_steps=2, height=64, width=64)
    return torch.from_numpy(np.array(image)).float()


def denoise(family, pipeline, prompt):
    """Return a prediction of the denoiser for a prompt, a function of the text encoders too."""
    embeddings = family.encode_prompts(pipeline, [prompt])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = getattr(pipeline, family.denoiser)
    return denoiser(latents, torch.tensor([500]), **family.condition(embeddings, sizes)).sample


@EVERY_METHOD
@EVERY_FAMILY
def test_step_0_is_the_base_model_bit_for_bit(method, name, pipeline, base):
    before = denoise(FAMILIES[name][0], pipeline, base_prompt(method))
    attach(method, name, pipeline, base)
    assert torch.equal(denoise(FAMILIES[name][0], pipeline, prompt_of(method)), before)


@EVERY_METHOD
@EVERY_FAMILY
def test_without_is_the_base_model_bit_for_bit_and_only_inside(method, name, pipeline, base):
    family = FAMILIES[name][0]
    before = denoise(family, pipeline, base_prompt(method))
    _, attached = attach(method, name, pipeline, base, **BASE_PRIOR)
    perturb(attached)
    trained = denoise(family, pipeline, prompt_of(method))
    assert not torch.equal(trained, before)
    with attached.without():
        assert torch.equal(denoise(family, pipeline, base_prompt(method)), before)
        assert torch.equal(denoise(family, pipeline, prompt_of(method)), before)
    assert torch.equal(denoise(family, pipeline, prompt_of(method)), trained)
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
    denoise(family, pipeline, prompt_of(method)).square().mean().backward()
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
    same_start = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert same_start == (method in WITHOUT_CHANCE)


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
    plain, prompt = draw(pipeline, base_prompt(method)), prompt_of(method)
    _, attached = attach(method, name, pipeline, base)
    perturb(attached)
    trained = draw(pipeline, prompt)
    path = tmp_path / method.weights_name
    attached.save(path, {"instance_prompt": prompt}, torch.float32)
    fresh = load_adapted_pipeline(
        AdaptedModelOptions(pretrained_model_name_or_path=str(base), adapter=[str(path)]), READERS
    )
    fresh.set_progress_bar_config(disable=True)
    assert (draw(fresh, prompt) - trained).abs().max() <= 1  # of 255
    assert (plain - trained).abs().mean() > 1.5
    description = attached.describe(path, str(base), prompt)
    count = sum(parameter.numel() for parameter in parameters_of(attached))
    assert f"{count:,} parameters" in " ".join(description.contents)


@pytest.mark.parametrize("method", [m for m in METHODS_TESTED if m is not SVDIFF], ids=lambda method: method.name)
@EVERY_FAMILY
def test_the_card_s_snippet_runs(method, name, pipeline, base, tmp_path, monkeypatch):
    """Word for word, but for the GPU and its precision."""
    _, attached = attach(method, name, pipeline, base)
    perturb(attached)
    attached.save(tmp_path / method.weights_name, {}, torch.float32)
    usage = attached.describe(tmp_path / method.weights_name, str(base), prompt_of(method)).usage
    snippet = re.search("```python\n(.*?)```", usage, re.DOTALL)[1]
    for old, new in {"cuda": "cpu", "float16": "float32", ").images": ", num_inference_steps=1).images"}.items():
        assert old in snippet
        snippet = snippet.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    drawn = draw(names["pipeline"], prompt_of(method))
    assert (drawn - draw(pipeline, prompt_of(method))).abs().max() <= 1  # of 255


@pytest.mark.parametrize("name", ["sd"])
def test_alpha_over_rank_multiplies_a_lora_in_training_and_for_diffusers_own_loader(pipeline, base, tmp_path):
    _, attached = attach(LORA, "sd", pipeline, base, rank=2, lora_alpha=3.0)
    perturb(attached)
    trained = draw(pipeline, PROMPT)
    layer = next(module for module in pipeline.unet.modules() if hasattr(module, "lora_A"))
    B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * B @ A)
    attached.save(tmp_path / "lora.safetensors", {}, torch.float32)
    fresh = DiffusionPipeline.from_pretrained(base)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert (draw(fresh, PROMPT) - trained).abs().max() <= 1  # of 255


@pytest.mark.parametrize("start, reference", [("gaussian", "gaussian"), ("kaiming", True)])
@pytest.mark.parametrize("name", ["sd"])
def test_a_lora_starts_as_peft_starts_one(start, reference, pipeline, base):
    peer = DiffusionPipeline.from_pretrained(base).unet
    attach(LORA, "sd", pipeline, base, rank=2, init_lora_weights=start, seed=5)
    with torch_seed(seed_of(5, Stream.FACTORS, 0)):
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        peer.add_adapter(LoraConfig(r=2, init_lora_weights=reference, target_modules=targets))
    expected, found = (
        [weight for path, weight in unet.named_parameters() if "lora_A" in path] for unet in (peer, pipeline.unet)
    )
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))


# ---- the exact numbers of trained parameters, of the real architectures ----

COUNTS = {  # method, architecture, options -> UNet alone, with text encoders
    ("kronecker", "sd15"): (398_048, 520_928),
    ("kronecker", "sdxl"): (3_874_560, None),
    ("lora", "sd15"): (797_184, 1_092_096),
    ("lora", "sd21"): (829_952, 1_583_616),
    ("lora", "sdxl"): (5_806_080, 7_411_712),
    ("custom_diffusion", "sd15"): (None, 19_170_048),
    ("custom_diffusion", "sd21"): (None, 25_560_064),
    ("custom_diffusion", "sdxl"): (None, 340_789_248),
    ("custom_diffusion", "sd15", "freeze_model=crossattn"): (None, 43_963_328),
    ("custom_diffusion", "sd21", "freeze_model=crossattn"): (None, 50_353_344),
    ("custom_diffusion", "sdxl", "freeze_model=crossattn"): (None, 545_672_448),
    ("custom_diffusion", "sd15", "modifier_token="): (19_169_280, None),
    ("textual_inversion", "sd15"): (None, 768),
    ("textual_inversion", "sd21"): (None, 1024),
    ("textual_inversion", "sdxl"): (None, 768 + 1280),
    ("dreambooth", "sd15"): (859_520_964, 982_581_444),
    ("dreambooth", "sd21"): (865_910_724, 1_206_298_564),
    ("dreambooth", "sdxl"): (2_567_463_684, 3_385_184_004),
    ("svdiff", "sd15"): (322_856, 397_352),
    ("svdiff", "sd21"): (325_928, 515_368),
    ("svdiff", "sdxl"): (1_203_880, 1_607_336),
}


@pytest.mark.parametrize("case", COUNTS, ids="-".join)
def test_the_parameters_are_those_that_the_papers_print(case):
    (method,) = (method for method in METHODS_TESTED if method.name == case[0])
    name = "sdxl" if case[1] == "sdxl" else "sd"
    options = dict(option.split("=") for option in case[2:])
    if method is KRONECKER:
        options |= {"kron_init": "invariant", "kron_targets": list(ATTENTION_TARGETS), "kron_factors": []}
    for with_text, expected in enumerate(COUNTS[case]):
        if expected is None:
            continue
        models = FAMILIES[name][0].trained_models(load_architecture(case[1]), bool(with_text))
        tokenizers = {part: build_tokenizer() for part in models if part != "unet"}
        attached = method.attach(Host(FAMILIES[name][0], models, tokenizers), configure(method, name, "", **options))
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
        return read_result(tmp_path / folder / method.weights_name), metrics(tmp_path / folder)

    expected, told = run("whole", max_train_steps=4)
    run("parts", max_train_steps=2, checkpointing_steps=2)
    resumed, continued = run("parts", max_train_steps=4, resume_from_checkpoint="latest")
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert [row["loss"] for row in continued] == [row["loss"] for row in told]


@pytest.mark.parametrize(  # what a family differs in here: SDXL's text encoders have layers that get no gradient
    "method, name",
    [*((method, "sd") for method in METHODS_TESTED), (KRONECKER, "sdxl"), (DREAMBOOTH, "sdxl")],
    ids=lambda value: getattr(value, "name", value),
)
def test_two_processes_train_what_one_does(method, name, base, dog_photos, tmp_path, fresh_accelerator):
    options = {
        "instance_data_dir": str(dog_photos),
        "resolution": 64,
        "max_train_steps": 2,
        "report_to": ["none"],
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # a step in proportion to small gradients, not to their signs, which rounding decides
    }
    if method is not TEXTUAL_INVERSION:  # which refuses one
        options |= {"with_prior_preservation": True, "prior_source": "base_model", "class_prompt": "a photo of dog"}
    one, two = tmp_path / "one", tmp_path / "two"
    train(FAMILIES[name][0], method, configure(method, name, base, **options, train_batch_size=2, output_dir=str(one)))
    options |= {"pretrained_model_name_or_path": base, "instance_prompt": PROMPT, **options_of(method, name)}
    processes = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    result = launch(*processes, *script(method, name), **options, output_dir=two)
    assert result.returncode == 0, result.stderr
    expected, trained = (read_result(folder / method.weights_name) for folder in (one, two))
    assert expected.keys() == trained.keys()
    assert all(torch.allclose(trained[key], expected[key], atol=1e-5) for key in expected)
    steps = zip(metrics(one), metrics(two), strict=True)
    assert all(a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3) and a["grad_norm"] > 0 for a, b in steps)
    begun = read_result(base)  # which has the weights of a method that trains them all
    if moved := [key for key in trained if key in begun or key.endswith(BEGIN_AT_0)]:
        assert max((trained[key] - begun.get(key, 0)).abs().max() for key in moved) > 1e-4


@pytest.mark.parametrize("name", ["sd"])
@pytest.mark.parametrize("text_trains", [False, True], ids=["", "text"])
def test_a_run_starts_from_the_contrast_of_its_own_captions(
    text_trains, name, base, pipeline, dog_photos, tmp_path, fresh_accelerator
):
    """Those of the photos, each once, whatever is dropped in training; a prior is not needed."""
    photos, captions = tmp_path / "photos", ["sks dog", "a sks dog outside", "sks dog"]
    photos.mkdir()
    for number, text in enumerate(captions):
        shutil.copy(dog_photos / f"0{number}.jpg", photos)
        (photos / f"0{number}.txt").write_text(text)
    options = {"kron_targets": ["attn2.to_v"], "kron_a1": 1, "kron_a2": 64, "kron_init": "contrast"}
    options |= {"train_text_encoder": text_trains, "class_prompt": "a photo of dog", "caption_dropout_probability": 0.5}
    options |= {"instance_data_dir": str(photos), "resolution": 64, "max_train_steps": 1, "report_to": ["none"]}
    options |= {"output_dir": str(tmp_path / "out"), "learning_rate": 0.0}
    train(SD, KRONECKER, configure(KRONECKER, name, base, **options))
    with torch.no_grad():
        states = SD.encode_prompts(pipeline, [*captions, "a photo of dog"])["prompt_embeds"]
    expected = contrast_rows(states[:3].flatten(0, 1), states[3]).float()
    result = load_file(tmp_path / "out" / KRONECKER.weights_name)
    starts = [A for key, A in result.items() if key.endswith("attn2_to_v.lokr_w1")]
    assert starts
    for A in starts:
        torch.testing.assert_close(A, expected)


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
