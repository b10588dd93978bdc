"""Regret on a stream of tasks that drifts: the meta-leader against training once, from scratch, and fine-tuning.

    python -m experiments.online_regret --out=runs/online_regret

Each round brings five letters never seen before and two images of each, turned by a little more than those of the round
before; what is lost on ten other images is noted before anything is learned from the round. The meta-leader (Finn et
al. 2019) takes meta steps on a buffer of all rounds so far. Prints the cumulative regret against the meta-parameters
that know the whole stream, over 10 streams, and draws `online_regret.png`.
"""

from __future__ import annotations

import itertools
import pathlib
from typing import Any

from absl import flags

from experiments import _launch

_OUT = flags.DEFINE_string("out", "runs/online_regret", "Folder of the table and the figure.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the first stream; the others count on from it.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Streams: letters, images and weights differ.")
_ROUNDS = flags.DEFINE_integer("rounds", 200, "Rounds of a stream.")
_TURN = flags.DEFINE_float("turn", 1.0, "Degrees by which the images turn in a round.")
_WAYS, _SHOTS, _QUERIES, _SIDE = 5, 2, 2, 14
_INNER_RATE, _INNER_STEPS, _META_RATE, _META_STEPS, _META_BATCH = 0.1, 5, 3e-3, 5, 8
_ONCE = 5  # training once ends after this part of the rounds
_RATES, _FITS = (0.03, 0.1, 0.3), (5, 30)  # what is tried for the two without meta-learning
_ROWS = {
    "leader": "meta-leader, trained on a sample of all rounds",
    "latest": "meta-leader, trained on the latest rounds",
    "once": "meta-trained once, on the first fifth",
    "tuned": "fine-tuned from round to round",
    "scratch": "from scratch in each round",
}


