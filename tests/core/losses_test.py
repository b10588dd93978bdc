"""Losses, masks and the count of classes, against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metajax import tasks
from metajax.core import Examples, accuracy, cross_entropy, span_cross_entropy, squared_error
from metajax.core import _losses as losses


def examples(targets, mask, **rest):
    targets = jnp.asarray(targets)
    return Examples(jnp.zeros([len(mask), 1]), targets, jnp.array(mask), **rest)


def test_cross_entropy_by_hand():
    logits = np.log([[1.0, 2.0, 1.0], [3.0, 1.0, 4.0]])
    expected = [-np.log(2 / 4), -np.log(4 / 8)]
    np.testing.assert_allclose(cross_entropy(jnp.array(logits), jnp.array([1, 2])), expected, rtol=1e-6)


def test_cross_entropy_averages_the_kept_positions():
    logits = np.log([[[1.0, 3.0], [1.0, 1.0], [5.0, 5.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    targets = jnp.array([[0, -1, 1], [-1, -7, -1]])
    expected = [(-np.log(1 / 4) - np.log(1 / 2)) / 2, 0.0]
    np.testing.assert_allclose(cross_entropy(jnp.array(logits), targets), expected, rtol=1e-6)


def test_cross_entropy_shapes():
    message = r"targets must have the shape of outputs \(2, 3\) without its last axis, got \(3,\)"
    with pytest.raises(ValueError, match=message):
        cross_entropy(jnp.zeros([2, 3]), jnp.zeros([3], int))


SPANS = np.log([[[1.0, 2.0], [2.0, 1.0], [5.0, 1.0]], [[1.0, 4.0], [1.0, 1.0], [1.0, 3.0]], np.ones([3, 2])])


def test_span_cross_entropy_by_hand():
    """First positions are softmaxes over 1 2 5 and 1 1 1, last ones over 2 1 1 and 4 1 3."""
    targets = jnp.array([[1, 2], [-1, 0], [-1, -1]])
    expected = [(-np.log(2 / 8) - np.log(1 / 4)) / 2, -np.log(4 / 8), 0.0]
    np.testing.assert_allclose(span_cross_entropy(jnp.array(SPANS), targets), expected, rtol=1e-6)


def test_positions_with_large_negative_logits_do_not_count():
    padded = jnp.concatenate([jnp.array(SPANS), jnp.full([3, 2, 2], losses.absent_logit(jnp.float32))], axis=1)
    targets = jnp.array([[1, 2], [0, 0], [2, 1]])
    np.testing.assert_allclose(
        span_cross_entropy(padded, targets), span_cross_entropy(jnp.array(SPANS), targets), rtol=1e-6
    )
    gradient = jax.grad(lambda logits: span_cross_entropy(logits, targets).sum())(padded)
    assert (gradient[:, 3:] == 0).all()


@pytest.mark.parametrize(
    ("outputs", "targets"), [((2, 5), (2, 2)), ((2, 5, 3), (2, 2)), ((2, 5, 2), (2,)), ((2, 5, 2), (2, 3))]
)
def test_span_cross_entropy_shapes(outputs, targets):
    with pytest.raises(ValueError, match=r"targets of spans must be \[n, 2\] for outputs \[n, length, 2\], got"):
        span_cross_entropy(jnp.zeros(outputs), jnp.zeros(targets, int))


def test_accuracy_of_spans_counts_both_ends():
    score = tasks.spans.metric.score
    np.testing.assert_array_equal(score(jnp.array(SPANS), jnp.array([[2, 0], [0, -1], [0, 2]])), [1, 1, 0.5])
    np.testing.assert_array_equal(score(jnp.array(SPANS), jnp.array([[2, 1], [1, -1], [0, 2]])), [0.5, 0, 0.5])


def test_squared_error_by_hand():
    outputs, targets = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 4.0], [3.0, 0.0]])
    np.testing.assert_allclose(squared_error(outputs, targets), [2.5, 4.5])


def test_squared_error_shapes():
    with pytest.raises(ValueError, match=r"targets must have the shape of outputs \(2, 1\), got \(2,\)"):
        squared_error(jnp.zeros([2, 1]), jnp.zeros([2]))  # else it would broadcast to [2, 2] in silence


def test_mean_loss_over_kept_examples():
    outputs = jnp.array([[1.0], [2.0], [jnp.nan], [7.0]])
    kept = examples([[0.0], [0.0], [jnp.nan], [0.0]], [True, True, False, False])
    assert float(losses.mean_loss(tasks.regression, outputs, kept)) == 2.5
    assert float(losses.mean_loss(tasks.regression, outputs, kept._replace(mask=jnp.zeros(4, bool)))) == 0
    # an example without a target counts no more than padding
    labels = examples([0, -1, 1, 1], [True, True, True, False])
    expected = np.mean([-np.log(0.5), -np.log(0.5)])
    np.testing.assert_allclose(losses.mean_loss(tasks.classification, jnp.zeros([4, 2]), labels), expected, rtol=1e-6)


def test_gradient_of_a_masked_loss_is_zero_and_not_nan():
    kept = examples([[1.0], [jnp.nan]], [True, False])
    slope = jax.grad(lambda w: losses.mean_loss(tasks.regression, w * jnp.array([[1.0], [2.0]]), kept))(jnp.array(3.0))
    assert float(slope) == 4.0


def test_clear_padding_keeps_dtypes_and_structure():
    image, token, x = np.full([2, 3, 3], 7, np.uint8), np.array([5, -9]), np.array([np.inf, np.nan], np.float32)
    tree = {"image": image, "token": token, "x": x}
    cleared = losses.clear_padding(tree, np.array([True, False]))
    assert cleared["image"].dtype == np.uint8
    assert cleared["image"][:, 0, 0].tolist() == [7, 0]
    assert cleared["token"].tolist() == [5, 0]
    assert cleared["x"].tolist() == [np.inf, 0]
    assert losses.clear_padding(tree, None) is tree


def test_absent_classes_get_no_probability_and_no_gradient():
    mask = jnp.array([True, False, True])
    logits = jnp.array([[1.0, 50.0, 2.0, 60.0]])
    masked = losses.mask_classes(logits, mask)
    np.testing.assert_array_equal(masked, [[1.0, -1e9, 2.0, -1e9]])
    np.testing.assert_array_equal(jax.nn.softmax(masked)[0, [1, 3]], 0)
    slope = jax.grad(lambda x: cross_entropy(losses.mask_classes(x, mask), jnp.array([0]))[0])(logits)
    np.testing.assert_array_equal(slope[0, [1, 3]], 0)
    assert np.all(np.isfinite(slope))
    assert losses.mask_classes(logits, None) is logits


def test_more_classes_than_outputs():
    with pytest.raises(ValueError, match="ways must be at most 2, the number of outputs of the model, got 3"):
        losses.mask_classes(jnp.zeros([1, 2]), jnp.ones(3, bool))


def test_accuracy_by_hand():
    outputs = jnp.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(accuracy(outputs, examples([0, 1, 1, 0], [True] * 4))) == 0.5
    assert float(accuracy(outputs, examples([0, 1, 1, 0], [True, False, True, False]))) == 1.0
    assert float(accuracy(outputs, examples([0, -1, 0, 0], [True] * 4))) == pytest.approx(1 / 3)
    assert float(accuracy(outputs, examples([0, 0, 0, 0], [False] * 4))) == 0


def test_accuracy_over_positions():
    outputs = jax.nn.one_hot(jnp.array([[0, 1, 1], [0, 0, 0]]), 2)
    targets = jnp.array([[0, 1, -1], [1, 1, 0]])
    assert float(accuracy(outputs, examples(targets, [True, True]))) == pytest.approx((1 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("targets", "mask", "expected"),
    [
        ([0, 4, 1], [True] * 3, 5), ([0, 4, 1], [True, False, True], 2), ([-1, 2], [True, True], 3),
        ([3, 3], [False, False], 1),
    ],
)  # fmt: skip
def test_ways_from_kept_targets(targets, mask, expected):
    assert losses.count_ways(examples(targets, mask)) == expected


def test_ways_from_what_is_static():
    wide = examples([0, 1], [True, True], class_mask=jnp.ones(7, bool))
    assert losses.count_ways(wide, 3) == 7
    assert losses.count_ways(wide._replace(class_mask=None), 3) == 3
    assert jax.jit(lambda e: jnp.zeros(losses.count_ways(e)))(wide).shape == (7,)


def test_unknown_ways_under_jit():
    with pytest.raises(ValueError, match=r"the number of ways is unknown: under jit, give support\.class_mask"):
        jax.jit(lambda e: jnp.zeros(losses.count_ways(e)))(examples([0, 1], [True, True]))
