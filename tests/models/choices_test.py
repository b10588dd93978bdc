"""score_choices: against log-likelihoods of one choice at a time, in NumPy; and learners and adapters on top."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metajax
from metajax import adapters, data, evaluation, learners, models

DECODER = models.decoder(12, width=8, depth=1, heads=2, remat=False)


def made(seed=0, size=3, choices=4, length=6):
    """Prompts of 2 tokens, choices of 1 to 4; the last choice of the last question is absent."""
    rng = np.random.default_rng(seed)
    lengths = 2 + rng.integers(1, length - 1, (size, choices))
    lengths[-1, -1] = 0
    mask = np.arange(length) < lengths[..., None]
    tokens = np.where(mask, rng.integers(1, 12, (size, choices, length)), 0).astype(np.int32)
    return {"tokens": tokens, "mask": mask, "choice": mask & (np.arange(length) >= 2)}


@pytest.mark.parametrize("length_normalised", [True, False])
def test_scores_of_a_decoder(length_normalised):
    inputs = made()
    model = models.score_choices(DECODER, length_normalised=length_normalised)
    params = model.init(jax.random.key(0), inputs)
    scores = np.asarray(jax.jit(model.apply)(params, inputs))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, DECODER.init(jax.random.key(0), jnp.ones([1, 3], int))
    )
    alone = jax.jit(DECODER.apply)  # one choice at a time, and without padding
    for (row, choice), score in np.ndenumerate(scores):
        tokens = inputs["tokens"][row, choice][inputs["mask"][row, choice]]
        if not tokens.size:
            assert score == -1e9
            continue
        logits = np.asarray(alone(params, tokens[None]), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        found = [logp[place - 1, tokens[place]] for place in range(2, len(tokens))]
        assert score == pytest.approx(np.mean(found) if length_normalised else np.sum(found), abs=1e-5)


def test_scores_of_one_output_a_sequence():
    inputs = made() | {"types": made(1)["tokens"]}

    def apply(params, inputs, mask):
        assert mask.shape == (12,)
        assert set(inputs) == {"tokens", "mask", "types"}
        return (params * inputs["tokens"] + inputs["types"]).sum(-1, keepdims=True)

    model = models.score_choices(metajax.Model(lambda key, inputs: jnp.ones([]), apply, ("mask",)))
    scores = model.apply(2.0, inputs, mask=jnp.array([True, False, True]))
    expected = (2 * inputs["tokens"] + inputs["types"]).sum(-1)
    expected[-1, -1] = -1e9
    np.testing.assert_allclose(scores, expected)


def test_statistics_pass_through():
    inputs = made()
    apply = lambda params, inputs, stats: (inputs["tokens"][:, :1] * 1.0, "kept")  # noqa: E731
    model = models.score_choices(metajax.Model(lambda key, inputs: (), apply, ("stats",)))
    scores, stats = model.apply((), inputs, stats=None)
    assert (scores.shape, stats) == ((3, 4), "kept")


@pytest.mark.slow
def test_one_question_at_a_time_scores_the_same_in_less_memory():
    inputs, decoder = made(size=8), models.decoder(4000, width=8, depth=1, heads=2)
    plain, saving = (adapters.lora(models.score_choices(decoder, remat=remat), rank=2) for remat in (False, True))
    params = plain.init(jax.random.key(0), inputs)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # the new path is not zero

    def gradient(model):
        loss = lambda params: -jax.nn.log_softmax(model.apply(params, inputs))[:, 0].mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss)).lower(params).compile()

    (loss, grads), (expected, expected_grads) = gradient(saving)(params), gradient(plain)(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, expected_grads)
    temporaries = [gradient(model).memory_analysis().temp_size_in_bytes for model in (saving, plain)]
    assert temporaries[0] < temporaries[1] / 3


def test_one_question_at_a_time_hides_other_words_in_each():
    same = jax.tree.map(lambda leaf: np.repeat(leaf[:1], 20, axis=0), made())
    count = metajax.Model(lambda key, inputs: (), lambda params, inputs: inputs["mask"].sum(-1, keepdims=True) * 1.0)
    model = models.score_choices(models.hide_tokens(count, 0.5), remat=True)
    assert len(np.unique(model.apply((), same, key=jax.random.key(0)), axis=0)) > 3
    np.testing.assert_array_equal(model.apply((), same, key=None), same["mask"].sum(-1))


def test_absent_choices_give_no_nan_to_the_gradient():
    """A model whose attention to nothing is NaN."""

    def apply(params, inputs):
        share = inputs["mask"] / inputs["mask"].sum(-1, keepdims=True)
        return (params * share * inputs["tokens"]).sum(-1, keepdims=True)

    model = models.score_choices(metajax.Model(lambda key, inputs: jnp.ones([]), apply))
    gradient = jax.grad(lambda params: model.apply(params, made())[:, 0].sum() + model.apply(params, made())[-1, -1])(
        1.0
    )
    assert jnp.isfinite(gradient)


def test_refusals():
    with pytest.raises(ValueError, match="model must be of type Model"):
        models.score_choices(lambda x: x)
    with pytest.raises(ValueError, match="length_normalised must be of type bool, got 1"):
        models.score_choices(DECODER, length_normalised=1)
    with pytest.raises(ValueError, match="remat must be of type bool, got 'example'"):
        models.score_choices(DECODER, remat="example")
    with pytest.raises(ValueError, match="remat must be False for a model that needs mask, stats, got True"):
        models.score_choices(metajax.Model(lambda key, inputs: (), lambda *_: (), ("mask", "stats")), remat=True)
    model = models.score_choices(metajax.Model(lambda key, inputs: (), lambda params, inputs: jnp.zeros([12, 3])))
    with pytest.raises(
        ValueError, match=r"logits \[n, length, vocab\] or one output \[n, 1\] for tokens \(12, 6\), got .*\(12, 3\)"
    ):
        model.apply((), made())
    for inputs in (made()["tokens"], {"tokens": made()["tokens"]}, jax.tree.map(lambda leaf: leaf[0], made())):
        with pytest.raises(ValueError, match="inputs must be those of data"):
            model.apply((), inputs)


@pytest.mark.slow
def test_maml_over_lora_learns_which_choice_is_right():
    """A task names the right choice by its only token: what the support says, and nothing else tells."""
    rng = np.random.default_rng(0)
    tokens = np.ones([40, 2, 3], np.int32)
    tokens[..., 1] = rng.integers(4, 12, (40, 1))
    tokens[..., 2] = [2, 3]
    tokens = np.where(rng.random([40, 1, 1]) < 0.5, tokens, tokens[:, ::-1])
    there = np.ones(tokens.shape, bool)
    tasks = np.repeat([0, 1], 20)
    inputs = {"tokens": tokens, "mask": there, "choice": there & (np.arange(3) == 2)}
    source = data.ClassSource(
        "toy", "train", inputs, tasks, ("two", "three"),
        targets=np.argmax(tokens[..., 2] == 2 + tasks[:, None], axis=1).astype(np.int32),
    )  # fmt: skip
    spec = data.EpisodeSpec(ways=1, shots=4, queries=6)
    model = adapters.lora(models.score_choices(DECODER), rank=2)
    learner = learners.maml(model, optax.sgd(5.0), 4, adapts="lora")
    params = learner.init(jax.random.key(0), data.episode(source, spec, seed=0, index=0).support.inputs)
    before = evaluation.evaluate(learner, params, source, spec, episodes=20, batch=20, num_steps=0)
    after = evaluation.evaluate(learner, params, source, spec, episodes=20, batch=20)
    assert abs(before.mean - 0.5) < 0.2
    assert after.mean > 0.85
