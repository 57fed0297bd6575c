"""Weights that were trained themselves: folders of models, Custom Diffusion's files, and what they do to a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreambooth.drawing.pipelines import load_adapted_pipeline, load_pipeline_with, merge_adapters, read_adapters
from dreambooth.options.base_model import AdaptedModelOptions
from kron_adapter import KroneckerError, load_kronecker
from kron_formats.changes import Factors, LowRank, Replacement, StoredFactors
from kron_formats.matching import match_layers
from kron_formats.merging import merged_weight
from kron_formats.names import components, find_parameters
from kron_formats.reading import read_adapter
from methods.readers import READERS
from tests.adapters import plain_pipeline

KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


def options(base, *adapters, **more) -> AdaptedModelOptions:
    adapters = [str(adapter) for adapter in adapters]
    return AdaptedModelOptions(pretrained_model_name_or_path=str(base), adapter=adapters, **more)


def parameters(models) -> dict[str, torch.Tensor]:
    """Return "component.parameter" -> a copy of it."""
    parts = components(models)
    return {
        f"{part}.{name}": p.detach().clone() for part, model in parts.items() for name, p in model.named_parameters()
    }


@pytest.fixture(scope="module")
def tuned():
    """kind -> a small pipeline of which every parameter of the UNet and the text encoders is another."""

    def make(kind):
        pipeline = plain_pipeline(kind)
        torch.manual_seed(1)
        for model in components(pipeline).values():
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
        return pipeline

    made = {kind: make(kind) for kind in ("sd", "sdxl")}
    return made.__getitem__


@pytest.fixture(scope="module")
def folder(tuned, tmp_path_factory):
    """kind -> the folder of that pipeline."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(f"tuned-{kind}")
            tuned(kind).save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.fixture
def base(tiny_sd, tiny_sdxl):
    return {"sd": tiny_sd, "sdxl": tiny_sdxl}


# ---- what an entry is ----


def test_every_entry_says_what_it_adds_and_how_much_of_it():
    torch.manual_seed(0)
    weight, kernel, vector = torch.randn(8, 6), torch.randn(4, 3, 2, 2), torch.randn(5)
    A, B = torch.randn(2, 3), torch.randn(4, 2)
    entries = [
        (Factors(A, B), weight, torch.kron(A.double(), B.double())),
        (StoredFactors(A, LowRank(B, torch.eye(2))), weight, torch.kron(A.double(), B.double())),
        (LowRank(torch.ones(8, 1), torch.arange(6.0)[None]), weight, torch.arange(6.0).double().expand(8, 6)),
        (Replacement(lambda: weight + 1, (8, 6)), weight, (weight + 1).double() - weight.double()),
        (Replacement(lambda: kernel * 2, (4, 3, 2, 2)), kernel, kernel.double().flatten(1)),
        (Replacement(lambda: vector.half(), (5,)), vector, vector.half().double() - vector.double()),
    ]
    for entry, base, delta in entries:
        torch.testing.assert_close(entry.delta(base), delta, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(entry.scaled(0.5).scaled(0.5).delta(base), 0.25 * delta, rtol=1e-6, atol=1e-6)
        assert entry.delta(base).dtype == torch.float64 and entry.isfinite()
        assert entry.misfit(tuple(delta.shape)) is None
        assert entry.misfit((7, 7)) and entry.size == tuple(delta.shape)
    assert not Replacement(lambda: torch.tensor([float("nan")]), (1,)).isfinite()


# ---- folders ----


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_folder_of_a_model_replaces_every_parameter_and_a_strength_goes_part_of_the_way(kind, tuned, folder, base):
    exact, plain = parameters(tuned(kind)), parameters(plain_pipeline(kind))
    drawn = parameters(load_adapted_pipeline(options(base[kind], folder(kind)), READERS))
    assert drawn.keys() == exact.keys() and all(torch.equal(drawn[name], exact[name]) for name in exact)
    half = parameters(load_adapted_pipeline(options(base[kind], f"{folder(kind)}:0.5"), READERS))
    for name, tensor in half.items():
        torch.testing.assert_close(tensor, ((plain[name].double() + exact[name].double()) / 2).float(), rtol=0, atol=0)


def test_one_component_counts_for_itself_by_its_folder_or_its_class(tuned, folder, base, tmp_path):
    exact, plain = parameters(tuned("sdxl")), parameters(plain_pipeline("sdxl"))
    for part, name in (("unet", "unet"), ("text_encoder", "mine"), ("text_encoder_2", "other")):
        shutil.copytree(folder("sdxl") / part, tmp_path / name)
        drawn = parameters(load_adapted_pipeline(options(base["sdxl"], tmp_path / name), READERS))
        for key, tensor in drawn.items():
            assert torch.equal(tensor, exact[key] if key.startswith(f"{part}.") else plain[key]), key


def test_shards_and_variants_are_read_as_diffusers_names_them(tuned, folder, base, tmp_path):
    unet, exact = tuned("sd").unet, parameters({"unet": tuned("sd").unet})
    unet.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    unet.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="300KB")
    for name in ("shards", "variant"):
        layers = match_layers(read_adapter(tmp_path / name), {"unet": plain_pipeline("sd").unet}).layers
        for parameter, entry in layers.items():
            assert torch.equal(entry.read(), exact[f"unet.{parameter.path}.{parameter.parameter}"])
    next((tmp_path / "shards").glob("*00002*.safetensors")).unlink()
    with pytest.raises(KroneckerError, match="31 of the 32 files of its weights"):
        read_adapter(tmp_path / "shards")


