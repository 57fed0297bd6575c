"""Several adapters at once: weights, switching, removal, merging; offloading, half precision, compilation, peft."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from kron_adapter import (
    KroneckerError,
    add_kronecker,
    attach_to_diffusers,
    disable_kronecker,
    inject_kronecker,
    kronecker_adapters,
    kronecker_layers,
    load_kronecker,
    merge_kronecker,
    remove_kronecker,
    save_kronecker,
    set_kronecker_scale,
    unmerge_kronecker,
)
from kron_formats import matching, reading
from kron_formats.matching import match_layers
from kron_formats.names import components, find_layers, linear_modules
from kron_formats.reading import read_adapter
from tests.adapters import adapted_pipeline, dense_weights, draw, plain_pipeline, plain_weights, quantised, worst_error

FACTORS = {"dog": (4, 64), "style": (16, 16), "light": (64, 4)}


@pytest.fixture(scope="module")
def deltas_and_files(tmp_path_factory):
    """Three adapters: {name: dense deltas}, {name: file}. The second has no text encoder."""
    folder, base = tmp_path_factory.mktemp("several"), plain_weights(plain_pipeline("sd"))
    deltas, files = {}, {}
    for seed, (name, factors) in enumerate(FACTORS.items()):
        pipeline = adapted_pipeline("sd", *factors, text=name != "style")
        for layer in kronecker_layers(pipeline.unet).values():
            nn.init.normal_(layer.A, std=layer.A.shape[1] ** -0.5, generator=torch.Generator().manual_seed(seed))
        files[name] = folder / f"{name}.safetensors"
        save_kronecker(pipeline, files[name])
        deltas[name] = {layer: weight - base[layer] for layer, weight in dense_weights(pipeline).items()}
    return deltas, files


@pytest.fixture
def files(deltas_and_files):
    return deltas_and_files[1]


def combined(deltas, scales):
    """W + Σ scale · ΔW, in a plain pipeline."""
    pipeline = plain_pipeline("sd")
    weights = plain_weights(pipeline)
    for name, scale in scales.items():
        for layer, delta in deltas[name].items():
            weights[layer] = weights[layer] + scale * delta
    for component in ("unet", "text_encoder"):
        model = getattr(pipeline, component)
        for path, module in model.named_modules():
            key = f"{component}.{path}"
            if isinstance(module, nn.Linear):
                module.weight.data = weights[key].float()
    return pipeline


def loaded(files, **scales):
    pipeline = plain_pipeline("sd")
    for name, scale in scales.items():
        load_kronecker(pipeline, files[name], scale, name)
    return pipeline


def assert_same_image(left, right, tolerance=2e-3):
    assert (draw(left) - draw(right)).abs().max() < tolerance


def test_adapters_add_up_with_their_weights(deltas_and_files):
    deltas, files = deltas_and_files
    pipeline = loaded(files, dog=0.8, style=0.5, light=1.0)
    assert kronecker_adapters(pipeline) == ["dog", "style", "light"]
    assert_same_image(pipeline, combined(deltas, {"dog": 0.8, "style": 0.5, "light": 1.0}))
    for scales in ({"dog": 0.3, "style": 1.0}, {"light": 1.2}, {"style": 0.5, "dog": 0.8, "light": 0}):
        set_kronecker_scale(pipeline, scales)
        assert_same_image(pipeline, combined(deltas, scales))
    assert (draw(combined(deltas, {"dog": 0.8})) - draw(combined(deltas, {"style": 0.8}))).abs().max() > 0.02


def test_switching_and_removing_need_no_reload_and_end_at_the_base_bit_for_bit(files):
    base = plain_pipeline("sd")
    image, state = draw(base), {k: v.clone() for k, v in base.unet.state_dict().items()}
    pipeline = loaded(files, dog=1.0, style=1.0, light=1.0)
    only_dog, only_light = draw(loaded(files, dog=1.0)), draw(loaded(files, light=1.0))
    set_kronecker_scale(pipeline, {"dog": 1.0})
    assert torch.equal(draw(pipeline), only_dog)
    set_kronecker_scale(pipeline, 0)
    assert torch.equal(draw(pipeline), image)
    set_kronecker_scale(pipeline, 1)
    with disable_kronecker(pipeline):
        assert torch.equal(draw(pipeline), image)
    remove_kronecker(pipeline, "style")
    remove_kronecker(pipeline, "dog")
    assert kronecker_adapters(pipeline) == ["light"]
    assert torch.equal(draw(pipeline), only_light)
    load_kronecker(pipeline, files["dog"], name="dog")
    remove_kronecker(pipeline)
    assert not kronecker_adapters(pipeline)
    assert pipeline.unet.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_merging_rounds_the_sum_once_and_unmerging_restores_every_bit(deltas_and_files):
    deltas, files = deltas_and_files
    base = plain_weights(plain_pipeline("sd"))
    pipeline = loaded(files, dog=0.8, style=0.5)
    before = draw(pipeline)
    merge_kronecker(pipeline)
    exact = {
        layer: base[layer] + 0.8 * delta + 0.5 * deltas["style"].get(layer, 0) for layer, delta in deltas["dog"].items()
    }
    largest = max(weight.abs().max().item() for weight in exact.values())
    assert worst_error(plain_weights(pipeline), exact) < 2**-24 * largest  # one rounding of fp32's 24 bits
    assert_same_image(pipeline, combined(deltas, {"dog": 0.8, "style": 0.5}))
    for call in (
        merge_kronecker,
        lambda p: set_kronecker_scale(p, {"dog": 1}),
        lambda p: remove_kronecker(p, "dog"),
        lambda p: load_kronecker(p, files["light"], name="light"),
    ):
        with pytest.raises(KroneckerError, match="merged"):
            call(pipeline)
    unmerge_kronecker(pipeline)
    assert all(torch.equal(weight, base[name]) for name, weight in plain_weights(pipeline).items())
    assert torch.equal(draw(pipeline), before)


def test_an_adapter_that_is_switched_off_is_not_merged(deltas_and_files):
    deltas, files = deltas_and_files
    pipeline = loaded(files, dog=1.0, style=1.0)
    set_kronecker_scale(pipeline, {"style": 1.0})
    merge_kronecker(pipeline)
    remove_kronecker(pipeline)
    assert_same_image(pipeline, combined(deltas, {"style": 1.0}))


def test_each_adapter_is_saved_by_its_name_and_bit_for_bit(files, tmp_path):
    pipeline = loaded(files, dog=0.8, style=0.5)
    save_kronecker(pipeline, tmp_path / "again.safetensors", name="style")
    alone = plain_pipeline("sd")
    load_kronecker(alone, tmp_path / "again.safetensors")
    assert torch.equal(draw(alone), draw(loaded(files, style=1.0)))
    with pytest.raises(KroneckerError, match="no adapter named default to save; there are: dog, style"):
        save_kronecker(pipeline, tmp_path / "other.safetensors")


def test_names_are_checked(files):
    pipeline = loaded(files, dog=1.0)
    with pytest.raises(KroneckerError, match='has an adapter named "dog" already: .* under another name'):
        load_kronecker(pipeline, files["style"], name="dog")
    for call in (lambda: set_kronecker_scale(pipeline, {"cat": 1.0}), lambda: remove_kronecker(pipeline, "cat")):
        with pytest.raises(KroneckerError, match="no adapter named cat; there are: dog"):
            call()


# ---- where the base is not a plain model on one device ----


@pytest.mark.parametrize("first", ["load", "offload"])
def test_sequential_offloading_changes_nothing(first, files):
    """Weights live on the meta device between calls and are brought in layer by layer."""
    expected = draw(loaded(files, dog=0.8, style=0.5))
    pipeline = loaded(files, dog=0.8, style=0.5) if first == "load" else plain_pipeline("sd")
    cpu_offload(pipeline.unet, torch.device("cpu"))
    if first == "offload":
        load_kronecker(pipeline, files["dog"], 0.8, "dog")
        load_kronecker(pipeline, files["style"], 0.5, "style")
    assert pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.is_meta
    torch.testing.assert_close(draw(pipeline), expected, rtol=0, atol=1e-4)
    with pytest.raises(KroneckerError, match="offloaded; merge before"):
        merge_kronecker(pipeline)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_keep_their_dtype_and_the_factors_theirs(dtype, files):
    unet = plain_pipeline("sd").unet.to(dtype)
    load_kronecker(unet, files["style"], 0.5, "style")
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = layer(x)
    assert y.dtype == dtype and layer.A.dtype == layer.B.dtype == torch.float32
    exact = x.double() @ (layer.weight.double() + layer.delta_weight.double()).T
    assert (y.double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_compiled_models_follow_their_adapters(files):
    model = loaded(files, dog=0.8, style=0.5).unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(2, 5, model.in_features)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        before = model(x)
        model.scale = 0.1
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert (model(x) - before).abs().max() > 1e-3


def test_a_compiled_unet_and_one_inside_peft_are_loaded_by_the_same_names(files):
    expected = draw(loaded(files, dog=1.0))
    compiled = plain_pipeline("sd")
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    load_kronecker({"unet": compiled.unet, "text_encoder": compiled.text_encoder}, files["dog"], name="dog")
    assert torch.equal(draw(compiled), expected)

    inside = plain_pipeline("sd")
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    inside.unet.add_adapter(config, "lora")
    with_lora = draw(inside)
    load_kronecker(inside, files["dog"], name="dog")
    assert len(kronecker_layers(inside.unet)) == 32
    inside.unet.disable_adapters()
    torch.testing.assert_close(draw(inside), expected, rtol=0, atol=1e-5)
    inside.unet.enable_adapters()
    assert (draw(inside) - expected).abs().max() > 1e-3
    remove_kronecker(inside)
    assert torch.equal(draw(inside), with_lora)


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_quantised_bases_take_adapters_but_no_merging(kind):
    base = quantised(nn.Linear(128, 128), kind)
    model = nn.ModuleDict({"to_q": base})
    x = torch.randn(3, 128)
    before = model["to_q"](x)
    layer = inject_kronecker(model, 4, 16, ("to_q",))["to_q"]
    assert torch.equal(layer(x), before)
    nn.init.normal_(layer.B)
    torch.testing.assert_close(layer(x) - before, x @ layer.delta_weight.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(KroneckerError, match="cannot take a merged delta"):
        merge_kronecker(model)


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_files_load_into_a_quantised_unet_and_leave_it_bit_for_bit(kind, files):
    pipeline = plain_pipeline("sd")
    for path, _, linear in linear_modules(pipeline.unet):
        if ".to_" in path:
            pipeline.unet.set_submodule(path, quantised(linear, kind))
    base = draw(pipeline)
    with pytest.raises(KroneckerError, match="has quantised layers, .* use load_kronecker"):
        attach_to_diffusers(pipeline, files["style"])
    load_kronecker(pipeline, files["style"], name="style")
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(2, 5, layer.in_features)
    torch.testing.assert_close(layer(x), layer.base(x) + x @ layer.delta_weight.T, rtol=1e-4, atol=1e-4)
    assert (draw(pipeline) - base).abs().max() > 1e-3
    remove_kronecker(pipeline)
    assert torch.equal(draw(pipeline), base)


# ---- matched once, added to other models ----


def empty(pipeline):
    """The pipeline's models without weights, as scripts look at them before they load any."""
    with torch.device("meta"):
        return {name: type(model)(model.config) if name != "unet" else type(model).from_config(model.config)
                for name, model in components(pipeline).items()}  # fmt: skip


