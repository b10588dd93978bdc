"""Momentum contrast or supervised pre-training before prototypical training, against prototypical training alone.

    python -m experiments.pretraining --data=PATH --out=runs/pretraining

    python -m experiments.pretraining --data=PATH --out=OUT --arms=moco &                         # beside each other:
    python -m experiments.pretraining --data=PATH --out=OUT --arms=scratch --scratch_steps=1250   # one core each
    python -m experiments.pretraining --data=PATH --out=OUT --arms=supervised

Trains Conv4 on CIFAR-FS. One arm trains on the training images without labels and then on episodes. Another arm trains
on episodes from scratch, for the same processor time. The third arm trains to classify all training classes, as in
Meta-Baseline, and then on episodes, for as many steps as the first arm. All arms keep the parameters that are best on
validation episodes. Prints the 5-way 1-shot accuracy on unseen classes, and draws the accuracy on validation classes
during training. An arm whose result is in the folder is not run again.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from metajax import run

_DATA = flags.DEFINE_string("data", None, "CIFAR-FS, as data.path takes it.", required=True)
_OUT = flags.DEFINE_string("out", "runs/pretraining", "Folder of the table and the picture.")
_SEED = flags.DEFINE_integer("seed", 0, "Of parameters, batches and episodes.")
_PRETRAIN = flags.DEFINE_integer("pretrain_steps", 1000, "Steps of momentum contrast, or on labels.")
_META = flags.DEFINE_integer("meta_steps", 800, "Meta steps after it; from scratch, as many more as take its time.")
_SCRATCH = flags.DEFINE_integer("scratch_steps", 0, "Meta steps from scratch; 0: as many as take the other arm's time.")
_ARMS = flags.DEFINE_list("arms", ["moco", "scratch", "supervised"], "Which to run now.")
_QUEUE = flags.DEFINE_integer("queue", 2048, "Keys of earlier batches, a multiple of 256; 0: MoCo v3.")
_WIDTH = flags.DEFINE_integer("width", 32, "Channels of Conv4.")
_EPISODES = flags.DEFINE_integer("episodes", 600, "Test episodes.")
_BATCH, _RATE, _META_BATCH, _VALIDATIONS = 256, 2e-3, 4, 8
_TITLES = {
    "scratch": "prototypical, from scratch",
    "moco": "momentum contrast, then prototypical",
    "supervised": "labels, then prototypical",
}


def main() -> int:
    """Trains and evaluates the arms and prints the results."""
    run.prepare(host_devices=1)
    import jax
    import numpy as np
    import optax

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    if 0 != _SCRATCH.value < _VALIDATIONS:
        raise ValueError(f"scratch_steps must be 0 or at least {_VALIDATIONS}, got {_SCRATCH.value}")
    if not _ARMS.value or {*_ARMS.value} - {*_TITLES}:
        raise ValueError(f"arms must be among {', '.join(_TITLES)}, got {_ARMS.value}")
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
    standard = [metajax.data.random_crop(padding=4), metajax.data.random_flip()]

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

    def meta_step(steps: int) -> Any:
        rule = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(_RATE, steps)))
        outer = metajax.outer_update(learner, rule, hypergrad=metajax.hypergrad.unrolled(), before=False)
        return metajax.training.augment(outer, standard)

    def fitted(outer: Any, stream: Any, example: Any, steps: int) -> tuple[Any, float]:
        """Returns the state after pre-training, and the processor seconds of the pre-training."""
        state, clock = outer.init(jax.random.key(_SEED.value), example), _Clock()
        state = metajax.training.fit(outer, state, stream, steps=steps, callbacks=[clock])
        return state, clock.seconds

    def contrasted(steps: int) -> tuple[Any, float]:
        rule, stream = optax.adam(optax.cosine_decay_schedule(_RATE, steps)), batches()
        outer = metajax.training.moco(model, rule, queue=_QUEUE.value)
        state, seconds = fitted(outer, stream, next(stream), steps)
        return metajax.training.encoder_params(state), seconds

    def labelled(steps: int) -> tuple[Any, float]:
        rule = optax.adam(optax.cosine_decay_schedule(_RATE, steps))
        pretrain = metajax.learners.pretrain(model, train.num_classes)
        outer = metajax.outer_update(pretrain, rule, hypergrad=metajax.hypergrad.unrolled(), before=False)
        with contextlib.closing(metajax.data.batches(train, _BATCH, _SEED.value)) as stream:
            example = jax.tree.map(lambda leaf: leaf[0], next(stream))
            state, seconds = fitted(metajax.training.augment(outer, standard), stream, example, steps)
        return state.params["backbone"], seconds

    def meta_trained(arm: str, steps: int, params: Any, before: float) -> None:
        """Trains from `params`, tests the parameters with the best validation score, and writes the results."""
        outer, example = meta_step(steps), metajax.data.episode(train, train_spec, seed=0, index=0)
        state = outer.init(jax.random.key(_SEED.value), example, params)
        clock = _Clock()
        curve, best = [(before, validated(state.params))], (-1.0, state.params)

        def look(step: int, state: Any, metrics: Any) -> None:
            nonlocal best
            if step % (steps // _VALIDATIONS) == 0:
                with clock.stopped():
                    params = jax.tree.map(np.asarray, state.params)
                    curve.append((before + clock.seconds, validated(params)))
                    best = max(best, (curve[-1][1], params), key=lambda pair: pair[0])
                    print(
                        f"{arm}: step {step}, {curve[-1][0]:.0f} s, validation {100 * curve[-1][1]:.2f} %", flush=True
                    )

        metajax.training.fit(outer, state, episodes(), steps=steps, callbacks=[clock, look])
        found = metajax.evaluation.evaluate(learner, best[1], test, spec, episodes=_EPISODES.value)
        told = {"seconds": before + clock.seconds, "cost": clock.seconds / steps, "steps": steps, "curve": curve}
        _runs.write_json(out / f"{arm}.json", {**settings, **told, "accuracy": found.values.tolist()})

    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": _SEED.value, "width": _WIDTH.value, "pretrain_steps": _PRETRAIN.value, "meta_steps": _META.value,
        "episodes": _EPISODES.value, "queue": _QUEUE.value,
    }  # fmt: skip
    done = {arm: _read(out / f"{arm}.json", settings) for arm in _TITLES}
    for arm, pretrained in (("moco", contrasted), ("supervised", labelled)):
        if arm in _ARMS.value and done[arm] is None:
            backbone, seconds = pretrained(_PRETRAIN.value)
            print(f"{arm}: {_PRETRAIN.value} steps before the episodes, {seconds:.0f} s", flush=True)
            meta_trained(arm, _META.value, backbone, seconds)
            done[arm] = _read(out / f"{arm}.json", settings)
    if "scratch" in _ARMS.value and done["scratch"] is None:
        if not _SCRATCH.value and done["moco"] is None:
            raise ValueError("scratch_steps must be given where the other arm has no result yet, got 0")
        meta_trained("scratch", _SCRATCH.value or round(done["moco"]["seconds"] / done["moco"]["cost"]), None, 0.0)
        done["scratch"] = _read(out / "scratch.json", settings)
    found = {arm: result for arm, result in done.items() if result is not None}
    if "scratch" in found and len(found) > 1:
        _report(found, out)
    return 0


def _read(path: pathlib.Path, settings: dict[str, Any]) -> Any:
    """Returns the result of an arm, or None if there is none."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found[name] != value:
            raise ValueError(f"out must hold results of {name}={value}, got one of {found[name]}")
    return found


