"""Task types: their scores and the targets that count, by hand; which one a learner and a loss have."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import core, tasks
from metajax.core import _losses
from metajax.tasks import _lookup


def score(task, outputs, targets, mask=None):
    targets = np.asarray(targets)
    mask = np.ones(len(targets), bool) if mask is None else np.array(mask, bool)
    kept = _losses.kept_examples(task, metajax.Examples(np.zeros(len(targets)), targets, mask))
    return float(_losses.mean_over(task.metric.score(outputs, targets), kept))


def test_accuracy_counts_kept_examples_only():
    logits = jnp.array([[3.0, 1.0], [0.0, 2.0], [5.0, 0.0], [1.0, 0.0]])
    assert score(tasks.classification, logits, [0, 1, 1, 0]) == pytest.approx(3 / 4)
    assert score(tasks.classification, logits, [0, 1, 1, 0], [1, 1, 1, 0]) == pytest.approx(2 / 3)
    assert score(tasks.classification, logits, [0, 1, -1, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("row", "target", "right"),
    [
        ([np.nan, np.nan, np.nan], 0, False),
        ([1.0, np.nan, 0.0], 0, False),
        ([np.nan, 1.0, 0.0], 0, False),  # argmax alone would pick the NaN
        ([1.0, 0.0, np.inf], 2, False),
        ([-np.inf, -np.inf, -np.inf], 0, False),
        ([-np.inf, 0.0, -np.inf], 1, True),  # a class that is ruled out
    ],
)
def test_an_output_that_is_not_finite_is_wrong(row, target, right):
    """In training, where `core.accuracy` counts, as in evaluation."""
    assert score(tasks.classification, jnp.array([row]), [target]) == float(right)
    examples = metajax.Examples(np.zeros(1), np.array([target]), np.ones(1, bool))
    assert float(core.accuracy(jnp.array([row]), examples)) == float(right)


def test_accuracy_of_token_targets_averages_over_examples():
    logits = jnp.eye(3)[jnp.array([[0, 1], [2, 2]])]  # [2, 2, 3]
    assert score(tasks.next_token_prediction, logits, [[0, 0], [2, -1]]) == pytest.approx((0.5 + 1.0) / 2)


def test_a_span_with_an_end_that_is_not_finite_is_half_right():
    outputs = jnp.zeros([1, 3, 2]).at[0, 1].set(1).at[0, 2, 1].set(jnp.nan)
    assert score(tasks.spans, outputs, [[1, 1]]) == 0.5


def test_squared_error_is_the_mean_over_kept_examples_and_keeps_nan():
    outputs, targets = jnp.array([[1.0], [3.0], [9.0]]), np.zeros([3, 1], np.float32)
    assert score(tasks.regression, outputs, targets, [1, 1, 0]) == pytest.approx(5.0)
    assert np.isnan(score(tasks.regression, outputs.at[0].set(np.nan), targets))


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="outputs"):
        score(tasks.classification, jnp.zeros([2, 3]), [0, 1, 2])
    with pytest.raises(ValueError, match="targets"):
        score(tasks.regression, jnp.zeros([3]), np.zeros([3, 1]))


def test_negative_integers_are_numbers_in_a_regression_and_padding_of_labels():
    """The same integers: a regression reads all of them, a classification leaves the negative ones out."""
    examples = metajax.Examples(np.zeros(3), np.array([-2, 0, 1]), np.ones(3, bool))
    outputs = jnp.array([1.0, 0.0, 0.0])
    assert float(_losses.mean_loss(tasks.regression, outputs, examples)) == pytest.approx((9 + 0 + 1) / 3)
    assert _losses.kept_examples(tasks.classification, examples).tolist() == [False, True, True]
    learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1), task=tasks.regression)
    whole = metajax.Examples(np.ones([3, 2], np.float32), np.array([[-2], [0], [1]]), np.ones(3, bool))
    params = learner.init(jax.random.key(0), whole.inputs)
    found = learner.outer_loss(learner.adapt(params, whole), params, whole)[0]
    floats = whole._replace(targets=whole.targets.astype(np.float32))
    assert float(found) == float(learner.outer_loss(learner.adapt(params, floats), params, floats)[0])


def test_the_task_type_of_arguments():
    assert tasks.resolve() is tasks.classification
    assert tasks.resolve(tasks.spans) is tasks.spans
    assert tasks.resolve(loss=core.squared_error) is tasks.regression
    assert tasks.resolve(loss=core.span_cross_entropy) is tasks.spans
    assert tasks.resolve(tasks.regression, core.squared_error) is tasks.regression
    own = tasks.resolve(tasks.classification, lambda outputs, targets: outputs[:, 0])
    assert (own.name, own.metric, own.classes) == ("classification", tasks.classification.metric, True)
    assert own.loss(jnp.array([[2.0, 1.0], [3.0, 4.0]]), jnp.array([0, 1])).tolist() == [2, 3]
    alone = tasks.resolve(loss=lambda outputs, targets: jnp.abs(outputs - targets))
    assert alone.metric.name == "loss"
    assert alone.counts(np.array([-1, 2])).tolist() == [True, True]
    assert tasks.of(metajax.Learner(None, None, None, None)) is tasks.classification
    assert tasks.of(metajax.Learner(None, None, None, None, task=tasks.spans)) is tasks.spans
    for arguments, text in (
        ({"task": "regression"}, "task must be of type TaskType, such as metajax.tasks.regression, got 'regression'"),
        ({"loss": "mse"}, r"loss must be a function \(outputs, targets\) -> \[n\], got 'mse'"),
    ):
        with pytest.raises(ValueError, match=text):
            tasks.resolve(**arguments)


def test_numbers_that_a_head_gives():
    def examples(targets, class_mask=None):
        return metajax.Examples(np.zeros(4), targets, np.ones(4, bool), class_mask)

    assert tasks.classification.num_outputs(examples(np.zeros(4, int), np.ones(7, bool))) == 7
    assert tasks.regression.num_outputs(examples(np.zeros([4, 3]))) == 3
    assert tasks.regression.num_outputs(examples(np.zeros(4))) == 1
    assert tasks.multiple_choice.num_outputs(examples(np.zeros(4, int))) == 1
    assert tasks.spans.num_outputs(examples(np.zeros([4, 2], int))) is None


ONE = (np.ones([5, 2], np.float32), np.arange(5.0, dtype=np.float32)[:, None])  # inputs, targets [5, 1]


def evaluated(loss, targets=ONE[1], mask=(True,) * 5):
    examples = metajax.Examples(ONE[0], targets, np.array(mask))
    learner = metajax.learners.maml(metajax.models.mlp(1, hidden=()), optax.sgd(0.1), loss=loss)
    params = jax.tree.map(jnp.ones_like, learner.init(jax.random.key(0), examples.inputs))
    return float(jax.jit(learner.outer_loss)(learner.adapt(params, examples, num_steps=0), params, examples)[0])


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (lambda outputs, targets: (outputs - targets) ** 2, r"\(5, 1\)"),
        (lambda outputs, targets: (outputs - targets[:, 0]) ** 2, r"\(5, 5\)"),
        (lambda outputs, targets: jnp.mean((outputs - targets) ** 2), r"\(\)"),
        (lambda outputs, targets: jnp.zeros(4), r"\(4,\)"),
    ],
)
def test_a_loss_of_another_shape_is_refused(loss, shape):
    with pytest.raises(ValueError, match=rf"one number for each of the 5 examples, shape \(5,\), got shape {shape}"):
        evaluated(loss)


def test_a_loss_of_ones_own_cannot_mix_examples():
    """`[n]` against `[n, 1]` would be broadcast to all pairs of examples, whose mean has the right shape."""
    expected = evaluated(lambda outputs, targets: jnp.mean((outputs - targets) ** 2, axis=-1))
    flat = evaluated(lambda outputs, targets: jnp.mean((outputs - targets) ** 2, axis=-1), ONE[1][:, 0])
    assert flat == expected == evaluated(core.squared_error)


def test_a_loss_of_ones_own_has_no_other_metric():
    examples = metajax.Examples(ONE[0], (np.arange(15).reshape(5, 3) % 2), np.ones(5, bool))
    episode = metajax.Episode(examples, examples)

    def loss(outputs, targets):
        return optax.sigmoid_binary_cross_entropy(outputs, targets).mean(axis=-1)

    losses = []
    for dtype in (np.int32, np.float32):
        learner = metajax.learners.maml(metajax.models.mlp(3), optax.sgd(0.1), loss=loss)
        outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled())
        one = metajax.Episode(*[part._replace(targets=part.targets.astype(dtype)) for part in episode])
        state = outer.init(jax.random.key(0), one)
        _, metrics = jax.jit(outer.update)(state, jax.tree.map(lambda leaf: leaf[None], one))
        assert sorted(metrics) == ["grad_norm", "inner_loss", "loss", "loss_before"]
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]


def test_other_kinds_of_tasks_are_refused_by_name():
    require = _lookup.require_same
    require(tasks.spans, tasks.spans, name="source", other_name="learner")
    require(tasks.resolve(loss=lambda outputs, targets: 0), tasks.spans, name="source", other_name="learner")
    with pytest.raises(ValueError, match="source and learner must be of one task type, got regression of source and"):
        require(tasks.regression, tasks.spans, name="source", other_name="learner")
    spec, waves = metajax.data.EpisodeSpec(1, 5, 5), metajax.data.sinusoids()
    learner = metajax.learners.maml(metajax.models.mlp(1), optax.sgd(0.1))
    with pytest.raises(ValueError, match="got regression of source and classification of learner"):
        metajax.evaluation.evaluate(learner, (), waves, spec)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled())
    episodes = metajax.data.episodes(waves, spec, batch=1, seed=0)
    with pytest.raises(ValueError, match="got regression of episodes and classification of learner"):
        metajax.training.fit(outer, None, episodes, steps=1)
    episodes.close()
    with pytest.raises(ValueError, match="sources must have one task type, got 'classification', 'regression'"):
        metajax.data.mixture([waves, metajax.data.glyphs("train")])


def test_labels_that_no_class_has():
    learner = metajax.learners.maml(metajax.models.mlp(outputs=5), optax.sgd(0.1), 2)
    x = np.ones([3, 2], np.float32)
    params = learner.init(jax.random.key(0), x)

    def examples(labels, class_mask=None):
        return metajax.Examples(x, np.array(labels), np.ones(3, bool), class_mask)

    for labels, class_mask, text in (
        ([1, 2, 5], None, "labels below 5, the number of outputs of the model, got 5"),
        ([0, 255, 1], None, "labels below 5, the number of outputs of the model, got 255"),
        ([0, 1, 2], np.ones(2, bool), "labels below 2, the number of entries of class_mask, got 2"),
        ([0, 1, 2], np.array([True, False, True]), "labels of classes that class_mask has, got 1"),
    ):
        with pytest.raises(ValueError, match=f"targets must be {text}"):
            learner.adapt(params, examples(labels, class_mask))
        outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=metajax.hypergrad.unrolled())
        if class_mask is not None:
            with pytest.raises(ValueError, match=f"targets must be {text}"):
                outer.init(jax.random.key(0), metajax.Episode(*[examples(labels, class_mask)] * 2))
    learner.adapt(params, examples([0, -1, 4]))
