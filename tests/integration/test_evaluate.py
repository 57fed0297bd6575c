"""scripts/evaluate.py through its command line, its numbers recomputed from the images that it wrote."""

import csv
import json
import math
import subprocess
import sys
from itertools import combinations, product
from statistics import fmean

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, ViTModel

from dreambooth.scoring import contact_sheet, models
from kron_adapter import save_kronecker
from scripts import convert, evaluate, generate
from tests.adapters import adapted_pipeline
from tests.backbones import distance, stand_in_for_torchvision
from tests.conftest import ROOT, flags
from tests.safety import add_safety_checker

PROMPTS = ["a {} in the snow", "a red {}"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "robot.safetensors"
    save_kronecker(adapted_pipeline("sd", 4, 64, strength=0.3), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of the robot, square as they are."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        path = ROOT / "toyworld" / "photos" / "robot" / f"{number:02d}.png"
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def options(tiny_sd, tiny_clip, tiny_dino, photos, tmp_path):
    return {
        "pretrained_model_name_or_path": tiny_sd,
        "instance_data_dir": photos,
        "class_noun": "robot",
        "prompt": PROMPTS,
        "num_images": 3,
        "num_class_images": 3,
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "batch_size": 2,
        "clip_model": tiny_clip,
        "dino_model": tiny_dino,
        "output_dir": tmp_path / "out",
    }


def report(options):
    return json.loads((options["output_dir"] / "scores.json").read_text())


def pixels(path):
    return np.asarray(Image.open(path), int)


class Judge:
    """The scores once more, from files, one image at a time, by transformers and torch alone."""

    def __init__(self, clip, dino):
        self.clip, self.dino = CLIPModel.from_pretrained(clip), ViTModel.from_pretrained(dino, add_pooling_layer=False)
        self.clip_processor, self.dino_processor = map(AutoImageProcessor.from_pretrained, (clip, dino))
        self.tokenizer = AutoTokenizer.from_pretrained(clip)

    @torch.no_grad()
    def clip_of(self, path, text="robot"):
        image = self.clip_processor(Image.open(path).convert("RGB"), return_tensors="pt")
        output = self.clip(**self.tokenizer(text, return_tensors="pt"), **image)
        return output.image_embeds[0], output.text_embeds[0]

    @torch.no_grad()
    def dino_of(self, path):
        image = self.dino_processor(Image.open(path).convert("RGB"), return_tensors="pt")
        return self.dino(**image).last_hidden_state[0, 0]

    def clip_i(self, images, photos):
        return mean_cosine((self.clip_of(i)[0], self.clip_of(p)[0]) for i, p in product(images, photos))

    def clip_t(self, images, text):
        return mean_cosine(self.clip_of(image, text) for image in images)

    def likeness(self, images, photos):
        return mean_cosine((self.dino_of(i), self.dino_of(p)) for i, p in product(images, photos))

    def diversity(self, images):
        return 1 - mean_cosine(combinations(map(self.dino_of, images), 2))


def mean_cosine(pairs):
    return fmean(float(cosine_similarity(x, y, dim=0)) for x, y in pairs)


def close(ours, theirs):
    return math.isclose(ours, theirs, abs_tol=1e-5)


def test_scores_are_those_of_the_images_that_it_wrote(run_main, options, adapter, tiny_clip, tiny_dino, photos, capsys):
    run_main(evaluate, **options, adapter=adapter, seed=7)
    output, judge, scores = options["output_dir"], Judge(tiny_clip, tiny_dino), report(options)
    references = sorted(photos.iterdir())
    rows = list(csv.DictReader((output / "scores.csv").open()))
    assert [(row["model"], row["prompt"]) for row in rows] == [
        (model, prompt) for model in ("base", "adapted") for prompt in ("a sks robot in the snow", "a red sks robot")
    ]
    table = iter(rows)
    for model in ("base", "adapted"):
        means = scores["models"][model]
        for number, (text, entry) in enumerate(zip(("a robot in the snow", "a red robot"), means["by_prompt"])):
            images = [output / "images" / model / f"{number:02d}-{seed}.png" for seed in (7, 8, 9)]
            assert entry["text"] == text
            assert close(entry["clip_i"], judge.clip_i(images, references))
            assert close(entry["dino"], judge.likeness(images, references))
            assert close(entry["clip_t"], judge.clip_t(images, text))
            assert close(entry["diversity"], judge.diversity(images))
            assert {name: str(value) for name, value in entry.items()} == {
                name: value for name, value in next(table).items() if name != "model"
            }
        for name in ("clip_i", "dino", "clip_t", "diversity"):
            assert close(means[name], fmean(entry[name] for entry in means["by_prompt"]))
    assert abs(scores["models"]["base"]["dino"] - scores["models"]["adapted"]["dino"]) > 1e-3

    before, after = ([output / "images" / m / f"class-{s}.png" for s in (7, 8, 9)] for m in ("base", "adapted"))
    prior = scores["prior"]
    assert close(prior["similarity_before"], judge.likeness(before, references))
    assert close(prior["similarity_after"], judge.likeness(after, references))
    assert close(prior["diversity_before"], judge.diversity(before))
    assert close(prior["diversity_after"], judge.diversity(after))
    pairs = [(judge.dino_of(x), judge.dino_of(y)) for x, y in zip(before, after)]
    assert close(prior["distance"], 1 - mean_cosine(pairs)) and prior["distance"] > 1e-3

    assert close(scores["photos"]["dino"], mean_cosine(combinations(map(judge.dino_of, references), 2)))
    assert scores["settings"]["seed"] == 7
    printed = capsys.readouterr().out
    assert f"{len(references)} photos in " in printed
    for model in ("base", "adapted"):
        assert f"{scores['models'][model]['dino']:.3f}" in printed
    assert f"distance at one seed {prior['distance']:.3f}" in printed


def test_images_are_those_of_generate_without_and_with_the_adapter(run_main, options, adapter, tiny_sd, tmp_path):
    run_main(evaluate, **options, adapter=f"{adapter}:0.8", class_prompt="a robot, any robot")
    for model, extra in {"base": {}, "adapted": {"adapter": f"{adapter}:0.8"}}.items():
        shared = {name: options[name] for name in ("height", "width", "num_inference_steps", "num_images")}
        prompts = ["a sks robot in the snow", "a red sks robot", "a robot, any robot"]
        base = {"pretrained_model_name_or_path": tiny_sd, "output_dir": tmp_path / model}
        run_main(generate, **base, prompt=prompts, **shared, **extra)
        ours = options["output_dir"] / "images" / model
        for name in ("00-0", "00-2", "01-1", "02-0", "02-2"):
            theirs = pixels(tmp_path / model / f"{name}.png")
            assert np.abs(pixels(ours / f"{name.replace('02-', 'class-')}.png") - theirs).max() <= 1
    assert np.abs(pixels(ours / "00-0.png") - pixels(ours.with_name("base") / "00-0.png")).mean() > 1


def test_a_lora_is_scored_like_any_adapter(run_main, options, adapter, tiny_sd, tmp_path):
    base = ["--pretrained_model_name_or_path", str(tiny_sd)]
    convert.main([str(adapter), "--to", "lora", "--output", str(tmp_path / "lora.safetensors"), *base])
    scores = {}
    for name, file in {"native": adapter, "lora": tmp_path / "lora.safetensors"}.items():
        run_main(evaluate, **options | {"output_dir": tmp_path / name}, adapter=file)
        scores[name] = report({"output_dir": tmp_path / name})
    assert scores["lora"]["models"]["base"] == scores["native"]["models"]["base"]
    for score in ("clip_i", "dino", "clip_t", "diversity"):
        native, lora = (scores[name]["models"]["adapted"][score] for name in ("native", "lora"))
        assert math.isclose(native, lora, abs_tol=2e-3)


def test_a_base_model_alone_a_prompt_file_and_single_images_will_do(run_main, options, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("# two\na {} in the snow\n\na red {}\n")
    del options["prompt"]
    run_main(evaluate, **options | {"num_images": 1, "instance_token": "xyz"}, prompts=tmp_path / "prompts.txt")
    scores = report(options)
    assert list(scores["models"]) == ["base"] and scores["prior"] is None
    assert scores["models"]["base"]["diversity"] is None
    rows = scores["models"]["base"]["by_prompt"]
    assert [row["prompt"] for row in rows] == ["a xyz robot in the snow", "a red xyz robot"]
    images = {path.name for path in (options["output_dir"] / "images").rglob("*.png")}
    assert images == {"00-0.png", "01-0.png"} and not caplog.records
    (tmp_path / "prompts.txt").write_text(f"# two\n{'very ' * 18}red {{}}\n")
    run_main(evaluate, **options | {"num_images": 1, "instance_token": "xyz"}, prompts=tmp_path / "prompts.txt")
    drawn, scored = (record.getMessage() for record in caplog.records)
    assert "prompts.txt, line 2: 83 tokens, without 'xyz robot'; this loses the subject's own 'xyz'" in drawn
    assert "CLIP-T" in scored and "prompts.txt, line 2" in scored


def test_images_that_a_safety_checker_would_blacken_are_scored(run_main, options, tiny_sd, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    add_safety_checker(pipeline, threshold=-2.0)
    pipeline.save_pretrained(tmp_path / "checked")
    run_main(evaluate, **options | {"pretrained_model_name_or_path": tmp_path / "checked"})
    images = list((options["output_dir"] / "images" / "base").glob("*.png"))
    assert len(images) == 6 and all(pixels(path).any() for path in images)


def test_held_out_photos_are_compared_with_and_denoised(
    run_main, options, adapter, photos, tiny_clip, tiny_dino, tmp_path, monkeypatch, capsys
):
    sheets = []
    draw_sheet = contact_sheet.draw_sheet
    monkeypatch.setattr(contact_sheet, "draw_sheet", lambda *sheet: sheets.append(sheet) or draw_sheet(*sheet))
    run_main(evaluate, **options | {"prompt": PROMPTS[:1]}, adapter=adapter, holdout=1, denoising_pairs=4)
    output, judge, scores = options["output_dir"], Judge(tiny_clip, tiny_dino), report(options)
    held_out = sorted(photos.iterdir())[-1:]
    drawn = [output / "images" / "adapted" / f"00-{seed}.png" for seed in range(3)]
    assert close(scores["models"]["adapted"]["dino"], judge.likeness(drawn, held_out))
    losses = {model: scores["models"][model]["denoising"] for model in ("base", "adapted")}
    assert losses["base"]["whole"] > 0 and losses["base"]["whole"] != losses["adapted"]["whole"]
    assert losses["base"]["masked"] is None and scores["prior"]["drift"] > 0
    rows = list(csv.DictReader((output / "scores.csv").open()))
    assert [float(row["denoising_whole"]) for row in rows] == [loss["whole"] for loss in losses.values()]
    assert sheets[0][1][0] == "photos that were not trained on"
    printed = capsys.readouterr().out
    assert "1 photo held out (--holdout 1), in " in printed and "\nheld out" in printed and "\nphotos" not in printed
    assert f"{losses['adapted']['whole']:.4f}" in printed and f"drift {scores['prior']['drift']:.4f}" in printed

    # The same photo as a folder of its own, with a mask, and the base model's own class images as a folder
    other = tmp_path / "other"
    other.mkdir()
    (other / "held-out.png").write_bytes(held_out[0].read_bytes())
    Image.new("L", (128, 128), 255).save(other / "held-out.mask.png")
    classes = tmp_path / "class"
    classes.mkdir()
    for path in (output / "images" / "base").glob("class-*.png"):
        (classes / path.name).write_bytes(path.read_bytes())
    again = options | {"output_dir": tmp_path / "again", "prompt": PROMPTS[:1], "instance_data_dir": None}
    again = {name: value for name, value in again.items() if value is not None}
    shared = {"reference_dir": other, "class_data_dir": classes, "denoising_pairs": 4}
    run_main(evaluate, **again, adapter=adapter, **shared)
    scores = report(again)
    for model, loss in losses.items():
        denoised = scores["models"][model]["denoising"]
        assert denoised["whole"] == loss["whole"] and math.isclose(denoised["masked"], loss["whole"], rel_tol=1e-5)
    assert scores["prior"]["drift"] == json.loads((output / "scores.json").read_text())["prior"]["drift"]


def test_prompts_without_the_subject_and_lpips(
    run_main, options, adapter, photos, tiny_clip, tiny_dino, tmp_path, monkeypatch, capsys
):
    stand_in_for_torchvision(monkeypatch)
    sheets = []
    draw_sheet = contact_sheet.draw_sheet
    monkeypatch.setattr(contact_sheet, "draw_sheet", lambda *sheet: sheets.append(sheet) or draw_sheet(*sheet))
    texts = ["a red car on a beach", "a duck"]
    (tmp_path / "other.txt").write_text("\n".join(["# not of the robot", *texts]))
    run_main(
        evaluate,
        **options | {"prompt": PROMPTS[:1]},
        adapter=adapter,
        other_prompts=tmp_path / "other.txt",
        lpips="alex",
    )
    output, judge, scores = options["output_dir"], Judge(tiny_clip, tiny_dino), report(options)
    references = sorted(photos.iterdir())

    def images(model, name):
        return [output / "images" / model / f"{name}-{seed}.png" for seed in range(3)]

    others = scores["other_prompts"]
    assert [row["prompt"] for row in others["by_prompt"]] == texts
    for number, row in enumerate(others["by_prompt"]):
        before, after = (images(model, f"other-{number:02d}") for model in ("base", "adapted"))
        for when, drawn in (("before", before), ("after", after)):
            assert close(row[f"clip_t_{when}"], judge.clip_t(drawn, texts[number]))
            assert close(row[f"similarity_{when}"], judge.likeness(drawn, references))
        moved = 1 - mean_cosine((judge.dino_of(x), judge.dino_of(y)) for x, y in zip(before, after))
        assert close(row["distance"], moved) and moved > 1e-3
    assert close(others["distance"], fmean(row["distance"] for row in others["by_prompt"]))

    def diversity(paths):
        return fmean(distance(*pair) for pair in combinations(map(Image.open, paths), 2))

    rows = list(csv.DictReader((output / "scores.csv").open()))
    for model, row in zip(("base", "adapted"), rows, strict=True):
        entry = scores["models"][model]
        assert entry["lpips_diversity"] == pytest.approx(diversity(images(model, "00")), rel=1e-4)
        assert float(row["lpips_diversity"]) == entry["lpips_diversity"] == entry["by_prompt"][0]["lpips_diversity"]
    assert scores["prior"]["lpips_diversity_after"] == pytest.approx(diversity(images("adapted", "class")), rel=1e-4)

    assert sheets[0][1][-2:] == [f"{text}: base | adapted" for text in texts]
    printed = capsys.readouterr().out
    assert f"distance at one seed {others['distance']:.3f}" in printed and "other prompts" in printed
    assert f"{scores['models']['adapted']['lpips_diversity']:.3f}" in printed


def test_other_prompts_do_not_name_the_subject(run_main, options, adapter, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it loaded"))
    path = tmp_path / "other.txt"
    for text, words in {
        "a {} here": r"has \{\}",
        "Sks, in the snow": "names the subject, sks",
        "#": "it has no prompts",
    }.items():
        path.write_text(f"a car\n{text}\n" if text != "#" else text)
        with pytest.raises(ValueError, match=f"--other_prompts {path}(, line 2)?: .*{words}"):
            run_main(evaluate, **options, adapter=adapter, other_prompts=path)
    path.write_text("a robot\n")
    with pytest.raises(BaseException, match="it loaded"):
        run_main(evaluate, **options, adapter=adapter, other_prompts=path)
    assert [record.getMessage() for record in caplog.records if f"{path}, line 1" in record.getMessage()]


def test_the_base_model_s_images_are_drawn_once_for_all_adapters(run_main, options, adapter, tmp_path, monkeypatch):
    drawn = []
    draw_images = models.draw_images
    monkeypatch.setattr(
        models, "draw_images", lambda *a, prompt, **k: drawn.append(prompt) or draw_images(*a, prompt=prompt, **k)
    )

    def scores(name, **more):
        drawn.clear()
        own = (
            options | {"output_dir": tmp_path / name, "prompt": PROMPTS[:1], "holdout": 1, "denoising_pairs": 2} | more
        )
        run_main(evaluate, **own, adapter=adapter)
        return {part: value for part, value in report(own).items() if part != "settings"}

    subject, of_class = "a sks robot in the snow", "a photo of robot"
    alone = scores("alone")
    assert drawn == [subject, of_class] * 2
    cache = {"base_images_cache": tmp_path / "cache"}
    assert scores("first", **cache) == alone and drawn == [subject, of_class] * 2
    assert scores("second", **cache) == alone and drawn == [subject, of_class]  # the adapted model alone draws
    for path in (tmp_path / "second" / "images" / "base").iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / "images" / "base" / path.name).read_bytes()
    assert scores("guided", **cache, guidance_scale=5) != alone and drawn == [subject, of_class] * 2


def test_a_reference_that_was_trained_on_is_refused(run_main, options, photos, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it loaded"))
    with pytest.raises(ValueError, match="--reference_dir: 00.png is the same picture as 00.png in --instance_data"):
        run_main(evaluate, **options, reference_dir=photos)


def test_the_prior_can_be_left_out(run_main, options, adapter):
    run_main(evaluate, **options | {"num_class_images": 0}, adapter=adapter)
    assert report(options)["prior"] is None
    assert not list(options["output_dir"].rglob("class-*"))


def test_the_sheet_shows_photos_and_for_each_prompt_the_models_side_by_side(run_main, options, adapter, monkeypatch):
    sheets = []
    draw_sheet = contact_sheet.draw_sheet
    monkeypatch.setattr(contact_sheet, "draw_sheet", lambda *sheet: sheets.append(sheet) or draw_sheet(*sheet))
    run_main(evaluate, **options, adapter=adapter)
    ((rows, labels),) = sheets
    prompts = ["a sks robot in the snow", "a red sks robot", "a photo of robot"]
    assert labels == ["photos", *(f"{prompt}: base | adapted" for prompt in prompts)]
    folder = options["output_dir"] / "images"
    for row, name in zip(rows[1:], ["00", "01", "class"], strict=True):
        count = len(row) // 2
        cells = [("base", seed, row[seed]) for seed in range(count)]
        cells += [("adapted", seed, row[count + 1 + seed]) for seed in range(count)]
        for model, seed, cell in cells:
            drawn = Image.open(folder / model / f"{name}-{seed}.png")
            assert cell == drawn.resize((192, 192), Image.Resampling.BICUBIC)
        assert row[count].size == (16, 192)
    sheet = Image.open(options["output_dir"] / "sheet.png")
    assert sheet.width == max(sum(cell.width + 4 for cell in row) - 4 for row in rows)
    assert sheet.height == 4 * (192 + 21 + 10)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"instance_data_dir": "nowhere"}, "--instance_data_dir nowhere: there is no such folder"),
        ({"instance_data_dir": "empty"}, "--instance_data_dir empty: there is no readable image"),
        ({"prompt": None, "prompts": "none.txt"}, "--prompts none.txt: it has no prompts"),
        ({"prompt": None, "prompts": "nowhere.txt"}, "--prompts nowhere.txt: .*No such file"),
        ({"prompt": ["a {} here", "a photo"]}, r"the prompt 'a photo' has no \{\}, which stands for the subject"),
        ({"clip_model": "empty"}, "--clip_model empty is not a CLIP model: "),
        ({"dino_model": "nowhere"}, "--dino_model nowhere is not a DINO model: "),
        ({"reference_dir": "nowhere"}, "--reference_dir nowhere: there is no such folder"),
        ({"holdout": 3}, "--holdout 3: --instance_data_dir .* has 3 photos"),
        ({"holdout": 1, "class_data_dir": "empty"}, "--class_data_dir empty: there is no readable image"),
        ({"other_prompts": "nowhere.txt"}, "--other_prompts nowhere.txt: .*No such file"),
        ({"adapter": "none.txt"}, "none.txt"),
        ({"pretrained_model_name_or_path": "nowhere"}, "nowhere is not a base model"),
    ],
)
def test_what_is_wrong_is_refused_before_the_base_model_loads(run_main, options, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.txt").write_text("# nothing\n")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it loaded"))
    options = {name: value for name, value in (options | change).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        run_main(evaluate, **options)
    assert not options["output_dir"].exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": None}, "--prompts, a file, or --prompt"),
        ({"prompts": "a.txt"}, "--prompts, a file, or --prompt"),
        ({"num_images": 0}, "--num_images is 0; "),
        ({"num_class_images": -1}, "--num_class_images is -1; "),
        ({"batch_size": 0}, "--batch_size is 0"),
        ({"num_inference_steps": 0}, "--num_inference_steps is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"class_noun": " "}, "--class_noun is empty"),
        ({"instance_data_dir": None}, "--instance_data_dir or --reference_dir"),
        ({"holdout": 1, "reference_dir": "other"}, "--holdout and --reference_dir"),
        ({"holdout": -1}, "--holdout is -1"),
        ({"denoising_pairs": 8}, "--denoising_pairs needs"),
        ({"class_data_dir": "class"}, "--class_data_dir needs"),
        ({"class_noun": None}, "--class_noun"),
        ({"lpips": "resnet"}, "--lpips"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(run_main, options, capsys, change, words):
    options = {name: value for name, value in (options | change).items() if value is not None}
    with pytest.raises(SystemExit) as exit:
        run_main(evaluate, **options)
    assert exit.value.code == 2 and words in capsys.readouterr().err


def test_errors_of_the_command_line_are_one_line(options, tmp_path):
    options["instance_data_dir"] = "nowhere"
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *flags(options)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == "error: --instance_data_dir nowhere: there is no such folder"
