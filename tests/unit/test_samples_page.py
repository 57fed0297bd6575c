"""samples/index.html: every step of every prompt, small enough, made from the folder alone; the photos."""

import base64
import io
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dreambooth.drawing.sheet import save_sheet
from dreambooth.layout import sheet_path
from dreambooth.report import page
from dreambooth.report.page import PIXELS, SIDES, save_page
from dreambooth.report.photos import save_photo_scores, warning_of
from tests.browser import browser, needs_chromium

COLOURS = {0: "red", 10: "lime", 20: "blue"}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "samples").mkdir()
    return SimpleNamespace(output_dir=str(tmp_path))


def draw(folder, step, prompts=("a dog", "a cat"), images=2, size=64):
    rows = [[Image.new("RGB", (size, size), COLOURS[step])] * images for _ in prompts]
    save_sheet(sheet_path(folder, step), rows, prompts)


class Page(HTMLParser):
    """The pictures of a page and what else it refers to."""

    def __init__(self, text: str):
        super().__init__()
        self.images, self.addresses, self.steps = {}, [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "img":
            picture = Image.open(io.BytesIO(base64.b64decode(given["src"].partition("base64,")[2])))
            self.images[given["alt"]] = (picture, "hidden" in given)
        self.addresses += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        self.steps = given.get("data-steps", self.steps)


def written(tmp_path) -> tuple[Page, str]:
    text = (tmp_path / "samples" / "index.html").read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_has_every_image_of_every_step_and_shows_the_first_beside_the_last(config, tmp_path):
    for step in COLOURS:
        draw(tmp_path, step)
    save_page(config)
    found, text = written(tmp_path)
    names = {f"{prompt}, image {n}, step {step}" for prompt in ("a dog", "a cat") for n in (1, 2) for step in COLOURS}
    assert found.images.keys() == names and found.steps == "[10, 20]"
    for name, (picture, hidden) in found.images.items():
        step = int(name.rpartition(" ")[2])
        assert hidden == (step == 10)
        assert np.abs(np.asarray(picture, int)[96, 96] - np.asarray(Image.new("RGB", (1, 1), COLOURS[step]))).max() < 4
    assert all(address.startswith("data:image/jpeg;base64,") for address in found.addresses)
    assert not re.findall(r"https?://|@import|url\(", text)


def test_a_resumed_run_writes_the_same_page(config, tmp_path):
    for step in COLOURS:
        draw(tmp_path, step)
        save_page(config)
    _, whole = written(tmp_path)
    sheet_path(tmp_path, 20).unlink()
    save_page(config)
    found, _ = written(tmp_path)
    assert found.steps == "[10]"
    page._pictures.cache_clear()  # another process
    draw(tmp_path, 20)
    save_page(config)
    assert written(tmp_path)[1] == whole
    for sheet in (tmp_path / "samples").glob("*.png"):
        sheet.unlink()
    save_page(config)
    assert not list((tmp_path / "samples").iterdir())


def test_a_sheet_that_is_replaced_is_read_again(config, tmp_path):
    draw(tmp_path, 0)
    save_page(config)
    COLOURS[0], before = "black", COLOURS[0]
    draw(tmp_path, 0)
    COLOURS[0] = before
    save_page(config)
    assert np.asarray(written(tmp_path)[0].images["a dog, image 1, step 0"][0]).max() < 4


def test_prompts_that_changed_are_all_there_and_the_newest_first(config, tmp_path):
    draw(tmp_path, 0)
    draw(tmp_path, 10, ["<b>\"new\" & 'old'</b>", "a cat", "a cat"], images=1)
    save_page(config)
    found, text = written(tmp_path)
    prompts = re.findall('<h2 class="prompt">(.*)</h2>', text)
    assert prompts == ["&lt;b&gt;&#34;new&#34; &amp; &#39;old&#39;&lt;/b&gt;", "a cat", "a dog"]
    assert {name for name in found.images if "a cat" in name} == {
        f"a cat, image {n}, step {step}" for n in (1, 2) for step in (0, 10)
    }
    assert text.count("not drawn at step 0</div>") == 1  # of the new prompt
    assert text.count('<div class="none">not drawn at this step') == 2  # of "a dog", both images


@pytest.mark.parametrize("limit, side", [(PIXELS, 384), (7 * 256**2, 192), (1, SIDES[-1])])
def test_pictures_are_as_large_as_fits(limit, side, config, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PIXELS", limit)
    for step in (0, 10):
        draw(tmp_path, step, size=1024)
    save_page(config)
    assert {picture.size for picture, _ in written(tmp_path)[0].images.values()} == {(side, side)}


def test_damaged_sheets_and_full_disks_are_not_the_end(config, tmp_path, caplog, monkeypatch):
    draw(tmp_path, 0)
    sheet_path(tmp_path, 10).write_bytes(b"cut off")
    save_page(config)
    found, whole = written(tmp_path)
    assert len(found.images) == 4 and not caplog.text

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(page, "write_text", fail)
    save_page(config)
    assert "index.html was not written" in caplog.text and written(tmp_path)[1] == whole


@needs_chromium
def test_in_a_browser_keys_choose_the_step_and_a_phone_is_wide_enough(config, tmp_path):
    for step in COLOURS:
        draw(tmp_path, step, prompts=["a dog " * 20], size=384)
    save_photo_scores(tmp_path, ["a photo with a rather long name.jpg"] * 4, [0.7, 0.72, 1.1, 0.69], [0.5] * 4)
    save_page(config)
    shown = "[...document.querySelectorAll('.after img')].filter(i => i.offsetWidth).map(i => i.dataset.step).join()"
    with browser(tmp_path / "profile") as tab:
        for width in (1280, 400):
            tab.open((tmp_path / "samples" / "index.html").as_uri(), width)
            assert tab.value(shown) == "20,20" and tab.overflow() <= 0
            tab.press("ArrowLeft")
            tab.press("ArrowLeft")
            assert tab.value(shown) == "10,10" and tab.value("document.querySelector('output').value") == "10"
            tab.press("ArrowRight")
            assert tab.value(shown) == "20,20"


# ---- the photos ----


def test_the_page_has_the_photos_with_their_losses_and_the_warning(config, tmp_path):
    names = ["01.jpg", "<i>2.jpg", "03.jpg", "04.jpg", "odd.jpg"]
    save_photo_scores(tmp_path, names, [0.90, 0.92, 0.91, 0.89, 1.06])
    save_page(config)
    before = written(tmp_path)[1]
    save_photo_scores(tmp_path, names, [0.90, 0.92, 0.91, 0.89, 1.06], [0.70, 0.72, 0.71, 0.69, 1.25])
    save_page(config)
    after = written(tmp_path)[1]
    number = r'<td class="number">(.*?)</td>'
    for text in (before, after):
        cells = re.findall(rf'<td class="name">(.*?)</td>{number}', text)
        assert cells[1:3] == [("&lt;i&gt;2.jpg", "0.920"), ("03.jpg", "0.910")] and len(cells) == 5
        assert "odd.jpg (1.06)" in text and "0.89 to 0.92" in text
    assert len(re.findall(number, before)) == 5 and "0.720" not in before
    assert re.findall(number, after)[1::2] == ["0.700", "0.720", "0.710", "0.690", "1.250"]
    assert re.findall(r"width: ([\d.]+)%\"></span>", after)[-2:] == ["69.0", "100.0"]


@pytest.mark.parametrize(
    "ratios, odd",
    [
        ([0.9, 1.07, 0.95, 0.97], "1"),
        ([0.9, 1.07, 0.95, 0.97, 1.01], "14"),
        ([0.9, 0.99, 0.95, 1.0], ""),  # an empty prompt is as good as none
        ([0.9, float("nan"), 0.95, 0.97], ""),
        ([1.1, 0.9, 1.2, 0.9], ""),  # prompts do not help most: they tell nothing
        ([1.1], ""),
        ([], ""),
    ],
)
def test_photos_whose_prompts_harm_are_warned_of_if_prompts_help_most(ratios, odd):
    warning = warning_of("0123456789"[: len(ratios)], ratios)
    assert re.findall(r"(\d) \(", warning or "") == [*odd]