@pytest.fixture
def matched(files):
    models = empty(plain_pipeline("sd"))
    assert all(weight.is_meta for model in models.values() for weight in model.parameters())
    return {name: match_layers(read_adapter(path), models) for name, path in files.items()}


@pytest.mark.parametrize("lora", [False, True])
def test_an_adapter_matched_without_weights_is_added_without_reading_it_again(lora, matched, files, monkeypatch):
    expected, pipeline = plain_pipeline("sd"), plain_pipeline("sd")
    for pipe in (expected, pipeline):
        if lora:  # puts its own layers around those that were matched
            torch.manual_seed(0)
            pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "lora")
    load_kronecker(expected, files["dog"], 0.8, "dog")
    load_kronecker(expected, files["style"], 0.5, "style")
    monkeypatch.setattr(reading, "open_safetensors", None)
    monkeypatch.setattr(matching, "spelling_index", None)
    for path in files.values():
        path.rename(path.with_suffix(".away"))
    try:
        add_kronecker(pipeline, matched["dog"], 0.8, "dog")
        add_kronecker(pipeline, matched["style"], 0.5, "style")
    finally:
        for path in files.values():
            path.with_suffix(".away").rename(path)
    assert kronecker_adapters(pipeline) == ["dog", "style"]
    assert torch.equal(draw(pipeline), draw(expected))
    for ours, theirs in zip(components(pipeline).values(), components(expected).values()):
        layers, others = kronecker_layers(ours), kronecker_layers(theirs)
        assert layers.keys() == others.keys()
        assert [layer.target for layer in layers.values()] == [layer.target for layer in others.values()]


