"""Features of a frozen model, computed once and stored on disk."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np

from metajax.core import _tree, _validate
from metajax.core._types import Model, Params
from metajax.data import ClassSource, cached, cut_to, read

_BATCH = 64  # examples in each call


def features(model: Model, params: Params, source: ClassSource, *, cache: bool = True) -> ClassSource:
    """Computes the features of all examples of a source with a frozen model, and returns a source of vectors.

    If nothing below the head is trained, every episode sees the same features, so they are computed once: in batches,
    with one compiled function for each length bucket. They are stored in the folder that METAJAX_CACHE names, or in
    `~/.cache/metajax`, under a hash of the program, the parameters and the inputs. A damaged file is replaced.

    Args:
      model: a network from inputs to features `[n, d]`; the features of an example must not depend on other examples.
      params: its parameters.
      source: the source of the examples.
      cache: whether to look for features on disk and to store them there.

    Returns:
      The same classes, examples and nodes, with inputs float32 `[n, d]`.

    Raises:
      ValueError: `source` has no examples by class, or `model` needs statistics of a whole batch or returns no vectors.

    >>> import metajax
    >>> model = metajax.models.mlp(outputs=3)
    >>> source = ClassSource("toy", "train", np.eye(4), np.arange(4) % 2, ("a", "b"))
    >>> params = model.init(jax.random.key(0), source.inputs)
    >>> features(model, params, source, cache=False).inputs.shape
    (4, 3)
    """
    _validate.instance("model", model, Model)
    _validate.instance("source", source, ClassSource)
    if model.needs:
        raise ValueError(f"model must map each example by itself, got one that needs {', '.join(model.needs)}")
    params = jax.tree.map(jax.numpy.asarray, params)
    apply = jax.jit(model.apply)
    shape = jax.eval_shape(apply, params, _inputs(source, np.zeros(1, int), (source.length_buckets or (0,))[-1])).shape
    if len(shape) != 2:
        raise ValueError(
            f"model must give features [n, d], such as a decoder with head='features', got outputs of shape {shape}"
        )

    def make() -> dict[str, np.ndarray]:
        return {"features": _compute(apply, params, source)}

    made = cached(_key(apply, params, source), make) if cache else make()
    return dataclasses.replace(source, inputs=made["features"], lengths=None, length_buckets=(), length_axis=1)


def _compute(apply: Any, params: Params, source: ClassSource) -> np.ndarray:
    count = len(source.labels)
    buckets = np.array(source.length_buckets or (0,))
    lengths = np.zeros(count, int) if source.lengths is None else source.lengths
    of_row = np.searchsorted(buckets, lengths) if source.length_buckets else np.zeros(count, int)
    whole: np.ndarray | None = None
    for bucket in np.unique(of_row):
        rows = np.flatnonzero(of_row == bucket)
        for start in range(0, len(rows), _BATCH):
            some = rows[start : start + _BATCH]
            # the last batch is filled with copies, so that there is one shape and one compilation
            found = np.asarray(apply(params, _inputs(source, np.resize(some, _BATCH), buckets[bucket])), np.float32)
            if whole is None:
                whole = np.empty((count, *found.shape[1:]), np.float32)
            whole[some] = found[: len(some)]
    assert whole is not None  # a source has examples
    return whole


def _inputs(source: ClassSource, rows: np.ndarray, length: int) -> Any:
    return jax.tree.map(lambda leaf: read(cut_to(source, leaf, leaf, length), rows), source.inputs)


def _key(apply: Any, params: Params, source: ClassSource) -> str:
    """Hashes everything that the features depend on: the program, its parameters, the inputs and their buckets."""
    digest = hashlib.sha256()
    example = _inputs(source, np.zeros(_BATCH, int), (source.length_buckets or (0,))[-1])
    digest.update(apply.lower(params, example).as_text().encode())
    _tree.update_hash(digest, (params, source.inputs))
    digest.update(repr(source.length_buckets).encode())
    return f"features {digest.hexdigest()}"
