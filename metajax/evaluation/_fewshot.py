"""Few-shot evaluation on fixed episodes: one learner, no ensembling, mean and 95 % interval."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metajax import tasks
from metajax.core import _keys, _losses, _tree, _validate
from metajax.core._types import Episode, Examples, Learner, Params, TaskType
from metajax.data import AnswerSource, EpisodeSpec, Source, check_source, episode_batch, told
from metajax.evaluation import _metrics
from metajax.evaluation._judges import ByLoss, ByMetric, Judge, adapt_and_predict
from metajax.evaluation._spans import answers
from metajax.tasks import require_same
from metajax.training import choose_task_batching


class Evaluation(NamedTuple):
    """The result of `evaluate`. Its `str` is a table whose last line is `summary()`.

    Attributes:
      metric: name of the metric, such as "accuracy".
      mean: mean over episodes.
      ci95: half width of the 95 % interval, `1.96 s / sqrt(n)` with the sample standard deviation s.
      values: `[episodes]`, the score of each episode.
      episodes: number of episodes.
      seed: seed of the list of episodes.
      normalisation: name of the normalisation policy as given by the caller, or None.
      transductive: whether predictions depend on the other query examples. This is measured, not declared. None if the
        outputs of the first episode are not finite or if nothing is predicted.
      spec: the size of the episodes.
      source: name and split of the source.
      shuffled: whether the support labels were shuffled, as a control.
      task: the task type.
      percent: whether scores are fractions, which are shown in percent.
      scores: `[episodes]` by name, all scores after adaptation, including that of the metric.
      before: the same before adaptation, or None if not requested or if there is no inner loop.
      nonfinite: number of predictions that are not finite, over all episodes.
      rows: additional rows of the table.

    >>> import numpy as np
    >>> spec = EpisodeSpec(5, 1, 15)
    >>> print(Evaluation("accuracy", 0.9, 0.01, np.full(600, 0.9), 600, 0, "batch", True, spec, "glyphs (test)"))
    source         glyphs (test)
    task           5-way 1-shot, 15 queries a class
    episodes       600 (seed 0)
    normalisation  batch
    predictions    transductive
    accuracy 90.00 +- 1.00 % (600 episodes)
    """

    metric: str
    mean: float
    ci95: float
    values: np.ndarray
    episodes: int
    seed: int
    normalisation: str | None
    transductive: bool | None
    spec: EpisodeSpec
    source: str
    shuffled: bool = False
    task: TaskType = tasks.classification
    percent: bool = True
    scores: Mapping[str, np.ndarray] = {}
    before: Mapping[str, np.ndarray] | None = None
    nonfinite: int = 0
    rows: Mapping[str, str] = {}

    @property
    def gain(self) -> tuple[float, float] | None:
        """The gain in the metric by adaptation: mean and half width of the 95 % interval over the same episodes."""
        if self.before is None:
            return None
        return _metrics.mean_and_interval(self.values - self.before[self.metric])

    def summary(self) -> str:
        """Returns a line such as `accuracy 98.71 +- 0.22 % (600 episodes)` or `mse 0.1234 +- 0.0123 (600 episodes)`."""
        return f"{self.metric.replace('_', ' ')} {self._told(self.mean, self.ci95)} ({self.episodes} episodes)"

    def _told(self, mean: float, ci95: float, sign: str = "") -> str:
        if self.percent:
            return f"{100 * mean:{sign}.2f} +- {100 * ci95:.2f} {'points' if sign else '%'}"
        return f"{mean:{sign}.4f} +- {ci95:.4f}"

    def _scores(self, scores: Mapping[str, np.ndarray]) -> str:
        several = {name: _metrics.mean_and_interval(values) for name, values in scores.items()}
        return ", ".join(f"{name.replace('_', ' ')} {self._told(*found)}" for name, found in several.items())

    def __str__(self) -> str:
        spec = self.spec
        task = str(spec)
        if not self.task.classes:
            task = f"{self.task.name}, {told(spec.shots)} support and {spec.queries} query examples"
        kinds = {True: "transductive", False: "inductive", None: "not measured"}
        broken = f"{self.nonfinite} predictions, which are not finite, count as wrong"
        rows = {
            "source": self.source,
            "task": task,
            "episodes": f"{self.episodes} (seed {self.seed})",
            "normalisation": self.normalisation or "not stated",
            "predictions": kinds[self.transductive],
            **({"not finite": broken} if self.nonfinite else {}),
            **({"support": "labels shuffled (a control)"} if self.shuffled else {}),
            **self.rows,
            **({} if self.before is None else {"before": self._scores(self.before)}),
            **({"after": self._scores(self.scores)} if self.before is not None or len(self.scores) > 1 else {}),
            **({} if self.gain is None else {"gain": f"{self.metric} {self._told(*self.gain, sign='+')}"}),
        }
        return "\n".join([*(f"{name:<13}  {value}" for name, value in rows.items()), self.summary()])


class Outputs(NamedTuple):
    """Outputs of one query set.

    Attributes:
      before: outputs without adaptation, or None if the learner has no inner loop.
      after: outputs of the adapted learner.

    >>> Outputs._fields
    ('before', 'after')
    """

    before: Any
    after: Any


def evaluate(
    learner: Learner,
    params: Params,
    source: Source,
    spec: EpisodeSpec,
    *,
    episodes: int = 600,
    seed: int = 0,
    num_steps: int | None = None,
    batch: int = 20,
    normalisation: str | None = None,
    shuffle_support: bool = False,
    before: bool | None = None,
    judge: Judge | None = None,
    key: jax.Array | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluates meta-parameters on a fixed list of episodes.

    Episode k of the list depends only on the split of the source, `seed` and k. Each split has its own random stream,
    so the episodes of a test split never coincide with those of training, for any seeds. Only an evaluation on the
    training split needs a seed that training did not use.

    The computation is compiled once for each learner, size of episodes, `num_steps` and `batch`, so repeated calls with
    other parameters do not compile again. The tasks of a batch run under vmap or one after the other, as chosen by
    `metajax.training.choose_task_batching`. Both give the same result up to rounding.

    Whether predictions are transductive is measured on the first episode: the query set is predicted unchanged and
    with its second half replaced. If predictions of the first half change, they depend on the other query examples.

    Args:
      learner: the learner.
      params: its meta-parameters; `metajax.core.merge(state.params, frozen)` if there is a frozen base.
      source: the source of the episodes.
      spec: size of the episodes. It may have fewer ways than the model has outputs; the other outputs are masked.
      episodes: number of episodes, at least 2.
      seed: selects the list of episodes; 0 or above.
      num_steps: number of inner steps, for learners that take one. None uses the default of the learner.
      batch: episodes per compiled call.
      normalisation: name of the normalisation policy of the model, reported with the result.
      shuffle_support: whether to shuffle the labels of each support set among its examples, for episode k by `seed` and
        k only. Accuracy is then at chance, unless predictions use other information than the support set.
      before: whether to also score the learner before adaptation (without inner steps). None uses the default of the
        judge.
      judge: scores the episodes. None uses the metric of the task type, for which outputs that are not finite are
        wrong; `answers()` for a source of `metajax.data.question_answering`; and the objective itself if it consists
        of inner losses only.
      key: PRNG key for learners that use randomness (episode k folds in k). None is deterministic.
      progress: called after each batch with the number of completed episodes.

    Returns:
      An `Evaluation`.

    Raises:
      ValueError: an argument is out of range, the source is too small for `spec` or its task type differs from that of
        the learner, labels are to be shuffled but targets are not labels, (before anything is computed) the most ways
        of `spec` exceed the outputs of the model, or the query set of an episode is all padding.

    >>> import numpy as np, metajax
    >>> from metajax.data._source import ClassSource
    >>> inputs = np.array([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [2.0, 0.0]])
    >>> source = ClassSource("toy", "test", inputs, np.array([0, 0, 1, 1]), ("up", "right"))
    >>> learner = metajax.learners.prototypical(metajax.Model(lambda key, x: (), lambda params, x: x))
    >>> evaluate(learner, (), source, EpisodeSpec(2, 1, 1), episodes=10).summary()
    'accuracy 100.00 +- 0.00 % (10 episodes)'
    """
    _validate.learner(learner)
    check_source(source, spec)
    _validate.int_at_least("episodes", episodes, 2)
    _validate.int_at_least("seed", seed, 0)
    if num_steps is not None:
        _validate.int_at_least("num_steps", num_steps, 0)
    batch = min(_validate.positive_int("batch", batch), episodes)
    task = tasks.of(learner)
    require_same(getattr(source, "task", None), task, name="source", other_name="learner")
    if shuffle_support and not task.classes:
        raise ValueError(f"shuffle_support must be False for {task.name}, whose targets are no labels, got True")
    judge = default_judge(learner, source) if judge is None else judge
    judge.check(source)
    steps = {"after": num_steps}
    if learner.problem is not None and (judge.before if before is None else before):
        steps = {"before": 0, **steps}
    params = _tree.strong(params)

    def draw(start: int) -> Episode:
        chunk = episode_batch(source, spec, seed=seed, start=start, count=batch)
        return _shuffled(chunk, seed, start) if shuffle_support else chunk

    chunk = draw(0)
    first: Episode = jax.tree.map(lambda leaf: leaf[0], chunk)
    if task.classes:
        for part in first:
            _losses.check_labels(part)
    # This is also the first trace: arguments that do not match raise here, before anything is computed.
    predicts = learner.objective != "prequential"
    transductive = is_transductive(learner, params, first, num_steps, key) if predicts else None
    together = side_by_side(first)
    scores: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in steps}
    pending: list[Any] = []

    def settle() -> None:
        name, values, notes = pending.pop(0)
        scores[name].append(judge.score(source, jax.tree.map(np.asarray, values), notes))

    for start in range(0, episodes, batch):
        if start:
            # The last chunk is also drawn in full and its surplus dropped, so that there is one shape to compile.
            chunk = draw(start)
        ready = judge.prepare(source, chunk, seed, start)
        for name, taken in steps.items():
            values = _values(
                params, ready.support, ready.query, key, start,
                learner=learner, num_steps=taken, judge=judge, side_by_side=together,
            )  # fmt: skip
            pending.append((name, values, ready.notes))
        while len(pending) > len(steps):  # one chunk is computed while the next is drawn
            settle()
        if start and progress is not None:
            progress(start)
    while pending:
        settle()
    if progress is not None:
        progress(episodes)
    found = {
        which: {name: np.concatenate([part[name] for part in parts])[:episodes] for name in parts[0]}
        for which, parts in scores.items()
    }
    broken = {which: int(several.pop("nonfinite", np.zeros(1)).sum()) for which, several in found.items()}
    found = {which: {name: v.astype(np.float64) for name, v in several.items()} for which, several in found.items()}
    values = found["after"][judge.metric.name]
    return Evaluation(
        judge.metric.name, *_metrics.mean_and_interval(values), values, episodes, seed, normalisation, transductive,
        spec, f"{source.name} ({source.split})", shuffle_support, task, judge.metric.percent, found["after"],
        found.get("before"), broken["after"], judge.rows(source),
    )  # fmt: skip


