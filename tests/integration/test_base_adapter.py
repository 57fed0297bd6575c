"""--base_adapter: adapters that are part of the base model, for all that reads one."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train_dreambooth_kronecker
from dreambooth.base_model.cache import text_identity
from dreambooth.base_model.source import base_source
from dreambooth.drawing.pipelines import load_adapted_pipeline
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.options.base_model import AdaptedModelOptions, BaseModelOptions, FrozenModelOptions
from kron_adapter import KroneckerError, load_kronecker, save_kronecker
from methods.readers import READERS
from tests.adapters import adapted_pipeline, dense_weights, draw
from tests.conftest import WEIGHTS, assert_same, factors
from tests.integration.test_loras import write_lora


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """An adapter of the tiny pipeline's UNet and text encoder, as a file, and W + ΔW of its layers in fp64."""
    pipeline = adapted_pipeline("sd", 2, 8, text=True)
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    save_kronecker(pipeline, path)
    return path, dense_weights(pipeline)


def weights_of(base, *entries, dtype=torch.float32):
    """Return "component.layer" -> weight of the layers of a base model."""
    config = BaseModelOptions(pretrained_model_name_or_path=str(base), base_adapter=list(map(str, entries)))
    weights = base_source(config).weights
    weights.check(["unet", "text_encoder"])
    parts = {part: weights.load(part, dtype) for part in ("unet", "text_encoder")}
    return {f"{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_changed_weight_is_the_sum_rounded_once_and_no_other_changes(dtype, tiny_sd, style):
    path, exact = style
    plain, changed = weights_of(tiny_sd, dtype=dtype), weights_of(tiny_sd, path, dtype=dtype)
    layers = {name.removesuffix(".base") for name in exact}
    for name, weight in changed.items():
        layer = name.removesuffix(".weight")
        expected = exact[layer].float().to(dtype) if layer in layers else plain[name]
        assert torch.equal(weight, expected), name


def test_strengths_methods_and_the_order_of_adapters(tiny_sd, style, tmp_path):
    """A Kronecker adapter at half its strength and a LoRA, whose changes add up."""
    lora, deltas = write_lora(tmp_path, "kohya")
    plain, changed = weights_of(tiny_sd), weights_of(tiny_sd, f"{style[0]}:0.5", lora)
    name = next(name for name in style[1] if name in deltas)
    weight = plain[f"{name}.weight"].double()
    expected = weight + 0.5 * (style[1][name] - weight) + deltas[name]
    torch.testing.assert_close(changed[f"{name}.weight"].double(), expected, rtol=0, atol=1e-7)


def test_pipelines_are_those_of_the_merged_adapter(tiny_sd, style):
    def drawn(**options):
        config = AdaptedModelOptions(pretrained_model_name_or_path=str(tiny_sd), **options)
        pipeline = load_adapted_pipeline(config, READERS)
        pipeline.set_progress_bar_config(disable=True)
        return draw(pipeline)

    as_base = drawn(base_adapter=[str(style[0])])
    assert not torch.allclose(as_base, drawn(), atol=1e-3)
    torch.testing.assert_close(as_base, drawn(adapter=[str(style[0])]), rtol=0, atol=1e-4)


def test_kept_encodings_are_told_apart(tiny_sd, style):
    def identity(*entries):
        config = FrozenModelOptions(pretrained_model_name_or_path=str(tiny_sd), base_adapter=list(entries))
        return text_identity(SD, config, torch.float32)

    assert len({identity(), identity(str(style[0])), identity(f"{style[0]}:0.5")}) == 3


def test_what_cannot_be_part_of_a_base_model_is_refused(tiny_sd, tiny_sdxl, style, tmp_path):
    with pytest.raises(KroneckerError, match="does not fit this model"):
        weights_of(tiny_sdxl, style[0])
    with pytest.raises(KroneckerError, match="inf"):
        weights_of(tiny_sd, f"{style[0]}:inf")
    save_file({"emb_params": torch.randn(1, 64)}, tmp_path / "word.safetensors")
    with pytest.raises((UserError, KroneckerError), match="word"):
        weights_of(tiny_sd, tmp_path / "word.safetensors")


def test_a_run_on_top_of_an_adapter_that_starts_from_one(options, style, run_main, tmp_path, capsys):
    """It begins as the model with both in it; resumes exactly; its file and card name what is beneath it."""
    head = adapted_pipeline("sd", 4, 4)
    save_kronecker(head, tmp_path / "head.safetensors")
    given = {**options, "base_adapter": style[0], "init_adapter": tmp_path / "head.safetensors"}
    run_main(train_dreambooth_kronecker, **given, checkpointing_steps=2)
    whole, cut = options["output_dir"], tmp_path / "cut"
    run_main(train_dreambooth_kronecker, **{**given, "output_dir": cut, "max_train_steps": 2}, checkpointing_steps=2)
    resume = {"output_dir": cut, "resume_from_checkpoint": "latest", "checkpointing_steps": 2}
    run_main(train_dreambooth_kronecker, **{**given, **resume})
    assert_same(factors(whole), factors(cut))

    still = tmp_path / "still"
    run_main(train_dreambooth_kronecker, **{**given, "output_dir": still, "learning_rate": 0.0, "max_train_steps": 1})
    both = adapted_pipeline("sd", 4, 4)
    load_kronecker(both, style[0], name="style")
    own = AdaptedModelOptions(
        pretrained_model_name_or_path=str(options["pretrained_model_name_or_path"]),
        base_adapter=[str(style[0])],
        adapter=[str(still / WEIGHTS)],
    )
    pipeline = load_adapted_pipeline(own, READERS)
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(pipeline), draw(both), rtol=0, atol=1e-4)

    with safe_open(still / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert metadata["kronecker.base_adapter"] == "style.safetensors"
    assert json.loads(metadata["kronecker.config"])["init_adapter"] == "head.safetensors"
    assert "style.safetensors" in (still / "README.md").read_text()
    load_adapted_pipeline(AdaptedModelOptions(**{**vars(own), "base_adapter": []}), READERS)
    assert "style.safetensors: name that with --base_adapter" in capsys.readouterr().err
