"""Words in pictures: each in the first font that has all of it, Pillow's own or one that is installed."""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

from PIL import ImageDraw, ImageFont

# Pillow's own font has ASCII and little else. These are files that come with Linux, Windows and macOS; ~ is a space
INSTALLED = """
DejaVuSans.ttf NotoSans-Regular.ttf FreeSans.ttf segoeui.ttf arial.ttf Arial.ttf NotoSansCJK-Regular.ttc
NotoSansCJKsc-Regular.otf NotoSansSC-Regular.otf SourceHanSansSC-Regular.otf wqy-microhei.ttc wqy-zenhei.ttc
DroidSansFallbackFull.ttf ipaexg.ttf ipag.ttf TakaoGothic.ttf NanumGothic.ttf msyh.ttc simsun.ttc YuGothM.ttc
meiryo.ttc msgothic.ttc malgun.ttf PingFang.ttc STHeiti~Medium.ttc Hiragino~Sans~GB.ttc AppleSDGothicNeo.ttc
AppleGothic.ttf Arial~Unicode.ttf arialuni.ttf NotoSansArabic-Regular.ttf NotoSansHebrew-Regular.ttf
NotoSansDevanagari-Regular.ttf NotoSansThai-Regular.ttf Nirmala.ttc NotoEmoji-Regular.ttf seguiemj.ttf unifont.otf
""".split()
NO_CHARACTER = "\U0010ffff"  # no font has it, so it shows what a font draws for what it lacks
LACKING = "…"  # stands for characters that no font has


def draw_text(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: str, size: int) -> None:
    """Draw a line of text of `size` px whose top left corner is (x, y)."""
    baseline = y + _font(size).getmetrics()[0]
    for font, run in _runs(text, size):
        draw.text((x, baseline), run, fill=colour, font=font, anchor="ls")
        x += font.getlength(run)


def text_width(text: str, size: int) -> float:
    """Return the width of a line of text, px."""
    return sum(font.getlength(run) for font, run in _runs(text, size))


def legible(text: str, size: int) -> str:
    """Return a text with LACKING for each run of characters that no font has."""
    runs = groupby(_letters(text), key=lambda letter: _font_of(letter, size) is not None)
    return "".join("".join(run) if known else LACKING for known, run in runs)


def font_files(text: str, size: int) -> list[str]:
    """Return the files of the installed fonts in which a text is written here, Pillow's own font apart."""
    files = (font.path for font, _ in _runs(text, size))
    return [*dict.fromkeys(file for file in files if isinstance(file, str))]


def _letters(text: str) -> list[str]:
    """Return the characters of a text, each with the marks that belong to it, without those that only steer others."""
    letters: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(character)
        if kind.startswith("M") and letters:
            letters[-1] += "" if "\ufe00" <= character <= "\ufe0f" else character  # those choose one of its forms
        elif kind != "Cf":  # joins others, or sets their direction
            letters.append(character)
    return letters


def _runs(text: str, size: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
    """Yield the parts of a text in one font each. A space in a part belongs to it: words may run from right to left."""
    letters, fonts = _letters(text), []
    for _, letters_of_word in groupby(letters, key=str.isspace):
        word = list(letters_of_word)
        whole = _font_of("".join(word), size)
        fonts += [whole or _font_of(letter, size) or _font(size) for letter in word]
    for place in range(1, len(letters) - 1):
        if letters[place].isspace() and fonts[place - 1] is fonts[place + 1]:
            fonts[place] = fonts[place - 1]
    for font, run in groupby(zip(fonts, letters), key=lambda pair: pair[0]):
        yield font, "".join(letter for _, letter in run)


@lru_cache(maxsize=4096)
def _font_of(word: str, size: int) -> ImageFont.FreeTypeFont | None:
    """Return the first font that has all characters of a word, None if none has."""
    if _has(_font(size), word):
        return _font(size)
    return next((font for font in _installed(size) if _has(font, word)), None)


def _has(font: ImageFont.FreeTypeFont, word: str) -> bool:
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)  # the other one puts lone marks on a circle
    lacking = plain.getmask(NO_CHARACTER)
    return word.isspace() or all(
        character.isprintable() and not _same(plain.getmask(character), lacking) for character in word
    )


def _same(left: Any, right: Any) -> bool:
    return left.size == right.size and bytes(left) == bytes(right)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # all wheels of Pillow have FreeType
    return font


@lru_cache
def _installed(size: int) -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for name in INSTALLED:
        try:
            fonts.append(ImageFont.truetype(name.replace("~", " "), size))  # looks in the system's folders
        except OSError:
            continue
    return fonts
