"""scripts/interpret.py through its command line, on files and on a small pipeline."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from interpretation.adapters import read_interpreted
from interpretation.measuring import measure
from interpretation.options import FileOptions
from interpretation.pruning import groups_of, without, write_part
from kron_adapter import kronecker_layers, load_kronecker, save_kronecker
from kron_formats.architectures import load_architecture
from kron_formats.changes import Factors, LowRank
from kron_formats.export import write_low_rank
from kron_formats.families import ATTENTION_TARGETS, SD1, SDXL
from kron_formats.names import find_layers, match_target
from kron_formats.reading import read_adapter
from kron_formats.writing import write_native
from scripts import convert, generate, interpret
from tests.adapters import adapted_pipeline, dense_weights, plain_pipeline, plain_weights
from tests.conftest import ROOT, flags


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "robot.safetensors"
    save_kronecker(adapted_pipeline("sd", 4, 64, text=True, strength=0.3), path, {"instance_prompt": "a sks robot"})
    return path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "robot-lora.safetensors"
    layers = {
        layer: LowRank(torch.randn(layer.size[0], 2) * 0.1, torch.randn(2, layer.size[1]) * 0.1)
        for layer in find_layers({"unet": plain_pipeline("sd").unet})
        if match_target(layer.name, ATTENTION_TARGETS)
    }
    write_low_rank(path, layers, 4.0, SD1, {}, torch.float32)  # twice up · down
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the script: `run("a.safetensors", "b.safetensors", keep=0.9)`; return its folder, and what it printed."""

    def run(*files, **options):
        output = options.pop("output_dir", tmp_path / "out")
        monkeypatch.setattr(sys, "argv", ["interpret", *map(str, files), *flags({**options, "output_dir": output})])
        interpret.main()
        return output, capsys.readouterr().out

    return run


def numbers(output):
    return json.loads((output / "interpretation.json").read_text(encoding="utf-8"))


def by_layer(entry):
    return {layer["layer"]: layer for layer in entry["layers"]}


def assert_alone(page: str) -> None:
    """A page that needs nothing but itself."""
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page) and "<script" not in page


# ---- files ----


def test_two_files_and_a_run_beside_a_base_model(run, adapter, lora, tiny_sd, tmp_path):
    folder = tmp_path / "run"
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        tensors = {name: x * (step / 20 if "w2" in name else 1) for name, x in load_file(adapter).items()}
        save_file(tensors, folder / f"checkpoint-{step}" / "robot.safetensors")
        save_file({"state": torch.zeros(1)}, folder / f"checkpoint-{step}" / "training_state.safetensors")
    output, said = run(f"{adapter}:0.5", lora, folder, pretrained_model_name_or_path=tiny_sd)
    found = numbers(output)["adapters"]
    assert [entry["adapter"] for entry in found] == ["robot.safetensors at 0.5", "robot-lora.safetensors", "run"]
    base, adapted = plain_weights(plain_pipeline("sd")), adapted_pipeline("sd", 4, 64, text=True, strength=0.3)
    dense = {name: weight - base[name] for name, weight in dense_weights(adapted).items()}
    for name, layer in by_layer(found[0]).items():
        own = next(key for key in dense if key.split(".")[-4:] == name.split(".")[-4:] and same(key, name))
        assert layer["frobenius"] == pytest.approx(dense[own].norm().item() / 2, rel=1e-4)
        assert layer["relative"] == pytest.approx((dense[own].norm() / base[own].norm()).item() / 2, rel=1e-4)
        sides = layer["singular_values"]
        assert layer["spectral"] == pytest.approx(sides["A"][0] * sides["B"][0], rel=1e-4)
        assert layer["spectral"] == pytest.approx(torch.linalg.matrix_norm(dense[own], 2).item() / 2, rel=1e-4)
    tensors = load_file(lora)
    for layer in by_layer(found[1]).values():
        key = "lora_" + layer["layer"].replace(".", "_")
        product = tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
        assert layer["frobenius"] == pytest.approx(2 * product.norm().item(), rel=1e-4)  # alpha / r = 4 / 2
        assert layer["largest_rank"] == 2 and layer["share_of_nearest_lora"]["2"] == pytest.approx(1)
    assert found[2]["steps"]["10"]["frobenius"] == pytest.approx(found[2]["frobenius"] / 2, rel=1e-4)
    assert {path.stem for path in (output / "plots").iterdir()} == {
        "map-1", "map-2", "map-3", "film-3", "factors-1", "factors-3", "shares",
    }  # fmt: skip
    assert all(Image.open(path).size > (200, 200) for path in (output / "plots").iterdir())
    page = (output / "interpretation.html").read_text(encoding="utf-8")
    assert_alone(page)
    assert page.count("data:image/png") == 7 and "robot-lora.safetensors" in page and "down 0.0 cross k" in page
    assert "Wrote" in said and 'id="parts"' not in page


