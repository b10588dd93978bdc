"""The embedded default data: characters of many scripts, rendered from the fonts that matplotlib ships."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

import numpy as np

from metajax.core import _validate
from metajax.data import _cache
from metajax.data._source import SPLITS, ClassSource
from metajax.data.sources import _fonts

_VERSION = 2  # of the arrays that this file and _fonts create; part of the cache key
_SEED = 2017
_MIN_SIZE = 8
_INK = 0.7  # longer side of the ink box over the side of the image
# Jitter, uniform within these bounds: small enough that the ink never leaves the image.
_ROTATION = math.radians(8)
_SHEAR = 0.1
_SCALE = 0.1
_SHIFT = 0.05  # of the side of the image


def glyphs(split: str = "train", *, size: int = 28, per_family: int = 16) -> ClassSource:
    """Returns a source of letters of many scripts in up to 12 fonts; nothing is downloaded.

    The classes are the letters (Unicode category L) in at least 8 of the DejaVu fonts, without accented letters. The
    splits are by script: Latin and Greek for training, Armenian for validation, Cyrillic, Georgian and Lao for testing.
    Letters that look alike (a cosine of at least 0.95 of the size-normalised renderings in any font, such as Latin A,
    Greek Alpha and Cyrillic A) never occur in two splits. Within a split they share an entry of `groups`, so they never
    occur in the same episode; the same holds for upper and lower case of a letter. `nodes` are the scripts. `families`
    are DejaVu Sans, Sans Mono and Serif; support and query of a class come from different families. A font is not used
    for a letter if its form differs from that of all other families (DejaVu Serif Italic: cursive Cyrillic).

    The longer side of each letter is 70 % of the side of the image. Letters are drawn with light affine jitter
    (rotation up to 8 degrees, shear and scale up to 10 %, shift up to 5 % of the side). The arrays depend only on the
    arguments and the installed fonts. The first call for a split takes about three seconds; later calls read the
    arrays from the cache of decoded data (the folder METAJAX_CACHE, by default ~/.cache/metajax).

    Args:
      split: "train", "val" or "test".
      size: side of the images in pixels, at least 8.
      per_family: number of images of a letter in each family, at least 2; every class has 2 or 3 families.

    Returns:
      A source whose `inputs` are uint8 `[n, size, size, 1]`, ink 255 on 0, and whose class names are Unicode names.

    Raises:
      ValueError: an argument is out of its range.
      FileNotFoundError: matplotlib was installed without its fonts.

    >>> source = glyphs("val")
    >>> source.inputs.shape[1:], source.inputs.dtype, source.class_names[0]
    ((28, 28, 1), dtype('uint8'), 'ARMENIAN CAPITAL LETTER BEN')
    """
    _validate.one_of("split", split, SPLITS)
    size = _validate.int_at_least("size", size, _MIN_SIZE)
    per_family = _validate.int_at_least("per_family", per_family, 2)
    arrays = _cache.cached(_key(split, size, per_family), lambda: _render(split, size, per_family))
    names = tuple(unicodedata.name(chr(code)) for code in arrays["codes"])
    return ClassSource(
        "glyphs",
        split,
        arrays["inputs"],
        arrays["labels"],
        names,
        arrays["groups"],
        arrays["families"],
        _scripts(names),
    )


def _scripts(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Returns the classes of each script; signs and mathematical letters have no script."""
    scripts: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        script = next((word for word in name.split() if word in _fonts.SCRIPTS), None)
        if script is not None:
            scripts.setdefault(script, []).append(index)
    return scripts


def _key(split: str, size: int, per_family: int) -> str:
    """Returns all that the arrays depend on; the fonts come with matplotlib, the rasteriser with Pillow."""
    import matplotlib
    import PIL

    versions = f"matplotlib {matplotlib.__version__}, pillow {PIL.__version__}, unicode {unicodedata.unidata_version}"
    return f"glyphs {split} {size} {per_family}, version {_VERSION}, {versions}"


def _render(split: str, size: int, per_family: int) -> dict[str, np.ndarray]:
    """Draws all images of a split, letter by letter."""
    alphabet = _fonts.alphabets()[split]
    fonts = _fonts.fonts()
    em = max(64, 2 * size)
    images: list[list[np.ndarray]] = [[] for _ in alphabet.codes]
    families: list[list[int]] = [[] for _ in alphabet.codes]
    # Seeded by the code point, so that a letter looks the same whatever the other letters are.
    jitter = [
        np.random.default_rng([_SEED, code]).uniform(-1, 1, [len(fonts), per_family, 5]).tolist()
        for code in alphabet.codes
    ]
    shares = _shares(alphabet.drawn, np.array([font.family for font in fonts]), per_family)
    for number, font in enumerate(fonts):
        renderer = _fonts.Renderer(font, em)
        for row in np.flatnonzero(shares[number]):
            ink = renderer.draw(alphabet.codes[row])
            count = shares[number, row]
            images[row].extend(_jittered(ink, size, draw) for draw in jitter[row][number][:count])
            families[row].extend([font.family] * count)
    counts = [len(each) for each in images]
    return {
        "inputs": np.stack([image for each in images for image in each])[..., None],
        "labels": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        "families": np.array([family for each in families for family in each], np.int32),
        "groups": alphabet.groups.astype(np.int32),
        "codes": np.array(alphabet.codes, np.int32),
    }


def _shares(drawn: np.ndarray, family: np.ndarray, per_family: int) -> np.ndarray:
    """Returns the number of images of each font and letter, `[fonts, letters]`; a family's fonts share its images."""
    shares = np.zeros(drawn.shape, int)
    for each in np.unique(family):
        inside = drawn[family == each]
        whole, rest = np.divmod(per_family, np.maximum(np.count_nonzero(inside, axis=0), 1))
        shares[family == each] = inside * (whole + (np.cumsum(inside, axis=0) <= rest))
    return shares


def _jittered(ink: Any, size: int, draw: list[float]) -> np.ndarray:
    """Centres the ink and applies one affine jitter; `draw` holds five numbers in [-1, 1]."""
    from PIL import Image

    fine = 2 * size  # drawn at twice the size and averaged: PIL's affine transform does not antialias
    scale = _INK * fine / max(ink.size) * (1 + _SCALE * draw[0])
    cos, sin = math.cos(_ROTATION * draw[1]), math.sin(_ROTATION * draw[1])
    shear = _SHEAR * draw[2]
    # Ink to image is scale * rotation @ [[1, shear], [0, 1]]; PIL wants image to ink.
    a, b = (cos + shear * sin) / scale, (sin - shear * cos) / scale
    c, d = -sin / scale, cos / scale
    x, y = (fine * (0.5 + _SHIFT * shift) for shift in draw[3:])
    padded = Image.new("L", (ink.width + 2, ink.height + 2))  # adds a rim, since interpolation ends at the border
    padded.paste(ink, (1, 1))
    coefficients = (a, b, padded.width / 2 - a * x - b * y, c, d, padded.height / 2 - c * x - d * y)
    image = padded.transform((fine, fine), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(image.reduce(2))
