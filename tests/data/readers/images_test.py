"""Reading of images that nobody has vouched for: what they become, and what is refused before it is read."""

import io
import os
import stat
import zipfile

import numpy as np
import pytest
from PIL import Image

from metajax.data.readers import _images
from metajax.data.readers._folders import read_image_folder
from metajax.data.readers._images import decode


def png(array, mode=None, form="PNG", **options):
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array, np.uint8))
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
RGB = np.stack([GREY, GREY + 100, 255 - GREY], axis=-1)

NOISE = png(np.random.default_rng(0).integers(256, size=(80, 80)))


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def packed(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_grey_and_rgb_are_kept_to_the_bit():
    np.testing.assert_array_equal(decode(png(GREY), "x"), GREY[..., None])
    np.testing.assert_array_equal(decode(png(RGB), "x"), RGB)
    np.testing.assert_array_equal(decode(png(RGB, form="BMP"), "x"), RGB)
    np.testing.assert_array_equal(decode(png(GREY), "x", channels=3), np.repeat(GREY[..., None], 3, axis=-1))
    luma = RGB @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decode(png(RGB), "x", channels=1)[..., 0] - luma).max() <= 1
    assert decode(png(RGB, form="JPEG"), "x").shape == (8, 8, 3)


def test_one_bit_palette_and_sixteen_bit():
    bits = (GREY % 2 * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode(png(bits, "1"), "x"), bits[..., None])
    flat = np.zeros([8, 8, 3], np.uint8) + np.array([255, 0, 51], np.uint8)
    np.testing.assert_array_equal(decode(png(Image.fromarray(flat).convert("P")), "x"), flat)
    deep = Image.fromarray((GREY.astype(np.uint16) << 8) + 7)
    np.testing.assert_array_equal(decode(png(deep), "x"), GREY[..., None])


def test_transparency_is_white():
    drawn = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawn.putpixel((1, 2), (0, 0, 0, 255))
    grey = decode(png(drawn), "x", channels=1)[..., 0]
    assert grey[2, 1] == 0
    assert (np.delete(grey.ravel(), 9) == 255).all()
    assert decode(png(drawn, "LA"), "x").tolist() == grey[..., None].tolist()