def same(key: str, name: str) -> bool:
    """Whether a path in a model and a layer's name are the same; names have CLIP's text_model level."""
    return key == name or key == name.replace("text_model.", "")


def test_files_for_published_models_need_no_base_model_and_form_no_change(tmp_path, monkeypatch):
    torch.manual_seed(0)
    layers = find_layers({"unet": load_architecture("sdxl")["unet"]})
    factors = {
        layer: Factors(torch.randn(4, 64), torch.randn(layer.size[0] // 4, layer.size[1] // 64))
        for layer in layers
        if match_target(layer.name, ATTENTION_TARGETS)
    }
    write_native(tmp_path / "sdxl.safetensors", factors, SDXL, {})
    for name in ("dense", "delta"):
        monkeypatch.setattr(Factors, name, lambda *arguments: pytest.fail("ΔW is formed"))
    config = FileOptions(adapter=[str(tmp_path / "sdxl.safetensors")], output_dir=str(tmp_path))
    portrait = measure(read_interpreted(config)[0], {})
    assert len(portrait.layers) == 560 and portrait.family == "SDXL"
    first = portrait.layers[0]
    exact = torch.linalg.matrix_norm(torch.kron(first.change.A.double(), first.change.B.double()))
    assert first.spectrum.frobenius == pytest.approx(exact.item(), rel=1e-9)


# ---- parts ----


@pytest.fixture
def scored(quick_evaluation):
    """The options with which parts are tried, but for the photos."""
    return {
        **quick_evaluation,
        "class_noun": "robot",
        "prompt": ["a {} in the snow", "a red {}"],
        "num_class_images": 2,
        "batch_size": 64,
        "denoising_pairs": 4,
    }


@pytest.fixture
def photos_like(run_main, tiny_sd, tmp_path):
    """What an adapter draws as the photos, by which it raises the likeness: `photos_like("robot.safetensors")`."""

    def photos(adapter):
        folder, drawing = tmp_path / "photos", {"height": 64, "width": 64, "num_inference_steps": 1, "num_images": 1}
        prompts = ["a sks robot in the snow", "a red sks robot"]
        files = {"pretrained_model_name_or_path": tiny_sd, "adapter": adapter, "output_dir": folder}
        run_main(generate, **files, **drawing, prompt=prompts)
        (folder / "grid.png").unlink()
        return folder

    return photos


def test_parts_are_left_out_and_the_pruned_file_is_one_like_the_whole(run, adapter, scored, photos_like):
    output, said = run(adapter, **scored, reference_dir=photos_like(adapter), keep=0.5, pairs_of_a=1)
    found = numbers(output)
    ablation = found["ablations"][0]
    assert [*ablation["without"]] == [
        "down 0", "mid", "up 1", "text_encoder", "self", "cross", "q", "k", "v", "out", "singular pair 1 of A",
    ]  # fmt: skip
    whole, base = ablation["whole"], ablation["base"]
    for name, trial in ablation["without"].items():
        assert trial["dino_fall"] == pytest.approx(whole["dino"] - trial["dino"], abs=1e-6)
        assert trial["dino"] != whole["dino"] and len(trial["loss_explained_by_timestep"]) == 4
        assert "singular" in name or trial["parameters"] < whole["parameters"]
    assert whole["loss"] != base["loss"] and whole["drift"] > 0
    assert (output / "images" / "without-cross" / "00-0.png").is_file()
    page = (output / "interpretation.html").read_text(encoding="utf-8")
    assert_alone(page)
    assert "holds the subject" in page and "costs the class" in page and 'id="when"' in page
    assert (output / "plots" / "when.png").is_file() and (output / "plots" / "without-1.png").is_file()

    pruned, path = found["pruned"], output / "pruned.safetensors"
    assert pruned["bytes"] == path.stat().st_size and pruned["share_of_likeness"] >= 0.5
    assert len(pruned["dropped"]) + len(pruned["kept"]) == 34 and "pruned.safetensors" in said
    kept = load_file(path)
    assert pruned["parameters"] == sum(x.numel() for x in kept.values()) - sum("alpha" in name for name in kept)


def test_a_lora_is_tried_too(run, lora, scored, photos):
    scored |= {"prompt": ["a red {}"], "num_class_images": 1}
    output, _ = run(lora, **scored, reference_dir=photos, pairs_of_a=2, adapter_scale=0.5)
    found = numbers(output)
    assert found["adapters"][0]["strength"] == 0.5
    assert {"cross", "singular pair 2 of ΔW"} <= found["ablations"][0]["without"].keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_part_of_a_file_is_a_file_for_the_same_tools(adapter, lora, tiny_sd, tmp_path, dtype):
    part, halved = tmp_path / "part.safetensors", tmp_path / "adapter.safetensors"
    with safe_open(adapter, "pt") as file:
        save_file({key: file.get_tensor(key).to(dtype) for key in file.keys()}, halved, file.metadata())
    whole = read_one(halved, tiny_sd)
    groups = groups_of(whole)
    assert {len(layers) for name, layers in groups.items() if "text_encoder" in name} == {4}  # A1111 needs all four
    dropped = [*groups][:-3:2]
    write_part(part, whole, without(groups, dropped))
    kept, all_of_it = load_file(part), load_file(halved)
    assert kept.keys() < all_of_it.keys()
    again = read_one(part, tiny_sd).matched.layers
    for layer, factors in again.items():
        exact = whole.matched.layers[layer].dense()
        assert (factors.dense() - exact).norm() <= (0 if dtype == torch.float32 else 2e-3) * exact.norm()
    assert {tensor.dtype for tensor in kept.values()} == {dtype}
    assert read_adapter(part).own_metadata["instance_prompt"] == "a sks robot"
    pipeline = plain_pipeline("sd")
    load_kronecker(pipeline, part)
    assert len(kronecker_layers(pipeline.unet)) + len(kronecker_layers(pipeline.text_encoder)) == len(kept) // 3
    as_lora = ["--to", "lora", "--output", str(tmp_path / "lora.safetensors")]
    convert.main([str(part), *as_lora, "--pretrained_model_name_or_path", str(tiny_sd)])
    assert len(read_one(tmp_path / "lora.safetensors", tiny_sd).matched.layers) == len(kept) // 3


def test_a_part_of_a_lora_is_a_lora(lora, tiny_sd, tmp_path):
    whole = read_one(f"{lora}:0.5", tiny_sd)
    groups = groups_of(whole)
    write_part(tmp_path / "part.safetensors", whole, without(groups, [*groups][::2]))
    part = read_one(tmp_path / "part.safetensors", tiny_sd).matched
    assert 0 < len(part.layers) < len(whole.matched.layers)
    for layer, change in part.layers.items():  # at the file's own strength
        assert torch.allclose(change.dense(), whole.matched.layers[layer].dense(), atol=1e-5)
    pipeline = plain_pipeline("sd")
    pipeline.load_lora_weights(str(tmp_path), weight_name="part.safetensors")


def read_one(path, base):
    return read_interpreted(
        FileOptions(adapter=[str(path)], pretrained_model_name_or_path=str(base), output_dir="unused")
    )[0]


def test_an_adapter_that_adds_nothing_is_not_made_smaller(run, adapter, scored, photos_like, capsys):
    del scored["denoising_pairs"]  # which is for photos that were not trained on
    folder = photos_like(f"{adapter}:0")
    assert "--keep 0.5" in refused(run, capsys, adapter, **scored, instance_data_dir=folder, keep=0.5)


# ---- refusals ----


@pytest.fixture
def photos():
    return ROOT / "toyworld" / "photos" / "robot"


def refused(run, capsys, *files, **options) -> str:
    with pytest.raises((SystemExit, ValueError)) as end:
        run(*files, **options)
    return capsys.readouterr().err if isinstance(end.value, SystemExit) else str(end.value)


def test_what_cannot_be_interpreted_is_refused(run, adapter, tiny_sd, tiny_sdxl, tmp_path, capsys):
    (tmp_path / "note.safetensors").write_text("no tensors")
    (tmp_path / "file").write_text("")
    assert "not a readable safetensors" in refused(run, capsys, tmp_path / "note.safetensors")
    assert "--pretrained_model_name_or_path" in refused(run, capsys, adapter)  # fits no published model
    assert "does not fit" in refused(run, capsys, adapter, pretrained_model_name_or_path=tiny_sdxl)
    assert "--output_dir" in refused(run, capsys, adapter, output_dir=tmp_path / "file")
    assert "given twice" in refused(run, capsys, adapter, adapter, pretrained_model_name_or_path=tiny_sd)
    assert "ADAPTER" in refused(run, capsys)
    assert not (tmp_path / "out").exists()


def test_keep_needs_a_base_model_photos_and_one_adapter(run, adapter, lora, tiny_sd, scored, photos, tmp_path, capsys):
    assert "pretrained_model_name_or_path" in refused(run, capsys, adapter, keep=0.9)
    alone = {"pretrained_model_name_or_path": tiny_sd, "class_noun": "robot", "prompt": ["a {}"]}
    assert "--instance_data_dir" in refused(run, capsys, adapter, keep=0.9, **alone)
    scored |= {"reference_dir": photos}
    assert "one ADAPTER" in refused(run, capsys, adapter, lora, keep=0.9, **scored)
    assert "--keep" in refused(run, capsys, adapter, **scored | {"keep": 1.5})
    assert "--lpips" in refused(run, capsys, adapter, **scored, lpips="alex")
    assert "--num_class_images" in refused(run, capsys, adapter, **scored | {"num_class_images": 0})
    (tmp_path / "two.yaml").write_text("dog: {instance_prompt: a photo of sks dog, class_prompt: a photo of dog}\n")
    del scored["class_noun"]
    assert "--subjects" in refused(run, capsys, adapter, **scored, subjects=tmp_path / "two.yaml")


def test_shifts_are_spectra_and_have_no_parts(run, scored, photos, tiny_sd, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kron_formats.decomposition.cache_folder", lambda: None)
    layers = [layer for layer in find_layers({"unet": plain_pipeline("sd").unet}) if ".attn1." in layer.name]
    shifts = {f"{layer.name}.delta": torch.linspace(0.1, 0.2, min(layer.size)) for layer in layers}
    save_file(shifts, tmp_path / "shifts.safetensors")
    output, _ = run(tmp_path / "shifts.safetensors", pretrained_model_name_or_path=tiny_sd)
    entries = by_layer(numbers(output)["adapters"][0])
    first = entries[f"unet.{layers[0].name}"]
    assert first["frobenius"] == pytest.approx(shifts[f"{layers[0].name}.delta"].norm().item(), rel=1e-5)
    assert len(first["singular_values"]) == min(layers[0].size)
    assert "SVDiff" in refused(run, capsys, tmp_path / "shifts.safetensors", **scored, reference_dir=photos)
