"""Contrastive pre-training without labels: a backbone that tells images apart is where learners begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metajax import data, hypergrad, learners, models, tasks
from metajax.core import _losses, _validate
from metajax.core._types import Aux, Collected, Episode, Examples, Learner, MetaState, Model, OuterUpdate, Params
from metajax.learners._forward import forward
from metajax.learners._metric import unit
from metajax.models._wrap import as_floats
from metajax.training._outer import outer_update

View = Callable[[jax.Array, jax.Array], jax.Array]  # (key, images) -> images

TRAINED = r"^(backbone|head|predictor)/"  # the paths that a gradient trains; the others are averages and the queue
_AREA, _STRETCH = (0.2, 1.0), 4 / 3  # of a crop: share of the image, largest ratio of its sides
_JITTER, _JITTERED, _GREYED = 0.4, 0.8, 0.2  # strength, and the shares of images that get it and that become grey
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


def random_view(key: jax.Array, images: jax.Array) -> jax.Array:
    """A random view of each image: a crop that is resized, a flip, other colours, or none.

    The augmentation of MoCo v2 and SimCLR without blur and without a change of hue, as small images take it. A crop has
    20 to 100 % of the area and sides in a ratio of 3/4 to 4/3; brightness, contrast and saturation change by up to 40 %
    in 4 of 5 images; one of 5 becomes grey. Images without three channels keep to crop, flip, brightness and contrast.

    Args:
      key: PRNG key.
      images: `[n, height, width, c]`, bytes, or floats in [0, 1].

    Returns:
      Floats in [0, 1] of the same shape.

    Raises:
      ValueError: `images` are of another shape.

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
    # a key for each image, so that those behind it (padding) do not matter
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
    model: Model,
    *,
    momentum: float | None = None,
    queue: int = 0,
    temperature: float = 0.2,
    dim: int = 128,
    hidden: int = 256,
    view: View = random_view,
) -> Learner:
    """A learner that is trained to tell images apart, and deployed as a nearest class mean in its features.

    Two views of each image of the query set are made; the loss (InfoNCE) is the cross-entropy of finding the one among
    others by the other one. Padding is no image: it is neither found nor among the others. Labels are not looked at,
    nor is the support set. What the others are:

    | `momentum` | `queue` | | the others |
    |---|---|---|---|
    | None | 0 | SimCLR | all views of the batch, by the same network |
    | a number | 0 | MoCo v3 | views of the batch, by an average of the network; a predictor stands behind the network |
    | a number | a number | MoCo v2 | the last so many views of earlier batches, by an average of the network |

    Train it by `moco` or `simclr`, or as any learner by `outer_update(..., trainable=TRAINED)` on
    `metajax.data.batches`: the average and the queue are meta-parameters that no gradient trains. Keys come into the
    queue in the order of tasks and images.

    Args:
      model: a network from images to features `[n, d]`.
      momentum: share of the old average that stays in a step, from 0 and below 1; None for SimCLR.
      queue: keys of earlier batches; 0 for none.
      temperature: divides the cosines.
      dim: numbers in the vectors that are compared.
      hidden: units of the hidden layer of the projection head, and of the predictor.
      view: `(key, images) -> images`, the random views.

    Returns:
      A `Learner` whose meta-parameters are `{"backbone", "head"}`, with momentum also `{"momentum"}`, and `{"queue"}`
      `[queue, dim]`, oldest first, or `{"predictor"}`. `adapt` and `predict` are those of `prototypical` with cosine
      distances on the backbone. Without a key both views are drawn from a fixed one.

    Raises:
      ValueError: an argument out of range, a queue without momentum, or a model that normalises by statistics of the
        batch beside momentum (they tell which key belongs to a query: take layer or group normalisation).

    Sources: He et al. 2020, arXiv:1911.05722; Chen et al. 2020, arXiv:2003.04297; Chen, Xie and He 2021,
    arXiv:2104.02057 (MoCo v1 to v3); Chen et al. 2020, arXiv:2002.05709 (SimCLR).

    >>> import jax, jax.numpy as jnp, metajax
    >>> learner = metajax.strategies.contrastive(metajax.models.conv4(width=8, normalisation="group"), momentum=0.99)
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
    deployed = learners.prototypical(model, distance="cosine")

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
    return Learner(init, adapt, deployed.predict, outer_loss, task=tasks.classification, update_state=written)


def _features(model: Model, params: Params, images: Any, mask: Any) -> jax.Array:
    return forward(model, params, images, mask=mask)[0]


def _pushed(queue: jax.Array, keys: jax.Array, kept: jax.Array) -> jax.Array:
    """The queue with the keys that are kept behind it, and as many fewer in front."""
    rows, counts = jnp.concatenate([queue, keys]), jnp.concatenate([jnp.ones(len(queue), bool), kept])
    return rows[jnp.argsort(counts, stable=True)[-len(queue) :]]  # what is not kept comes first


def _among_queue(queries: jax.Array, keys: jax.Array, queue: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines `[n, 1 + queue]` of each query with its key and with the queue; the first one is right."""
    right = jnp.sum(queries * keys, axis=1, keepdims=True)
    return jnp.concatenate([right, queries @ queue.T], axis=1), jnp.zeros(len(queries), jnp.int32)


