"""scripts/make_masks.py on a stand-in for rembg, which has the functions of rembg 2.0.86 that are called."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from dreambooth.data.masks import REMBG
from dreambooth.errors import SaveError, UserError
from scripts import make_masks
from tests.conftest import ROOT
from tests.unit.test_photos import BLUE, read, warnings_in

SIZE = (64, 32)
SKY, DOG = BLUE, (220, 160, 40)


def picture(dog=(0, 0, 32, 16)) -> Image.Image:
    """A photo of a dog: a rectangle, left, top, right, bottom, in blocks of 16 px, which JPEG keeps apart."""
    image = Image.new("RGB", SIZE, SKY)
    image.paste(DOG, dog)
    return image


def find_dog(image):
    """What the models do: one mask of what looks like a dog."""
    red, _, blue = image.convert("RGB").split()
    return [ImageOps.invert(blue.point(lambda value: 255 * (value > 128))).convert("L")]


class StandIn(ModuleType):
    """rembg's interface: a session, which masks upright images, and `remove`, which turns them upright before."""

    def __init__(self, predict=find_dog):
        super().__init__("rembg")
        self.predict, self.models, self.calls = predict, [], 0

    def new_session(self, model_name="bria-rmbg", *args, sess_opts=None, **kwargs):
        if model_name == "no-such-model":
            raise ValueError(f"No session class found for model '{model_name}'")
        self.models.append(model_name)
        return SimpleNamespace(predict=self.predict)

    def remove(self, data, alpha_matting=False, *, session=None, only_mask=False, post_process_mask=False):
        assert isinstance(data, Image.Image) and only_mask
        self.calls += 1
        masks = session.predict(ImageOps.exif_transpose(data))
        whole = Image.new(masks[0].mode, (data.width, sum(mask.height for mask in masks)))
        for number, mask in enumerate(masks):
            whole.paste(mask, (0, number * mask.height))
        return whole


