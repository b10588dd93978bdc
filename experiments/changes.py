"""Adaptation on a stream of letters that change without notice, with detection of the changes.

    python -m experiments.changes --out=runs/changes

Each step brings one image of each of ten letters, from scripts that were not used in training. The learner classifies
them before the labels are revealed. At random steps, the ten letters are replaced. Prototypes are computed from the
steps since the last change according to Bayesian change-point detection (after MOCA, Harrison et al. 2020), from the
last M steps, or from the steps since the true last change. Prints accuracy, cumulative regret against the true changes,
and the number of steps after a change until four of five letters are classified correctly again, over 10 streams, and
draws `changes.png`.
"""

from __future__ import annotations

import itertools
from typing import Any

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/changes", "Folder of the table and the figure.")
_SEED = flags.DEFINE_integer("seed", 0, "Of training, and of the first stream; the others count on from it.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Streams.")
_STEPS = flags.DEFINE_integer("steps", 400, "Steps of a stream.")
_TRAIN = flags.DEFINE_integer("train_steps", 300, "Meta steps of the prototypes, before the streams.")
_WAYS, _LONGEST, _HAZARD, _WINDOWS = 10, 20, 0.03, (1, 5, 20)
_LEVEL = 0.2  # error at which the learner counts as recovered
_AROUND = 10  # steps before and after a change that are shown in the figure
_TOLD, _FOUND = "told when it changes", "change points"


def main() -> int:
    """Trains the prototypical network, runs each strategy on each stream, compares and draws them."""
    run.prepare(host_devices=1)
    import numpy as np

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value, 4 * _AROUND)
    begins = {seed: _begins(seed) for seed in range(_SEED.value, _SEED.value + _SEEDS.value)}
    if not any(_alone(begins[seed]) for seed in begins):
        raise ValueError(
            f"steps must be enough for a change with {_AROUND} steps before and after it, got {_STEPS.value}: "
            f"none of the {_SEEDS.value} streams has one"
        )
    embed = _trained()
    # the streams are embedded once, so the learner on them only computes means
    learner = metajax.learners.prototypical(
        metajax.Model(lambda key, x: (), lambda params, x: x), distance="cosine", ways=_WAYS
    )
    followers = {
        _FOUND: metajax.online.change_points(
            learner, longest=_LONGEST, hazard=_HAZARD, log_likelihood=lambda *pair: -metajax.core.cross_entropy(*pair)
        ),
        **{
            f"the last {f'{window} steps' if window > 1 else 'step'}": metajax.online.recent(learner, window=window)
            for window in _WINDOWS
        },
    }
    source = metajax.data.glyphs("test")
    losses: dict[str, list[Any]] = {name: [] for name in [_TOLD, *followers]}
    right: dict[str, list[Any]] = {name: [] for name in losses}
    for seed, changed in begins.items():
        items = _stream(source, seed, changed, embed)
        for name in losses:
            adapted = _told(learner, items, changed) if name == _TOLD else _followed(followers[name], items)
            lost, hit = _judged(learner, adapted, items)
            losses[name].append(lost)
            right[name].append(hit)
    reference = np.array(losses[_TOLD])
    curves = {name: _around(values, list(begins.values())) for name, values in right.items()}
    count = sum(len(changed) - 1 for changed in begins.values())
    print(f"{_SEEDS.value} streams of {_STEPS.value} steps, {count} changes; mean and 95 % interval")
    print(f"{'':24s}{'accuracy, %':>18s}{'regret, nats':>20s}{'steps to recover':>18s}")
    found: dict[str, Any] = {"seed": _SEED.value, "steps": _STEPS.value}
    for name in losses:
        accuracy = 100 * np.array(right[name]).mean(1)
        regret = metajax.online.cumulative_regret(np.array(losses[name]), reference)[:, -1]
        back = metajax.online.recovery_time(1 - curves[name], _AROUND, level=_LEVEL)
        print(f"{name:24s}{_runs.told(accuracy, 2):>18s}{_runs.told(regret, 2):>20s}{back:18.0f}")
        found[name] = {
            "accuracy": accuracy.tolist(),
            "regret": regret.tolist(),
            "recovery": back if np.isfinite(back) else None,
        }
    out.mkdir(parents=True, exist_ok=True)
    _runs.write_json(out / "changes.json", found)
    _draw(out / "changes.png", curves)
    print(f"figure: {out / 'changes.png'}")
    return 0