def test_a_folder_that_is_not_a_whole_trained_model_is_refused_with_the_reason(folder, tmp_path):
    broken = tmp_path / "broken"

    def read(part="unet"):
        return match_layers(read_adapter(broken), plain_pipeline("sd"))

    def copy():
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(folder("sd"), broken)

    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    cases = {
        "a parameter is missing": (lambda t: t.pop("conv_in.bias"), r"1 missing \(unet.conv_in.bias\)"),
        "one too many": (lambda t: t.update(extra=torch.ones(1)), r"1 not in the model \(unet.extra\)"),
        "another size": (lambda t: t.update({"conv_in.bias": torch.ones(3)}), "unet.conv_in.bias holds a weight that"),
        "not finite": (lambda t: t["conv_in.bias"].fill_(float("inf")), "unet.conv_in.bias is not all finite"),
        "integers": (lambda t: t.update({"conv_in.bias": t["conv_in.bias"].int()}), "conv_in.bias is of type I32"),
    }
    for change, words in cases.values():
        copy()
        tensors = load_file(weights)
        change(tensors)
        save_file(tensors, weights)
        with pytest.raises(KroneckerError, match=words):
            read()
    copy()
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(KroneckerError, match="unet has no weights that can be read"):
        read()
    copy()
    config = json.loads((broken / "unet" / "config.json").read_text())
    (broken / "unet" / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "x"}}))
    with pytest.raises(KroneckerError, match="unet is quantised"):
        read()
    with pytest.raises(KroneckerError, match="but a model in it: name .*broken"):
        read_adapter(tmp_path)
    for other, words in (("vae", "AutoencoderKL"), ("scheduler", "there is no adapter in the folder")):
        with pytest.raises(KroneckerError, match=words):
            read_adapter(folder("sd") / other)
    with pytest.raises(KroneckerError, match="is not a Kronecker adapter: it is a model that was trained in full"):
        load_kronecker(plain_pipeline("sd"), folder("sd"))


def test_a_model_of_another_family_is_called_by_it(folder, base):
    with pytest.raises(KroneckerError, match="it is a model that was trained in full for SDXL|does not fit this model"):
        read_adapters(options(base["sd"], folder("sdxl")), READERS)


# ---- Custom Diffusion ----


@pytest.fixture(scope="module")
def attention():
    """Trained weights of the cross-attentions of the small UNet, by their own names; all of attn2."""
    torch.manual_seed(2)
    return {
        name: 0.1 * torch.randn_like(p) for name, p in plain_pipeline("sd").unet.named_parameters() if ".attn2." in name
    }


