"""The JAX variants of the `speed` benchmark: this project, and plain JAX written by hand."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

from experiments._speed_job import Job, Variant
from metajax import run


def variant(job: Job) -> Variant:
    """Returns the variant named by the job."""
    ours = job.variant.startswith("metajax")
    if ours:
        run.prepare(host_devices=None if job.job == "conv4_step" else 1)
    import jax

    make = {"conv4_step": _meta_step if ours else _meta_step_by_hand, "adapt": _adapt if ours else _adapt_by_hand}
    compiled, checked = make[job.job](job)
    device = jax.devices()[0]
    about = {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")},
        "device": device.device_kind, "accelerator": device.platform != "cpu",
    }  # fmt: skip

    def device_memory() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use") if about["accelerator"] else None

    return Variant(compiled, checked, _matmul, about, device_memory)


def stepper(outer: Any, state: Any, episodes: Any) -> tuple[Callable[[], None], dict[str, Any]]:
    """Compiles the meta step and returns a call that takes one more step, starting from `state`, and facts about it.

    The temporaries are summed over all devices.
    """
    import jax

    program = jax.jit(outer.update, donate_argnums=0).lower(state, episodes).compile()
    episodes = jax.device_put(episodes, program.input_shardings[0][1])
    held = [state]

    def call() -> None:
        held[0], metrics = program(held[0], episodes)
        jax.block_until_ready((held[0].params, metrics))

    devices = len(held[0].step.sharding.device_set)
    return call, {"temporary_bytes": devices * _temporaries(program)}


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def _meta_step(job: Job) -> tuple[Any, Any]:
    import jax
    import optax

    import metajax

    learner, params, episodes = _learner(job), _nested(job.inputs.params), _episodes(job)
    episode = jax.tree.map(lambda leaf: leaf[0], episodes)
    estimator = getattr(metajax.hypergrad, job.variant.removeprefix("metajax ").replace(" ", "_"))()
    gradient = metajax.hypergrad.value_and_grad(learner, estimator)

    def compiled() -> tuple[Callable[[], None], dict[str, Any]]:
        tasks = len(episodes.query.targets)
        devices = jax.local_devices()[: math.gcd(tasks, jax.local_device_count())]
        if devices[0].platform != "cpu":  # one device, as for the peers
            devices = devices[:1]
        outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=estimator, before=False)
        if devices[1:]:
            outer = metajax.parallel.shard(outer, metajax.parallel.make_mesh(devices=devices))
        call, facts = stepper(outer, outer.init(jax.random.key(0), episode, params=params), episodes)
        return call, {**facts, "flops": tasks * _flops(gradient, params, episode)}

    return compiled, lambda: _flat(jax.jit(gradient)(params, episode)[1])


def _adapt(job: Job) -> tuple[Any, Any]:
    import jax

    learner, params = _learner(job), jax.device_put(_nested(job.inputs.params))
    support = jax.device_put(jax.tree.map(lambda leaf: leaf[0], _episodes(job).support))
    adapt = jax.jit(lambda params, support: learner.adapt(params, support).params)

    def compiled() -> tuple[Callable[[], None], dict[str, Any]]:
        call, facts = _program(adapt, params, support)
        return call, {**facts, "flops": _flops(adapt, params, support)}

    return compiled, lambda: _difference(_flat(adapt(params, support)), job.inputs.params)


def _learner(job: Job) -> Any:
    import optax

    import metajax

    width, ways = job.inputs.params["head/kernel"].shape
    return metajax.learners.maml(metajax.models.conv4(ways, width=width), optax.sgd(job.rate), job.steps)


def _episodes(job: Job) -> Any:
    import numpy as np

    import metajax

    ways = len(job.inputs.params["head/bias"])
    parts = (job.inputs.support, job.inputs.query)
    return metajax.Episode(*(
        metajax.Examples(images, labels, np.ones(labels.shape, bool), np.ones([len(labels), ways], bool))
        for images, labels in parts
    ))  # fmt: skip


def _nested(params: dict[str, Any]) -> Any:
    from flax import traverse_util

    return traverse_util.unflatten_dict(params, sep="/")


def _flat(params: Any) -> dict[str, Any]:
    from flax import traverse_util

    return traverse_util.flatten_dict(params, sep="/")


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    return {name: after[name] - before[name] for name in before}


def _flops(function: Callable[..., Any], *arguments: Any) -> float:
    from metajax.core import _cost

    return _cost.flops(function, *arguments)


def _program(function: Any, *arguments: Any) -> tuple[Callable[[], None], dict[str, Any]]:
    """Compiles a jitted function and returns a call of it without state, and facts about it."""
    import jax

    program = function.lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments)), {"temporary_bytes": _temporaries(program)}


def _matmul(size: int) -> Callable[[int], None]:
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones([size, size], jnp.float32)
    product = jax.jit(jnp.matmul)

    def call(times: int) -> None:
        jax.block_until_ready([product(matrix, matrix) for _ in range(times)])

    return call


# By hand: the simplest JAX code for the same job.


def _forward(params: dict[str, Any], images: Any) -> Any:
    import jax
    import jax.numpy as jnp

    values = images
    for block in range(4):
        kernel = params[f"block_{block}/kernel"]
        values = jax.lax.conv_general_dilated(
            values, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, variance = jnp.mean(values, (0, 1, 2)), jnp.var(values, (0, 1, 2))
        values = (values - mean) * jax.lax.rsqrt(variance + 1e-5)
        values = jax.nn.relu(values * params[f"block_{block}/norm/scale"] + params[f"block_{block}/norm/bias"])
        values = jax.lax.reduce_window(values, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return values.reshape(len(values), -1) @ params["head/kernel"] + params["head/bias"]


def _loss(params: dict[str, Any], images: Any, labels: Any) -> Any:
    import jax
    import jax.numpy as jnp

    scores = jax.nn.log_softmax(_forward(params, images))
    return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], 1))


def _adapted(job: Job, params: dict[str, Any], images: Any, labels: Any) -> dict[str, Any]:
    import jax

    def step(fast: Any, _: None) -> tuple[Any, None]:
        grads = jax.grad(_loss)(fast, images, labels)
        return jax.tree.map(lambda value, grad: value - job.rate * grad, fast, grads), None

    return jax.lax.scan(step, params, None, length=job.steps)[0]


def _meta_step_by_hand(job: Job) -> tuple[Any, Any]:
    import jax
    import optax

    params, support, query = jax.device_put((job.inputs.params, job.inputs.support, job.inputs.query))
    optimizer = optax.adam(1e-3)

    def task_loss(params: Any, support: Any, query: Any) -> Any:
        return _loss(_adapted(job, params, *support), *query)

    def mean_loss(params: Any, support: Any, query: Any) -> Any:
        return jax.vmap(task_loss, (None, 0, 0))(params, support, query).mean()

    def update(params: Any, state: Any, support: Any, query: Any) -> Any:
        updates, state = optimizer.update(jax.grad(mean_loss)(params, support, query), state)
        return optax.apply_updates(params, updates), state

    def compiled() -> tuple[Callable[[], None], dict[str, Any]]:
        return _program(jax.jit(update), params, optimizer.init(params), support, query)

    return compiled, lambda: jax.jit(jax.grad(mean_loss))(params, support, query)


def _adapt_by_hand(job: Job) -> tuple[Any, Any]:
    import jax

    params, *support = jax.device_put((job.inputs.params, *(part[0] for part in job.inputs.support)))
    adapt = jax.jit(lambda params, images, labels: _adapted(job, params, images, labels))
    return lambda: _program(adapt, params, *support), lambda: _difference(adapt(params, *support), params)