def _trained() -> Any:
    """Returns a function from images to features, meta-trained on the letters of other scripts."""
    import jax
    import optax

    import metajax

    model = metajax.models.conv4(width=32, normalisation="group")
    learner = metajax.learners.prototypical(model, distance="cosine")
    outer = metajax.outer_update(learner, optax.adam(2e-3), hypergrad=metajax.hypergrad.unrolled(), before=False)
    source, spec = metajax.data.glyphs("train"), metajax.data.EpisodeSpec(ways=20, shots=1, queries=5)
    episodes = (
        metajax.data.episode_batch(source, spec, seed=_SEED.value, start=start, count=4)
        for start in itertools.count(step=4)
    )
    first = next(episodes)
    state = outer.init(jax.random.key(_SEED.value), jax.tree.map(lambda leaf: leaf[0], first))
    state = metajax.training.fit(outer, state, itertools.chain([first], episodes), steps=_TRAIN.value)

    return jax.jit(lambda images: model.apply(state.params, images))


def _begins(seed: int) -> list[int]:
    """Returns the steps at which the letters of a stream change, including the first step."""
    import numpy as np

    changed = np.random.default_rng(seed).random(_STEPS.value - 1) < _HAZARD
    return [0, *(1 + np.flatnonzero(changed)).tolist()]


def _alone(begins: list[int]) -> list[int]:
    """Returns the changes with at least `_AROUND` steps to the changes before and after and to the end."""
    ends = [*begins[1:], _STEPS.value]
    return [
        one
        for before, one, after in zip(begins, begins[1:], ends[1:], strict=False)
        if one - before >= _AROUND and after - one >= _AROUND
    ]


def _stream(source: Any, seed: int, begins: list[int], embed: Any) -> list[Any]:
    """Returns a stream of features, with one image of each letter per step."""
    import numpy as np

    import metajax

    steps, items = _STEPS.value, []
    for regime, (begin, end) in enumerate(itertools.pairwise([*begins, steps])):
        letters = metajax.online.character_stream(source, seed=steps * seed + regime, ways=_WAYS, queries=1)
        items += [
            one.query._replace(inputs=np.asarray(embed(one.query.inputs)))
            for one in itertools.islice(letters, end - begin)
        ]
    return items


def _followed(online: Any, items: list[Any]) -> list[Any]:
    """Returns the adapted learner before each step."""
    import jax

    state, adapt, observe = online.init(jax.random.key(0), items[0]), jax.jit(online.adapt), jax.jit(online.observe)
    found = []
    for item in items:
        found.append(adapt(state))
        state = observe(state, item)
    return found


def _told(learner: Any, items: list[Any], begins: list[int]) -> list[Any]:
    """Returns the learner adapted to the steps since the true last change, at most the last `_LONGEST` steps."""
    import jax
    import numpy as np

    import metajax

    adapt, found, size = jax.jit(learner.adapt), [], len(items[0].mask)
    for step in range(len(items)):
        begin = max(max(one for one in begins if one <= step), step - _LONGEST)
        kept = [*items[begin:step], *[items[0]] * (_LONGEST - (step - begin))]  # padded to one size, for one program
        support = metajax.Examples(*(np.concatenate(leaves) for leaves in zip(*(one[:3] for one in kept), strict=True)))
        found.append(adapt((), support._replace(mask=np.arange(len(support.mask)) < size * (step - begin))))
    return found


def _judged(learner: Any, adapted: list[Any], items: list[Any]) -> tuple[list[float], list[float]]:
    """Returns the loss and the accuracy of each step."""
    import jax

    import metajax

    @jax.jit
    def judge(one: Any, item: Any) -> Any:
        loss, aux = learner.outer_loss(one, (), item)
        return loss, metajax.core.accuracy(aux.outputs, item)

    found = [judge(*pair) for pair in zip(adapted, items, strict=True)]
    return [float(loss) for loss, _ in found], [float(hit) for _, hit in found]


def _around(right: list[Any], begins: list[list[int]]) -> Any:
    """Returns the mean accuracy in the steps before and after a change, over isolated changes."""
    import numpy as np

    pairs = zip(right, begins, strict=True)
    return np.mean([values[one - _AROUND : one + _AROUND] for values, own in pairs for one in _alone(own)], axis=0)


def _draw(path: Any, curves: dict[str, Any]) -> None:
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot(np.arange(-_AROUND, _AROUND), 100 * values, "o-", ms=3, label=name)
    axes.axvline(-0.5, color="0.6", lw=1)
    axes.set(xlabel="steps since the letters changed", ylabel="accuracy, %", title=f"{_WAYS} letters, one image each")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
