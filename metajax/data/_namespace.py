"""Support for three array libraries: NumPy on the host, JAX on the device, TensorFlow in the pipeline's graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def namespace(array: Any) -> Any:
    """Returns the library of an array: `numpy`, `jax.numpy`, or TensorFlow's NumPy functions.

    >>> namespace(np.zeros(2)).__name__
    'numpy'
    """
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    import tensorflow.experimental.numpy as tnp

    return tnp


def on_host(array: Any) -> bool:
    """Returns whether shapes may depend on values, which holds for every library except JAX.

    >>> on_host(np.zeros(2))
    True
    """
    return not namespace(array).__name__.startswith("jax")


def over_leading(function: Callable[[Any, Any], Any], values: Any, numbers: Any) -> Any:
    """Applies `function(values [n, ...], numbers [n, k])` over all axes of `values` except its last three.

    >>> over_leading(lambda images, numbers: images[:, :1], np.zeros([2, 5, 4, 4, 1]), np.zeros([2, 5, 3])).shape
    (2, 5, 1, 4, 1)
    """
    xp = namespace(values)
    if xp.__name__.startswith("tensorflow"):
        import tensorflow as tf

        # shapes of a graph may be known only when it runs; padding may have been cut off the values
        leading = tf.shape(values)[: len(values.shape) - 3]
        count, numbers = tf.reduce_prod(leading), numbers[:, : leading[-1]]
        made = function(
            tf.reshape(values, [count, *values.shape[-3:]]), tf.reshape(numbers, [count, numbers.shape[-1]])
        )
        return tf.reshape(made, tf.concat([leading, made.shape[1:]], axis=0))
    leading = values.shape[:-3]
    count, numbers = math.prod(leading), numbers[..., : leading[-1], :]
    made = function(values.reshape(count, *values.shape[-3:]), numbers.reshape(count, numbers.shape[-1]))
    return made.reshape(*leading, *made.shape[1:])


def keep_shape(function: Callable[[Any, Any], Any], values: Any, numbers: Any) -> Any:
    """Applies `function(values [n, ...], numbers [n, k])` and restores the static shape if TensorFlow loses it.

    >>> keep_shape(lambda images, numbers: images[:, :1], np.zeros([5, 4, 4, 1]), np.zeros([5, 3])).shape
    (5, 1, 4, 1)
    """
    made = function(values, numbers)
    if not namespace(values).__name__.startswith("tensorflow"):
        return made
    import tensorflow as tf

    one = function(np.zeros([1, *values.shape[1:]], values.dtype.as_numpy_dtype), np.zeros([1, numbers.shape[1]], "f4"))
    return tf.ensure_shape(made, [None, *one.shape[1:]])