def _report(arms: dict[str, Any], out: pathlib.Path) -> None:
    """Prints the table and draws the curves."""
    import numpy as np
    from matplotlib.figure import Figure

    import metajax

    episodes = len(arms["scratch"]["accuracy"])
    print(f"CIFAR-FS, unseen classes, 5-way 1-shot, {episodes} episodes: accuracy in %, processor seconds of training")

    def line(title: str, values: Any, told: str = "") -> None:
        mean, ci95 = metajax.evaluation.mean_and_interval(100 * np.asarray(values))
        print(f"{title:38s}{mean:7.2f} +- {ci95:.2f}{told}")

    for arm, result in arms.items():
        line(_TITLES[arm], result["accuracy"], f"{result['seconds']:9.0f}")
        if arm != "scratch":
            line("  more, episode by episode", np.subtract(result["accuracy"], arms["scratch"]["accuracy"]))
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot(
        xlabel="processor seconds of training", ylabel="validation accuracy, %", title="CIFAR-FS, 5-way 1-shot"
    )
    for arm, result in arms.items():
        times, values = np.array(result["curve"]).T
        axes.plot(times, 100 * values, "o-", label=_TITLES[arm])
    axes.legend()
    figure.savefig(out / "pretraining.png", dpi=120)


class _Clock:
    """A callback that counts the processor seconds between steps, without the first step and its compilation."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def __call__(self, step: int, state: Any, metrics: Any) -> None:
        float(metrics["loss"])  # waits for the step
        if step > 1:
            self.seconds += time.process_time() - self._since
        self._since = time.process_time()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Excludes the enclosed code from the count."""
        yield
        self._since = time.process_time()


if __name__ == "__main__":
    run.launch(main)
