"""The peer of the `step` benchmark: MAML as a plain PyTorch loop over tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_RATE, _STEPS = 0.1, 5


def _parameters(params: Any) -> list[torch.Tensor]:
    """The parameters of our Conv4 in the order and layout of `_forward`."""
    arrays = []
    for index in range(4):
        block = params[f"block_{index}"]
        arrays += [np.transpose(block["kernel"], (3, 2, 0, 1)), block["norm"]["scale"], block["norm"]["bias"]]
    arrays += [np.transpose(params["head"]["kernel"]), params["head"]["bias"]]
    return [torch.tensor(np.array(array), requires_grad=True) for array in arrays]


def _forward(params: list[torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    values = images
    for index in range(4):
        kernel, scale, bias = params[3 * index : 3 * index + 3]
        values = F.batch_norm(F.conv2d(values, kernel, padding=1), None, None, scale, bias, training=True)
        values = F.max_pool2d(F.relu(values), 2)
    return F.linear(values.flatten(1), params[-2], params[-1])


def _task_loss(params: list[torch.Tensor], task: tuple[torch.Tensor, ...]) -> torch.Tensor:
    images, labels, query_images, query_labels = task
    fast = params
    for _ in range(_STEPS):
        loss = F.cross_entropy(_forward(fast, images), labels)
        grads = torch.autograd.grad(loss, fast, create_graph=True)
        fast = [value - _RATE * grad for value, grad in zip(fast, grads, strict=True)]
    return F.cross_entropy(_forward(fast, query_images), query_labels)


def _tasks(episodes: Any) -> list[tuple[torch.Tensor, ...]]:
    def images(values: Any) -> torch.Tensor:
        return torch.tensor(np.moveaxis(np.asarray(values), -1, -3).copy())

    def labels(values: Any) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.int64)

    columns = (
        images(episodes.support.inputs), labels(episodes.support.targets),
        images(episodes.query.inputs), labels(episodes.query.targets),
    )  # fmt: skip
    return list(zip(*columns, strict=True))


def stepper(episodes: Any) -> Callable[[], Any]:
    """One meta step of the loop over all tasks."""
    import jax

    import metajax

    init = metajax.models.conv4(outputs=5).init(jax.random.key(0), np.zeros([1, 28, 28, 1], np.float32))
    params, tasks = _parameters(init), _tasks(episodes)
    optimizer = torch.optim.Adam(params, 1e-3)

    def call() -> None:
        optimizer.zero_grad()
        for task in tasks:
            (_task_loss(params, task) / len(tasks)).backward()
        optimizer.step()

    return call


def vmapped_stepper(episodes: Any) -> Callable[[], Any]:
    """The same meta step by torch.func: the gradient of the inner loss, vmapped over tasks."""
    import jax

    import metajax

    init = metajax.models.conv4(outputs=5).init(jax.random.key(0), np.zeros([1, 28, 28, 1], np.float32))
    params = _parameters(init)
    columns = [torch.stack(column) for column in zip(*_tasks(episodes), strict=True)]
    inner = torch.func.grad(lambda fast, images, labels: F.cross_entropy(_forward(fast, images), labels))

    def task_loss(params: list[torch.Tensor], *task: torch.Tensor) -> torch.Tensor:
        images, labels, query_images, query_labels = task
        fast = params
        for _ in range(_STEPS):
            grads = inner(fast, images, labels)
            fast = [value - _RATE * grad for value, grad in zip(fast, grads, strict=True)]
        return F.cross_entropy(_forward(fast, query_images), query_labels)

    losses = torch.func.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))
    optimizer = torch.optim.Adam(params, 1e-3)

    def call() -> None:
        optimizer.zero_grad()
        losses(params, *columns).mean().backward()
        optimizer.step()

    return call


def relative_error(learner: Any, episodes: Any) -> float:
    """How far the hypergradients of the first task lie apart, relative to their norm."""
    import jax

    import metajax

    episode = jax.tree.map(lambda leaf: leaf[0], episodes)
    init = learner.init(jax.random.key(0), episode.support.inputs)
    gradient = jax.jit(metajax.hypergrad.value_and_grad(learner, metajax.hypergrad.mixed_mode()))
    ours = _parameters(gradient(init, episode)[1])
    params = _parameters(init)
    theirs = torch.autograd.grad(_task_loss(params, _tasks(episodes)[0]), params)
    squared = [float(((a - b) ** 2).sum()) for a, b in zip(ours, theirs, strict=True)]
    total = [float((b**2).sum()) for b in theirs]
    return (sum(squared) / sum(total)) ** 0.5
