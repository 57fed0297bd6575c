"""What diffusers does to models, with Kronecker adapters in them: the result is right, or an error says it."""

import copy
import io
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from peft.tuners.tuners_utils import BaseTunerLayer

from kron_adapter import (
    KroneckerError,
    attach_to_diffusers,
    disable_kronecker,
    inject_kronecker,
    kronecker_layers,
    load_kronecker,
    merge_kronecker,
    remove_kronecker,
    save_kronecker,
    set_kronecker_scale,
    unmerge_kronecker,
)
from tests.adapters import adapted_pipeline, draw, plain_pipeline

CLOSE = 1e-4


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter's file, the image that it draws, and the base model's."""
    path, pipeline = tmp_path_factory.mktemp("trained") / "dog.safetensors", adapted_pipeline("sd", 4, 64, text=True)
    save_kronecker(pipeline, path)
    image, base = draw(pipeline), draw(plain_pipeline("sd"))
    assert (image - base).abs().max() > 0.1
    return path, image, base


@pytest.fixture
def adapted(trained):
    pipeline = plain_pipeline("sd")
    load_kronecker(pipeline, trained[0], name="dog")
    return pipeline


def same(left, right):
    return (left - right).abs().max() < CLOSE


# ---- fused q, k and v ----


@pytest.mark.parametrize("merged", [False, True])
def test_fused_projections_have_the_adapter_in_them(adapted, trained, merged):
    _, image, base = trained
    set_kronecker_scale(adapted, 1.0)
    if merged:
        merge_kronecker(adapted)
    adapted.fuse_qkv_projections()
    assert same(draw(adapted), image)
    adapted.unfuse_qkv_projections()
    assert same(draw(adapted), image)
    if merged:
        unmerge_kronecker(adapted)
    set_kronecker_scale(adapted, 0)
    assert same(draw(adapted), base)


def test_what_fused_projections_would_not_follow_is_refused(adapted, trained):
    path, image, _ = trained
    adapted.fuse_qkv_projections()

    def disable():
        with disable_kronecker(adapted):
            pass

    for call in (
        disable,
        lambda: set_kronecker_scale(adapted, 0.5),
        lambda: remove_kronecker(adapted),
        lambda: load_kronecker(adapted, path, name="again"),
    ):
        with pytest.raises(KroneckerError, match="unfuse_qkv_projections"):
            call()
    assert same(draw(adapted), image)
    plain = plain_pipeline("sd")
    plain.fuse_qkv_projections()
    for call in (
        lambda: load_kronecker(plain, path),
        lambda: inject_kronecker(plain.unet, 4, 64),
        lambda: attach_to_diffusers(plain, path),
    ):
        with pytest.raises(KroneckerError, match="the UNet2DConditionModel .*unfuse_qkv_projections"):
            call()
    assert not kronecker_layers(plain.unet) and not kronecker_layers(plain.text_encoder)
    assert not any(isinstance(module, BaseTunerLayer) for module in plain.unet.modules())


def test_an_adapter_that_fails_leaves_nothing_behind(tmp_path, trained):
    strong = adapted_pipeline("sd", 4, 64, text=True)
    kronecker_layers(strong.text_encoder).popitem()[1].B.data.fill_(1e25)
    save_kronecker(strong, tmp_path / "strong.safetensors")
    pipeline = plain_pipeline("sd").to(torch.float16)
    with pytest.raises(KroneckerError, match="not all finite in torch.float16"):
        attach_to_diffusers(pipeline, tmp_path / "strong.safetensors")
    for scale in (float("nan"), float("inf")):
        with pytest.raises(KroneckerError, match=f"dog.safetensors: the scale is {scale}"):
            load_kronecker(pipeline, trained[0], scale)
    for model in (pipeline.unet, pipeline.text_encoder):
        assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        assert not kronecker_layers(model)


# ---- saved, copied ----


@pytest.mark.parametrize("merged", [False, True])
def test_a_saved_pipeline_is_a_plain_one(adapted, trained, merged, tmp_path):
    _, image, base = trained
    if merged:
        merge_kronecker(adapted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted.save_pretrained(tmp_path, max_shard_size="200KB", variant="fp32")
    warned = [str(warning.message) for warning in caught if "save_kronecker" in str(warning.message)]
    assert [("UNet" in text, "dog" in text) for text in warned] == ([] if merged else [(False, True), (True, True)])
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp32")
    loaded.set_progress_bar_config(disable=True)
    assert same(draw(loaded), image if merged else base)
    assert same(draw(adapted), image) and len(kronecker_layers(adapted.unet)) == 32
    assert len(list((tmp_path / "unet").glob("*.fp32-*.safetensors"))) > 1


@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_is_a_model_of_its_own(adapted, trained, merged, tmp_path):
    if merged:
        merge_kronecker(adapted)
    content = io.BytesIO()
    torch.save(adapted.unet, content)
    content.seek(0)
    for unet in (copy.deepcopy(adapted.unet), torch.load(content, weights_only=False)):
        pipeline = plain_pipeline("sd")
        pipeline.register_modules(unet=unet, text_encoder=adapted.text_encoder)
        assert same(draw(pipeline), trained[1])
        if not merged:
            merge_kronecker(unet)
        unet.save_pretrained(tmp_path)
        unmerge_kronecker(unet)
        remove_kronecker(unet)
        assert unet.state_dict().keys() == plain_pipeline("sd").unet.state_dict().keys()
        assert not {"save_pretrained"} & vars(unet).keys() and not unet._forward_pre_hooks
    assert len(kronecker_layers(adapted.unet)) == 32


# ---- strengths, casting and offloading ----


def test_the_scale_of_a_call_is_refused(adapted, trained):
    assert same(draw(adapted, cross_attention_kwargs={"scale": 1.0}), trained[1])
    with pytest.raises(KroneckerError, match=r'"scale": 0.5.*set_kronecker_scale'):
        draw(adapted, cross_attention_kwargs={"scale": 0.5})
    remove_kronecker(adapted)
    assert torch.equal(draw(adapted, cross_attention_kwargs={"scale": 0.5}), trained[2])


@pytest.mark.parametrize("first", ["load", "cast"])
def test_layers_cast_to_8_bits_keep_their_adapters(first, adapted, trained):
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    pipeline = adapted if first == "load" else plain_pipeline("sd")
    pipeline.unet.enable_layerwise_casting(**cast)
    if first == "cast":
        load_kronecker(pipeline, trained[0])
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.A.dtype == torch.float32
    x = torch.randn(3, 128)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta_weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "level", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading_changes_nothing(level, adapted, trained):
    apply_group_offloading(adapted.unet, torch.device("cpu"), **level)
    assert same(draw(adapted), trained[1])


def test_a_lora_after_the_adapter_is_refused_whole(adapted, trained, tmp_path):
    lora = {}
    for name in ("attn1.to_q", "ff.net.0.proj"):
        path = f"unet.mid_block.attentions.0.transformer_blocks.0.{name}"
        d_out = 128 if name == "attn1.to_q" else 1024
        lora |= {f"{path}.lora_A.weight": torch.randn(2, 128), f"{path}.lora_B.weight": torch.randn(d_out, 2)}
    with pytest.raises(ValueError, match="KroneckerLinear"):
        adapted.load_lora_weights(dict(lora))
    assert same(draw(adapted), trained[1])
    pipeline = plain_pipeline("sd")
    pipeline.load_lora_weights(dict(lora))
    load_kronecker(pipeline, trained[0])
    assert not same(draw(pipeline), trained[1])
    pipeline.unload_lora_weights()
    assert same(draw(pipeline), trained[1])
