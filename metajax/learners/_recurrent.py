"""A learner whose adaptation is the hidden state of a recurrent network."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from metajax import tasks
from metajax.core import _losses, _validate
from metajax.core._types import Examples, Learner, Loss, Model, Params, TaskType
from metajax.learners._forward import query_loss
from metajax.models import from_nnx


class _Memory(NamedTuple):
    params: Params
    hidden: jax.Array


class Cell(nnx.Module):
    """A gated recurrent unit that maps `[n, hidden + inputs]` to `[n, hidden]`.

    >>> Cell(3, 4, nnx.Rngs(0))(jnp.zeros([2, 7])).shape
    (2, 4)
    """

    def __init__(self, inputs: int, hidden: int, rngs: nnx.Rngs):
        self.hidden = hidden
        self.cell = nnx.GRUCell(inputs, hidden, rngs=rngs)

    def __call__(self, values: jax.Array) -> jax.Array:
        return self.cell(values[:, : self.hidden], values[:, self.hidden :])[0]


def recurrent(
    model: Model,
    outputs: int,
    *,
    hidden: int = 32,
    task: TaskType | None = None,
    loss: Loss | None = None,
) -> Learner:
    """Adaptation by a hidden state (ReBAL, Nagabandi et al. 2019): a recurrent network reads the support set in order.

    No weight changes. A gated recurrent unit reads the support set, and its hidden state is appended to the inputs of a
    query. With `online.recent` the support set is the last M steps of a stream. Padding is not read.

    Args:
      model: a network from `[n, inputs + hidden]` to `[n, outputs]`, such as `metajax.models.mlp(outputs)`.
      outputs: size of a target `[n, outputs]`, or the number of classes if targets are labels `[n]`.
      hidden: size of the hidden state.
      task: the task type, None for regression; `metajax.tasks.classification` for labels.
      loss: `(outputs, targets) -> [n]`, instead of the loss of the task type; see `metajax.tasks.resolve`.

    Returns:
      A `Learner` without an inner problem, whose meta-parameters are `{"cell", "model"}`. Inputs are one array
      `[n, ...]`, which is flattened.

    Raises:
      ValueError: an argument has the wrong type, or a number is below 1.

    Source: Nagabandi et al. 2019, arXiv:1803.11347; the unit: Cho et al. 2014, arXiv:1406.1078.

    >>> import metajax
    >>> learner = recurrent(metajax.models.mlp(1), 1, hidden=8)
    >>> support = metajax.Examples(jnp.ones([3, 2]), jnp.ones([3, 1]), jnp.ones(3, bool))
    >>> adapted = learner.adapt(learner.init(jax.random.key(0), support.inputs), support)
    >>> learner.predict(adapted, support.inputs).shape
    (3, 1)
    """
    _validate.instance("model", model, Model)
    _validate.positive_int("outputs", outputs)
    _validate.positive_int("hidden", hidden)
    resolved = tasks.regression if task is None and loss is None else tasks.resolve(task, loss)

    def cell(width: int) -> Model:
        return from_nnx(lambda rngs: Cell(width + outputs, hidden, rngs))

    def beside(inputs: jax.Array, memory: jax.Array) -> jax.Array:
        return jnp.concatenate([inputs, jnp.broadcast_to(memory, (len(inputs), hidden))], axis=1)

    def init(key: jax.Array, inputs: Any) -> Params:
        cell_key, model_key = jax.random.split(key)
        flat = _flat(inputs)
        read = jnp.zeros([1, hidden + flat.shape[1] + outputs])
        return {
            "cell": cell(flat.shape[1]).init(cell_key, read),
            "model": model.init(model_key, beside(flat, jnp.zeros(hidden))),
        }

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> _Memory:
        del num_steps, key
        inputs = _flat(_losses.clear_padding(support.inputs, support.mask))
        targets = _losses.clear_padding(support.targets, support.mask)
        if resolved.classes:
            targets = jax.nn.one_hot(targets, outputs)
        unit = cell(inputs.shape[1])

        def read(memory: jax.Array, row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            values, kept = row
            new = unit.apply(meta_params["cell"], jnp.concatenate([memory, values])[None])[0]
            return jnp.where(kept, new, memory), None

        rows = jnp.concatenate([inputs, targets.reshape(len(inputs), outputs)], axis=1)
        memory, _ = jax.lax.scan(read, jnp.zeros(hidden), (rows, jnp.asarray(support.mask)))
        return _Memory(meta_params["model"], memory)

    def predict(adapted: _Memory, inputs: Any, *, mask: Any = None, key: Any = None) -> jax.Array:
        del key
        return model.apply(adapted.params, beside(_flat(_losses.clear_padding(inputs, mask)), adapted.hidden))

    return Learner(init, adapt, predict, query_loss(predict, resolved), task=resolved)


def _flat(inputs: jax.Array) -> jax.Array:
    return jnp.asarray(inputs, jnp.float32).reshape(len(inputs), -1)
