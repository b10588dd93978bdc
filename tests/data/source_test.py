"""ClassSource: who is drawn, how often, and what is refused. Inputs are row numbers, so that rows can be traced."""

import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from metajax.data import ClassSource, EpisodeSpec, episode_batch


def make(counts, **options):
    labels = np.repeat(np.arange(len(counts)), counts)
    names = tuple(f"c{index}" for index in range(len(counts)))
    return ClassSource("toy", "train", np.arange(len(labels))[:, None], labels, names, **options)


def rows(examples, ways):
    return examples.inputs.reshape(ways, -1)


def draw(source, spec, count, seed=0):
    several = episode_batch(source, spec, seed=seed, start=0, count=count)
    return [jax.tree.map(lambda leaf, k=k: leaf[k], several) for k in range(count)]


def test_layout_of_an_episode():
    source, spec = make([6, 5, 7, 5]), EpisodeSpec(3, 2, 3)
    for episode in draw(source, spec, 50):
        assert episode.support.targets.tolist() == [0, 0, 1, 1, 2, 2]
        assert episode.query.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert episode.query.targets.dtype == np.int32
        for part, size in ((episode.support, 6), (episode.query, 9)):
            assert part.inputs.shape == (size, 1)
            assert part.mask.dtype == bool
            assert part.mask.tolist() == [True] * size
            assert part.class_mask.tolist() == [True] * 3
        classes = source.labels[np.concatenate([rows(episode.support, 3), rows(episode.query, 3)], axis=1)]
        assert (classes == classes[:, :1]).all(), "the examples of a way are of one class"
        assert len(set(classes[:, 0])) == 3, "two ways are different classes"


@pytest.mark.parametrize("options", [{}, {"families": np.tile(np.arange(3), 40)[:120]}], ids=["plain", "families"])
@pytest.mark.parametrize("counts", [[20] * 6, [4, 90, 5, 6, 7, 8]], ids=["equal", "unequal"])
def test_support_and_query_never_overlap(counts, options):
    source, spec = make(counts, **options), EpisodeSpec(5, 1, 3)
    for episode in draw(source, spec, 200):
        together = np.concatenate([episode.support.inputs, episode.query.inputs])
        assert len(np.unique(together)) == len(together)


def test_a_whole_class_is_used_where_it_just_suffices():
    source = make([4, 4, 4])
    for episode in draw(source, EpisodeSpec(3, 1, 3), 20):
        assert sorted(np.concatenate([episode.support.inputs, episode.query.inputs])[:, 0]) == list(range(12))


def test_classes_are_uniform_in_every_position():
    source, spec, count = make([3] * 12), EpisodeSpec(4, 1, 1), 6000
    seen = np.zeros((4, 12))
    pairs = np.zeros((12, 12))
    for episode in draw(source, spec, count):
        classes = source.labels[episode.support.inputs[:, 0]]
        seen[np.arange(4), classes] += 1
        pairs[classes[0], classes[1]] += 1
    for position in seen:
        assert stats.chisquare(position).pvalue > 1e-3
    assert stats.chisquare(pairs[~np.eye(12, dtype=bool)]).pvalue > 1e-3


@pytest.mark.parametrize("size", [7, 40])  # below and above where a partition comes before the sort
def test_examples_are_uniform_in_support_and_query(size):
    counts = [size, size, 4 * size]
    source, spec, count = make(counts), EpisodeSpec(3, 2, 3), 6000
    support, query = np.zeros(sum(counts)), np.zeros(sum(counts))
    first_of_support = np.zeros(sum(counts))
    for episode in draw(source, spec, count):
        np.add.at(support, episode.support.inputs[:, 0], 1)
        np.add.at(query, episode.query.inputs[:, 0], 1)
        np.add.at(first_of_support, rows(episode.support, 3)[:, 0], 1)
    for label in range(3):
        of_class = source.labels == label
        assert support[of_class].sum() == 2 * count
        for seen in (support, query, first_of_support):
            assert stats.chisquare(seen[of_class]).pvalue > 1e-3


