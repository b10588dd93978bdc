"""Regret on a stream of tasks: the meta-leader compared with training once, from scratch, and by fine-tuning.

    python -m experiments.online_regret --out=runs/online_regret

Each round brings another sine wave, of which five points are given. The loss on ten other points is recorded before the
learner trains on the round. The phases drift by one turn from the first round to the last. The meta-leader (Finn et al.
2019) takes meta steps on a buffer of all rounds so far. Prints the cumulative regret against knowing each wave, whose
loss is 0, over 10 streams, and draws `online_regret.png`.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/online_regret", "Folder of the table and the figure.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first stream; the others count on from it.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Streams: waves, points and weights differ.")
_ROUNDS = flags.DEFINE_integer("rounds", 200, "Rounds of a stream.")
_POINTS, _TARGETS = 5, 10
_PARTS = slice(_POINTS), slice(_POINTS, None)
_INNER_RATE, _INNER_STEPS, _META_RATE, _META_STEPS, _META_BATCH = 0.02, 5, 3e-3, 40, 8
_CLIP = 10.0  # maximum norm of inner gradients, because the five points may be outliers
_ONCE = 5  # training once ends after 1 / _ONCE of the rounds
_RATES, _FITS = (0.005, 0.01, 0.02), (30, 100)  # rates and steps to try for the two baselines without meta-learning
_ROWS = {
    "leader": "follows the meta-leader",
    "once": "meta-trained once, in the first fifth",
    "longer": "likewise, and as many meta steps as the leader",
    "tuned": "fine-tuned from round to round",
    "scratch": "from scratch in each round",
}


def main() -> int:
    """Runs each strategy on each stream, compares and draws the results."""
    run.prepare(host_devices=1)
    import jax
    import numpy as np

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    rounds = _ROUNDS.value
    _runs.require_seeds(_SEEDS.value, "rounds", rounds, 10)

    def follow(online: Any, items: list[Any], seed: int) -> Any:
        return metajax.online.run_online(online, online.init(jax.random.key(seed), items[0]), items, steps=len(items))

    trial = _stream(_SEED.value + _SEEDS.value, rounds)  # with a seed that is not used below
    found: dict[str, Any] = {"seed": _SEED.value, "rounds": rounds}
    plain = {}
    for name in ("tuned", "scratch"):
        tried = {
            (rate, steps): float(follow(_plain(rate, steps, carry=name == "tuned"), trial, 0)[1].sum())
            for rate in _RATES
            for steps in _FITS
        }
        best = min(tried, key=lambda pair: tried[pair] if np.isfinite(tried[pair]) else np.inf)
        found[f"{name}_rate_and_steps"] = best
        plain[name] = _plain(*best, carry=name == "tuned")
    leader, part = _leader(rounds), rounds // _ONCE
    frozen = leader._replace(update=_same)
    # takes the meta steps of the later rounds at once
    at_once = jax.jit(_leader(rounds, steps=(rounds - part) * _META_STEPS).update)
    losses: dict[str, list[Any]] = {name: [] for name in _ROWS}
    for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
        items = _stream(seed, rounds)
        for name in plain:
            losses[name].append(follow(plain[name], items, seed)[1])
        state, first = follow(leader, items[:part], seed)
        starts = ("leader", leader, state), ("once", frozen, state), ("longer", frozen, at_once(state)[0])
        for name, online, start in starts:
            _, later = metajax.online.run_online(online, start, items[part:], steps=rounds - part)
            losses[name].append(np.append(first, later))
    regrets = {name: metajax.online.cumulative_regret(values) for name, values in losses.items()}
    print(f"{_SEEDS.value} streams of {rounds} waves, {_POINTS} points each; mean and 95 % interval")
    print(f"{'':50s}{'regret':>20s}{'more than the leader':>24s}{'MSE, last half':>20s}")
    for name, title in _ROWS.items():
        late = np.array(losses[name])[:, rounds // 2 :].mean(1)
        last, more = regrets[name][:, -1], regrets[name][:, -1] - regrets["leader"][:, -1]
        print(f"{title:50s}{_runs.told(last, 2):>20s}{_runs.told(more, 2):>24s}{_runs.told(late, 2):>20s}")
    out.mkdir(parents=True, exist_ok=True)
    found |= {"regret": {name: values[:, -1].tolist() for name, values in regrets.items()}}
    _runs.write_json(out / "online_regret.json", found)
    _draw(out / "online_regret.png", regrets)
    print(f"figure: {out / 'online_regret.png'}")
    return 0


def _stream(seed: int, rounds: int) -> list[Any]:
    """Returns waves `a sin(x - p)` as in MAML, except that p drifts by one turn over all rounds."""
    import numpy as np

    import metajax

    rng = np.random.default_rng(seed)
    items = []
    for number in range(rounds):
        amplitude, phase = rng.uniform(0.1, 5), rng.uniform(0, np.pi) + 2 * np.pi * number / rounds
        x = rng.uniform(-5, 5, [_POINTS + _TARGETS, 1]).astype(np.float32)
        wave = metajax.Examples(x, (amplitude * np.sin(x - phase)).astype(np.float32), np.ones(len(x), bool))
        items.append(metajax.Episode(*(metajax.Examples(*(leaf[part] for leaf in wave[:3])) for part in _PARTS)))
    return items


def _same(state: Any) -> Any:
    """An update that does nothing."""
    return state, {}


def _learner(rate: float, steps: int) -> Any:
    import optax

    import metajax

    model, inner = metajax.models.mlp(1), optax.chain(metajax.inner.clip_by_global_norm(_CLIP), optax.sgd(rate))
    return metajax.learners.maml(model, inner, steps, loss=metajax.core.squared_error)


def _leader(rounds: int, steps: int = _META_STEPS) -> Any:
    import optax

    import metajax

    learner = _learner(_INNER_RATE, _INNER_STEPS)
    outer = metajax.outer_update(
        learner, optax.adam(_META_RATE), hypergrad=metajax.hypergrad.mixed_mode(), before=False, task_batching="vmap"
    )
    return metajax.online.follow_the_meta_leader(
        learner, outer, capacity=rounds, meta_batch=_META_BATCH, meta_steps=steps
    )


def _plain(rate: float, steps: int, *, carry: bool) -> Any:
    """Returns a learner without meta-learning. Each round starts from the weights of the last one or random weights."""
    import jax
    import jax.numpy as jnp

    import metajax

    fits = _learner(rate, steps)

    def observe(params: Any, item: Any) -> Any:
        everything = jax.tree.map(lambda *parts: jnp.concatenate(parts), item.support, item.query)
        return fits.adapt(params, everything).params if carry else params

    return metajax.online.Online(
        init=lambda key, item: fits.init(key, item.support.inputs),
        adapt=fits.adapt,
        loss=lambda params, item: fits.outer_loss(fits.adapt(params, item.support), params, item.query)[0],
        observe=observe,
        update=_same,
    )


def _draw(path: pathlib.Path, regrets: dict[str, Any]) -> None:
    import matplotlib.figure

    from experiments import _figures

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in regrets.items():
        _figures.band(axes, range(values.shape[1]), values, _ROWS[name])
    axes.set(xlabel="round", ylabel="cumulative regret", title="squared errors, against knowing each wave")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
