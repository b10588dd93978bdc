"""arrays: whose example is whose after the classes are divided, and what is refused."""

import jax
import numpy as np
import pytest

from metajax.data import EpisodeSpec, arrays, device_sampler, episode, episode_batch, episodes

TEXTS = ["owl", "cat", "elk", "cat", "owl", "cat", "elk", "bee"]
INPUTS = np.arange(8)[:, None]


def rows_of(source):
    """The inputs of each class."""
    return {
        name: source.inputs[rows, 0].tolist() for name, rows in zip(source.class_names, source.members, strict=True)
    }


def test_texts_are_classes_in_order():
    expected = {"bee": [7], "cat": [1, 3, 5], "elk": [2, 6], "owl": [0, 4]}
    for labels in (TEXTS, np.array(TEXTS), np.array(TEXTS, object)):
        source = arrays(INPUTS, labels)
        assert rows_of(source) == expected
        assert list(source.class_names) == sorted(expected)
    assert (source.name, source.split) == ("arrays", "train")
    source = arrays(INPUTS, TEXTS, split="val", name="mine")
    assert rows_of(source) == expected, "no division where none is asked for"
    assert (source.name, source.split) == ("mine", "val")


def test_integers_are_in_the_order_of_numbers_and_negative_ones_are_left_out():
    labels = np.array([17, 3, 100, -1, 3, 17, -5, 100])
    source = arrays(INPUTS, labels)
    assert source.class_names == ("3", "17", "100")
    assert rows_of(source) == {"3": [1, 4], "17": [0, 5], "100": [2, 7]}
    named = arrays(INPUTS, labels.tolist(), class_names=["c", "a", "b"])
    assert rows_of(named) == {"c": [1, 4], "a": [0, 5], "b": [2, 7]}
    for dtype in (np.uint8, np.int8):
        assert rows_of(arrays(INPUTS, (labels * (labels > 0)).astype(dtype)))["17"] == [0, 5]


def test_a_list_divides_the_classes_and_copies_nothing():
    splits = {"train": ["owl", "bee"], "test": ["CAT"]}
    groups, nodes = np.array([4, 5, 5, 6]), {"furry": ["cat", "elk"], "winged": ["bee", "owl"], "all": ["owl", "cat"]}
    options = {"splits": splits, "groups": groups, "nodes": nodes, "families": np.arange(8) % 3}
    train, test = (arrays(INPUTS, TEXTS, split=split, **options) for split in ("train", "test"))
    assert rows_of(train) == {"bee": [7], "owl": [0, 4]}
    assert rows_of(test) == {"cat": [1, 3, 5]}
    assert train.inputs is INPUTS
    assert train.groups.tolist() == [4, 6]
    assert test.groups.tolist() == [5]
    assert {node: members.tolist() for node, members in train.nodes.items()} == {"winged": [0, 1], "all": [1]}
    assert {node: members.tolist() for node, members in test.nodes.items()} == {"furry": [0], "all": [0]}
    drawn = episode_batch(test, EpisodeSpec(1, 1, 2), seed=0, start=0, count=20)
    together = np.concatenate([part.inputs[..., 0] for part in drawn], axis=1)
    assert (np.sort(together, axis=1) == [1, 3, 5]).all()


def test_shares_divide_the_classes():
    labels = np.repeat(np.arange(20), 3)
    found = [
        arrays(labels, labels, split=split, splits={"train": 0.5, "val": 0.2, "test": 0.3}).class_names
        for split in ("train", "val", "test")
    ]
    assert [len(names) for names in found] == [10, 4, 6]
    assert sorted(sum(found, ()), key=int) == [str(label) for label in range(20)]