def test_classes_of_one_group_never_meet():
    groups = np.array([0, 0, 0, 1, 1, 2, 3])
    source, spec, count = make([2] * 7, groups=groups), EpisodeSpec(3, 1, 1), 4000
    sets = {}
    for episode in draw(source, spec, count):
        classes = source.labels[episode.support.inputs[:, 0]]
        assert len(set(groups[classes])) == 3
        key = frozenset(classes.tolist())
        sets[key] = sets.get(key, 0) + 1
    assert len(sets) == 3 * 2 + 3 * 2 + 3 + 2  # every admissible set is drawn
    sizes = np.bincount(groups)

    def chance(order):  # one class after the other, each from those whose group is not taken
        left = len(groups) - np.cumsum([0, *sizes[groups[list(order[:-1])]]])
        return np.prod(1 / left)

    expected = [count * sum(map(chance, itertools.permutations(key))) for key in sets]
    assert sum(expected) == pytest.approx(count)
    assert stats.chisquare(list(sets.values()), expected).pvalue > 1e-3


def test_groups_are_respected_where_chance_would_hardly_do_it():
    groups = np.array([0] * 60 + [1, 2, 3])
    source = make([2] * 63, groups=groups)
    for episode in draw(source, EpisodeSpec(4, 1, 1), 30):
        assert sorted(groups[source.labels[episode.support.inputs[:, 0]]]) == [0, 1, 2, 3]


def test_support_and_query_come_from_different_families():
    families = np.tile(np.repeat(np.array([10, 20, 30, 40]), 3), 5)  # 4 families of 3 in each of 5 classes
    source = make([12] * 5, families=families)
    seen = np.zeros(60)
    for episode in draw(source, EpisodeSpec(4, 2, 6), 3000):
        for support, query in zip(rows(episode.support, 4), rows(episode.query, 4), strict=True):
            assert len(set(families[support])) == 1, "two shots fit in one family"
            assert not set(families[support]) & set(families[query])
        np.add.at(seen, episode.query.inputs[:, 0], 1)
    assert stats.chisquare(seen).pvalue > 1e-3


def test_families_give_way_where_they_are_too_small():
    families = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0])  # the second class has one family only
    source = make([5, 6], families=families)
    for episode in draw(source, EpisodeSpec(2, 1, 3), 100):
        labels = source.labels[episode.query.inputs[:, 0]].reshape(2, 3)
        assert (labels == labels[:, :1]).all()
        of_first = next(way for way in range(2) if labels[way, 0] == 0)
        support, query = rows(episode.support, 2)[of_first], rows(episode.query, 2)[of_first]
        if support[0] != 4:
            assert 4 in query, "the example of the other family is taken first"


def test_too_many_ways():
    with pytest.raises(ValueError, match=r"ways is 5, but toy \(train\) has 4 classes"):
        make([9] * 4).check(EpisodeSpec(5, 1, 1))
    with pytest.raises(ValueError, match=r"ways is 4, but toy \(train\) has 3 classes that may stand in one episode"):
        make([9] * 4, groups=np.array([0, 0, 1, 2])).check(EpisodeSpec(4, 1, 1))
    make([9] * 4).check(EpisodeSpec(4, 1, 1))


def test_too_many_examples():
    source = make([9, 7, 9])
    source.check(EpisodeSpec(2, 2, 5))
    with pytest.raises(ValueError, match=r"shots \+ queries is 3 \+ 5 = 8, but class 'c1' of toy \(train\) has 7"):
        source.check(EpisodeSpec(2, 3, 5))


