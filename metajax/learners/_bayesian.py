"""Amortised Bayesian meta-learning: the meta-parameters are a prior, and an inner loop infers the task posterior."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metajax import tasks
from metajax.core import _inner, _keys, _losses, _tree, _validate
from metajax.core._types import Aux, Examples, InnerProblem, Learner, Loss, Model, Params, TaskType
from metajax.learners._forward import Adapted, forward, masked, support_stats

Average = Literal["probabilities", "outputs"]
_PRECISION_RATE = 0.01  # rate of the exponential hyper-prior on precisions, as in the paper


def bayesian(
    model: Model,
    inner: optax.GradientTransformation,
    num_steps: int = 1,
    *,
    adapts: _tree.Where = None,
    beta: float = 0.01,
    gamma: float = 0.0,
    scale: float = 0.1,
    samples: int = 1,
    predict_samples: int = 10,
    average: Average | None = None,
    task: TaskType | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Amortised Bayesian meta-learning (Ravi and Beatson 2019); over low-rank adapters, ABMLL (Zhang et al. 2025).

    The meta-parameters `{"mean", "log_scale"}` are the prior `p` over the adapted weights: a Gaussian with independent
    weights. `mean` holds the parameters of `model`. `log_scale` holds the logarithms of the standard deviations, with
    None for leaves that do not adapt. The posterior `q` of a task has the same form. It starts at the prior and takes
    inner steps on

        E_q[mean loss of the support set] + beta * KL(q || p)

    and the outer loss is

        E_q[mean loss of the query set] + beta * KL(q || p) - gamma * log h(p)

    where `h` is the hyper-prior of the first paper: standard normal means, and precisions from Gamma(1, 0.01).
    Expectations are means over weights drawn from the key by reparameterisation. Without a key everything is
    deterministic: the mean replaces the draws, and the log-scales stay at their prior values.

    The second paper adds `beta` and `gamma` to balance the prior against reconstruction, because the divergence sums
    over all weights while the loss is a mean over examples. In that paper the mean and the scale of the *product* of
    an adapter are each low-rank; here the *leaves* of the adapter are Gaussian, and the inner loop is the one of the
    first paper.

    Args:
      model: a network with one output for each class (or the regression targets); `adapters.lora(...)` for ABMLL.
      inner: the inner update rule for means and log-scales, any optax transform. With SGD at rate r, the steps of a
        mean are stable only if `r * beta < 2 * scale**2`.
      num_steps: inner steps, at least 1. `adapt(..., num_steps=)` takes another number, 0 included.
      adapts: path regex or predicate over the parameters of `model`; it picks the leaves that adapt and have a scale.
        None picks all. All tasks share the other leaves, which are trained like other meta-parameters.
      beta: weight of the divergence. 1 / n gives the evidence lower bound for n support examples; 0 drops the prior.
      gamma: weight of the hyper-prior.
      scale: standard deviation of each weight in the prior that `init` makes.
      samples: draws of the weights in each inner step and in the outer loss.
      predict_samples: draws of the weights in `predict`.
      average: what `predict` averages over draws: "probabilities", returned as logarithms, or "outputs". None means
        "probabilities" if the loss of the task type is the cross-entropy, otherwise "outputs".
      task: the task type, None for classification.
      loss: `(outputs, targets) -> [n]`, a negative log-likelihood up to constants, instead of the loss of the task
        type; see `metajax.tasks.resolve`.

    Returns:
      A `Learner`. The `params` of the result of `adapt` are the posterior, `{"mean", "log_scale"}` like the prior, and
      its `mean` has every parameter of `model`. Support statistics are computed with the weights at their mean.

    Raises:
      ValueError: an argument has the wrong type, `num_steps`, `samples` or `predict_samples` is below 1, `beta` or
        `gamma` is negative, `scale` is 0 or below, `average` is unknown, or (at trace time) `adapts` picks nothing, or
        a task has more classes than the model has outputs.

    Source: Ravi and Beatson 2019, Amortized Bayesian Meta-Learning, ICLR, openreview.net/forum?id=rkgpy3C5tX; Zhang,
    Snell and Griffiths 2025, arXiv:2508.14285.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.bayesian(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1), num_steps=3)
    >>> support = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> prior = jax.jit(learner.init)(jax.random.key(0), support.inputs)
    >>> posterior = jax.jit(learner.adapt)(prior, support, key=jax.random.key(1))
    >>> log_probabilities = learner.predict(posterior, support.inputs, key=jax.random.key(2))
    >>> jnp.exp(log_probabilities).sum(axis=1).round(4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    _validate.instance("model", model, Model)
    _validate.instance("inner", inner, optax.GradientTransformation)
    for name, count in (("num_steps", num_steps), ("samples", samples), ("predict_samples", predict_samples)):
        _validate.positive_int(name, count)
    _validate.non_negative_float("beta", beta)
    _validate.non_negative_float("gamma", gamma)
    _validate.positive_float("scale", scale)
    resolved = tasks.resolve(task, loss)
    if average is None:
        average = "probabilities" if resolved.loss is _losses.cross_entropy else "outputs"
    _validate.one_of("average", average, ("probabilities", "outputs"))

    def adapting(mean: Params) -> Params:
        return _tree.split(mean, adapts, name="adapts")[0]

    def init(key: Any, inputs: Any) -> Params:
        mean = model.init(key, inputs)
        return {"mean": mean, "log_scale": jax.tree.map(lambda m: jnp.full_like(m, math.log(scale)), adapting(mean))}

    def prior_of(meta_params: Params) -> Params:
        return {"mean": adapting(meta_params["mean"]), "log_scale": meta_params["log_scale"]}

    def drawn_outputs(adapted: Adapted, inputs: Any, *, mask: Any, key: Any, count: int) -> Any:
        """Returns outputs `[count, n, ...]` for drawn weights; without a key `[1, n, ...]`, for the mean weights."""

        def outputs(key: Any) -> Any:
            weights_key, model_key = _keys.split(key, 2)
            weights = _tree.fill(_draw(prior_of(adapted.params), weights_key), adapted.params["mean"])
            found, _ = forward(model, weights, inputs, mask=mask, key=model_key, stats=adapted.stats)
            return masked(found, adapted.class_mask)

        if key is None:
            return jax.tree.map(lambda leaf: leaf[None], outputs(None))
        return jax.vmap(outputs)(jax.random.split(key, count))

    def expected_loss(outputs: Any, examples: Examples) -> jax.Array:
        return jnp.mean(jax.vmap(lambda drawn: _losses.mean_loss(resolved, drawn, examples))(outputs))

    def whole(params: Params, meta_params: Params) -> Params:
        return {"mean": _tree.fill(params["mean"], meta_params["mean"]), "log_scale": params["log_scale"]}

    def problem_init(meta_params: Params, support: Examples, key: Any) -> Params:
        del support, key
        return prior_of(meta_params)

    def inner_loss(params: Params, meta_params: Params, support: Examples, step: Any, key: Any) -> jax.Array:
        del step
        posterior = Adapted(whole(params, meta_params), support.class_mask)
        outputs = drawn_outputs(posterior, support.inputs, mask=support.mask, key=key, count=samples)
        value = expected_loss(outputs, support)
        if beta:
            value += beta * _divergence(params, prior_of(meta_params))
        return value

    def finalize(params: Params, meta_params: Params, support: Examples, key: Any) -> Adapted:
        posterior = whole(params, meta_params)
        return Adapted(posterior, support.class_mask, support_stats(model, posterior["mean"], support, key))

    problem = InnerProblem(problem_init, inner_loss, lambda meta_params: inner, num_steps, finalize)

    def predict(adapted: Adapted, inputs: Any, *, mask: Any = None, key: Any = None) -> Any:
        return _average(average, drawn_outputs(adapted, inputs, mask=mask, key=key, count=predict_samples))

    def outer_loss(adapted: Adapted, meta_params: Params, query: Examples, *, key: Any = None) -> tuple[jax.Array, Aux]:
        outputs = drawn_outputs(adapted, query.inputs, mask=query.mask, key=key, count=samples)
        value, prior = expected_loss(outputs, query), prior_of(meta_params)
        # a task without query examples has weight 0, its divergence included
        weight = jnp.any(_losses.kept_examples(resolved, query)).astype(value.dtype)
        if beta:
            value += weight * beta * _divergence(prior_of(adapted.params), prior)
        if gamma:
            value += weight * gamma * _hyper_prior(prior)
        return value, Aux(_average(average, outputs))

    return Learner(init, _inner.adaptation(problem), predict, outer_loss, problem, resolved)


def _draw(gaussian: Params, key: Any) -> Params:
    """Draws weights from a Gaussian; returns its mean if there is no key."""
    mean = gaussian["mean"]
    if key is None:
        return mean
    noise = optax.tree.random_like(key, mean)
    return jax.tree.map(lambda m, s, draw: m + jnp.exp(s) * draw, mean, gaussian["log_scale"], noise)


def _divergence(q: Params, p: Params) -> jax.Array:
    """Computes KL(q || p) of two Gaussians with independent weights."""

    def of_leaf(q_mean: jax.Array, q_log: jax.Array, p_mean: jax.Array, p_log: jax.Array) -> jax.Array:
        # expm1: near the prior, the variance term is a small difference of numbers close to 1
        wider = q_log - p_log
        moved = (q_mean - p_mean) * jnp.exp(-p_log)
        return jnp.sum(0.5 * jnp.expm1(2 * wider) - wider + 0.5 * jnp.square(moved))

    return optax.tree.sum(jax.tree.map(of_leaf, q["mean"], q["log_scale"], p["mean"], p["log_scale"]))


def _hyper_prior(p: Params) -> jax.Array:
    """Computes the negative log density of a prior, up to a constant: N(0, 1) means, Gamma(1, 0.01) precisions."""
    means = 0.5 * optax.tree.norm(p["mean"], squared=True)
    return means + optax.tree.sum(jax.tree.map(lambda s: _PRECISION_RATE * jnp.sum(jnp.exp(-2 * s)), p["log_scale"]))


def _average(average: Average, outputs: Any) -> Any:
    """Averages outputs `[count, n, ...]` over the draws; a single draw is returned unchanged."""

    def of_leaf(leaf: jax.Array) -> jax.Array:
        if leaf.shape[0] == 1:
            return leaf[0]
        if average == "outputs":
            return jnp.mean(leaf, axis=0)
        # stays in logarithms: the probability of an absent class is 0 in floating point, but its logit is finite
        return jax.nn.logsumexp(jax.nn.log_softmax(leaf), axis=0) - math.log(leaf.shape[0])

    return jax.tree.map(of_leaf, outputs)
