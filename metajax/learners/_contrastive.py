"""Contrastive learning without labels: trains a backbone to tell images apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax import data, models, tasks
from metajax.core import _losses, _validate
from metajax.core._types import Aux, Collected, Examples, Features, Learner, Model, Params
from metajax.learners._forward import forward
from metajax.learners._metric import prototypical, unit
from metajax.models import as_floats

View = Callable[[jax.Array, jax.Array], jax.Array]  # (key, images) -> images

_TRAINED = r"^(backbone|head|predictor)/"  # the paths trained by gradients; the others are averages and the queue
_AREA, _STRETCH = (0.2, 1.0), 4 / 3  # of a crop: share of the image, largest ratio of its sides
_JITTER, _JITTERED, _GREYED = 0.4, 0.8, 0.2  # strength, share of images with colour jitter, share turned grey
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random_view(key: jax.Array, images: jax.Array) -> jax.Array:
    """Makes a random view of each image: a resized crop, a flip, and a change of colours or of none.

    This is the augmentation of MoCo v2 and SimCLR without blur and without hue changes, as is usual for small images. A
    crop has 20 to 100 % of the area and an aspect ratio of 3/4 to 4/3. Brightness, contrast and saturation change by up
    to 40 % in 4 of 5 images, and 1 of 5 becomes grey. Images without three channels get only the crop, the flip,
    brightness and contrast.

    Args:
      key: PRNG key.
      images: `[n, height, width, c]`, bytes, or floats in [0, 1].

    Returns:
      Floats in [0, 1] of the same shape.

    Raises:
      ValueError: `images` have another shape.

    Sources: Chen et al. 2020, arXiv:2003.04297 (MoCo v2) and arXiv:2002.05709 (SimCLR), appendix A.

    >>> import jax, numpy as np
    >>> view = jax.jit(random_view)(jax.random.key(0), np.full([2, 8, 8, 3], 255, np.uint8))
    >>> view.shape, view.dtype, bool((view <= 1).all())
    ((2, 8, 8, 3), dtype('float32'), True)
    """
    if len(images.shape) != 4:
        raise ValueError(f"images must be [n, height, width, c], got shape {images.shape}")
    count, height, width, channels = images.shape
    pixels = as_floats(images)
    # one key for each image, so that later images (padding) do not matter
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(count))
    size, ratio, top, left, flip, jitter, grey, *colour = jax.vmap(lambda key: jax.random.uniform(key, [10]))(keys).T
    area = _AREA[0] + (_AREA[1] - _AREA[0]) * size
    stretch = jnp.sqrt(_STRETCH) ** (2 * ratio - 1)
    sides = jnp.minimum(1, jnp.sqrt(area) * jnp.stack([stretch, 1 / stretch]))
    places = jnp.stack([top, left]) * (1 - sides)

    def crop(image: jax.Array, side: jax.Array, place: jax.Array) -> jax.Array:
        start = place * jnp.array([height, width])
        return jax.image.scale_and_translate(image, image.shape, (0, 1), 1 / side, -start / side, "linear")

    pixels = jax.vmap(crop, in_axes=(0, 1, 1))(pixels, sides, places)
    pixels = data.random_flip().apply(pixels, flip[:, None])
    changes = {"brightness": _JITTER, "contrast": _JITTER, "saturation": _JITTER if channels == 3 else 0.0}
    changed = data.colour_jitter(**changes).apply(pixels, jnp.stack(colour, axis=1))
    pixels = jnp.where((jitter < _JITTERED)[:, None, None, None], jnp.clip(changed, 0, 1), pixels)
    if channels == 3:
        grey_pixels = jnp.sum(pixels * jnp.array(_GREY), axis=3, keepdims=True)
        pixels = jnp.where((grey < _GREYED)[:, None, None, None], grey_pixels, pixels)
    return pixels


def contrastive(
    model: Features,
    *,
    momentum: float | None = None,
    queue: int = 0,
    temperature: float = 0.2,
    dim: int = 128,
    hidden: int = 256,
    view: View = random_view,
) -> Learner:
    """A learner that is trained to tell images apart and predicts by the nearest class mean of its features.

    It makes two views of each image of the query set. The loss (InfoNCE) is the cross-entropy of using one view to find
    the other view of the same image among other views. Padding is excluded: it is neither found nor among the other
    views. Labels and the support set are not used. The other views are:

    | `momentum` | `queue` | | the other views |
    |---|---|---|---|
    | None | 0 | SimCLR | all views of the batch, from the same network |
    | a number | 0 | MoCo v3 | views of the batch, from an average of the network; a predictor follows the network |
    | a number | a number | MoCo v2 | the last `queue` views of earlier batches, from an average of the network |

    Train it with `metajax.training.moco` or `simclr`, or like any learner with `outer_update` on
    `metajax.data.batches`. The average and the queue are meta-parameters that no gradient trains. Keys enter the queue
    in the order of tasks and images.

    Args:
      model: a network from images to features `[n, d]`.
      momentum: share of the old average kept in each step, at least 0 and below 1; None for SimCLR.
      queue: number of keys from earlier batches; 0 for none.
      temperature: divides the cosines.
      dim: size of the compared vectors.
      hidden: units of the hidden layer of the projection head and of the predictor.
      view: `(key, images) -> images`, the random views.

    Returns:
      A `Learner` with the meta-parameters `{"backbone", "head"}`. With momentum there is also `{"momentum"}`, and
      either `{"queue"}` `[queue, dim]`, oldest first, or `{"predictor"}`. `adapt` and `predict` are the ones of
      `prototypical` with cosine distances on the backbone. Without a key, both views are drawn from a fixed key.

    Raises:
      ValueError: an argument is out of range, there is a queue without momentum, or the model normalises by batch
        statistics and momentum is set (the statistics reveal which key belongs to a query: use layer or group
        normalisation).

    Sources: He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297; Chen, Xie and He 2021,
    arXiv:2104.02057 (MoCo v1 to v3); Chen et al. 2020, arXiv:2002.05709 (SimCLR).

    >>> import jax, jax.numpy as jnp, metajax
    >>> learner = metajax.learners.contrastive(metajax.models.conv4(width=8, normalisation="group"), momentum=0.99)
    >>> sorted(jax.eval_shape(learner.init, jax.random.key(0), jnp.ones([1, 16, 16, 3])))
    ['backbone', 'head', 'momentum', 'predictor']
    """
    _validate.instance("model", model, Model)
    _validate.int_at_least("queue", queue, 0)
    _validate.positive_float("temperature", temperature)
    if momentum is None and queue:
        raise ValueError(f"queue must be 0 without momentum, got {queue}")
    if momentum is not None:
        _validate.below_one("momentum", momentum)
        if {"mask", "stats"} & {*model.needs}:
            raise ValueError(
                "model must not normalise by statistics of the batch under momentum contrast, since they tell which "
                f"key belongs to a query: take layer or group normalisation, got a model that needs {model.needs}"
            )
    head, predictor = (models.mlp(_validate.positive_int("dim", dim), hidden=(hidden,)) for _ in range(2))
    deployed = prototypical(model, distance="cosine")

    def init(key: jax.Array, inputs: Any) -> Params:
        keys = jax.random.split(key, 4)
        backbone = model.init(keys[0], inputs)
        features = jax.eval_shape(lambda: _features(model, backbone, inputs, jnp.ones(len(inputs), bool)))
        params = {"backbone": backbone, "head": head.init(keys[1], features)}
        if momentum is None:
            return params
        params["momentum"] = dict(params)
        if queue:
            return {**params, "queue": unit(jax.random.normal(keys[2], [queue, dim], features.dtype))}
        return {**params, "predictor": predictor.init(keys[3], jax.ShapeDtypeStruct((1, dim), features.dtype))}

    def project(params: Params, images: jax.Array, mask: jax.Array) -> jax.Array:
        return head.apply(params["head"], _features(model, params["backbone"], images, mask))

    def adapt(meta_params: Params, support: Examples, *, num_steps: int | None = None, key: Any = None) -> Any:
        return deployed.adapt(meta_params["backbone"], support, num_steps=num_steps, key=key)

    def outer_loss(
        adapted: Any, meta_params: Params, query: Examples, *, key: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        del adapted
        kept = _losses.kept_examples(tasks.classification, query)
        images = _losses.clear_padding(query.inputs, query.mask)
        keys = jax.random.split(jax.random.key(0) if key is None else key)
        one, other = (view(key, images) for key in keys)
        twice, state, collected = jnp.tile(kept, 2), (), ()  # type: Any, Any, Any
        if momentum is None:
            vectors = unit(project(meta_params, jnp.concatenate([one, other]), twice))
            logits, targets = _among_themselves(vectors)
            rows = columns = twice
        else:
            now = {name: meta_params[name] for name in ("backbone", "head")}
            average = optax.incremental_update(now, meta_params["momentum"], 1 - momentum)
            average = jax.lax.stop_gradient(average)
            state = {"momentum": average}
        if momentum is not None and queue:
            found, before = unit(project(average, other, kept)), jax.lax.stop_gradient(meta_params["queue"])
            logits, targets = _among_queue(unit(project(meta_params, one, kept)), found, before)
            rows, columns = kept, jnp.ones(logits.shape[1], bool)
            collected = {"keys": found, "kept": kept}
        elif momentum is not None:
            queries = [
                predictor.apply(meta_params["predictor"], project(meta_params, images, kept)) for images in (one, other)
            ]
            keys_of = [project(average, images, kept) for images in (other, one)]
            logits = jnp.concatenate([unit(query) @ unit(key).T for query, key in zip(queries, keys_of, strict=True)])
            targets = jnp.tile(jnp.arange(len(kept)), 2)
            rows, columns = twice, kept
        logits = jnp.where(columns, logits / temperature, _losses.absent_logit(logits.dtype))
        value = _losses.mean_over(_losses.cross_entropy(logits, targets), rows)
        metrics = {"accuracy": _losses.mean_over(_losses.hits(logits, targets).astype(value.dtype), rows)}
        return value, Aux(metrics=metrics, state=state, collected=collected)

    def update_state(meta_params: Params, averaged: Any, collected: Collected) -> Params:
        new = {**meta_params, **averaged}
        if queue:
            found, kept = collected.values["keys"], collected.values["kept"] & collected.counts[:, None]
            new["queue"] = _pushed(meta_params["queue"], found.reshape(-1, found.shape[-1]), kept.reshape(-1))
        return new

    written = None if momentum is None else update_state
    return Learner(init, adapt, deployed.predict, outer_loss, None, tasks.classification, "query", written, _TRAINED)


def _features(model: Model, params: Params, images: Any, mask: Any) -> jax.Array:
    return forward(model, params, images, mask=mask)[0]


def _pushed(queue: jax.Array, keys: jax.Array, kept: jax.Array) -> jax.Array:
    """Appends the kept keys to the queue and drops as many keys from its front."""
    rows, counts = jnp.concatenate([queue, keys]), jnp.concatenate([jnp.ones(len(queue), bool), kept])
    return rows[jnp.argsort(counts, stable=True)[-len(queue) :]]  # rows that are not kept come first


def _among_queue(queries: jax.Array, keys: jax.Array, queue: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines `[n, 1 + queue]` of each query with its key and the queue; the first column is correct."""
    right = jnp.sum(queries * keys, axis=1, keepdims=True)
    return jnp.concatenate([right, queries @ queue.T], axis=1), jnp.zeros(len(queries), jnp.int32)


def _among_themselves(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns cosines `[2n, 2n]` between views, self-pairs masked; the correct one is the image's other view."""
    count, absent = len(vectors), _losses.absent_logit(vectors.dtype)
    cosines = jnp.where(jnp.eye(count, dtype=bool), absent, vectors @ vectors.T)
    return cosines, (jnp.arange(count) + count // 2) % count
