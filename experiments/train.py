"""Meta-trains a learner, evaluates it on unseen classes, and writes a run folder.

    python -m experiments.train                                          # the default job
    python -m experiments.train --config=experiments/configs/maml_omniglot.py \
        --config.data.path=PATH --config.inner.steps=5 --workdir=RUN     # another config, with changes
    python -m experiments.train --config=... --workdir=RUN --resume      # goes on where it stopped
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import pathlib
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import _launch, _runs

_CONFIG = _launch.define_config(pathlib.Path(__file__).parent / "configs" / "prototypical_glyphs.py")
_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder; a fresh one under runs/ by default.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue the run in workdir, or start it where there is none.")
_PROFILE = flags.DEFINE_string("profile", None, "STEP:COUNT, the steps to trace for TensorBoard.")


def main() -> int:
    """Does what the flags say."""
    if _RESUME.value and not _WORKDIR.value:
        raise ValueError("workdir must name the run that --resume continues, got none")
    _launch.prepare()
    from metajax.training import Preempted

    workdir = pathlib.Path(_WORKDIR.value or _fresh())
    try:
        return run(_CONFIG.value, workdir, resume=_RESUME.value, profile=_PROFILE.value)
    except Preempted as end:
        print(f"{end}; the same command with --resume and --workdir={workdir} continues", file=sys.stderr)
        return os.EX_TEMPFAIL


def run(config: ConfigDict, workdir: pathlib.Path, *, resume: bool = False, profile: str | None = None) -> int:
    """Trains, evaluates and reports.

    Raises:
      ValueError: the config or the folder is refused; nothing is written then.
    """
    import jax
    import numpy as np

    import metajax

    watchers: list[Any] = [metajax.training.Heartbeat(workdir / "heartbeat.json")]
    if profile is not None:
        watchers.append(metajax.training.Profile(profile, workdir / "tensorboard"))
    train = metajax.training.open_source(config, "train")
    validation, test = (metajax.training.open_source(config, split) for split in ("val", "test"))
    experiment = metajax.training.build(config, num_classes=getattr(train, "num_classes", None))
    validation.check(experiment.spec)
    test.check(experiment.spec)
    on_device = config.data.sampler == "device"
    if on_device:
        data, sample = metajax.data.device_sampler(train, experiment.train_spec)
        batch = metajax.data.episode_batch(
            train, experiment.train_spec, seed=config.seed, start=0, count=config.outer.meta_batch
        )
    else:
        try:
            episodes = stream(config, experiment, train)
        except ImportError as error:
            raise ValueError(f"data.sampler must be 'device' here, got 'pipeline': {error}") from error
        with contextlib.closing(episodes):
            batch = jax.tree.map(np.asarray, next(episodes))
    outer = meta_step(config, experiment, jax.tree.leaves(batch)[0].shape[0])
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    # traced before anything is written, so that what does not fit together is refused here
    jax.eval_shape(lambda key: outer.update(outer.init(key, example), batch), jax.random.key(config.seed))
    folder = _runs.Run.open(workdir, config.to_dict(), resume=resume)
    if folder.finished:
        print(f"{workdir} is finished; nothing to do")
        return 0
    print(f"training {config.learner.name} on {train.name} into {workdir}")

    state = outer.init(jax.random.key(config.seed), example)
    checkpoints = metajax.training.Checkpoints(workdir / "checkpoints")
    extra: dict[str, Any] = {"seconds": 0.0, "best": None}
    if checkpoints.latest() is not None:
        state, extra = checkpoints.restore(state)
        print(f"resuming at step {int(state.step)}")
    start = int(state.step)
    # older checkpoints have no position
    position = extra.get("position", start if config.learner.name == "finetune" else start * config.outer.meta_batch)

    def score(params: Any) -> dict[str, float]:
        # NumPy, as after training: one compilation for both, on one device
        found = _evaluate(experiment, jax.tree.map(np.asarray, params), validation, config, config.validation.episodes)
        return {f"validation_{experiment.metric}": found.mean}

    recorder = metajax.training.Recorder(
        workdir, every=config.log.every, start=start, seconds=extra["seconds"], meta_batch=config.outer.meta_batch
    )
    validating = metajax.training.Validation(
        score, recorder, every=config.validation.every, checkpoints=checkpoints,
        better=(f"validation_{experiment.metric}", 1 if experiment.metric == "accuracy" else -1), best=extra["best"],
        steps=config.outer.steps,
    )  # fmt: skip
    saving = metajax.training.Saving(
        checkpoints, every=config.checkpoint.every, steps=config.outer.steps,
        extra=lambda: {
            "seconds": recorder.seconds, "best": validating.best,
            # of the step that is saved: its batch was handed out, the next one was not
            **({} if on_device else {"position": episodes.position}),
        },
    )  # fmt: skip
    progress = metajax.training.Progress(config.outer.steps, meta_batch=config.outer.meta_batch, start=start)
    preemption = metajax.training.Preemption(saving.save_now)  # last: what else sees the step has seen it then
    callbacks: list[Any] = [progress, recorder, validating, saving, *watchers, preemption]
    if not recorder.tensorboard:
        print("TensorFlow is not installed: metrics.jsonl is written, TensorBoard events are not")
    if start < config.outer.steps:
        if on_device:
            state = metajax.training.fit_on_device(
                outer, state, data, sample, batch=config.outer.meta_batch, steps=config.outer.steps, seed=config.seed,
                chunk=math.gcd(config.log.every, config.validation.every, config.checkpoint.every),
                callbacks=callbacks,
            )  # fmt: skip
        else:
            with contextlib.closing(stream(config, experiment, train, position)) as episodes:
                state = metajax.training.fit(outer, state, episodes, steps=config.outer.steps, callbacks=callbacks)
        extra = {"seconds": recorder.seconds}
    checkpoints.close()

    params = jax.tree.map(np.asarray, state.params)
    found = _evaluate(experiment, params, test, config, config.evaluation.episodes)
    shown = metajax.data.episode(test, experiment.spec, seed=config.evaluation.seed, index=0)
    metajax.evaluation.report(
        workdir / "report.png", history=metajax.training.read_metrics(workdir), evaluation=found, episode=shown,
        outputs=metajax.evaluation.predict_query(experiment.learner, params, shown, num_steps=experiment.eval_steps),
        title=f"{config.learner.name} on {config.data.name}",
    )  # fmt: skip
    folder.finish(config, found, params, seconds=extra["seconds"])
    print(f"report: {workdir / 'report.png'}")
    print(found)
    return 0


def _fresh() -> pathlib.Path:
    stem = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return pathlib.Path("runs") / f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"


def meta_step(config: Any, experiment: Any, tasks: int) -> Any:
    """The meta step, over all local devices where the tasks divide, on augmented episodes where the config says so."""
    import metajax

    outer = metajax.outer_update(
        experiment.trained, experiment.optimizer, hypergrad=experiment.hypergrad, before=config.log.before
    )
    mesh = _mesh(tasks)
    if mesh.size > 1:
        outer = metajax.parallel.shard(outer, mesh)
    if experiment.transform is not None:
        outer = metajax.training.augment(outer, experiment.transform)
    return outer


def _mesh(tasks: int) -> Any:
    """The most local devices over which the tasks divide."""
    import jax

    import metajax

    count = max(count for count in range(1, jax.local_device_count() + 1) if tasks % count == 0)
    return metajax.parallel.make_mesh(devices=jax.local_devices()[:count])


def stream(config: Any, experiment: Any, source: Any, start: int = 0) -> Any:
    """The batches of the pipeline from a position on, each task on the device of the meta step that trains on it."""
    import metajax

    tasks = size = config.outer.meta_batch
    if config.learner.name == "finetune":
        batches, tasks = metajax.data.batches(source, size, config.seed, start=start), 1
    else:
        batches = metajax.data.episodes(source, experiment.train_spec, batch=size, seed=config.seed, start=start)
    mesh = _mesh(tasks)
    return metajax.data.prefetch_to_device(
        batches, device=metajax.parallel.task_sharding(mesh) if mesh.size > 1 else None
    )


def _evaluate(experiment: Any, params: Any, source: Any, config: Any, episodes: int) -> Any:
    import metajax

    return metajax.evaluation.evaluate(
        experiment.learner, params, source, experiment.spec, episodes=episodes, seed=config.evaluation.seed,
        num_steps=experiment.eval_steps, normalisation=metajax.training.normalisation(config),
    )  # fmt: skip


if __name__ == "__main__":
    _launch.run(main)
