"""Momentum contrast before prototypical training, against prototypical training alone for as long.

    python -m experiments.pretraining --data=PATH --out=runs/pretraining

Conv4 on CIFAR-FS. One arm learns the training images without labels first and then on episodes, the other one on
episodes from scratch, for the same processor time. Both keep the parameters that are best on validation episodes.
Prints the accuracy on classes never seen, 5-way 1-shot, and draws how it grows on validation classes.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from absl import flags

from experiments import _launch

_DATA = flags.DEFINE_string("data", None, "CIFAR-FS, as data.path takes it.", required=True)
_OUT = flags.DEFINE_string("out", "runs/pretraining", "Folder of the table and the picture.")
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters, batches and episodes.")
_PRETRAIN = flags.DEFINE_integer("pretrain_steps", 1000, "Steps of momentum contrast.")
_META = flags.DEFINE_integer("meta_steps", 800, "Meta steps after it; from scratch, as many more as take its time.")
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of Conv4.")
_EPISODES = flags.DEFINE_integer("episodes", 600, "Test episodes.")
_BATCH, _QUEUE, _RATE, _META_BATCH, _VALIDATIONS = 256, 2048, 2e-3, 4, 8


class Arm(NamedTuple):
    """One way to train.

    Attributes:
      params: the best meta-parameters by validation.
      seconds: processor time of its training in all.
      curve: `(processor seconds, validation accuracy)`, the first one before any episode.
    """

    params: Any
    seconds: float
    curve: list[tuple[float, float]]


def main() -> int:
    """Trains both arms, evaluates, prints."""
    _launch.prepare(host_devices=1)
    import jax
    import numpy as np
    import optax

    import metajax
    from experiments import _runs

    out = pathlib.Path(_OUT.value)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got {str(out)!r}")
    if min(_PRETRAIN.value, _META.value) < _VALIDATIONS:
        raise ValueError(
            f"pretrain_steps and meta_steps must be at least {_VALIDATIONS}, got {_PRETRAIN.value} and {_META.value}"
        )
    train, validation, test = (metajax.data.cifar_fs(_DATA.value, split) for split in ("train", "val", "test"))
    model = metajax.models.conv4(width=_WIDTH.value, pool=False, normalisation="group")
    learner = metajax.learners.prototypical(model)
    spec = metajax.data.EpisodeSpec(ways=5, shots=1, queries=15)
    train_spec = metajax.data.EpisodeSpec(ways=10, shots=1, queries=10)
    images = np.asarray(train.inputs)

    def batches() -> Iterator[Any]:
        rng = np.random.default_rng(_SEED.value)
        while True:
            yield images[rng.choice(len(images), _BATCH, replace=len(images) < _BATCH)]

    def episodes() -> Iterator[Any]:
        index = 0
        while True:
            yield metajax.data.episode_batch(train, train_spec, seed=_SEED.value, start=index, count=_META_BATCH)
            index += _META_BATCH

    def validated(params: Any) -> float:
        return metajax.evaluation.evaluate(learner, params, validation, spec, episodes=200).mean

    def contrast(steps: int) -> Any:
        rule = optax.adam(optax.cosine_decay_schedule(_RATE, steps))
        return metajax.strategies.moco(model, rule, queue=_QUEUE)

    def meta_step(steps: int) -> Any:
        rule = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(_RATE, steps)))
        outer = metajax.outer_update(learner, rule, hypergrad=metajax.hypergrad.unrolled(), before=False)
        standard = [metajax.data.random_crop(padding=4), metajax.data.random_flip()]
        return metajax.training.augment(outer, standard)

    def pretrained(steps: int) -> tuple[Any, float]:
        """The backbone and the processor seconds that it took."""
        outer, stream = contrast(steps), batches()
        state = outer.init(jax.random.key(_SEED.value), next(stream))
        clock = _Clock()
        state = metajax.training.fit(outer, state, stream, steps=steps, callbacks=[clock])
        return metajax.strategies.encoder_params(state), clock.seconds

    def meta_trained(steps: int, params: Any, before: float) -> Arm:
        outer, example = meta_step(steps), metajax.data.episode(train, train_spec, seed=0, index=0)
        state = outer.init(jax.random.key(_SEED.value), example, params)
        clock = _Clock()
        curve, best = [(before, validated(state.params))], (-1.0, state.params)

        def look(step: int, state: Any, metrics: Any) -> None:
            nonlocal best
            if step % max(steps // _VALIDATIONS, 1) == 0 or step == steps:
                with clock.stopped():
                    params = jax.tree.map(np.asarray, state.params)
                    curve.append((before + clock.seconds, validated(params)))
                    best = max(best, (curve[-1][1], params), key=lambda pair: pair[0])

        metajax.training.fit(outer, state, episodes(), steps=steps, callbacks=[clock, look])
        return Arm(best[1], before + clock.seconds, curve)

    backbone, seconds = pretrained(_PRETRAIN.value)
    arms = {"moco": meta_trained(_META.value, backbone, seconds)}
    cost = (arms["moco"].seconds - seconds) / _META.value
    arms["scratch"] = meta_trained(round(arms["moco"].seconds / cost), None, 0.0)
    found = {
        name: metajax.evaluation.evaluate(learner, arm.params, test, spec, episodes=_EPISODES.value)
        for name, arm in arms.items()
    }
    found["moco alone"] = metajax.evaluation.evaluate(
        metajax.learners.prototypical(model, distance="cosine"), backbone, test, spec, episodes=_EPISODES.value
    )
    titles = {
        "scratch": "prototypical, from scratch", "moco": "momentum contrast, then prototypical",
        "moco alone": "momentum contrast alone, cosine",
    }  # fmt: skip
    print(f"CIFAR-FS, unseen classes, {spec}, {_EPISODES.value} episodes: accuracy in %, processor seconds of training")
    for name, title in titles.items():
        taken = arms[name].seconds if name in arms else seconds
        print(f"{title:38s}{100 * found[name].mean:7.2f} +- {100 * found[name].ci95:.2f}{taken:9.0f}")
    gain = metajax.evaluation.mean_and_interval(100 * (found["moco"].values - found["scratch"].values))
    print(f"{'gain, episode by episode':38s}{gain[0]:7.2f} +- {gain[1]:.2f}")
    out.mkdir(parents=True, exist_ok=True)
    _runs.write_json(
        out / "pretraining.json",
        {
            "seed": _SEED.value, "width": _WIDTH.value, "pretrain_steps": _PRETRAIN.value, "meta_steps": _META.value,
            "accuracy": {name: [one.mean, one.ci95] for name, one in found.items()}, "gain_percent": list(gain),
            "seconds": {name: arm.seconds for name, arm in arms.items()},
            "validation": {name: arm.curve for name, arm in arms.items()},
        },
    )  # fmt: skip
    _draw(out / "pretraining.png", arms, titles)
    return 0


class _Clock:
    """A callback that counts the processor seconds between steps, from the second step on: without compilation."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def __call__(self, step: int, state: Any, metrics: Any) -> None:
        float(metrics["loss"])  # the step has ended
        if step > 1:
            self.seconds += time.process_time() - self._since
        self._since = time.process_time()

    def stopped(self) -> Any:
        """A context whose time does not count."""
        import contextlib

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            yield
            self._since = time.process_time()

        return context()


def _draw(path: pathlib.Path, arms: dict[str, Arm], titles: dict[str, str]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(
        xlabel="processor seconds of training", ylabel="validation accuracy, %", title="CIFAR-FS, 5-way 1-shot"
    )
    for name, arm in arms.items():
        axes.plot([point[0] for point in arm.curve], [100 * point[1] for point in arm.curve], "o-", label=titles[name])
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _launch.run(main)
