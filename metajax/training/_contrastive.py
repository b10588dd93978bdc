"""Contrastive pre-training on images without labels, as the initialization of the backbone of any learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax import hypergrad
from metajax.core._types import Episode, Examples, Learner, MetaState, Model, OuterUpdate, Params
from metajax.learners import contrastive, random_view
from metajax.training._outer import outer_update


def moco(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    momentum: float = 0.99,
    queue: int = 4096,
    temperature: float = 0.2,
    dim: int = 128,
    hidden: int = 256,
    view: Callable[[jax.Array, jax.Array], jax.Array] = random_view,
) -> OuterUpdate:
    """Momentum contrast (He et al. 2020): learns to tell views of an image from other images, without labels.

    The network encodes queries and a slow average of the network encodes keys. With a queue this is MoCo v2. With
    `queue=0` it is MoCo v3: the keys of the batch are the negatives, both views are queries, and a predictor follows
    the network. Heads have one hidden layer and no normalisation.

    Args:
      model: a network from images to features, without batch statistics.
      optimizer: any optax transform.
      momentum: decay of the average; see `contrastive` for all options.
      queue: number of keys of earlier batches, or 0.
      temperature: divides the cosine similarities.
      dim: dimension of the compared vectors.
      hidden: units of the hidden layer of each head.
      view: `(key, images) -> images`.

    Returns:
      Pure functions `init(key, images) -> state` and `update(state, images) -> (state, metrics)`, with images `[n,
      height, width, c]` and a `MetaState`. They work with `metajax.training.fit`, its callbacks and checkpoints.
      Metrics are `loss`, `accuracy` (how often the key is found) and `grad_norm`. `encoder_params` returns the
      backbone.

    Raises:
      ValueError: as for `contrastive`.

    Source: He et al. 2020, Momentum Contrast for Unsupervised Visual Representation Learning, arXiv:1911.05722.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.models.conv4(width=8, depth=1, normalisation="group")
    >>> pretrain = metajax.training.moco(model, optax.adam(1e-3), queue=8)
    >>> images = jax.random.bits(jax.random.key(0), [4, 2, 2, 3], jnp.uint8)
    >>> state = pretrain.init(jax.random.key(1), images)
    >>> state, metrics = jax.jit(pretrain.update)(state, images)
    >>> sorted(metrics), model.apply(metajax.training.encoder_params(state), images).shape
    (['accuracy', 'grad_norm', 'loss'], (4, 8))
    """
    if momentum is None:
        raise ValueError("momentum must be a number from 0 and below 1, got None")
    options: dict[str, Any] = {"temperature": temperature, "dim": dim, "hidden": hidden, "view": view}
    return _of_images(contrastive(model, momentum=momentum, queue=queue, **options), optimizer)


def simclr(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    temperature: float = 0.2,
    dim: int = 128,
    hidden: int = 256,
    view: Callable[[jax.Array, jax.Array], jax.Array] = random_view,
) -> OuterUpdate:
    """SimCLR (Chen et al. 2020): finds the other view of an image among all views of the batch, without labels.

    Args:
      model: a network from images to features.
      optimizer: any optax transform.
      temperature: divides the cosine similarities; see `contrastive` for all options.
      dim: dimension of the compared vectors.
      hidden: units of the hidden layer of the head.
      view: `(key, images) -> images`.

    Returns:
      Pure functions, as for `moco`.

    Raises:
      ValueError: as for `contrastive`.

    Source: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709.

    >>> import metajax, optax
    >>> metajax.training.simclr(metajax.models.conv4(), optax.adam(1e-3)).axis_name is None
    True
    """
    return _of_images(contrastive(model, temperature=temperature, dim=dim, hidden=hidden, view=view), optimizer)


def _of_images(learner: Learner, optimizer: optax.GradientTransformation) -> OuterUpdate:
    """Returns the meta step of a contrastive learner on images: a batch of images is the query set of one task."""
    outer = outer_update(learner, optimizer, hypergrad=hypergrad.unrolled(), before=False)

    def episode(images: jax.Array) -> Episode:
        def some(count: int) -> Examples:
            return Examples(images[:count], jnp.zeros(count, jnp.int32), jnp.ones(count, bool), jnp.ones(1, bool))

        return Episode(some(0), some(len(images)))

    def init(key: jax.Array, images: jax.Array, params: Params = None, **options: Any) -> MetaState:
        return outer.init(key, episode(images), params, **options)

    def update(state: MetaState, images: jax.Array, frozen: Params = None) -> tuple[MetaState, dict[str, Any]]:
        return outer.update(state, jax.tree.map(lambda leaf: leaf[None], episode(images)), frozen)

    return OuterUpdate(init, update)


def encoder_params(state: MetaState) -> Params:
    """Returns the backbone parameters in a state of `moco` or `simclr`, the initial parameters of other learners.

    >>> import jax, jax.numpy as jnp
    >>> encoder_params(MetaState({"backbone": 1, "head": 2}, (), (), jnp.array(0), jax.random.key(0)))
    1
    """
    return state.params["backbone"]
