"""No key is used twice: every split, fold and draw of a meta step is recorded, with the data of its key."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rows
import worlds

import metajax
from metajax import data, evaluation, hypergrad, learners, models, replay, training

_DRAWS = (
    "normal", "uniform", "bernoulli", "randint", "choice", "permutation", "categorical", "gumbel", "bits", "rademacher",
)  # fmt: skip


class Uses:
    """What became of each key, by its data: how often is no matter, since what is computed again is the same use."""

    def __init__(self):
        self.kinds, self.places = {}, {}

    def add(self, kind, place, key):
        for one in np.reshape(key, (-1, np.shape(key)[-1])):
            self.kinds.setdefault(tuple(one.tolist()), set()).add(kind)
            if kind == "draw":
                self.places.setdefault(tuple(one.tolist()), set()).add(place)

    def check(self):
        """A key is split, or folded, or drawn from at one place."""
        jax.effects_barrier()
        both = {key: kinds for key, kinds in self.kinds.items() if len(kinds) > 1}
        assert not both
        shared = {key: places for key, places in self.places.items() if len(places) > 1}
        assert not shared

    def draws(self):
        return {place for places in self.places.values() for place in places}


@pytest.fixture
def uses(monkeypatch):
    """Records what is traced from here on."""
    found = Uses()

    def recorded(kind, function):
        @functools.wraps(function)
        def run(key, *arguments, **keywords):
            frame = sys._getframe(1)
            place = (frame.f_code.co_filename, frame.f_lineno)
            if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
                jax.debug.callback(functools.partial(found.add, kind, place), jax.random.key_data(key))
            return function(key, *arguments, **keywords)

        return run

    for name in _DRAWS:
        monkeypatch.setattr(jax.random, name, recorded("draw", getattr(jax.random, name)))
    for name in ("split", "fold_in"):
        monkeypatch.setattr(jax.random, name, recorded(name, getattr(jax.random, name)))
    return found


def test_what_is_recorded(uses):
    """The recorder sees a key that is drawn from twice, one that is split and folded, and one under vmap and scan."""
    key = jax.random.key(0)

    @jax.jit
    def twice(key):
        return (
            jax.random.normal(key)
            + jax.random.normal(key)
        )  # fmt: skip

    twice(key)
    with pytest.raises(AssertionError):
        uses.check()
    uses.kinds, uses.places = {}, {}
    jax.jit(lambda key: (jax.random.split(key), jax.random.fold_in(key, 1)))(key)
    with pytest.raises(AssertionError):
        uses.check()
    uses.kinds, uses.places = {}, {}
    several = jax.random.split(key, 3)
    jax.jit(jax.vmap(jax.random.normal))(several)
    jax.lax.scan(lambda carry, key: (carry, jax.random.normal(key)), 0, jax.random.split(several[0], 2))
    with pytest.raises(AssertionError):  # the first is drawn from and split
        uses.check()


def _drawing():
    """A learner each function of which draws, where it has a key."""

    def number(key):
        return 0.0 if key is None else 0.1 * jax.random.normal(key)

    def init(meta, support, key, *, context):
        noise = 0.0 if key is None else 0.1 * jax.random.normal(key, meta["start"].shape)
        return meta["start"] + noise + context

    def context(meta, support, key):
        return meta["start"].mean() + (0.0 if key is None else 0.1 * jax.random.uniform(key))

    def stream(meta, support, key):
        return jnp.zeros([2, 3]) if key is None else 0.1 * jax.random.normal(key, [2, 3])

    def carry(meta, support, key, *, context):
        return context if key is None else context + 0.1 * jax.random.bernoulli(key)

    def noise(key, params):
        return 0.0 if key is None else 0.1 * jax.random.normal(key, params.shape)

    def loss(params, meta, support, step, key, *, data, context, carry):
        return jnp.sum((params - data + carry + context - meta["goal"] + noise(key, params)) ** 2), carry * 0.9

    def plain_loss(params, meta, support, step, key, *, data, context):
        return jnp.sum((params - data + context - meta["goal"] + noise(key, params)) ** 2)

    def finalize(params, meta, support, key, **parts):
        return params + number(key)

    def outer_loss(adapted, meta, query, *, key=None, inner_losses=None):
        return jnp.sum(adapted**2) + (0.0 if key is None else jax.random.uniform(key)), metajax.Aux()

    def learner(with_carry, objective="query"):
        problem = metajax.InnerProblem(
            init, loss if with_carry else plain_loss, lambda meta: optax.sgd(0.1), 2, finalize, stream, context,
            carry if with_carry else None,
        )  # fmt: skip
        first = lambda key, inputs: {"start": jax.random.normal(key, [3]), "goal": jnp.ones(3)}  # noqa: E731
        return metajax.learners.bilevel(problem, outer_loss, init=first, objective=objective)

    return learner


_ESTIMATORS = {
    "unrolled": hypergrad.unrolled(),
    "unrolled_remat": hypergrad.unrolled(remat=True),
    "mixed_mode": hypergrad.mixed_mode(),
    "forward_mode": hypergrad.forward_mode(),
    "first_order": hypergrad.first_order(),
    "truncated": hypergrad.truncated(1),
    "persistent_truncation": hypergrad.persistent_truncation(1),
    "evolution": hypergrad.evolution(sigma=0.01, pairs=2),
    "persistent_evolution": hypergrad.persistent_evolution(sigma=0.01, pairs=2, steps=1),
    "displacement": hypergrad.displacement(),
    "implicit": hypergrad.implicit(steps=2),
    "finite_difference": hypergrad.finite_difference(),
    "sama": hypergrad.sama(),
}


def test_all_estimators_are_here():
    made = {name for name in hypergrad.__all__ if name in worlds.ESTIMATORS or name in _ESTIMATORS}
    assert made | {"unrolled_remat"} == set(_ESTIMATORS)


@pytest.mark.parametrize(
    "name", worlds.few_by_default(_ESTIMATORS, lambda name: name in ("mixed_mode", "implicit", "persistent_evolution"))
)
def test_estimators(uses, name):
    """Two meta steps of two tasks, by a learner that draws in each of its functions."""
    learner = _drawing()(with_carry=name not in ("implicit", "sama"))
    part = metajax.Examples(jnp.zeros([2, 1]), jnp.zeros([2, 1]), jnp.ones(2, bool))
    episode = metajax.Episode(part, part)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=_ESTIMATORS[name])
    state = outer.init(jax.random.key(0), episode, num_tasks=2)
    update = jax.jit(outer.update)
    for _ in range(2):
        state, _ = update(state, worlds.stack([episode] * 2))
    uses.check()
    places = {line for file, line in uses.draws() if file == __file__}
    assert len(places) == 8 - (name in ("implicit", "sama")), "every function draws, and the first meta-parameters"


_WORDS = models.hide_tokens(models.decoder(16, width=8, depth=1, heads=2, remat=False), 0.3)
_SOME = {
    **{
        name: (row.learner, lambda row=row: row.episode(0, 1, np.float32))
        for name, row in rows.ROWS.items()
    },
    "reptile with batches": (
        learners.reptile(models.mlp(worlds.WAYS), optax.sgd(0.1), 3, batch_size=2),
        lambda: worlds.episode(worlds.LEARNERS["maml"], dtype=np.float32),
    ),
    "bayesian": (
        learners.bayesian(models.mlp(worlds.WAYS), optax.sgd(0.1), 2, samples=2),
        lambda: worlds.episode(worlds.LEARNERS["maml"], dtype=np.float32),
    ),
    "moco with views": (
        learners.contrastive(models.mlp(4), momentum=0.9, queue=8, dim=4, hidden=4),
        lambda: worlds.episode(worlds.LEARNERS["maml_support_statistics"], dtype=np.float32),
    ),
    "words that are hidden": (
        learners.maml(_WORDS, optax.sgd(0.1), 2, task=metajax.tasks.next_token_prediction),
        lambda: metajax.Episode(*[
            metajax.Examples(
                {"tokens": jnp.ones([2, 5], jnp.int32), "mask": jnp.ones([2, 5], bool)}, jnp.ones([2, 5], jnp.int32),
                jnp.ones(2, bool),
            )
        ] * 2),
    ),
}  # fmt: skip
_DRAW = ("reptile with batches", "bayesian", "moco with views", "words that are hidden")


@pytest.mark.parametrize(
    "name", worlds.few_by_default(_SOME, lambda name: name in ("reptile with batches", "moco with views"))
)
def test_learners(uses, name):
    learner, episode = _SOME[name]
    episode = episode()
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.mixed_mode())
    state, update = outer.init(jax.random.key(0), episode), jax.jit(outer.update)
    for _ in range(2):
        state, _ = update(state, worlds.stack([episode] * 2))
    uses.check()
    if name in _DRAW and name != "bayesian":  # which lets optax draw
        assert any("flax" not in place[0] for place in uses.draws()), "it draws, and not only its parameters"


def test_what_stands_around_a_meta_step(uses):
    """Episodes on the device, transforms of images, memories, and an evaluation with a key."""
    source, spec = data.glyphs("val"), data.EpisodeSpec(3, 1, 2)
    sampled, sample = data.device_sampler(source, spec)
    learner = learners.reptile(models.mlp(3), optax.sgd(0.1), 2, batch_size=2)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.displacement())
    outer = replay.replayed(outer, replay.reservoir(4), 1)
    outer = training.augment(outer, data.random_affine(rotation=10))
    state = outer.init(jax.random.key(0), data.episode(source, spec, seed=0, index=0))
    training.fit_on_device(outer, state, sampled, sample, batch=2, steps=3, chunk=2, seed=5)
    uses.check()
    params = learner.init(jax.random.key(1), data.episode(source, spec, seed=0, index=0).support.inputs)
    evaluation.evaluate(learner, params, source, spec, episodes=4, batch=2, key=jax.random.key(2))
    uses.check()
    assert len(uses.draws()) >= 4


@pytest.mark.slow
def test_keys_of_adapters_are_none_of_the_meta_steps(uses):
    """`split(key)[i]` is `fold_in(key, i)`: what makes adapters must not be the key of a step."""
    model = metajax.adapters.lora(models.decoder(16, width=8, depth=1, heads=2), rank=2)
    learner = learners.maml(model, optax.sgd(0.1), 1, adapts="lora", task=metajax.tasks.next_token_prediction)
    outer = metajax.outer_update(learner, optax.sgd(0.1), hypergrad=hypergrad.first_order())
    tokens = jnp.ones([2, 4], jnp.int32)
    part = metajax.Examples(tokens, tokens, jnp.ones(2, bool))
    state = outer.init(jax.random.key(0), metajax.Episode(part, part))
    outer.update(state, worlds.stack([metajax.Episode(part, part)] * 2))
    uses.check()
