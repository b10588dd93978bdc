"""Transformed sources: who shares a change, support and query apart, and the same everywhere."""

import jax
import numpy as np
import pytest

from metajax import data
from metajax.data import EpisodeSpec

SPEC = EpisodeSpec(ways=4, shots=2, queries=3)
TAG = data.Transform(1, lambda images, numbers: images * 0 + numbers[:, :, None, None])  # shows the number that it got


def toy(classes=9, each=8):
    """Images of 2 x 2 pixels that hold the number of the example."""
    count = classes * each
    images = np.tile(np.arange(count, dtype=np.float32)[:, None, None, None], (1, 2, 2, 1))
    return data.ClassSource(
        "toy", "train", images, np.repeat(np.arange(classes), each), tuple(map(str, range(classes)))
    )


def tags(part):
    assert (part.inputs == part.inputs[..., :1, :1, :]).all()
    return np.asarray(part.inputs)[..., 0, 0, 0]


def groups(values, targets):
    """How many different values each class has."""
    return [len(set(values[targets == way].tolist())) for way in range(4)]


@pytest.mark.parametrize("shared", ["example", "class", "episode"])
def test_who_shares_the_numbers(shared):
    source = data.transformed(toy(), TAG._replace(shared=shared))
    support, query = data.episode(source, SPEC, seed=0, index=3)
    values, targets = np.concatenate([tags(support), tags(query)]), np.concatenate([support.targets, query.targets])
    assert len(set(values.tolist())) == {"example": 20, "class": 4, "episode": 1}[shared]
    assert groups(values, targets) == [{"example": 5, "class": 1, "episode": 1}[shared]] * 4
    other = data.episode(source, SPEC, seed=0, index=4)
    assert not set(tags(other.query).tolist()) & set(values.tolist())


def test_support_and_query_apart():
    double = data.Transform(0, lambda images, numbers: images * 2)
    negate = data.Transform(0, lambda images, numbers: -images)
    plain = data.episode(toy(), SPEC, seed=0, index=0)
    changed = data.episode(data.transformed(toy(), double, query=[negate]), SPEC, seed=0, index=0)
    np.testing.assert_array_equal(changed.support.inputs, 2 * plain.support.inputs)
    np.testing.assert_array_equal(changed.query.inputs, -2 * plain.query.inputs)
    twice = data.transformed(data.transformed(toy(), double), support=negate)
    np.testing.assert_array_equal(data.episode(twice, SPEC, seed=0, index=0).support.inputs, -2 * plain.support.inputs)


def test_the_source_underneath_is_not_drawn_otherwise():
    plain, changed = (
        data.episode(source, SPEC, seed=5, index=7) for source in (toy(), data.transformed(toy(), data.random_flip()))
    )
    np.testing.assert_array_equal(plain.query.inputs, changed.query.inputs)  # the flip of an even image


@pytest.mark.parametrize("spec", [SPEC, EpisodeSpec((2, 5), (1, 3), 2)], ids=["fixed", "varying"])
def test_the_pipeline_gives_the_same(spec):
    transforms = [data.per_class(data.random_rotate90()), data.random_crop(20, padding=1), data.resize(12)]
    source = data.transformed(data.glyphs("val"), transforms, support=data.per_episode(data.random_flip()))
    stream = data.episodes(source, spec, batch=3, seed=2, workers=2)
    for start in range(0, 9, 3):
        found, expected = next(stream), data.episode_batch(source, spec, seed=2, start=start, count=3)
        assert found.query.inputs.dtype == np.uint8
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.shape == other.shape
            assert np.abs(one.astype(int) - other).max() <= 1
    data_on_device, sample = data.device_sampler(source, spec)
    one = jax.jit(sample)(data_on_device, jax.random.key(0))
    assert one.query.inputs.shape == (spec.capacity.query, 12, 12, 1)


def test_rotations_as_classes():
    source = data.transformed(data.glyphs("val"), data.per_class(data.random_rotate90()))
    images = data.glyphs("val").inputs[..., 0]
    place = {
        image.tobytes(): (row, turns) for turns in range(4) for row, image in enumerate(np.rot90(images, turns, (1, 2)))
    }
    for index in range(5):
        support, query = data.episode(source, EpisodeSpec(4, 2, 3), seed=0, index=index)
        turns = np.array([place[image[..., 0].tobytes()][1] for part in (support, query) for image in part.inputs])
        targets = np.concatenate([support.targets, query.targets])
        assert groups(turns, targets) == [1, 1, 1, 1]


def test_labelled_batches_are_transformed():
    source = data.transformed(toy(), [data.per_class(TAG), data.Transform(0, lambda images, numbers: images + 1)])
    batch = next(data.batches(source, 32, 0))
    assert batch.query.inputs.shape == (1, 32, 2, 2, 1)
    assert len(set(tags(batch.query).ravel().tolist())) == 32, "each example is its own class and episode"
    assert (batch.query.inputs >= 1).all()
    assert source.num_classes == 9


def test_what_is_no_transform():
    with pytest.raises(ValueError, match="support must be a transform or a list of them, got <function"):
        data.transformed(toy(), support=lambda images: images)
    with pytest.raises(ValueError, match="both must be a transform or a list of them, got 'flip'"):
        data.transformed(toy(), "flip")
    with pytest.raises(ValueError, match="source must be a data source"):
        data.transformed("toy", data.random_flip())
    wrong = data.transformed(toy(), data.colour_jitter(saturation=0.5))
    with pytest.raises(ValueError, match="saturation must be 0 for images of 1 channel"):
        data.episodes(wrong, SPEC, batch=1, seed=0)
