"""`experiments.prepare` as a process: a folder in, a set that tfds_source reads."""

import pytest

from metajax.data import image_folder, tfds_source

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets to prepare sets")
pytest.importorskip("array_record", reason="needs array_record to write ArrayRecord files (Linux only)")

CLASSES = ("maple", "oak", "pine", "yew")


def test_a_folder_becomes_a_set(launch, draw, tmp_path):
    folder, sets = draw(tmp_path / "trees", CLASSES, images=5), tmp_path / "sets"
    flags = ["--builder=image_folder", f"--path={folder}", "--name=trees", f"--data_dir={sets}"]
    done = launch("prepare", *flags, "--shards=2")
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 2
    assert told[0] == f"20 images of 4 classes in {sets}/trees/1.0.0"
    assert told[1] == f"metajax.data.tfds_source('trees', data_dir={str(sets)!r}) reads them"
    assert len(list(sets.rglob("*.array_record-*-of-00002"))) == 2

    read, plain = tfds_source("trees", data_dir=sets), image_folder(folder)
    assert read.class_names == plain.class_names
    for one, other in zip(read.members, plain.members, strict=True):
        images, expected = (
            sorted(image.tobytes() for image in source.inputs[rows]) for source, rows in ((read, one), (plain, other))
        )
        assert images == expected

    done = launch("prepare", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: data_dir already holds trees/1.0.0, in '{sets}/trees/1.0.0'; delete it first\n"


def test_bad_input_is_refused(refusals, draw, tmp_path):
    folder, sets = draw(tmp_path / "trees", CLASSES, images=1), tmp_path / "sets"
    (folder / "yew" / "note.png").write_text("no image")
    cases = [
        (("omni",), "builder must be one of 'omniglot', 'image_folder', got 'omni'"),
        (("omniglot",), "path must hold images_background and images_evaluation (folders or .zip), got"),
        (("omniglot", "--name=x"), "name is for builder image_folder only, got 'x'"),
        (("omniglot", "--channels=1"), "channels is for builder image_folder only, got 1"),
        (("image_folder",), "name must be given for builder image_folder, got none"),
        (("image_folder", "--name=X"), "name must be of lower-case letters, digits and underscores, got 'X'"),
        (("image_folder", "--name=x", "--format=parquet"), "format must be one of 'array_record', 'tfrecord', got"),
        (("image_folder", "--name=x", "--shards=0"), "shards must be an integer of at least 1, got 0"),
        (("image_folder", "--name=x"), "yew/note.png' is not a readable PNG, JPEG or BMP image"),
    ]
    flags = [(f"--builder={name}", f"--path={folder}", f"--data_dir={sets}", *more) for (name, *more), _ in cases]
    for (_, said), text in zip(cases, refusals("prepare", flags), strict=True):
        assert said in text
        assert "\n" not in text
    assert not [path for path in sets.rglob("*") if path.is_file()]
