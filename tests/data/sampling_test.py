"""The sampling rule: random sizes, Meta-Dataset's rule, hierarchies; the same on the host and on the device."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import worlds
from scipy import stats

from metajax.data import Bucket, ClassSource, EpisodeSpec, Imbalanced, device_sampler, episode_batch, glyphs

RULE = Imbalanced(support=60, per_class=10)
COUNTS = [4, 40, 12, 90, 23, 7, 300, 16, 55, 5, 31, 8]


def make(counts=COUNTS, **options):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"c{index}" for index in range(len(counts)))
    return ClassSource("toy", "train", np.arange(len(labels))[:, None], labels, names, **options)


def classes_of(source, part):
    """`[episodes, ways]`, the class of each way, -1 for absent ones."""
    ways = part.class_mask.shape[1]
    found = np.full([len(part.mask), ways], -1)
    labels = source.labels[part.inputs[..., 0]]
    for way in range(ways):
        here = part.mask & (part.targets == way)
        found[:, way] = np.where(here.any(axis=1), np.max(np.where(here, labels, -1), axis=1), -1)
        assert (np.where(here, labels == found[:, way, None], True)).all(), "a way holds one class"
    return found


def shots_of(part):
    return (part.mask[:, None] & (part.targets[:, None] == np.arange(part.class_mask.shape[1])[:, None])).sum(axis=-1)


def published(rng, counts, spec):
    """One episode by the text of section 3.2 of Meta-Dataset: ways, queries, and support examples of each class."""
    rule = spec.shots
    ways = rng.integers(spec.ways[0], min(spec.ways[1], len(counts)), endpoint=True)
    sizes = np.array(counts)[rng.choice(len(counts), ways, replace=False)]
    queries = min(spec.queries, min(size // 2 for size in sizes))
    beta = 1 - rng.random()  # in (0, 1]
    support = min(rule.support, sum(int(np.ceil(beta * min(rule.per_class, size - queries))) for size in sizes))
    portions = np.exp(rng.uniform(*rule.log_weights, ways)) * sizes
    portions /= portions.sum()
    each = [min(int(p * (support - ways)) + 1, size - queries) for p, size in zip(portions, sizes, strict=True)]
    return ways, queries, sum(each), max(each), min(each)


def test_the_rule_of_meta_dataset():
    source, spec = make(), EpisodeSpec(ways=(3, 9), shots=RULE, queries=6)
    several = episode_batch(source, spec, seed=0, start=0, count=6000)
    ways = several.query.class_mask.sum(axis=1)
    classes, shots, queries = classes_of(source, several.query), shots_of(several.support), shots_of(several.query)
    np.testing.assert_array_equal(several.support.class_mask, shots > 0)
    np.testing.assert_array_equal(several.query.class_mask, queries > 0)
    np.testing.assert_array_equal(classes_of(source, several.support), classes)
    sizes = np.where(classes >= 0, source.counts[classes], 10**6)
    expected = np.minimum(6, sizes.min(axis=1) // 2)
    np.testing.assert_array_equal(queries, np.where(classes >= 0, expected[:, None], 0))
    assert (shots + queries <= sizes).all()
    assert shots.sum(axis=1).max() <= RULE.support
    rng = np.random.default_rng(0)
    reference = np.array([published(rng, COUNTS, spec) for _ in range(6000)]).T
    absent = np.where(shots > 0, shots, 10**6)
    ours = [ways, expected, shots.sum(axis=1), shots.max(axis=1), absent.min(axis=1)]
    for found, wanted in zip(ours, reference, strict=True):
        table = np.stack([np.bincount(np.asarray(values, int), minlength=80)[:80] for values in (found, wanted)])
        assert stats.chi2_contingency(table[:, table.sum(axis=0) > 20]).pvalue > 1e-3


def test_ways_never_exceed_the_classes():
    ways = episode_batch(make([9] * 6), EpisodeSpec((2, 50), 1, 1), seed=0, start=0, count=3000).query.class_mask.sum(1)
    assert stats.chisquare(np.bincount(ways, minlength=7)[2:]).pvalue > 1e-3


def test_shots_between_bounds_are_uniform_and_the_same_for_all_classes():
    source, spec = make([9] * 6), EpisodeSpec((2, 5), (1, 4), 3)
    several = episode_batch(source, spec, seed=0, start=0, count=4000)
    shots, ways = shots_of(several.support), several.support.class_mask.sum(axis=1)
    for line, number in zip(shots, ways, strict=True):
        assert (line[:number] == line[0]).all()
        assert not line[number:].any()
    table = np.zeros([4, 4])
    np.add.at(table, (shots[:, 0] - 1, ways - 2), 1)
    assert stats.chisquare(table.ravel()).pvalue > 1e-3
    np.testing.assert_array_equal(several.query.mask.sum(axis=1), 3 * ways)


@pytest.mark.parametrize("options", [{}, {"groups": np.arange(12) // 2}, {"families": np.arange(sum(COUNTS)) % 3}])
@pytest.mark.parametrize("spec", [EpisodeSpec((2, 5), (1, 2), 2), EpisodeSpec((3, 6), RULE, 4)], ids=["range", "rule"])
def test_no_example_stands_twice_and_padding_comes_last(spec, options):
    several = episode_batch(make(**options), spec, seed=3, start=0, count=300)
    for part in several:
        assert (np.diff(part.mask.astype(int), axis=1) <= 0).all()
        assert (np.diff(part.class_mask.astype(int), axis=1) <= 0).all()
        assert not part.inputs[~part.mask].any()
        assert not part.targets[~part.mask].any()
        assert (np.diff(np.where(part.mask, part.targets, 99), axis=1) >= 0).all()
    for index in range(300):
        together = np.concatenate([part.inputs[index, part.mask[index], 0] for part in several])
        assert len(np.unique(together)) == len(together)


def test_hierarchical_episodes_stay_in_one_node():
    nodes = {"small": [0], "a": [1, 2, 3, 4], "b": [3, 4, 5, 6, 7, 8, 9], "c": ["c10", "c11", "c0"]}
    source, spec = make([6] * 12, nodes=nodes), EpisodeSpec(3, 1, 2, hierarchical=True)
    classes = classes_of(source, episode_batch(source, spec, seed=0, start=0, count=6000).query)
    members = {name: {int(str(member).removeprefix("c")) for member in node} for name, node in nodes.items()}
    sets = {}
    for line in classes:
        sets[frozenset(line.tolist())] = sets.get(frozenset(line.tolist()), 0) + 1
    expected = {}
    for name in ("a", "b", "c"):  # each third of the episodes, and within it every set of three equally often
        choices = [frozenset(choice) for choice in itertools.combinations(sorted(members[name]), 3)]
        for choice in choices:
            expected[choice] = expected.get(choice, 0) + 2000 / len(choices)
    assert set(sets) <= set(expected)
    assert stats.chisquare([sets.get(key, 0) for key in expected], list(expected.values())).pvalue > 1e-3


def test_whole_nodes():
    source = make([6] * 12, nodes={"a": range(4), "b": range(3, 12)}, whole_nodes=True)
    several = episode_batch(source, EpisodeSpec((3, 6), 1, 1, hierarchical=True), seed=0, start=0, count=500)
    classes = classes_of(source, several.query)
    assert {tuple(sorted(line[line >= 0])) for line in classes if line.max() < 4 and line[4] < 0} == {(0, 1, 2, 3)}
    assert set(several.query.class_mask.sum(axis=1)) == {4, 6}, "all classes of a node, up to the most ways"


def test_what_cannot_be_hierarchical():
    with pytest.raises(ValueError, match=r"hierarchical must be False for toy \(train\), which has no nodes, got True"):
        make().check(EpisodeSpec(2, 1, 1, hierarchical=True))
    with pytest.raises(
        ValueError, match=r"ways is 3, but no node of toy .* has so many classes; the largest, 'b', has 2"
    ):
        make(nodes={"a": [0], "b": [1, 2]}).check(EpisodeSpec(3, 1, 1, hierarchical=True))
    # classes of other nodes may be small
    make(nodes={"a": [0], "b": [1, 3]}).check(EpisodeSpec(2, 10, 10, hierarchical=True))
    with pytest.raises(ValueError, match=r"shots is Imbalanced, which takes 2 examples, but class 'c1' of toy"):
        make([9, 1, 9]).check(EpisodeSpec((2, 3), RULE, 1))


def test_own_targets_make_a_class_a_task():
    labels = np.repeat(np.arange(7), 9)
    targets = np.arange(63)[:, None] * 0.5
    source = ClassSource("tasks", "train", np.arange(63)[:, None], labels, tuple("abcdefg"), targets=targets)
    several = episode_batch(source, EpisodeSpec(1, (2, 4), 3), seed=0, start=0, count=200)
    for part in several:
        assert part.class_mask is None
        np.testing.assert_array_equal(part.targets, np.where(part.mask[..., None], part.inputs * 0.5, 0))
        tasks = labels[part.inputs[..., 0]]
        assert (np.where(part.mask, tasks, tasks[:, :1]) == tasks[:, :1]).all()
    with pytest.raises(
        ValueError, match=r"ways must be 1 for tasks \(train\), whose examples have targets of their own"
    ):
        source.check(EpisodeSpec(2, 1, 1))


SPECS = {
    "fixed": EpisodeSpec(5, 1, 2),
    "many ways": EpisodeSpec(12, 1, 2),
    "range": EpisodeSpec((2, 5), (1, 2), 2),
    "rule": EpisodeSpec((3, 6), RULE, 4),
    "nodes": EpisodeSpec((2, 4), RULE, 4, hierarchical=True),
}


# the larger source takes the same program of other numbers
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "source", worlds.few_by_default(["plain", "large", "glyphs"], lambda source: source != "large")
)
def test_the_device_draws_what_the_host_draws_from_the_same_bits(source, name):
    spec = SPECS[name]
    if source == "glyphs":  # groups and families
        source = glyphs("test")
    else:
        counts = COUNTS if source == "plain" else [100 * count for count in COUNTS]
        source = make(counts, nodes={"a": range(5), "b": range(3, 12)})
    tables = source.tables(spec)
    bits = np.random.default_rng(0).integers(0, 2**32, [20, source.bits(spec)], dtype=np.uint32)
    draw = jax.jit(jax.vmap(lambda tables, bits: source.draw(spec, tables, bits), in_axes=(None, 0)))
    host, device = source.draw(spec, tables, bits), draw(jax.tree.map(jnp.asarray, tables), bits)
    assert jax.tree.structure(host) == jax.tree.structure(device)
    for one, other in zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_sampler_on_the_device_is_uniform():
    source, spec = make([7, 7, 28, 7, 40]), EpisodeSpec(3, 2, 3)
    data, sample = device_sampler(source, spec)
    keys = jax.random.split(jax.random.key(0), 6000)
    several = jax.tree.map(np.asarray, jax.jit(jax.vmap(sample, in_axes=(None, 0)))(data, keys))
    classes = classes_of(source, several.query)
    np.testing.assert_array_equal(classes_of(source, several.support), classes)
    for position in range(3):
        assert stats.chisquare(np.bincount(classes[:, position], minlength=5)).pvalue > 1e-3
    for part in several:
        seen = np.bincount(part.inputs.ravel(), minlength=89)
        for rows in source.members:
            assert stats.chisquare(seen[rows]).pvalue > 1e-3
    together = np.sort(np.concatenate([several.support.inputs, several.query.inputs], axis=1)[..., 0], axis=1)
    assert (np.diff(together, axis=1) > 0).all(), "no example stands twice"


def test_a_sampler_on_the_device_gives_the_numbers_of_the_source():
    source, spec = glyphs("val"), EpisodeSpec((2, 4), (1, 2), 2, buckets=((6, 20, 30),))
    data, sample = device_sampler(source, spec)
    episode = jax.jit(sample)(data, jax.random.key(3))
    assert episode.support.mask.shape == (20,)
    assert episode.query.class_mask.shape == (6,)
    assert not np.asarray(episode.query.inputs)[~np.asarray(episode.query.mask)].any()
    images = source.inputs.reshape(len(source.inputs), -1)
    for part in episode:
        for image in np.asarray(part.inputs)[np.asarray(part.mask)]:
            assert (images == image.ravel()).all(axis=1).any()


def test_the_data_of_a_sampler_is_no_constant():
    data, sample = device_sampler(glyphs("val"), EpisodeSpec(5, 1, 3))
    text = jax.jit(sample).lower(data, jax.random.key(0)).as_text()
    assert len(text) < 200_000
    assert sum(leaf.size for leaf in jax.tree.leaves(data)) > 10**6


def test_buckets_are_padding_only():
    source = make()
    free, roomy = EpisodeSpec((3, 6), RULE, 4), EpisodeSpec((3, 6), RULE, 4, buckets=((9, 80, 50),))
    one, other = (episode_batch(source, spec, seed=0, start=0, count=5) for spec in (free, roomy))
    assert other.support.mask.shape == (5, 80)
    assert other.query.mask.shape == (5, 50)
    assert other.query.class_mask.shape == (5, 9)
    for few, many in zip(one, other, strict=True):
        size = few.mask.shape[1]
        np.testing.assert_array_equal(few.inputs, many.inputs[:, :size])
        np.testing.assert_array_equal(few.mask, many.mask[:, :size])
        assert not many.mask[:, size:].any()


def test_a_batch_has_the_smallest_size_that_holds_it():
    source, spec = make(), EpisodeSpec((2, 6), RULE, 4, buckets=((6, 60, 24), (3, 12, 12), (6, 30, 24)))
    assert spec.sizes == (Bucket(3, 12, 12), Bucket(6, 30, 24), Bucket(6, 60, 24))
    seen = set()
    for start in range(0, 60, 2):
        batch = episode_batch(source, spec, seed=0, start=start, count=2)
        size = Bucket(batch.query.class_mask.shape[1], batch.support.mask.shape[1], batch.query.mask.shape[1])
        ways, support, query = (
            int(mask.sum(axis=1).max()) for mask in (batch.query.class_mask, batch.support.mask, batch.query.mask)
        )
        assert size == spec.size_for(ways, support, query)
        seen.add(size)
    assert seen == set(spec.sizes)
