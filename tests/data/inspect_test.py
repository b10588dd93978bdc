"""describe and show: what they say of every kind of source and episode."""

import io

import numpy as np
import pytest
from PIL import Image

from metajax import Episode, Examples
from metajax.data import (
    ClassSource,
    EpisodeSpec,
    describe,
    episode,
    episode_batch,
    glyphs,
    image_folder,
    mixture,
    show,
    sinusoids,
    transformed,
)
from metajax.data._inspect import size_text


def toy(**fields):
    given = {"inputs": np.zeros([9, 4], np.float32), "labels": np.array([0] * 2 + [1] * 3 + [2] * 4)}
    return ClassSource(**{"name": "toy", "split": "train", "class_names": ("a", "b", "c"), **given, **fields})


def test_classes_and_their_examples():
    found = describe(toy(nodes={"x": ["a", "b"], "y": ["c"]}))
    assert str(found) == "\n".join(
        [
            "name      toy",
            "split     train",
            "classes   3",
            "examples  9: 2 to 4, median 3 a class",
            "nodes     2: 1 to 2 classes",
            "inputs    float32 [4]",
            "memory    144 B",
        ]
    )
    assert found.rows[0]["per_class"] == (2, 3, 4)
    assert found.rows[0]["nodes"] == {"x": 2, "y": 1}


def test_classes_that_were_left_out_are_counted():
    found = describe(toy().at_least(3))
    assert found.rows[0]["left_out"] == {"a": 2}
    assert found.rows[0]["examples"] == 7
    assert "left out  1 classes of too few examples: 'a' (2)" in str(found)


def test_sequences_and_targets():
    source = toy(
        inputs={"tokens": np.zeros([9, 8], np.int32), "mask": np.zeros([9, 8], bool)}, targets=np.zeros([9, 2]),
        lengths=np.array([1, 2, 3, 4, 5, 6, 7, 8, 8]), length_buckets=(4, 8),
    )  # fmt: skip
    told = str(describe(source))
    assert "inputs    mask: bool [8], tokens: int32 [8]" in told
    assert "targets   float64 [2]" in told
    assert "lengths   1 to 8, median 5, cut to 4, 8" in told


def test_memory_of_images_that_are_kept(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        for k in range(2):
            Image.new("L", (16, 16), k).save(tmp_path / name / f"{k}.png")
    source = image_folder(tmp_path, splits={"train": 1.0}, cache_bytes=700)
    assert "memory    1.5 KiB decoded, 0 B kept" in str(describe(source))
    source.inputs.take(np.arange(6))
    assert "memory    1.5 KiB decoded, 512 B kept" in str(describe(source))


def test_every_source():
    both = describe(mixture([glyphs("val"), transformed(glyphs("val", per_family=4))], [0.75, 0.25]))
    assert [row["weight"] for row in both.rows] == [0.75, 0.25]
    assert str(both).count("classes   54") == 2
    assert str(describe(sinusoids())) == "name      sinusoids\nsplit     train"
    with pytest.raises(ValueError, match="source must be a data source"):
        describe([1, 2])


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5.0 TiB")])
def test_sizes(count, text):
    assert size_text(count) == text


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("L"))


def test_images_are_in_the_row_of_their_class():
    inputs = np.repeat(np.array([0, 255, 0, 255], np.uint8)[:, None, None, None], 8, 1).repeat(8, 2)
    part = Examples(inputs, np.array([0, 1, 0, 1]), np.array([True, True, True, False]), np.ones(2, bool))
    figure = show(Episode(part, part), class_names=["dark", "bright"])
    shown = [int(axes.images[0].get_array().max()) for axes in figure.axes]
    assert shown == [0, 0, 255, 0, 0, 255], "support and query; padding is left out"
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {"dark", "bright"}
    assert figure._repr_png_()[1:4] == b"PNG"
    with pytest.raises(ValueError, match=r"class_names must have one for each class .* has 2 classes, got \['dark'\]"):
        show(Episode(part, part), class_names=["dark"])


def test_other_episodes_are_drawn():
    wave = show(episode(sinusoids(), EpisodeSpec(1, 5, 7), seed=0, index=0))
    assert [len(line.get_xdata()) for line in wave.axes[0].lines] == [5, 7]
    features = show(episode(toy(), EpisodeSpec(2, 1, 1), seed=0, index=0))
    assert [axes.images[0].get_array().shape for axes in features.axes] == [(2, 4), (2, 4)]
    assert drawn(features).std() > 0


def test_not_an_episode():
    with pytest.raises(ValueError, match="episode must be of type Episode, got 3"):
        show(3)
    with pytest.raises(
        ValueError, match=r"episode must be one task, without a task axis, got a mask of shape \(2, 5\)"
    ):
        show(episode_batch(sinusoids(), EpisodeSpec(1, 5, 7), seed=0, start=0, count=2))
