"""The embedded glyph classes: counts, separation of scripts and of letters that look alike, fonts, cache."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import unicodedata

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from PIL import Image, ImageDraw, ImageFont

from metajax.data._episodes import episode
from metajax.data._source import SPLITS, ClassSource
from metajax.data._spec import EpisodeSpec
from metajax.data.sources._fonts import alphabets, fonts
from metajax.data.sources._glyphs import _shares, glyphs

_FOLDER = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_FONTS = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic")


@pytest.fixture(scope="module")
def sources() -> dict[str, ClassSource]:
    return {split: glyphs(split) for split in SPLITS}


def _letters(source: ClassSource) -> list[str]:
    return [unicodedata.lookup(name) for name in source.class_names]


def _digest(source: ClassSource) -> str:
    parts = (source.inputs, source.labels, source.groups, source.families)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + repr(source.class_names).encode()).hexdigest()


def _rows(source: ClassSource, spec: EpisodeSpec, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the examples of one episode: support `[ways, shots]`, query `[ways, queries]`."""
    indexed = dataclasses.replace(source, inputs=np.arange(len(source.labels)))
    support, query = episode(indexed, spec, seed=seed, index=0)
    return support.inputs.reshape(spec.ways, -1), query.inputs.reshape(spec.ways, -1)


def _render(letter: str, font: str, em: int, side: int) -> np.ndarray:
    """A size-normalised rendering written without the module under test: unit length, stretched to a square."""
    face = ImageFont.truetype(str(_FOLDER / f"{font}.ttf"), em)
    canvas = Image.new("L", (6 * em, 4 * em))
    ImageDraw.Draw(canvas).text((2 * em, em), letter, fill=255, font=face)
    ink = np.asarray(canvas, np.float64)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    small = np.asarray(Image.fromarray(ink.astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS), np.float64)
    return small.ravel() / np.linalg.norm(small)


def _cosines(first: list[str], second: list[str], font: str, em: int = 80, side: int = 28) -> np.ndarray:
    left = np.stack([_render(letter, font, em, side) for letter in first])
    right = np.stack([_render(letter, font, em, side) for letter in second])
    return left @ right.T


def test_counts_and_form(sources: dict[str, ClassSource]) -> None:
    assert sources["train"].num_classes >= 450
    assert sources["val"].num_classes >= 40
    assert sources["test"].num_classes >= 300
    for split, source in sources.items():
        assert (source.name, source.split) == ("glyphs", split)
        assert source.inputs.dtype == np.uint8
        assert source.inputs.shape[1:] == (28, 28, 1)
        assert min(len(rows) for rows in source.members) >= 24
        assert np.percentile(source.inputs, [0, 50, 99]).tolist() == [0, 0, 255]  # ink is bright
        assert (source.inputs.reshape(len(source.inputs), -1).max(axis=1) > 128).all()  # none is blank
        assert len(np.unique(source.groups)) >= 25
        source.check(EpisodeSpec(20, 5, 15))


def test_letters_of_at_least_eight_fonts_without_accents(sources: dict[str, ClassSource]) -> None:
    from fontTools.ttLib import TTFont  # of matplotlib's own dependencies

    maps = [TTFont(path).getBestCmap() for path in _FOLDER.glob("DejaVu*.ttf") if "Display" not in path.name]
    assert len(maps) == 12
    for source in sources.values():
        for letter in _letters(source):
            assert unicodedata.category(letter).startswith("L")
            assert not any(unicodedata.category(part) == "Mn" for part in unicodedata.normalize("NFKD", letter))
            assert sum(ord(letter) in mapped for mapped in maps) >= 8, letter


