"""The letters of the glyph classes, the split of each letter, and the letters that look alike.

The letters are those in at least eight of the twelve DejaVu text fonts. These fonts come with matplotlib, and their
character maps are correct (LastResort maps every code point to a box, the TeX fonts map letters to symbols).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import unicodedata
from typing import Any

import numpy as np

_FAMILIES = {  # upright and slanted, each regular and bold; support and query of a class differ in family
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
}
_MIN_FONTS = 8

# The split of each script. Latin and Greek are for training, Cyrillic, Georgian (Asomtavruli, Nuskhuri and Mkhedruli)
# and Lao for testing, and Armenian for model selection. The table is explicit so that a class never changes its split.
# Letters of scripts that are not listed are not used.
SCRIPTS = {
    "LATIN": "train",
    "GREEK": "train",
    "ARMENIAN": "val",
    "CYRILLIC": "test",
    "GEORGIAN": "test",
    "LAO": "test",
}
# Latin and Greek letters whose Unicode name starts with something else: superscripts, units, mathematical letters.
_LATIN_BY_ANOTHER_NAME = (
    "MODIFIER", "SUPERSCRIPT", "FEMININE", "MASCULINE", "MICRO", "OHM", "KELVIN", "PLANCK", "CARON", "DOUBLE-STRUCK",
    "TURNED", "ROMAN", "MATHEMATICAL",
)  # fmt: skip

_TWIN = 0.95  # lowest cosine at which two letters look alike
_CROSS_TWIN = 0.94  # stricter between splits, to exclude twins with another rasteriser or resolution too
_SAME_FORM = 0.7  # a font draws another form of a letter if its best cosine with another family is lower
_TEST_FLOOR = 305  # test letters are dropped for a twin in another split only while more than this number are left
_EM = 64  # pixels per em of the renderings that are compared
_SIDE = 24  # side of the square to which they are scaled


@dataclasses.dataclass(frozen=True)
class Font:
    """One font file.

    Attributes:
      path: the file.
      codes: the code points that it maps.
      family: index of its family.
      form: index of its family and slant; regular and bold share it.
    """

    path: str
    codes: frozenset[int]
    family: int
    form: int


@dataclasses.dataclass(frozen=True)
class Alphabet:
    """The letters of one split.

    Attributes:
      codes: code points, one for each class.
      groups: `[classes]`; letters that look alike share a group.
      drawn: bool `[fonts, classes]`, which fonts draw which letter.
    """

    codes: tuple[int, ...]
    groups: np.ndarray
    drawn: np.ndarray


@functools.cache
def fonts() -> tuple[Font, ...]:
    """Returns the DejaVu fonts that matplotlib ships, in a fixed order.

    Raises:
      FileNotFoundError: matplotlib was installed without its fonts.
    """
    import matplotlib  # here, so that importing metajax stays fast
    from matplotlib.ft2font import FT2Font

    folder = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for family, (stem, styles) in enumerate(_FAMILIES.items()):
        for number, style in enumerate(styles):
            path = folder / f"{stem}{style}.ttf"
            if not path.is_file():
                raise FileNotFoundError(
                    f"the glyph classes are rendered from matplotlib's fonts, and {path} is missing"
                )
            codes = frozenset(FT2Font(str(path)).get_charmap())
            found.append(Font(str(path), codes, family, form=2 * family + number // 2))
    return tuple(found)


class Renderer:
    """Draws letters of one font; `draw` returns the ink, cropped, as an 8-bit grey PIL image, or None if blank."""

    def __init__(self, font: Font, em: int):
        from PIL import ImageFont

        self._font = ImageFont.truetype(font.path, em, layout_engine=ImageFont.Layout.BASIC)
        self._em = em

    def draw(self, code: int) -> Any:
        from PIL import Image, ImageDraw

        canvas = Image.new("L", (4 * self._em, 3 * self._em))  # the widest letters take two ems
        ImageDraw.Draw(canvas).text((self._em, self._em // 2), chr(code), fill=255, font=self._font)
        box = canvas.getbbox()
        return None if box is None else canvas.crop(box)


def split_of(letter: str) -> str | None:
    """Returns the split of the script of `letter`, or None if the script is not used.

    >>> split_of("A"), split_of("ա"), split_of("ж"), split_of("א")
    ('train', 'val', 'test', None)
    """
    words = unicodedata.name(letter, "").split() or [""]
    script = next((word for word in words if word in SCRIPTS), None)  # also MODIFIER LETTER CYRILLIC EN
    if script is not None:
        return SCRIPTS[script]
    return "train" if words[0] in _LATIN_BY_ANOTHER_NAME else None


def has_accent(letter: str) -> bool:
    """Returns whether the canonical or compatibility decomposition of `letter` holds a combining mark.

    >>> has_accent("é"), has_accent("e")
    (True, False)
    """
    return any(unicodedata.category(part).startswith("M") for part in unicodedata.normalize("NFKD", letter))


def same_letter(letter: str) -> str:
    """Returns a text that upper case, lower case and styled forms of one letter have in common.

    >>> same_letter("H") == same_letter("h") == same_letter("ₕ")
    True
    """
    return unicodedata.normalize("NFKD", letter).casefold()


@functools.cache
def alphabets() -> dict[str, Alphabet]:
    """Returns the letters of every split, with their groups and the fonts that draw them.

    Two letters are twins if the cosine of their size-normalised renderings reaches the threshold in any font that has
    both. The ink box is cropped and fitted to a square in two ways, stretched and centred; the larger cosine counts.
    Upper case, lower case and styled forms of one letter count as twins. Of twins in two splits one is dropped; the
    letter with the most twins in other splits is dropped first. Twins within a split share a group, also if they are
    twins only through a third letter.

    A font does not draw a letter if its form of the letter resembles that of no other family (the cursive forms of
    Cyrillic in the italics). A letter is dropped if this leaves a single family.
    """
    counts = collections.Counter(code for font in fonts() for code in font.codes)
    codes = [
        code
        for code in sorted(counts)
        if counts[code] >= _MIN_FONTS
        and unicodedata.category(chr(code)).startswith("L")
        and split_of(chr(code)) is not None
        and not has_accent(chr(code))
    ]
    vectors = _size_normalised(codes)
    has_ink = vectors.any(axis=(0, 3))  # some mapped letters are blank
    drawn = has_ink & _shares_form(vectors)
    family = np.array([font.family for font in fonts()])
    families = sum(drawn[family == each].any(axis=0).astype(int) for each in range(len(_FAMILIES)))
    usable = (np.count_nonzero(has_ink, axis=0) >= _MIN_FONTS) & (families >= 2)

    codes = [code for code, use in zip(codes, usable, strict=True) if use]
    names = np.unique([same_letter(chr(code)) for code in codes], return_inverse=True)[1]
    cosine = (names[:, None] == names).astype(np.float32)
    for square in vectors[:, :, usable]:
        for font_vectors in square:
            np.maximum(cosine, font_vectors @ font_vectors.T, out=cosine)
    split = np.array([split_of(chr(code)) for code in codes])
    kept = _without_cross_twins(cosine >= _CROSS_TWIN, split)
    result = {}
    for name in ("train", "val", "test"):
        rows = np.flatnonzero(kept & (split == name))
        groups = _components(cosine[np.ix_(rows, rows)] >= _TWIN)
        result[name] = Alphabet(tuple(codes[row] for row in rows), groups, drawn[:, usable][:, rows])
    return result


def _size_normalised(codes: list[int]) -> np.ndarray:
    """Returns renderings as unit vectors, `[2 squares, fonts, letters, pixels]`; 0 if a font lacks a letter."""
    from PIL import Image

    vectors = np.zeros([2, len(fonts()), len(codes), _SIDE * _SIDE], np.float32)
    for number, font in enumerate(fonts()):
        renderer = Renderer(font, _EM)
        for row, code in enumerate(codes):
            ink = renderer.draw(code) if code in font.codes else None
            if ink is None:
                continue
            side = max(ink.size)
            centred = Image.new("L", (side, side))
            centred.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
            for square, image in enumerate((ink, centred)):  # the ink is stretched to the square by resize
                small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32).ravel()
                vectors[square, number, row] = small / np.linalg.norm(small)
    return vectors


def _shares_form(vectors: np.ndarray) -> np.ndarray:
    """Returns which fonts, `[fonts, letters]`, draw a letter in a form that another family also has.

    Regular and bold of one family and slant share a form and are judged together, by their best cosine.
    """
    family = np.array([font.family for font in fonts()])
    by_letter = vectors.transpose(0, 2, 1, 3)
    cosine = np.matmul(by_letter, by_letter.swapaxes(2, 3)).max(axis=0)  # [letters, fonts, fonts]
    best = np.where(family[:, None] != family, cosine, 0).max(axis=2)
    form = np.array([font.form for font in fonts()])
    return np.stack([best[:, form == each].max(axis=1) >= _SAME_FORM for each in form])


def _without_cross_twins(twins: np.ndarray, split: np.ndarray) -> np.ndarray:
    """Returns a mask of letters in which no two letters of different splits are twins."""
    conflicts = twins & (split[:, None] != split)
    kept = np.ones(len(split), bool)
    preference = np.select([split == "train", split == "test"], [2, 1], 0)  # among equals: train is the largest split
    while True:
        degree = np.count_nonzero(conflicts, axis=1)
        order = np.where(degree > 0, 3 * degree + preference, -1)
        if np.count_nonzero(kept & (split == "test")) <= _TEST_FLOOR:
            order[split == "test"] = -1
        worst = int(order.argmax())
        if order[worst] < 0:
            return kept
        kept[worst] = False
        conflicts[worst] = conflicts[:, worst] = False


def _components(linked: np.ndarray) -> np.ndarray:
    """Numbers the connected components of a symmetric boolean matrix."""
    labels = np.full(len(linked), -1)
    count = 0
    for start in range(len(linked)):
        if labels[start] >= 0:
            continue
        reached = np.zeros(len(linked), bool)
        reached[start] = True
        while True:
            wider = reached | linked[reached].any(axis=0)
            if np.array_equal(wider, reached):
                break
            reached = wider
        labels[reached] = count
        count += 1
    return labels