def test_photographs_are_turned_as_exif_says():
    wide = np.zeros([8, 16, 3], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(png(wide, form="JPEG", exif=exif), "x").shape == (16, 8, 3)


def test_resizing():
    blocks = np.kron(np.array([[0, 255], [255, 0]]), np.ones([4, 4])).astype(np.uint8)
    np.testing.assert_array_equal(decode(png(blocks), "x", size=2)[..., 0], [[0, 255], [255, 0]])
    stripes = np.tile([0, 200], [8, 4]).astype(np.uint8)
    assert (decode(png(stripes), "x", size=4) == 100).all(), "the mean over the area"
    of_bits = decode(png(stripes // 200 * 255, "1"), "x", size=4)
    assert np.isin(of_bits, [127, 128]).all(), "of one-bit images too"
    assert decode(png(RGB), "x", size=20).shape == (20, 20, 3)
    assert decode(png(RGB[:4]), "x", size=5).shape == (5, 5, 3)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", png(GREY)[:50], NOISE[:4000], png(GREY).replace(b"IDAT", b"IDOT"), b"GIF89a" + bytes(40)],
    ids=["empty", "text", "cut header", "cut end", "damaged", "another format"],
)
def test_what_is_no_image(content):
    with pytest.raises(ValueError, match=r"'cat/1.png' is not a readable PNG, JPEG or BMP image"):
        decode(content, "cat/1.png")


def test_random_damage_never_escapes_as_another_error():
    rng = np.random.default_rng(0)
    for content in (png(RGB), png(RGB, form="JPEG"), png(RGB, form="BMP"), png(GREY, "P")):
        for _ in range(50):
            broken = bytearray(content)
            for place in rng.integers(len(broken), size=3):
                broken[place] = rng.integers(256)
            try:
                assert decode(bytes(broken), "x").dtype == np.uint8
            except ValueError as error:
                assert "is not a readable" in str(error)  # noqa: PT017


def test_decompression_bombs(monkeypatch):
    bomb = png(Image.new("1", (5000, 5000)))  # 25 million pixels in a few kilobytes
    assert len(bomb) < 10_000
    with pytest.raises(ValueError, match=r"'x' is not a readable .* 5000 x 5000 pixels, the limit is 16777216"):
        decode(bomb, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow's own limit raises, or warns
    with pytest.raises(ValueError, match=r"'x' is not a readable"):
        decode(bomb, "x")


def test_folder_and_zip_give_the_same(tmp_path):
    files = {f"{name}/{k}.png": png(GREY + k) for name in ("b", "a", "c d") for k in range(3)}
    hidden = {"a/.DS_Store": b"x", "__MACOSX/a/._1.png": b"x", "b/Thumbs.db": b"x", ".git/config": b"x"}
    expected = None
    for path in (
        tree(tmp_path / "plain", files),
        tree(tmp_path / "with", files | hidden),
        packed(tmp_path / "plain.zip", files),
        packed(tmp_path / "with.zip", files | hidden),
        packed(tmp_path / "around.zip", {f"top/{name}": content for name, content in files.items()}),
        packed(tmp_path / "windows.zip", {name.replace("/", "\\"): content for name, content in files.items()}),
    ):
        found = read_image_folder(path)
        assert found.class_names == ("a", "b", "c d")
        assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert found.labels.dtype == np.int32
        assert found.file_names == tuple(f"{name}/{k}.png" for name in ("a", "b", "c d") for k in range(3))
        np.testing.assert_array_equal(found.images[:, 0, 0, 0], [0, 1, 2] * 3)
        if expected is not None:
            np.testing.assert_array_equal(found.images, expected.images)
        expected = found
    assert read_image_folder(str(tmp_path / "plain")).images.shape == (9, 8, 8, 1)


def test_a_class_with_one_image_can_be_read(tmp_path):
    tree(tmp_path, {"a/1.png": png(GREY), "b/1.jpg": png(GREY, form="JPEG"), "b/2.bmp": png(GREY, form="BMP")})
    found = read_image_folder(tmp_path)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.file_names == ("a/1.png", "b/1.jpg", "b/2.bmp")


def test_inversion(tmp_path):
    dark_on_white = np.full([8, 8], 250, np.uint8)
    dark_on_white[3:5, 3:5] = 10
    tree(tmp_path, {"a/1.png": png(dark_on_white), "a/2.png": png(255 - dark_on_white)})
    ink = 255 - dark_on_white
    for invert, expected in (
        (False, [dark_on_white, ink]),
        (True, [ink, dark_on_white]),
        ("auto", [ink, ink]),
    ):
        np.testing.assert_array_equal(read_image_folder(tmp_path, invert=invert).images[..., 0], expected)


def test_auto_looks_at_the_median_of_all_four_edges():
    image = np.full([1, 8, 8, 1], 255, np.uint8)
    image[0, 0] = image[0, :, 0] = 0  # two of four edges: still as many bright pixels
    image[0, 7, 0] = 255
    assert _images.invert_images(image, "auto")[0, 4, 4, 0] == 0
    image[0, :, 7] = 0
    assert _images.invert_images(image, "auto")[0, 4, 4, 0] == 255
    for border, inverted in ((127, 127), (128, 127), (13, 13)):
        assert (_images.invert_images(np.full([1, 8, 8, 1], border, np.uint8), "auto") == inverted).all()


def test_missing_and_empty(tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder or a zip file, got '.*nothing', which does not exist"):
        read_image_folder(tmp_path / "nothing")
    for bad in ("", None, 3):
        with pytest.raises(ValueError, match=f"path must be a folder or a zip file, got {bad!r}"):
            read_image_folder(bad)
    for path in (tree(tmp_path / "e", {"a/.DS_Store": b""}), packed(tmp_path / "e.zip", {"a/": b""})):
        with pytest.raises(
            ValueError, match=r"path must hold images as CLASS/NAME.png, got '.*', which holds no files"
        ):
            read_image_folder(path)
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(ValueError, match=r"path must be a folder or a zip file, got '.*text.zip'"):
        read_image_folder(tmp_path / "text.zip")


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"a/notes.txt": b"hello"}, r"a/notes.txt' is not a readable PNG, JPEG or BMP image"),
        ({"a/2.png": b"hello"}, r"a/2.png' is not a readable PNG, JPEG or BMP image"),
        ({"1.png": png(GREY)}, r"CLASS/NAME.png and nothing else, or .*, got '1.png'"),
        ({"a/b/1.png": png(GREY)}, r"CLASS/NAME.png and nothing else, or .*, got 'a/b/1.png'"),
        ({"b/2.png": png(GREY[:4])}, r"different sizes: 'a/1.png' is 8 x 8 and 'b/2.png' is 4 x 8 .* give size="),
        ({"b/2.png": png(RGB)}, r"different channels: 'a/1.png' has 1 and 'b/2.png' has 3; give channels="),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True], ids=["folder", "zip"])