def test_splits_share_no_script_and_no_letter(sources: dict[str, ClassSource]) -> None:
    letters = {split: _letters(source) for split, source in sources.items()}
    scripts = {"train": {"LATIN", "GREEK"}, "val": {"ARMENIAN"}, "test": {"CYRILLIC", "GEORGIAN", "LAO"}}
    for split, source in sources.items():
        foreign = set().union(*(scripts[other] for other in SPLITS if other != split))
        assert not [name for name in source.class_names if foreign & set(name.split())]
    folded = {
        split: {unicodedata.normalize("NFKD", letter).casefold() for letter in letters[split]} for split in SPLITS
    }
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not set(letters[a]) & set(letters[b])
        assert not folded[a] & folded[b]


@pytest.mark.parametrize("font", _FONTS)
def test_no_twins_in_two_splits(sources: dict[str, ClassSource], font: str) -> None:
    """Another em, another side and another filter than those that chose the letters."""
    from fontTools.ttLib import TTFont

    mapped = TTFont(_FOLDER / f"{font}.ttf").getBestCmap()
    has = {split: [x for x in _letters(source) if ord(x) in mapped] for split, source in sources.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if has[a] and has[b]:
            cosines = _cosines(has[a], has[b], font)
            worst = np.unravel_index(cosines.argmax(), cosines.shape)
            assert cosines.max() < 0.95, (has[a][worst[0]], has[b][worst[1]], cosines.max())


def test_known_twins_are_found() -> None:
    """The measure that the test above uses does see the twins that were taken out."""
    cyrillic_a, zhe, armenian_oh = map(
        unicodedata.lookup,
        ("CYRILLIC CAPITAL LETTER A", "CYRILLIC CAPITAL LETTER ZHE", "ARMENIAN CAPITAL LETTER OH"),
    )
    assert _cosines(["A"], [cyrillic_a], "DejaVuSans").item() > 0.99
    assert _cosines(["O"], [armenian_oh], "DejaVuSans").item() >= 0.95
    assert _cosines(["A"], [zhe], "DejaVuSans").item() < 0.9


@pytest.mark.parametrize("split", SPLITS)
def test_no_twins_and_no_cases_of_one_letter_in_an_episode(sources: dict[str, ClassSource], split: str) -> None:
    source = sources[split]
    letters = _letters(source)
    twins = _cosines(letters, letters, "DejaVuSans") >= 0.95
    folded = np.array([unicodedata.normalize("NFKD", letter).casefold() for letter in letters])
    forbidden = twins | (folded[:, None] == folded)
    np.fill_diagonal(forbidden, False)
    assert forbidden.sum() > 20  # there is something to avoid
    spec = EpisodeSpec(ways=20, shots=1, queries=1)
    for seed in range(200):
        support, _ = _rows(source, spec, seed)
        classes = source.labels[support[:, 0]]
        assert len(set(classes.tolist())) == 20
        assert not forbidden[np.ix_(classes, classes)].any()


@pytest.mark.parametrize("shots", [1, 5])
def test_support_and_query_come_from_different_families(sources: dict[str, ClassSource], shots: int) -> None:
    for source in sources.values():
        for seed in range(100):
            support, query = _rows(source, EpisodeSpec(5, shots, 15), seed)
            for mine, others in zip(support, query, strict=True):
                assert not set(source.families[mine]) & set(source.families[others])


def test_every_class_has_as_many_images_in_each_of_two_or_three_families(sources: dict[str, ClassSource]) -> None:
    for source in sources.values():
        for rows in source.members:
            counts = np.bincount(source.families[rows])
            assert counts[counts > 0].tolist() in ([16, 16], [16, 16, 16])


def test_images_of_a_family_are_spread_over_the_fonts_that_draw_the_letter() -> None:
    drawn = np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    shares = _shares(drawn, np.array([0, 0, 0, 1]), 16)
    assert shares.tolist() == [[6, 8, 0], [5, 8, 0], [5, 0, 0], [16, 16, 16]]


def test_other_forms_of_a_letter_are_not_drawn() -> None:
    """DejaVu Serif Italic draws the cursive Cyrillic ghe, which has nothing in common with the upright one."""
    alphabet = alphabets()["test"]
    names = [pathlib.Path(font.path).stem for font in fonts()]
    italics = ["DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"]
    for letter, absent in (("CYRILLIC SMALL LETTER GHE", italics), ("CYRILLIC SMALL LETTER ZHE", [])):
        drawn = alphabet.drawn[:, alphabet.codes.index(ord(unicodedata.lookup(letter)))]
        assert [name for name, used in zip(names, drawn, strict=True) if not used] == absent
    assert ord("Ⴀ") not in alphabet.codes  # sans and serif share no form of it


def test_images_show_their_letter() -> None:
    """The mean image of a class matches the outline that matplotlib itself draws, better than other letters do."""
    source = glyphs("test")
    letters = ["Ж", "Ю", "Ⴃ", "ჭ", "ຖ"]
    grid = np.stack(np.meshgrid(np.arange(28) + 0.5, np.arange(28) + 0.5), axis=-1).reshape(-1, 2)
    outlines, means = [], []
    for letter in letters:
        path = TextPath((0, 0), letter, prop=FontProperties(fname=str(_FOLDER / "DejaVuSans.ttf")))
        low, high = path.get_extents().min, path.get_extents().max
        points = (grid - 14) * (high - low).max() / (0.7 * 28) * [1, -1] + (low + high) / 2  # text has y upwards
        inside = [Path(polygon).contains_points(points) for polygon in path.to_polygons()]
        outlines.append(np.sum(inside, axis=0) % 2.0)  # counters are not ink
        rows = source.members[_letters(source).index(letter)]
        means.append(source.inputs[rows[:4]].mean(axis=0).ravel())  # those of DejaVu Sans, regular
    table = np.corrcoef(outlines, means)[: len(letters), len(letters) :]
    assert table.argmax(axis=1).tolist() == list(range(len(letters)))
    assert np.diag(table).min() > 0.5


def test_jitter_moves_the_ink_but_keeps_it_inside(sources: dict[str, ClassSource]) -> None:
    for source in sources.values():
        images = source.inputs[..., 0].astype(float)
        border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
        assert border.mean() < 0.01
        assert len({image.tobytes() for image in source.inputs}) == len(images)  # no two are equal
        weight = images.sum(axis=(1, 2))
        centre = (images.sum(axis=1) * np.arange(28)).sum(axis=1) / weight
        spread = [centre[rows[:4]].std() for rows in source.members]  # one letter in one font or two
        assert 0.2 < np.mean(spread) < 2.0


def test_fresh_and_cached_arrays_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    digests = []
    for folder in ("one", "two", "two"):  # fresh, fresh, cached
        monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / folder))
        digests.append(_digest(glyphs("val")))
    monkeypatch.setenv("METAJAX_CACHE", "")
    digests.append(_digest(glyphs("val")))
    assert len(set(digests)) == 1
    (stored,) = (tmp_path / "two").iterdir()
    stored.write_bytes(stored.read_bytes()[:1000])
    monkeypatch.setenv("METAJAX_CACHE", str(tmp_path / "two"))
    assert _digest(glyphs("val")) == digests[0]
    assert stored.stat().st_size > 1000  # made anew


def test_size_and_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAJAX_CACHE", "")
    source = glyphs("val", size=20, per_family=8)
    assert source.inputs.shape == (24 * source.num_classes, 20, 20, 1)
    with pytest.raises(ValueError, match="shots \\+ queries"):
        source.check(EpisodeSpec(5, 10, 15))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "training"}, "split must be one of 'train', 'val', 'test', got 'training'"),
        ({"size": 0}, "size must be an integer of at least 8, got 0"),
        ({"size": 28.0}, "size must be an integer of at least 8, got 28.0"),
        ({"per_family": 1}, "per_family must be an integer of at least 2, got 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        glyphs(**arguments)  # type: ignore[arg-type]