def test_what_was_matched_is_not_added_to_another_model_and_leaves_it_untouched(matched):
    narrow = plain_pipeline("sd").unet
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    narrow.set_submodule(path, nn.Linear(32, 128))
    for models, words in (
        ({"unet": narrow}, rf"1 of its layers are missing here or have another size \(unet.{path}\)"),
        ({"text_encoder": plain_pipeline("sd").text_encoder}, "32 of its layers are missing here or have another size"),
    ):
        with pytest.raises(KroneckerError, match=words):
            add_kronecker(models, matched["style"])
        assert not kronecker_adapters(models)


def test_what_was_matched_has_a_name_of_its_own_and_is_no_lora(matched, tmp_path):
    pipeline = plain_pipeline("sd")
    add_kronecker(pipeline, matched["dog"], name="dog")
    with pytest.raises(KroneckerError, match='has an adapter named "dog" already: .* under another name'):
        add_kronecker(pipeline, matched["style"], name="dog")
    merge_kronecker(pipeline)
    with pytest.raises(KroneckerError, match="merged"):
        add_kronecker(pipeline, matched["style"], name="style")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.lora_down.weight": torch.ones(2, 128), f"{key}.lora_up.weight": torch.ones(128, 2)},
              tmp_path / "lora.safetensors")  # fmt: skip
    pipeline = plain_pipeline("sd")
    with pytest.raises(KroneckerError, match="it is a LoRA; load it with pipe.load_lora_weights"):
        add_kronecker(pipeline, match_layers(read_adapter(tmp_path / "lora.safetensors"), pipeline))
    assert not kronecker_adapters(pipeline)


def test_layers_are_the_same_by_component_and_name():
    pipeline = plain_pipeline("sd")
    before = find_layers(pipeline)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "lora")
    after = set(find_layers(pipeline))
    assert set(before) <= after and len(after) > len(before) == len(set(before))