def as_diffusers(weights):
    """The names that diffusers gives them, by its own class."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    own = CustomDiffusionAttnProcessor(True, True, 8, 8).state_dict()
    names = {name.replace("_custom_diffusion", ""): name for name in own}
    found = {}
    for key, tensor in weights.items():
        path, _, part = key.partition(".attn2.")
        found[f"{path}.attn2.processor.{names[part]}"] = tensor
    return found


def as_paper(weights, unet):
    sgm = {f"{x.name}.{x.parameter}": f"{x.sgm}.{x.parameter}" for x in find_parameters({"unet": unet})}
    return {f"model.diffusion_model.{sgm[name]}": tensor for name, tensor in weights.items()}


WORD = torch.arange(64.0)
LAYOUTS = {
    "ours": lambda w, unet: save_file({**w, "<new1>": WORD[None]}, "a.safetensors") or "a.safetensors",
    "diffusers": lambda w, unet: save_file(as_diffusers(w), "a.safetensors") or "a.safetensors",
    "diffusers' pickle": lambda w, unet: torch.save(
        {**as_diffusers(w), f"{KEY[:-1]}1.processor": {}}, "a.bin"
    ) or "a.bin",
    "the paper's": lambda w, unet: torch.save({"unet": w, "modifier_token": {"<new1>": WORD}}, "a.bin") or "a.bin",
    "the paper's, CompVis": lambda w, unet: torch.save({"unet": as_paper(w, unet)}, "a.bin") or "a.bin",
    "the paper's, safetensors": lambda w, unet: save_file(
        {**{f"unet.{k}": v for k, v in w.items()}, "modifier_token.<new1>": WORD}, "a.safetensors"
    ) or "a.safetensors",
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trained", ["kv", "all"])
def test_custom_diffusion_of_every_tool_replaces_the_same_weights(
    layout, trained, attention, tiny_sd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    weights = {k: v for k, v in attention.items() if trained == "all" or ".to_k." in k or ".to_v." in k}
    path = LAYOUTS[layout](weights, plain_pipeline("sd").unet)
    if path.endswith(".bin"):
        with pytest.raises(KroneckerError, match="--allow_pickle"):
            read_adapters(options(tiny_sd, path), READERS)
        assert len(read_adapters(options(tiny_sd, path, allow_pickle=True), READERS)[0].matched.layers) == len(weights)
    file = read_adapter(path, allow_pickle=True)
    assert file.noun == "a Custom Diffusion file"
    assert {word.text: word.vectors["text_encoder"].tolist() for word in file.words} in (
        {},
        {"<new1>": [WORD.tolist()]},
    )
    assert bool(file.words) == (layout in ("ours", "the paper's", "the paper's, safetensors"))
    unet = plain_pipeline("sd").unet
    entries = match_layers(file, plain_pipeline("sd")).layers
    assert len(entries) == len(weights)
    for parameter, entry in entries.items():
        name = f"{parameter.path}.{parameter.parameter}"
        weight = unet.get_parameter(name)
        changed = merged_weight(weight, [entry.delta(weight)], torch.float32, name)
        assert torch.equal(changed, weights[name]), name


def test_words_of_the_paper_s_sdxl_are_a_pair_for_both_text_encoders(tmp_path):
    pair = [torch.ones(64), 2 * torch.ones(64)]
    torch.save(
        {"unet": {f"{KEY}.to_k.weight": torch.ones(64, 128)}, "modifier_token": {"<new1>": pair}}, tmp_path / "a.bin"
    )
    (word,) = read_adapter(tmp_path / "a.bin", allow_pickle=True).words
    assert {name: rows[0, 0].item() for name, rows in word.vectors.items()} == {"text_encoder": 1, "text_encoder_2": 2}


def test_a_word_for_other_text_encoders_is_refused(tmp_path):
    save_file({"<new1>": torch.ones(1, 32), f"{KEY}.to_k.weight": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    with pytest.raises(KroneckerError, match="<new1> has vectors of 32 numbers for the text_encoder, .* has 64"):
        match_layers(read_adapter(tmp_path / "a.safetensors"), plain_pipeline("sd"))


def test_a_compressed_file_of_the_paper_s_code_is_called_so(tmp_path):
    torch.save({"unet": {f"{KEY}.to_k.weight": {"u": torch.ones(4, 1), "v": torch.ones(1, 4)}}}, tmp_path / "a.bin")
    with pytest.raises(KroneckerError, match="compressed Custom Diffusion"):
        read_adapter(tmp_path / "a.bin", allow_pickle=True)


# ---- with other adapters ----


def test_changes_of_weights_come_first_and_adapters_on_top(tuned, folder, attention, tiny_sd, tmp_path):
    """A folder at half strength, Custom Diffusion's weights and a Kronecker adapter, all together."""
    from kron_adapter import save_kronecker
    from tests.adapters import adapted_pipeline, dense_weights, plain_weights

    adapted = adapted_pipeline("sd", 4, 64, strength=0.01)
    save_kronecker(adapted, tmp_path / "kron.safetensors")
    save_file(attention, tmp_path / "custom.safetensors")
    config = options(tiny_sd, f"{folder('sd')}:0.5", tmp_path / "custom.safetensors", tmp_path / "kron.safetensors")
    adapters = read_adapters(config, READERS)
    pipeline = load_pipeline_with(adapters, config, READERS)
    merge_adapters(pipeline, READERS)
    plain, exact, dense = parameters(plain_pipeline("sd")), parameters(tuned("sd")), dense_weights(adapted)
    base = plain_weights(plain_pipeline("sd"))
    for name, tensor in parameters(pipeline).items():
        start, component = plain[name].double(), name.partition(".")[0]
        expected = (start + exact[name].double()) / 2
        if component == "unet" and (own := attention.get(name.removeprefix("unet."))) is not None:
            expected = expected + own.double() - start
        if (key := name.removesuffix(".weight")) in dense:
            expected = expected + dense[key] - base[key]
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=2e-7, msg=name)


def test_changes_are_made_in_fp32_whatever_the_precision(folder, tuned, tiny_sd):
    drawn = parameters(load_adapted_pipeline(options(tiny_sd, f"{folder('sd')}:0.5", dtype="bf16"), READERS))
    plain, exact = parameters(plain_pipeline("sd")), parameters(tuned("sd"))
    for name, tensor in drawn.items():
        expected = ((plain[name].double() + exact[name].double()) / 2).float().bfloat16()
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected), name