def default_judge(learner: Learner, source: Source) -> Judge:
    """Returns the judge that `evaluate` uses by default.

    Args:
      learner: the learner.
      source: the source of the episodes.

    >>> import metajax
    >>> learner = metajax.learners.prototypical(metajax.models.conv4())
    >>> default_judge(learner, metajax.data.glyphs()).metric.name
    'accuracy'
    """
    if learner.objective == "prequential":
        return ByLoss()
    return answers() if isinstance(source, AnswerSource) else ByMetric(tasks.of(learner))


def _shuffled(episodes: Episode, seed: int, start: int) -> Episode:
    """Shuffles the labels of each support set among its kept examples. The first episode has the number `start`."""
    support = episodes.support
    order = np.tile(np.arange(support.mask.shape[1]), (len(support.mask), 1))
    for index, (line, mask) in enumerate(zip(order, support.mask, strict=True), start):
        kept = np.flatnonzero(mask)
        line[kept] = np.random.default_rng([seed, index]).permutation(kept)
    rows = np.arange(len(order))[:, None]
    targets = jax.tree.map(lambda leaf: leaf[rows, order], support.targets)
    return episodes._replace(support=support._replace(targets=targets))


def predict(
    learner: Learner,
    params: Params,
    support: Examples,
    inputs: Any,
    *,
    mask: Any = None,
    num_steps: int | None = None,
    batch: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Adapts to a support set and predicts, in one compiled call.

    Args:
      learner: the learner.
      params: its meta-parameters.
      support: labelled examples of one task.
      inputs: `[n, ...]`, the query inputs.
      mask: `[n]` bool, False for padding. None keeps all.
      num_steps: number of inner steps, for learners that take one. None uses the default of the learner.
      batch: queries per compiled call, after one call that adapts, so that memory does not grow with `n`. None predicts
        all at once, as transductive predictions require.
      key: PRNG key. None is deterministic.

    Returns:
      The outputs `[n, ...]`.

    Raises:
      ValueError: the task has more classes than the model has outputs, or `batch` is below 1.

    >>> import jax.numpy as jnp, metajax
    >>> learner = metajax.learners.prototypical(metajax.Model(lambda key, x: (), lambda params, x: x), ways=2)
    >>> support = metajax.Examples(jnp.eye(2), jnp.array([0, 1]), jnp.ones(2, bool))
    >>> predict(learner, (), support, jnp.array([[1.0, 0.0]])).argmax(-1).tolist()
    [0]
    """
    count = len(jax.tree.leaves(inputs)[0])
    mask = np.ones(count, bool) if mask is None else mask
    params = _tree.strong(params)
    if batch is None or count <= _validate.positive_int("batch", batch):
        return _predict(params, support, inputs, mask, key, learner=learner, num_steps=num_steps)
    adapted = _adapt(params, support, key, learner=learner, num_steps=num_steps)
    outputs = []
    for start in range(0, count, batch):
        here = slice(start, min(start + batch, count))
        missing = batch - (here.stop - start)  # pads the last part to the same shape, to avoid a compilation

        def part(leaf: Any, here: slice = here, missing: int = missing) -> np.ndarray:
            return np.pad(np.asarray(leaf)[here], [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))

        found = _continue(adapted, jax.tree.map(part, inputs), part(mask), key, start, learner=learner)
        outputs.append(found[: batch - missing])
    return jnp.concatenate(outputs)


def predict_query(
    learner: Learner,
    params: Params,
    episode: Episode,
    *,
    num_steps: int | None = None,
    key: jax.Array | None = None,
) -> Outputs:
    """Returns outputs for the query set of one episode before and after adaptation, for example for `report`.

    Raises:
      ValueError: as for `predict`.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> learner = metajax.learners.maml(metajax.models.mlp(outputs=2), inner=optax.sgd(0.1))
    >>> examples = metajax.Examples(jnp.eye(4), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool))
    >>> params = learner.init(jax.random.key(0), examples.inputs)
    >>> outputs = predict_query(learner, params, metajax.Episode(examples, examples))
    >>> outputs.before.shape, outputs.after.shape
    ((4, 2), (4, 2))
    """
    support, query = episode

    def outputs(steps: int | None) -> jax.Array:
        return predict(learner, params, support, query.inputs, mask=query.mask, num_steps=steps, key=key)

    return Outputs(None if learner.problem is None else outputs(0), outputs(num_steps))


# The learner is a static argument: compiled calls are cached by its functions, so the validations of a training run
# share one compilation. `params` is an argument and never a constant.
@functools.partial(jax.jit, static_argnames=("learner", "num_steps"))
def _predict(
    params: Params, support: Examples, inputs: Any, mask: Any, key: Any, *, learner: Learner, num_steps: int | None
) -> Any:
    return adapt_and_predict(learner, num_steps)(params, support, inputs, mask, key)


@functools.partial(jax.jit, static_argnames=("learner", "num_steps"))
def _adapt(params: Params, support: Examples, key: Any, *, learner: Learner, num_steps: int | None) -> Any:
    return learner.adapt(params, support, num_steps=num_steps, key=_keys.of_task(key).adapt)


@functools.partial(jax.jit, static_argnames=("learner",))
def _continue(adapted: Any, inputs: Any, mask: Any, key: Any, start: Any, *, learner: Learner) -> Any:
    return learner.predict(adapted, inputs, mask=mask, key=_keys.fold(_keys.of_task(key).outer, start))


@functools.partial(jax.jit, static_argnames=("learner", "num_steps", "judge", "side_by_side"))
def _values(
    params: Params, support: Examples, query: Any, key: Any, start: Any, *,
    learner: Learner, num_steps: int | None, judge: Judge, side_by_side: bool,
) -> Any:  # fmt: skip
    """Returns the values that a judge keeps of each episode. Adapted parameters stay inside the loop over tasks."""
    run = judge.run(learner, num_steps)

    def one(task: tuple[jax.Array, Examples, Any]) -> Any:
        index, support, query = task
        return run(params, support, query, _keys.fold(key, index))

    tasks = (start + jnp.arange(support.mask.shape[0]), support, query)
    return jax.vmap(one)(tasks) if side_by_side else jax.lax.map(one, tasks)


def side_by_side(episode: Episode) -> bool:
    size = sum(np.size(leaf) for leaf in jax.tree.leaves((episode.support.inputs, episode.query.inputs)))
    return choose_task_batching(jax.default_backend(), size) == "vmap"


def is_transductive(learner: Learner, params: Params, episode: Episode, num_steps: int | None, key: Any) -> bool | None:
    """Returns whether replacing the second half of a query set changes predictions of the first half.

    Returns None if a prediction is not finite.
    """
    support, query = episode
    inputs, mask = query.inputs, np.asarray(query.mask)
    if np.sum(mask) < 2:  # there is no other query example: add a support example
        inputs = jax.tree.map(lambda leaf, other: np.concatenate([leaf, other[:1]]), inputs, support.inputs)
        mask = np.append(mask, True)
    rows = np.flatnonzero(mask)
    kept, replaced = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    source = np.arange(len(mask))
    source[replaced] = rows[0]  # copies of one example are valid inputs with other statistics
    moved = jax.tree.map(lambda leaf: np.asarray(leaf)[source], inputs)

    as_is, other = (
        np.asarray(predict(learner, params, support, values, mask=mask, num_steps=num_steps, key=_keys.fold(key, 0)))
        for values in (inputs, moved)
    )
    epsilon, absent = float(jnp.finfo(as_is.dtype).eps), _losses.absent_logit(as_is.dtype)
    as_is, other = as_is[kept].astype(np.float64), other[kept].astype(np.float64)
    if not (np.isfinite(as_is).all() and np.isfinite(other).all()):
        return None
    present = np.abs(as_is[as_is > absent / 2])  # without the logits of absent classes
    scale = float(np.max(present)) if present.size else 1.0
    return bool(np.max(np.abs(as_is - other)) > np.sqrt(epsilon) * scale)