def test_bad_files_are_named(tmp_path, extra, text, as_zip):
    files = {"a/1.png": png(GREY), "b/1.png": png(GREY)} | extra
    path = packed(tmp_path / "x.zip", files) if as_zip else tree(tmp_path / "x", files)
    with pytest.raises(ValueError, match=text):
        read_image_folder(path)


def test_mixed_images_are_read_where_size_and_channels_are_given(tmp_path):
    tree(tmp_path, {"a/1.png": png(GREY), "b/1.png": png(RGB[:4])})
    assert read_image_folder(tmp_path, size=6, channels=3).images.shape == (2, 6, 6, 3)
    with pytest.raises(ValueError, match=r"different channels"):
        read_image_folder(tmp_path, size=6)
    with pytest.raises(ValueError, match=r"different sizes"):
        read_image_folder(tmp_path, channels=1)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"size": "28"}, "size must be an integer of at least 1, got '28'"),
        ({"channels": 2}, "channels must be one of None, 1, 3, got 2"),
        ({"invert": "yes"}, "invert must be True, False or 'auto', got 'yes'"),
        ({"invert": None}, "invert must be True, False or 'auto', got None"),
    ],
)
def test_bad_options(tmp_path, bad, text):
    with pytest.raises(ValueError, match=text):
        read_image_folder(tmp_path, **bad)


def link(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (mode | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "entry",
    [
        "../evil.png",
        "a/../../evil.png",
        "..\\evil.png",
        "/etc/evil.png",
        "\\evil.png",
        "C:/evil.png",
        "__MACOSX/../../evil.png",
        "a/..",
        link("a/link.png", stat.S_IFLNK),
        link("a/fifo.png", stat.S_IFIFO),
    ],
    ids=str,
)
def test_unsafe_zips_are_refused_before_anything_is_read(tmp_path, monkeypatch, entry):
    path = packed(tmp_path / "x.zip", {"a/1.png": png(GREY), "b/1.png": png(GREY)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(entry, b"/etc/passwd")
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *args, **kwargs: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=r"entry '.*' of '.*x.zip' (points outside|is a link)"):
        read_image_folder(path)
    assert sorted(os.listdir(tmp_path)) == ["x.zip"], "nothing is written"


def test_encrypted_and_doubled_entries(tmp_path):
    path = packed(tmp_path / "x.zip", {"a/1.png": png(GREY)})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of encryption
    (tmp_path / "y.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"entry 'a/1.png' of '.*' is encrypted"):
        read_image_folder(tmp_path / "y.zip")
    packed(path, {"a/1.png": png(GREY), "a//1.png": png(GREY)})
    with pytest.raises(ValueError, match=r"entry 'a//1.png' of '.*' stands there twice"):
        read_image_folder(path)


def test_sizes_of_zip_entries(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", bytes(100_000))
        archive.writestr("a/2.png", bytes(100_000))
    assert path.stat().st_size < 1000
    monkeypatch.setattr(_images, "MAX_ZIP_BYTES", 150_000)
    with pytest.raises(ValueError, match=r"unpacks to 200000 bytes, the limit is 150000"):
        read_image_folder(path)
    monkeypatch.setattr(_images, "MAX_FILE_BYTES", 50_000)
    with pytest.raises(ValueError, match=r"entry 'a/1.png' .* unpacks to 100000 bytes, the limit is 50000"):
        read_image_folder(path)


def test_a_zip_that_lies_about_sizes(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", bytes(100_000))
    content = path.read_bytes().replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"entry 'a/1.png' of '.*' cannot be unpacked"):
        read_image_folder(path)


def test_files_of_a_folder(tmp_path, monkeypatch):
    tree(tmp_path, {"a/1.png": png(GREY)})
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"'a/2.png' in '.*' is not a regular file"):
        read_image_folder(tmp_path)
    (tmp_path / "a" / "2.png").unlink()
    os.mkfifo(tmp_path / "a" / "2.png")
    with pytest.raises(ValueError, match=r"'a/2.png' in '.*' is not a regular file"):
        read_image_folder(tmp_path)
    (tmp_path / "a" / "2.png").unlink()
    monkeypatch.setattr(_images, "MAX_FILE_BYTES", 10)
    with pytest.raises(ValueError, match=r"'a/1.png' in '.*' has more than 10 bytes"):
        read_image_folder(tmp_path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ValueError, match=r"must not hold folders in folders so deep"):
        read_image_folder(tmp_path)
