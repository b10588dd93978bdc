"""What a config becomes before anything is written: sources, the meta step on its mesh, and a stream of episodes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from metajax.run import _placement


class Job(NamedTuple):
    """The parts of one training run.

    Attributes:
      config: the config.
      facts: what is known of the data.
      experiment: what `metajax.run.build` makes of it.
      train: the source of the training episodes.
      validation: the source of the validation episodes.
      test: the source of the evaluation episodes.
      mesh: the devices.
      tasks: tasks in a step.
      outer: the meta step.
      example: one episode, of the shapes in training.
      sampler: `(data, sample)` of `metajax.data.device_sampler` where the device draws episodes, else None.

    >>> Job._fields[0]
    'config'
    """

    config: Any
    facts: Any
    experiment: Any
    train: Any
    validation: Any
    test: Any
    mesh: Any
    tasks: int
    outer: Any
    example: Any
    sampler: tuple[Any, Any] | None

    @property
    def stride(self) -> int:
        """How far a step moves the position in the stream."""
        return 1 if self.experiment.batches else self.config.training.meta_batch

    def deployed(self, state: Any) -> Any:
        """The meta-parameters in a state that are evaluated: the average, where one is kept."""
        from metajax import training

        return training.averaged_params(state) if self.experiment.average else state.params

    def stage(self, step: int) -> tuple[Any, Any, int]:
        """The source and the size of the episodes after `step`, and the step at which their stage of training ends."""
        from metajax import data

        end = 0
        for stage in self.experiment.stages:
            end += stage.steps
            if step < end:
                break
        resized = stage.resolution is not None
        return data.transformed(self.train, data.resize(stage.resolution)) if resized else self.train, stage.spec, end

    def at(self, step: int) -> tuple[Job, int]:
        """The job as it is in the stage of training after `step`, and the step at which that ends."""
        from metajax import data

        train, spec, end = self.stage(step)
        if (train, spec) == (self.train, self.experiment.train_spec):
            return self, end
        sampler = None if self.sampler is None else data.device_sampler(train, spec)
        return self._replace(train=train, experiment=self.experiment._replace(train_spec=spec), sampler=sampler), end

    def init(self, *, begin: bool = True) -> tuple[Any, Any]:
        """The state before the first step, and the frozen base beside it or None.

        Without `begin`, that of no other run, for its structure alone.
        """
        import jax

        from metajax import parallel

        start = self.experiment.start
        params, frozen = None, None
        if start is not None:
            params, frozen = self.experiment.split(start(self.example.support.inputs))
        if begin and self.config.init:
            params = self.beginning(params).params
        if frozen is not None and self.mesh.size > 1:
            rules = _placement.rules(self.config, self.mesh)
            frozen = parallel.put(frozen, parallel.frozen_shardings(frozen, self.mesh, rules))
        elif frozen is not None:
            frozen = jax.tree.map(jax.numpy.asarray, frozen)  # once, not in every step
        return self.outer.init(jax.random.key(self.config.seed), self.example, params, frozen=frozen), frozen

    def shapes(self) -> tuple[Any, Any]:
        """The shapes of what `init` gives; no array is made."""
        import jax

        def make(key: Any) -> tuple[Any, Any]:
            params, frozen = None, None
            if self.experiment.beside:
                params, frozen = self.experiment.split(self.experiment.trained.init(key, self.example.support.inputs))
            return self.outer.init(key, self.example, params, frozen=frozen), frozen

        return jax.eval_shape(make, jax.random.key(0))

    def beginning(self, params: Any = None) -> Any:
        """What this run takes of the one that `config.init` names.

        Args:
          params: what it is put into; None lets the learner make it.

        Raises:
          ValueError: there is no such run, or it does not fit.
        """
        import jax

        from metajax import training
        from metajax.run import _sources

        if params is None:
            params = self.experiment.trained.init(jax.random.key(self.config.seed), self.example.support.inputs)
        return training.begin_with(self.config.init, params, base=_sources.weights_sha256(self.config))

    def stream(self, start: int) -> Any:
        """The batches of the pipeline from a position on, each task on the device that trains on it."""
        from metajax import data, parallel

        place = parallel.task_sharding(self.mesh) if self.mesh.size > 1 else None
        return data.prefetch_to_device(_batches(self, self.tasks, start), device=place)


def open_job(config: Any, devices: Sequence[Any] | None = None) -> Job:
    """Opens sources and builds the meta step, and traces it: what does not fit together is refused here.

    Args:
      config: a config.
      devices: those of all processes by default.

    Raises:
      ValueError: a field of the config is out of range, or parts do not fit together.

    >>> from metajax.run import complete
    >>> given = {"data": {"name": "sinusoids"}, "model": {"name": "mlp"}, "episode": {"ways": 1}, "sampler": "device"}
    >>> given["learner"] = {"name": "maml", "inner": {"name": "sgd", "learning_rate": 0.1}}
    >>> open_job(complete(given)).facts.outputs
    1
    """
    import jax

    from metajax import data
    from metajax.core import _validate
    from metajax.run import _build, _sources

    train, validation, test = (_sources.open_source(config, split) for split in ("train", "val", "test"))
    spec = _build.episode_spec(config.episode)
    facts = _sources.facts_of(train, spec)
    experiment = _build.build(config, facts)
    validation.check(experiment.spec)
    test.check(experiment.spec)
    _validate.int_at_least("replay.capacity", config.replay.capacity, 0)
    _validate.positive_int("replay.count", config.replay.count)
    # one batch of examples is one task, which no devices divide
    tasks = 1 if experiment.batches else config.training.meta_batch
    mesh = _placement.make_mesh(config, tasks, devices=devices)
    job = Job(config, facts, experiment, train, validation, test, mesh, tasks, None, None, None)
    if config.sampler == "device":
        job = job._replace(sampler=data.device_sampler(train, experiment.train_spec))
        one = data.episode_batch(train, experiment.train_spec, seed=config.seed, start=0, count=1)
    else:
        try:
            stream = _batches(job, 1, 0, alone=True)
        except ImportError as error:
            raise ValueError(f"sampler must be 'device' here, got 'pipeline': {error}") from error
        one = next(stream)
        stream.close()
    job = job._replace(outer=meta_step(config, experiment, mesh), example=jax.tree.map(lambda leaf: leaf[0], one))
    _require_fit(job)
    _trace(job, one)
    end = 0
    for _ in experiment.stages[:-1]:
        source, spec, end = job.stage(end)
        try:
            source.check(spec)
            _trace(job, data.episode_batch(source, spec, seed=config.seed, start=0, count=1))
        except (TypeError, ValueError) as error:
            raise ValueError(f"curriculum must have episodes that fit, got others until step {end}: {error}") from error
    return job


def _require_fit(job: Job) -> None:
    """Refuses a model that does not take the inputs of the data."""
    import jax
    import numpy as np

    inputs = job.example.support.inputs
    try:
        jax.eval_shape(job.experiment.trained.init, jax.random.key(0), inputs)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        told = jax.tree.map(lambda leaf: f"{np.asarray(leaf).dtype}{list(np.shape(leaf))}", inputs)
        name = job.config.model.name
        raise ValueError(
            f"model must take the inputs of the data, {told}, got {name}: {str(error).splitlines()[0]}"
        ) from error


def _trace(job: Job, one: Any) -> None:
    """Traces the meta step on episodes of the shapes of `one`, a batch of a single task."""
    import jax
    import jax.numpy as jnp

    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((job.tasks, *leaf.shape[1:]), jnp.asarray(leaf).dtype), one)
    state, frozen = job.shapes()
    jax.eval_shape(job.outer.update, state, batch, *(() if frozen is None else (frozen,)))


def meta_step(config: Any, experiment: Any, mesh: Any) -> Any:
    """The meta step over a mesh, on augmented episodes and without what is not finite, where the config says so."""
    import metajax
    from metajax.core import _validate

    batching = config.training.task_batching
    outer = metajax.outer_update(
        experiment.trained, experiment.optimizer, hypergrad=experiment.hypergrad, before=config.log.before,
        trainable=experiment.trainable, task_batching=int(batching) if batching.isdecimal() else batching,
    )  # fmt: skip
    if experiment.average:
        outer = metajax.training.averaged(outer, experiment.average)
    rules = _placement.rules(config, mesh)
    if mesh.size > 1:
        outer = metajax.parallel.shard(outer, mesh, rules)
    if config.replay.capacity:
        outer = _replayed(outer, config, experiment)
    if _validate.one_of("watch.nonfinite", config.watch.nonfinite, ("stop", "skip")) == "skip":
        outer = metajax.training.skip_nonfinite(outer)
    if experiment.transforms:
        outer = metajax.training.augment(outer, experiment.transforms)
    return outer


def _replayed(outer: Any, config: Any, experiment: Any) -> Any:
    """The meta step on what it remembers too."""
    import jax

    from metajax import replay
    from metajax.core import outer_objective

    fields, learner = config.replay, experiment.trained
    if experiment.batches:
        raise ValueError("replay.capacity must be 0 for the sampler 'batches', which gives no episodes")
    if fields.count > fields.capacity:
        raise ValueError(f"replay.count must be at most replay.capacity, {fields.capacity}, got {fields.count}")
    if not fields.by_loss:
        return replay.replayed(outer, replay.reservoir(fields.capacity), fields.count)

    def losses(params: Any, episodes: Any) -> Any:
        """Of each task, after adaptation."""
        return jax.vmap(lambda one: outer_objective(learner, params, one)[0])(episodes)

    try:
        memory = replay.prioritised(fields.capacity)
    except ImportError as error:
        raise ValueError(f"replay.by_loss must be False here, got True: {error}") from error
    return replay.replayed(outer, memory, fields.count, priority=losses)


@contextlib.contextmanager
def bar(episodes: int, what: str) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error for what takes more than a second; gives what evaluators call as `progress`."""
    from tqdm import tqdm

    with tqdm(total=episodes, desc=what, unit="episode", mininterval=1.0, delay=1.0) as shown:

        def progress(done: int) -> None:
            shown.update(done - shown.n)

        yield progress


def _batches(job: Job, tasks: int, start: int, *, alone: bool = False) -> Any:
    """What this process brings of a stream of batches; all of it where it is `alone`."""
    from metajax import data, parallel

    config = job.config
    if job.experiment.batches:
        return data.batches(job.train, config.training.meta_batch, config.seed, start=start)
    index, count = (0, 1) if alone else parallel.process_block(job.mesh, tasks)
    return data.episodes(
        job.train, job.experiment.train_spec, batch=tasks // count, seed=config.seed, start=start,
        process_index=index, process_count=count,
    )  # fmt: skip