@pytest.fixture
def rembg(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "rembg", module)
    return module


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script on a folder, by default of one photo, a.jpg."""
    (tmp_path / "photos").mkdir()
    picture().save(tmp_path / "photos" / "a.jpg")

    def run(*flags):
        argv = ["make_masks.py", f"--instance_data_dir={tmp_path / 'photos'}", f"--output_dir={tmp_path / 'sheet'}"]
        monkeypatch.setattr(sys, "argv", [*argv, *flags])
        make_masks.main()

    return run


def test_training_finds_the_masks_where_the_subject_is(run, rembg, tmp_path, capsys):
    photos = tmp_path / "photos"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture(dog=(0, 0, 16, 32)).save(photos / "turned.jpg", exif=exif)
    cut_out = picture(dog=(0, 0, 64, 32)).convert("RGBA")
    cut_out.putalpha(0)
    cut_out.paste((*DOG, 255), (0, 0, 48, 32))
    cut_out.save(photos / "cut out.png")
    Image.fromarray(np.full((40, 40), 4096, np.uint16)).save(photos / "grey16.png")
    run("--model", "isnet-general-use")
    assert rembg.models == ["isnet-general-use"]
    found = {photo.path.name: photo for photo in read(photos)}
    assert all(photo.mask.shape == photo.pixels.shape[:2] for photo in found.values())
    means = {name: round(photo.mask.mean() / 255, 2) for name, photo in found.items()}
    assert means == {"a.jpg": 0.25, "cut out.png": 0.75, "grey16.png": 1, "turned.jpg": 0.25}
    assert found["turned.jpg"].mask[:7].min() == 255 and found["turned.jpg"].mask[9:].max() == 0  # the top, upright
    said = capsys.readouterr().out
    assert "a.jpg: 25% is subject; a.mask.png written" in said and "cut out.png: 75%" in said
    sheet = np.asarray(Image.open(tmp_path / "sheet" / "sheet.png")).astype(int)
    seen = [bool((abs(sheet - colour).max(axis=2) < 20).any()) for colour in (DOG, SKY)]
    assert seen == [True, False]  # what is masked out is covered


def test_masks_that_are_there_stay_unless_they_are_to_be_replaced(run, rembg, tmp_path, capsys):
    theirs = tmp_path / "photos" / "a-masklabel.png"
    Image.new("L", SIZE, 255).save(theirs)
    before = theirs.read_bytes()
    run()
    assert "a.jpg: 100% is subject; a-masklabel.png kept; --overwrite" in capsys.readouterr().out
    assert rembg.models == [] and theirs.read_bytes() == before  # no model is loaded for nothing
    run("--overwrite")
    assert [path.name for path in sorted((tmp_path / "photos").iterdir())] == ["a-masklabel.png", "a.jpg"]
    assert read(tmp_path / "photos")[0].mask.mean() < 128


def test_a_mask_that_cannot_be_replaced_in_place_gives_way(run, rembg, tmp_path):
    Image.new("L", SIZE, 255).save(tmp_path / "photos" / "a.mask.jpg")
    run("--overwrite")
    assert read(tmp_path / "photos")[0].mask.mean() < 128


def test_photos_that_differ_in_their_suffix_alone_have_masks_of_their_own(run, rembg, tmp_path):
    photos = tmp_path / "photos"
    picture(dog=(32, 0, 64, 32)).save(photos / "A.png")
    run()
    assert {path.name for path in photos.glob("*.mask.png")} == {"a.jpg.mask.png", "A.png.mask.png"}
    assert [round(photo.mask.mean()) for photo in read(photos)] == [128, 64]
    (photos / "A.png").rename(photos / "a.png")
    for mask in photos.glob("*.mask.png"):
        mask.unlink()
    Image.new("L", SIZE, 255).save(photos / "a.mask.png")
    with pytest.raises(UserError, match="a.mask.png is the mask of a.jpg and of a.png"):
        run("--overwrite")
    assert rembg.calls == 2


@pytest.mark.parametrize(
    "dog, words, written",
    [
        ((0, 0, 1, 1), "only 0.0% is subject", True),
        ((0, 0, 64, 31), "96.9% is subject", True),
        (None, "no subject", False),
    ],
)
def test_a_doubtful_mask_is_warned_of(run, rembg, tmp_path, caplog, dog, words, written):
    picture(dog=dog or (0, 0, 0, 0)).save(tmp_path / "photos" / "b.png")
    run()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"b.png: {words}")
    assert (tmp_path / "photos" / "b.mask.png").exists() == written
    assert [photo.mask is not None for photo in read(tmp_path / "photos")] == [True, written]


def test_a_damaged_photo_is_skipped(run, rembg, tmp_path, caplog):
    (tmp_path / "photos" / "b.jpg").write_bytes(b"damaged")
    run()
    assert "skipped unreadable images (b.jpg: it is not an image" in "".join(warnings_in(caplog))
    assert (tmp_path / "photos" / "a.mask.png").exists()


@pytest.mark.parametrize("reason", ["no rembg", "no onnxruntime"])
def test_without_rembg_a_line_says_what_to_install(run, monkeypatch, capsys, tmp_path, reason):
    monkeypatch.setitem(sys.modules, "rembg", None)
    if reason == "no onnxruntime":  # rembg then prints advice and ends the program
        (tmp_path / "rembg.py").write_text("print('advice')\nraise SystemExit(1)\n")
        monkeypatch.delitem(sys.modules, "rembg")
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"pip install '{REMBG}'".replace("[", r"\[")) as error:
        run()
    assert "\n" not in str(error.value) and error.value.exit_code == 2 and not capsys.readouterr().out


def test_what_a_model_cannot_do_is_an_error_that_names_it(run, rembg, tmp_path):
    with pytest.raises(UserError, match="--model no-such-model: No session class found"):
        run("--model", "no-such-model")
    rembg.predict = lambda image: 3 * find_dog(image)  # as u2net_cloth_seg
    with pytest.raises(UserError, match="--model u2net makes several masks"):
        run()
    rembg.predict = lambda image: {}["sam_prompt"]
    with pytest.raises(UserError, match="--model u2net: .*sam_prompt"):
        run()
    assert not [*(tmp_path / "photos").glob("*.mask.png")]


def test_a_mask_is_written_whole_or_not_at_all(run, rembg, tmp_path, monkeypatch):
    def full(image, path, **how):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(SaveError, match="a.mask.png cannot be written: No space left"):
        run()
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_the_sheet_does_not_become_a_photo(run, rembg, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(f"--output_dir={tmp_path / 'photos'}/")
    assert end.value.code == 2 and "--output_dir" in capsys.readouterr().err


def test_what_is_to_be_installed_is_the_same_everywhere():
    for name in ("scripts/make_masks.py", "docs/training.md"):
        assert f"pip install '{REMBG}'" in (ROOT / name).read_text()