def _among_themselves(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines `[2n, 2n]` of the views with each other, none with itself; right is the image's other view."""
    count, absent = len(vectors), _losses.absent_logit(vectors.dtype)
    cosines = jnp.where(jnp.eye(count, dtype=bool), absent, vectors @ vectors.T)
    return cosines, (jnp.arange(count) + count // 2) % count


def moco(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    momentum: float = 0.99,
    queue: int = 4096,
    temperature: float = 0.2,
    dim: int = 128,
    hidden: int = 256,
    view: View = random_view,
) -> OuterUpdate:
    """Momentum contrast (He et al. 2020): tells views of an image from a queue of other images, without labels.

    A query goes through the network, its key through a slow average of it. With a queue this is MoCo v2, and v3 with
    `queue=0`, where the keys of the batch are the negatives, both views are queries, and a predictor stands behind the
    network. Heads have one hidden layer and no normalisation.

    Args:
      model: a network from images to features, without statistics of the batch.
      optimizer: any optax transform.
      momentum: as for `contrastive`, and the others too.
      queue: keys of earlier batches, or 0.
      temperature: divides the cosines.
      dim: numbers in the vectors that are compared.
      hidden: units of the hidden layer of each head.
      view: `(key, images) -> images`.

    Returns:
      Pure functions: `init(key, images) -> state` and `update(state, images) -> (state, metrics)`, with images `[n,
      height, width, c]` and a `MetaState`, so that `metajax.training.fit`, its callbacks and checkpoints take it.
      Metrics are `loss`, `accuracy` (how often the key is found) and `grad_norm`; see `encoder_params`.

    Raises:
      ValueError: as `contrastive`.

    Source: He et al. 2020, Momentum Contrast for Unsupervised Visual Representation Learning, arXiv:1911.05722.

    >>> import jax, jax.numpy as jnp, optax, metajax
    >>> model = metajax.models.conv4(width=8, depth=1, normalisation="group")
    >>> pretrain = metajax.strategies.moco(model, optax.adam(1e-3), queue=8)
    >>> images = jax.random.bits(jax.random.key(0), [4, 2, 2, 3], jnp.uint8)
    >>> state = pretrain.init(jax.random.key(1), images)
    >>> state, metrics = jax.jit(pretrain.update)(state, images)
    >>> sorted(metrics), model.apply(metajax.strategies.encoder_params(state), images).shape
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
    view: View = random_view,
) -> OuterUpdate:
    """SimCLR (Chen et al. 2020): finds the other view of an image among all views of the batch, without labels.

    Args:
      model: a network from images to features.
      optimizer: any optax transform.
      temperature: as for `contrastive`, and the others too.
      dim: numbers in the vectors that are compared.
      hidden: units of the hidden layer of the head.
      view: `(key, images) -> images`.

    Returns:
      Pure functions, as `moco`.

    Raises:
      ValueError: as `contrastive`.

    Source: Chen et al. 2020, A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709.

    >>> import metajax, optax
    >>> metajax.strategies.simclr(metajax.models.conv4(), optax.adam(1e-3)).axis_name is None
    True
    """
    return _of_images(contrastive(model, temperature=temperature, dim=dim, hidden=hidden, view=view), optimizer)


def _of_images(learner: Learner, optimizer: optax.GradientTransformation) -> OuterUpdate:
    """The meta step of a contrastive learner, for bare images: a batch is the query set of one task."""
    outer = outer_update(learner, optimizer, hypergrad=hypergrad.unrolled(), trainable=TRAINED, before=False)

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
    """The parameters of the backbone in a state of `moco` or `simclr`: what every learner on that model begins with.

    >>> import jax, jax.numpy as jnp
    >>> encoder_params(MetaState({"backbone": 1, "head": 2}, (), (), jnp.array(0), jax.random.key(0)))
    1
    """
    return state.params["backbone"]