def test_families_and_groups_reach_the_episodes():
    labels, families = np.repeat(np.arange(4), 6), np.tile(np.repeat([7, 8], 3), 4)
    source = arrays(np.arange(24), labels, families=families, groups=[0, 0, 1, 1])
    for k in range(30):
        drawn = episode(source, EpisodeSpec(2, 1, 3), seed=0, index=k)
        assert (families[drawn.support.inputs][:, None] != families[drawn.query.inputs].reshape(2, 3)).all()
        assert sorted(labels[drawn.support.inputs] // 2) == [0, 1]


def test_hierarchical_episodes():
    labels = np.repeat(np.arange(6), 3)
    source = arrays(labels, labels, nodes={"even": ["0", "2", "4"], "odd": ["1", "3", "5"]})
    drawn = episode_batch(source, EpisodeSpec(3, 1, 2, hierarchical=True), seed=0, start=0, count=50)
    assert (drawn.query.inputs % 2 == drawn.query.inputs[:, :1] % 2).all()
    assert set(drawn.query.inputs[:, 0] % 2) == {0, 1}


def test_own_targets_make_a_class_a_task():
    x = np.linspace(0, 1, 12, dtype=np.float32)[:, None]
    source = arrays({"x": x}, np.repeat(["a", "b", "c"], 4), targets=2 * x, splits={"test": ["b", "c"]}, split="test")
    drawn = episode_batch(source, EpisodeSpec(1, 2, 2), seed=0, start=0, count=20)
    for part in drawn:
        assert part.class_mask is None
        np.testing.assert_array_equal(part.targets, 2 * part.inputs["x"])
        assert (part.inputs["x"] >= x[4]).all(), "no task of the other split"
    with pytest.raises(ValueError, match=r"ways must be 1 for arrays \(test\), whose examples have targets"):
        source.check(EpisodeSpec(2, 1, 1))


def test_sequences_come_in_length_buckets():
    lengths = np.array([1, 4, 2, 3, 8, 1, 2, 2])
    inputs = {"tokens": (np.arange(8) < lengths[:, None]) * np.arange(1, 9)[:, None], "id": np.arange(8)}
    source = arrays(inputs, [0] * 4 + [1] * 4, lengths=lengths.tolist(), length_buckets=[2, 4, 8])
    seen = set()
    for k in range(60):
        drawn = episode(source, EpisodeSpec(2, 1, 1), seed=0, index=k)
        rows = np.concatenate([part.inputs["id"] for part in drawn])
        tokens = np.concatenate([part.inputs["tokens"] for part in drawn])
        bucket = next(bucket for bucket in (2, 4, 8) if bucket >= lengths[rows].max())
        np.testing.assert_array_equal(tokens, inputs["tokens"][rows, :bucket])
        seen.add(bucket)
    assert seen == {2, 4, 8}


def test_pipeline_and_device_sampler_give_one_type():
    inputs = {"a": INPUTS.astype(np.int32), "b": np.zeros([8, 2, 3], np.uint8)}
    source, spec = arrays(inputs, np.repeat([5, 6], 4)), EpisodeSpec(2, 1, 2)
    data, sample = device_sampler(source, spec)
    drawn = jax.eval_shape(sample, data, jax.random.key(0))
    piped = next(episodes(source, spec, batch=1, seed=0))
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(piped), strict=True):
        assert ((1, *one.shape), one.dtype) == (other.shape, other.dtype)
    assert jax.tree.structure(drawn) == jax.tree.structure(piped)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"labels": np.zeros(8)}, r"labels must be a line of integers or of texts, got float64 of shape \(8,\)"),
        ({"labels": np.zeros(8, bool)}, "labels must be a line of integers or of texts, got bool"),
        ({"labels": np.zeros([8, 1], int)}, r"labels must be a line of integers or of texts, got int64 of shape"),
        ({"labels": np.array([b"a"] * 8)}, r"labels must be a line of integers or of texts, got \|S1 of shape"),
        ({"labels": np.array(["a", 1] * 4, object)}, "labels must be a line of integers or of texts, got object"),
        ({"labels": TEXTS[:7]}, "labels must have one entry for each of the 8 inputs, got 7"),
        ({"labels": [-1] * 8}, r"class_names of arrays \(train\) is empty; a source needs at least one class"),
        ({"class_names": ["a", "b"]}, "class_names must have one for each of the 4 different labels, got 2"),
        ({"class_names": "abcd"}, "class_names must be a list of texts, got 'abcd'"),
        ({"class_names": [0, 1, 2, 3]}, r"class_names must be a list of texts, got \[0, 1, 2, 3\]"),
        ({"class_names": ["a", "b", "a", "c"]}, "class_names must differ, got 'a' twice"),
        ({"split": "all"}, "split must be one of 'train', 'val', 'test', got 'all'"),
        (
            {"splits": {"train": ["cow"]}},
            r"arrays lacks 1 of the 1 classes that splits\['train'\] names, .* 'cow'",
        ),
        ({"splits": {"test": ["cat"]}}, "splits must name classes for split 'train'"),
        ({"splits": {"train": 0.5, "test": 0.6}}, "shares in splits must sum to 1"),
        ({"nodes": {"n": ["cat", "cow"]}}, r"nodes\['n'\] names 'cow', which is no class of arrays \(train\)"),
        ({"nodes": {"n": "cat"}}, r"nodes\['n'\] must be a list of class names, got 'cat'"),
        ({"nodes": {"n": [0]}}, r"nodes\['n'\] must be a list of class names, got \[0\]"),
        ({"groups": [0, 1]}, r"groups must have one entry for each of the 4 classes, got shape \(2,\)"),
        ({"groups": [0.5, 1, 2, 3]}, "groups must be a line of integers, got float64"),
        ({"families": [0, 1]}, "families must have one entry for each of the 8 inputs, got 2"),
        ({"targets": np.zeros(3)}, "targets must have one entry for each of the 8 inputs, got 3"),
        ({"lengths": [1] * 3}, "lengths must have one entry for each of the 8 inputs, got 3"),
        ({"length_buckets": (1,)}, r"lengths must be given with length_buckets, \(1,\), got None"),
        ({"lengths": [1] * 8, "length_buckets": (1, 2)}, "length_buckets must ascend and end with the length of"),
        ({"lengths": [2] * 8, "length_buckets": (1,)}, r"lengths must lie in \[0, 1\], .* got 2 to 2"),
        ({"lengths": [-1] * 8, "length_buckets": (1,)}, r"lengths must lie in \[0, 1\], .* got -1 to -1"),
    ],
)
def test_bad_arguments(changes, text):
    options = {"labels": TEXTS, **changes}
    with pytest.raises(ValueError, match=text):
        arrays(INPUTS, options.pop("labels"), **options)