def test_small_classes_are_told_or_left_out():
    source = make(
        [5, 1, 5, 0, 3, 5], groups=np.array([0, 1, 1, 2, 3, 4]), nodes={"a": [0, 1], "b": ["c3"], "c": [2, 4]}
    )
    with pytest.raises(ValueError, match=r"class 'c3' of toy \(train\) has 0 examples; source.at_least\(2\) leaves"):
        source.check(EpisodeSpec(2, 1, 1))
    left = source.at_least(4)
    assert left.class_names == ("c0", "c2", "c5")
    assert left.dropped == {"c1": 1, "c3": 0, "c4": 3}
    assert left.groups.tolist() == [0, 1, 4]
    assert {node: members.tolist() for node, members in left.nodes.items()} == {"a": [0], "c": [1]}
    assert [rows.tolist() for rows in left.members] == [
        rows.tolist() for rows in np.array(source.members, object)[[0, 2, 5]]
    ]
    assert left.at_least(5).dropped == left.dropped
    for episode in draw(left, EpisodeSpec(2, 1, 3), 50):
        assert not np.isin(episode.query.inputs, [5, 11, 12, 13]).any()
    with pytest.raises(
        ValueError, match=r"examples is 6, but no class of toy \(train\) has so many; the largest has 5"
    ):
        source.at_least(6)
    with pytest.raises(ValueError, match="examples must be an integer of at least 1, got 0"):
        source.at_least(0)


def test_arguments_that_do_not_fit():
    inputs, labels = np.zeros([4, 1]), np.array([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"split must be one of 'train', 'val', 'test', got 'all'"):
        ClassSource("toy", "all", inputs, labels, ("a", "b"))
    with pytest.raises(ValueError, match=r"labels must have one entry for each of the 4 inputs, got 3"):
        ClassSource("toy", "train", inputs, labels[:3], ("a", "b"))
    with pytest.raises(ValueError, match=r"labels must lie below 1, the number of classes, got 1"):
        ClassSource("toy", "train", inputs, labels, ("a",))
    with pytest.raises(ValueError, match=r"class_names of toy \(train\) is empty"):
        ClassSource("toy", "train", inputs[:0], labels[:0], ())
    with pytest.raises(ValueError, match=r"labels must be a line of integers, got float64 of shape \(4,\)"):
        ClassSource("toy", "train", np.zeros([4, 1]), np.array([0.0, 0, 1, 1]), ("a", "b"))
    with pytest.raises(ValueError, match=r"groups must have one entry for each of the 2 classes, got 3"):
        ClassSource("toy", "train", inputs, labels, ("a", "b"), groups=np.arange(3))
    with pytest.raises(ValueError, match=r"families must have one entry for each of the 4 inputs, got 2"):
        ClassSource("toy", "train", inputs, labels, ("a", "b"), families=np.arange(2))
    with pytest.raises(ValueError, match=r"class_names of toy \(train\) must differ, got 'a' twice"):
        ClassSource("toy", "train", inputs, labels, ("a", "b", "a"))
    with pytest.raises(ValueError, match=r"nodes\['n'\] names 'x', which is no class of toy \(train\)"):
        ClassSource("toy", "train", inputs, labels, ("a", "b"), nodes={"n": ["x"]})
    with pytest.raises(ValueError, match=r"nodes\['n'\] must hold classes in \[0, 2\), got \[2\]"):
        ClassSource("toy", "train", inputs, labels, ("a", "b"), nodes={"n": [2]})
    with pytest.raises(ValueError, match=r"targets must have one entry for each of the 4 inputs, got 3"):
        ClassSource("toy", "train", inputs, labels, ("a", "b"), targets=np.zeros(3))
    for buckets in ((2, 5), (3, 1), (1, 1)):
        with pytest.raises(
            ValueError, match=r"length_buckets must ascend and end with the length of the inputs, \[1\]"
        ):
            ClassSource("toy", "train", inputs, labels, ("a", "b"), lengths=np.ones(4, int), length_buckets=buckets)


def test_is_no_tuple():
    assert not isinstance(make([2, 2]), tuple)
    assert make([2, 3]).num_classes == 2
    assert [members.tolist() for members in make([2, 3]).members] == [[0, 1], [2, 3, 4]]