def main() -> int:
    """Follows each stream with each strategy, compares, draws."""
    _launch.prepare(host_devices=1)
    import jax
    import numpy as np

    import metajax
    from experiments import _runs
    from metajax import strategies

    out = pathlib.Path(_OUT.value)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got {str(out)!r}")
    rounds = _ROUNDS.value
    if _SEEDS.value < 2 or rounds < 10:
        raise ValueError(f"seeds must be at least 2 and rounds at least 10, got {_SEEDS.value} and {rounds}")

    def stream(split: str, seed: int) -> list[Any]:
        source = metajax.data.glyphs(split, size=_SIDE)
        many = strategies.character_stream(
            source, seed=seed, ways=_WAYS, shots=_SHOTS, queries=_QUERIES, turn=_TURN.value, hazard=1.0
        )
        return list(itertools.islice(many, rounds))

    def lost(online: Any, items: list[Any], seed: int) -> Any:
        return strategies.run_online(online, online.init(jax.random.key(seed), items[0]), items, steps=len(items))

    trial = stream("val", _SEED.value)
    found: dict[str, Any] = {"seed": _SEED.value, "rounds": rounds, "turn": _TURN.value}
    followed = {name: _leader(rounds, "sample" if name == "leader" else "latest") for name in ("leader", "latest")}
    for name in ("tuned", "scratch"):
        tried = {
            (rate, steps): float(lost(_plain(rate, steps, carry=name == "tuned"), trial, 0)[1].sum())
            for rate in _RATES
            for steps in _FITS
        }
        best = min(tried, key=lambda settings: tried[settings])
        found[f"{name}_rate_and_steps"] = best
        followed[name] = _plain(*best, carry=name == "tuned")
    whole = _leader(rounds, "sample", steps=rounds * _META_STEPS)
    losses: dict[str, list[Any]] = {name: [] for name in (*_ROWS, "hindsight")}
    for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
        items = stream("train", seed)
        for name, online in followed.items():
            losses[name].append(lost(online, items, seed)[1])
        online, part = followed["leader"], rounds // _ONCE
        state, first = lost(online, items[:part], seed)
        frozen = online._replace(update=_same)
        losses["once"].append(
            np.append(first, strategies.run_online(frozen, state, items[part:], steps=rounds - part)[1])
        )
        # the leader in hindsight: as many meta steps, on all rounds of the stream
        state = whole.init(jax.random.key(seed), items[0])
        state, _ = strategies.run_online(whole._replace(update=_same), state, items, steps=rounds)
        state = jax.jit(whole.update)(state)[0]
        losses["hindsight"].append(strategies.run_online(frozen, state, items, steps=rounds)[1])
    reference = np.array(losses.pop("hindsight"))
    print(f"{_SEEDS.value} streams of {rounds} rounds, {_WAYS} letters, {_SHOTS} images each; mean and 95 % interval")
    print(f"{'':50s}{'regret':>20s}{'loss of a round, last half':>30s}{'regret over the leader':>26s}")
    regrets = {name: strategies.cumulative_regret(values, reference) for name, values in losses.items()}
    for name, title in _ROWS.items():
        late, more = (
            np.mean(np.array(losses[name])[:, rounds // 2 :], 1),
            regrets[name][:, -1] - regrets["leader"][:, -1],
        )
        print(f"{title:50s}{_told(regrets[name][:, -1]):>20s}{_told(late):>30s}{_told(more):>26s}")
    print(f"{'what knows the whole stream':50s}{'0':>20s}{_told(reference[:, rounds // 2 :].mean(1)):>30s}")
    out.mkdir(parents=True, exist_ok=True)
    found |= {"regret": {name: values[:, -1].tolist() for name, values in regrets.items()}}
    _runs.write_json(out / "online_regret.json", found)
    _draw(out / "online_regret.png", regrets)
    print(f"figure: {out / 'online_regret.png'}")
    return 0


def _told(values: Any) -> str:
    import metajax

    mean, ci95 = metajax.evaluation.mean_and_interval(values)
    return f"{mean:.2f} +- {ci95:.2f}"


def _same(state: Any) -> Any:
    """An update that teaches nothing."""
    return state, {}


def _model() -> Any:
    import metajax

    return metajax.models.mlp(_WAYS, hidden=(64,))


def _leader(rounds: int, keep: Any, steps: int = _META_STEPS) -> Any:
    import optax

    import metajax

    learner = metajax.learners.maml(_model(), optax.sgd(_INNER_RATE), _INNER_STEPS)
    outer = metajax.outer_update(
        learner, optax.adam(_META_RATE), hypergrad=metajax.hypergrad.mixed_mode(), before=False, task_batching="vmap"
    )
    capacity = rounds if keep == "sample" else max(rounds // 10, 1)
    return metajax.strategies.follow_the_meta_leader(
        learner, outer, capacity=capacity, meta_batch=_META_BATCH, meta_steps=steps, keep=keep
    )


def _plain(rate: float, steps: int, *, carry: bool) -> Any:
    """No meta-learning: a round begins with the weights that fit all of the round before, or with random ones."""
    import jax
    import jax.numpy as jnp
    import optax

    import metajax

    model = _model()
    fits = metajax.learners.maml(model, optax.sgd(rate), steps)

    def observe(params: Any, item: Any) -> Any:
        everything = jax.tree.map(lambda *parts: jnp.concatenate(parts), item.support, item.query)
        return fits.adapt(params, everything).params if carry else params

    return metajax.strategies.Online(
        init=lambda key, item: model.init(key, item.support.inputs),
        adapt=fits.adapt,
        loss=lambda params, item: fits.outer_loss(fits.adapt(params, item.support), params, item.query)[0],
        observe=observe,
        update=_same,
    )


def _draw(path: pathlib.Path, regrets: dict[str, Any]) -> None:
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in regrets.items():
        mean, half = values.mean(0), 1.96 * values.std(0, ddof=1) / np.sqrt(len(values))
        line = axes.plot(mean, label=_ROWS[name])[0]
        axes.fill_between(np.arange(len(mean)), mean - half, mean + half, alpha=0.2, color=line.get_color(), lw=0)
    axes.set(xlabel="round", ylabel="cumulative regret", title="against meta-parameters that know the whole stream")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _launch.run(main)
