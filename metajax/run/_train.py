"""Meta-trains a learner, evaluates it on unseen classes, and writes a run folder.

    python -m metajax.run train --config=my_config.py --workdir=RUN
    python -m metajax.run train --config=my_config.py:learner=maml,learner.inner=sgd \\
        --config.learner.inner.learning_rate=0.4 --workdir=RUN           # other parts, with their arguments
    python -m metajax.run train --config=... --workdir=RUN --resume      # goes on where it stopped
    python -m metajax.run train --config=... --workdir=RUN --resume --distributed    # on each host of a cluster
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from metajax.run import _build, _folder, _job, _process, _sources

FLAGS = flags.FlagValues()  # of this launcher alone
_bool = functools.partial(flags.DEFINE_bool, flag_values=FLAGS)
_integer = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_WORKDIR = _string("workdir", None, "Run folder; a fresh one under runs/ by default.")
_RESUME = _bool("resume", False, "Continue the run in workdir, or start it where there is none.")
_PROFILE = _string("profile", None, "STEP:COUNT, the steps to trace for TensorBoard.")
_DISTRIBUTED = _bool("distributed", False, "One of several processes, found by TPU, Slurm, GKE or MPI.")
_COORDINATOR = _string("coordinator", None, "HOST:PORT of process 0, where nothing finds the processes.")
_PROCESS_ID = _integer("process_id", None, "Which process this is, from 0.")
_NUM_PROCESSES = _integer("num_processes", None, "How many processes there are.")
_PEER_TIMEOUT = _integer("peer_timeout", 60, "Seconds of silence after which a process counts as dead.")


def main() -> int:
    """Does what the flags say."""
    if _RESUME.value and not _WORKDIR.value:
        raise ValueError("workdir must name the run that --resume continues, got none")
    _process.prepare()
    explicit = (_COORDINATOR.value, _PROCESS_ID.value, _NUM_PROCESSES.value)
    if _DISTRIBUTED.value or explicit != (None, None, None):
        _process.join(*explicit, timeout=_PEER_TIMEOUT.value)
    from metajax import parallel, training

    flag, file = _process.define_config()
    workdir = pathlib.Path(_WORKDIR.value or parallel.from_first(lambda: _fresh(file.stem)))
    try:
        return run(flag.value, workdir, resume=_RESUME.value, profile=_PROFILE.value, beside=file.parent)
    except training.Preempted as end:
        print(f"{end}; the same command with --resume and --workdir={workdir} continues", file=sys.stderr)
        return os.EX_TEMPFAIL


def run(
    config: ConfigDict, workdir: pathlib.Path, *, resume: bool = False, profile: str | None = None,
    beside: pathlib.Path | None = None,
) -> int:  # fmt: skip
    """Trains, evaluates and reports; `beside` is the folder of the config file.

    Raises:
      ValueError: the config or the folder is refused; nothing is written then.
    """
    import jax

    from metajax import parallel

    opened: list[_job.Job] = []
    told: list[str] = []

    def prepare() -> None:
        job = _job.open_job(config)
        for watcher in _watchers(job, workdir, profile):  # refuses what is out of range
            watcher.close()
        if config.init and not (workdir / "config.json").exists():
            told.append(str(job.beginning()))
        opened.append(job)

    parallel.agree(prepare)
    (job,) = opened
    folder = _folder.Run.open(workdir, config, job.facts, resume=resume, beside=beside)
    if folder.finished:
        _say(f"{workdir} is finished; nothing to do")
        return 0
    spread = f" on {jax.process_count()} processes" if jax.process_count() > 1 else ""
    _say(f"training {config.learner.name} on {job.train.name} into {workdir}{spread}")
    for line in told:
        _say(line)
    params, seconds = _train(job, workdir, profile)
    parallel.from_first(lambda: _report(job, folder, params, seconds))
    return 0


def _train(job: _job.Job, workdir: pathlib.Path, profile: str | None) -> tuple[Any, float]:
    """Trains from the last checkpoint on, with rollbacks where the config allows them.

    Returns:
      The meta-parameters as NumPy arrays, and the seconds that training took.
    """
    from metajax import core, parallel, training

    checkpoints = training.Checkpoints(workdir / "checkpoints", base=_sources.base_sha256(job.config))

    def begin() -> tuple[Any, Any, dict[str, Any]]:
        found = checkpoints.latest()
        (state, frozen), extra = job.init(begin=found is None), {"seconds": 0.0, "best": None}
        if found is not None:
            state, extra = checkpoints.restore(state)
        return state, frozen, {"position": int(state.step) * job.stride, "rollbacks": 0, "waiting": [], **extra}

    state, frozen, extra = begin()
    if int(state.step):
        _say(f"resuming at step {int(state.step)}")
    while (start := int(state.step)) < job.config.training.steps:
        try:
            state, extra["seconds"] = _fit(job, workdir, checkpoints, state, frozen, extra, profile)
        except training.Rollback as spike:
            count = extra["rollbacks"] + 1
            if count > job.config.watch.rollbacks:
                raise
            reached = extra["position"] + (spike.step - start) * job.stride  # in the stream, with the spike's episodes
            state, frozen, extra = begin()
            extra |= {"rollbacks": count, "position": reached}
            _say(f"{spike}: back to step {int(state.step)}, with other episodes (rollback {count})")
            profile = None  # traced already, or never
    checkpoints.close()
    return parallel.to_host(core.merge(job.deployed(state), frozen)), extra["seconds"]


def _fit(
    job: _job.Job, workdir: pathlib.Path, checkpoints: Any, state: Any, frozen: Any, extra: dict[str, Any],
    profile: str | None,
) -> tuple[Any, float]:  # fmt: skip
    """Trains until the last step; gives the state and the seconds of training, those before this start included."""
    import jax

    from metajax import evaluation, parallel, training
    from metajax.training import closing

    config, steps = job.config, job.config.training.steps
    metric = evaluation.default_judge(job.experiment.learner, job.validation).metric
    start, first = int(state.step), jax.process_index() == 0
    episodes: Any = None  # where the device draws them

    def score(params: Any) -> dict[str, float]:
        # NumPy, as after training: one compilation for both, on one device
        whole = parallel.to_host(params)
        found = parallel.from_first(lambda: _evaluate(job, whole, job.validation, config.validation.episodes).mean)
        return {f"validation_{metric.name}": found}

    recorder = training.Recorder(
        workdir if first else None, every=config.log.every, start=start, seconds=extra["seconds"],
        waiting=extra["waiting"], meta_batch=config.training.meta_batch,
    )  # fmt: skip
    if first and not recorder.tensorboard:
        print("TensorFlow is not installed: metrics.jsonl is written, TensorBoard events are not")
    validating = training.Validation(
        score, recorder, every=config.validation.every, checkpoints=checkpoints, steps=steps, best=extra["best"],
        better=(f"validation_{metric.name}", 1 if metric.higher_is_better else -1), of=job.deployed, frozen=frozen,
    )  # fmt: skip

    def kept() -> dict[str, Any]:
        values = {"seconds": recorder.seconds, "best": validating.best, "rollbacks": extra["rollbacks"]}
        values["waiting"] = recorder.waiting
        # of the step that is saved: its batch was handed out, the next one was not
        return values if episodes is None else {**values, "position": episodes.position}

    saving = training.Saving(checkpoints, every=config.checkpoint.every, steps=steps, extra=kept)
    callbacks: list[Any] = [
        *([training.Progress(steps, meta_batch=config.training.meta_batch, start=start)] if first else []),
        recorder, *_watchers(job, workdir, profile, recorder.write), validating, saving,
        training.Preemption(saving.save_now),  # last: what else sees the step has seen it then
    ]  # fmt: skip
    position = extra["position"]
    with closing(callbacks) as within:  # after the last stage
        while int(state.step) < steps:
            stage, end = job.at(int(state.step))
            if stage.sampler is not None:
                data, sample = stage.sampler
                state = training.fit_on_device(
                    job.outer, state, data, sample, batch=config.training.meta_batch, steps=end,
                    seed=(config.seed + (extra["rollbacks"] << 32)) % 2**64,
                    chunk=math.gcd(config.log.every, config.validation.every, config.checkpoint.every),
                    frozen=frozen, callbacks=within,
                )  # fmt: skip
                continue
            episodes = stage.stream(position)
            with contextlib.closing(episodes):
                state = training.fit(job.outer, state, episodes, steps=end, frozen=frozen, callbacks=within)
                position = episodes.position
    return state, recorder.seconds


def _watchers(
    job: _job.Job, workdir: pathlib.Path, profile: str | None, record: Callable[..., None] | None = None
) -> list[Any]:
    """What looks at each step before it is saved, in every process.

    Raises:
      ValueError: a field of `config.watch`, or `profile`, is out of range.
    """
    import jax

    from metajax import training
    from metajax.core import _validate

    watch, index = job.config.watch, jax.process_index()
    name = f"heartbeat-{index}.json" if index else "heartbeat.json"
    watchers: list[Any] = [training.Heartbeat(workdir / name, every=watch.heartbeat)]
    if _validate.one_of("watch.spike", watch.spike, ("off", "count", "stop", "rollback")) != "off":
        watchers.append(
            training.Spikes(
                watch.window, watch.factor, watch.spike, record=record, checkpoint_every=job.config.checkpoint.every
            )
        )
    if watch.nonfinite == "skip":
        watchers.append(training.SkipLimit(watch.skip_limit))
    _validate.int_at_least("watch.rollbacks", watch.rollbacks, 0)
    stall = _validate.non_negative_float("watch.stall", watch.stall)
    if stall or jax.process_count() > 1:
        watchers.append(training.Stall(stall or 1800.0, status=_process.LOST_PEER))
    if profile is not None:
        watchers.append(training.Profile(profile, workdir / "tensorboard"))
    return watchers


def _report(job: _job.Job, folder: _folder.Run, params: Any, seconds: float) -> None:
    """Evaluates the run, and writes its picture and its results."""
    from metajax import data, evaluation, training

    config, experiment = job.config, job.experiment
    with _job.bar(config.evaluation.episodes, "evaluation") as progress:
        found = _evaluate(job, params, job.test, config.evaluation.episodes, progress)
    shown = data.episode(job.test, experiment.spec, seed=config.evaluation.seed, index=0)
    picture = folder.folder / "report.png"
    evaluation.report(
        picture, history=training.read_metrics(folder.folder), evaluation=found, episode=shown,
        outputs=evaluation.predict_query(experiment.learner, params, shown, num_steps=experiment.num_steps),
        title=f"{config.learner.name} on {config.data.name}",
    )  # fmt: skip
    folder.finish(config, found, params, seconds=seconds)
    print(f"report: {picture}")
    print(found)


def _evaluate(job: _job.Job, params: Any, source: Any, episodes: int, progress: Any = None) -> Any:
    from metajax import evaluation

    learner, params, (source,) = _build.on_features(job.config, job.facts, job.experiment.learner, params, source)
    return evaluation.evaluate(
        learner, params, source, job.experiment.spec, episodes=episodes, seed=job.config.evaluation.seed,
        num_steps=job.experiment.num_steps, normalisation=_build.normalisation(job.config), progress=progress,
    )  # fmt: skip


def _say(text: str) -> None:
    """Prints a line, once for all processes."""
    import jax

    if jax.process_index() == 0:
        print(text, flush=True)


def _fresh(stem: str) -> str:
    return str(pathlib.Path("runs") / f"{stem}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
