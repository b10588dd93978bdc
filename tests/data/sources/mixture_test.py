"""Mixtures: how often each source is asked, that its episodes stay its own, and what does not mix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from metajax import data
from metajax.data import ClassSource, EpisodeSpec

SPEC = EpisodeSpec(ways=3, shots=1, queries=2)


def toy(name, offset, classes=8, each=6, **options):
    """Inputs are unique numbers from `offset` on."""
    inputs = offset + np.arange(classes * each)[:, None]
    labels = np.repeat(np.arange(classes), each)
    return ClassSource(name, "train", inputs, labels, tuple(f"{name}{index}" for index in range(classes)), **options)


A, B, C = toy("a", 0), toy("b", 1000, classes=5), toy("c", 2000, classes=20)
SEVERAL = toy("several", 3000, length_axis=2)
BOTH = data.mixture([A, B, C], [0.5, 0.3, 0.2])


def origin(batch):
    return np.asarray(batch.query.inputs)[:, 0, 0] // 1000


def test_each_episode_is_one_of_its_source():
    batch = data.episode_batch(BOTH, SPEC, seed=0, start=0, count=4000)
    for part in batch:
        assert (part.inputs // 1000 == origin(batch)[:, None, None]).all()
        classes = (part.inputs[..., 0] % 1000) // 6
        for way in range(3):
            of_way = classes.reshape(4000, 3, -1)[:, way]
            assert (of_way == of_way[:, :1]).all()
    assert stats.chisquare(np.bincount(origin(batch)), [2000, 1200, 800]).pvalue > 1e-3
    for number, source in enumerate((A, B, C)):
        seen = np.bincount(batch.query.inputs[origin(batch) == number].ravel() - 1000 * number)
        assert stats.chisquare(seen).pvalue > 1e-3
        assert len(seen) == len(source.inputs)


def test_the_pipeline_and_the_device_give_the_same_mixture():
    spec = EpisodeSpec((2, 4), (1, 2), 2)
    stream = data.episodes(BOTH, spec, batch=5, seed=1)
    for start in (0, 5, 10):
        found, expected = next(stream), data.episode_batch(BOTH, spec, seed=1, start=start, count=5)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
    tables = BOTH.tables(spec)
    bits = np.random.default_rng(0).integers(0, 2**32, [30, BOTH.bits(spec)], dtype=np.uint32)
    draw = jax.jit(jax.vmap(lambda tables, bits: BOTH.draw(spec, tables, bits), in_axes=(None, 0)))
    host, device = BOTH.draw(spec, tables, bits), draw(jax.tree.map(jnp.asarray, tables), bits)
    for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        np.testing.assert_array_equal(one, other)
    on_device, sample = data.device_sampler(BOTH, SPEC)
    keys = jax.random.split(jax.random.key(0), 2000)
    batch = jax.jit(jax.vmap(sample, in_axes=(None, 0)))(on_device, keys)
    assert (np.asarray(batch.support.inputs) // 1000 == origin(batch)[:, None, None]).all()
    assert stats.chisquare(np.bincount(origin(batch)), [1000, 600, 400]).pvalue > 1e-3


def test_sources_of_different_size_meet_after_transforms():
    small = data.transformed(data.glyphs("val", size=14), [data.random_flip(), data.resize(20)])
    large = data.transformed(data.glyphs("val"), data.resize(20))
    both = data.mixture([small, large])
    batch = next(data.episodes(both, SPEC, batch=6, seed=0))
    assert batch.query.inputs.shape == (6, 6, 20, 20, 1)
    expected = data.episode_batch(both, SPEC, seed=0, start=0, count=6)
    assert np.abs(batch.query.inputs.astype(int) - expected.query.inputs).max() <= 1
    on_device, sample = data.device_sampler(both, SPEC)
    assert jax.jit(sample)(on_device, jax.random.key(0)).query.inputs.shape == (6, 20, 20, 1)


def test_hierarchies_and_flat_sources_mix():
    nodes = toy("n", 3000, nodes={"x": [0, 1, 2], "y": [3, 4, 5, 6]})
    batch = data.episode_batch(
        data.mixture([nodes, A]), EpisodeSpec(3, 1, 2, hierarchical=True), seed=0, start=0, count=400
    )
    of_nodes = batch.query.inputs[origin(batch) == 3][..., 0] - 3000
    for line in of_nodes // 6:
        assert set(line.tolist()) == {0, 1, 2} or set(line.tolist()) < {3, 4, 5, 6}
    assert len({frozenset(line.tolist()) for line in batch.query.inputs[origin(batch) == 0][..., 0] // 6}) > 30


def test_labelled_batches_count_the_classes_of_all():
    assert BOTH.num_classes == 33
    assert BOTH.class_names[8] == "b/b0"
    batch = next(data.batches(BOTH, 3000, 0))
    inputs, targets = batch.query.inputs[0, :, 0], batch.query.targets[0]
    offset = np.array([0, 8, 13])[inputs // 1000]
    np.testing.assert_array_equal(targets, offset + inputs % 1000 // 6)
    assert stats.chisquare(np.bincount(inputs // 1000), [1500, 900, 600]).pvalue > 1e-3


def test_regression_mixes_too():
    lines = data.from_sampler(
        lambda spec, rng: data.episode(data.sinusoids(), spec, seed=int(rng.integers(99)), index=0), name="lines"
    )
    both = data.mixture([data.sinusoids(), lines], name="modes")
    batch = next(data.episodes(both, EpisodeSpec(1, 4, 3), batch=8, seed=0))
    assert batch.query.inputs.shape == (8, 3, 1)
    assert getattr(both, "num_classes", None) is None
    with pytest.raises(ValueError, match="source must draw on a device, which modes"):
        data.device_sampler(both, EpisodeSpec(1, 4, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), r"sources must be a list of data sources, got \[\]"),
        ((["glyphs"],), "source must be a data source"),
        (([A, B], [0.5, 0.4]), r"weights must sum to 1, got \[0.5, 0.4\], which sum to 0.9"),
        (([A, B], [1.0]), r"weights must have one entry for each of the 2 sources, got \[1.0\]"),
        (([A, B], [1.5, -0.5]), r"weights\[1\] must be a finite number above 0, got -0.5"),
        (([A, data.sinusoids(split="val")],), "sources must have one split, got 'train', 'val'"),
        (([A, SEVERAL],), "sources must have one length_axis, got 1, 2"),
    ],
)
def test_what_does_not_mix(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.mixture(*arguments)


def test_inputs_of_different_form():
    with pytest.raises(
        ValueError, match=r"sources must give episodes of one form, but glyphs gives uint8\[14, 14, 1\]"
    ):
        data.mixture([data.glyphs("val", size=14), data.glyphs("val")]).check(SPEC)
    with pytest.raises(ValueError, match=r"hierarchical must be False for a\+b, none of whose sources has nodes"):
        data.mixture([A, B]).check(EpisodeSpec(2, 1, 1, hierarchical=True))
    with pytest.raises(ValueError, match="ways is 6, but b"):
        data.mixture([A, B]).check(EpisodeSpec(6, 1, 1))
