"""The PyTorch peers of the `speed` benchmark: a plain loop over tasks, torch.func, higher and torchopt."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments._speed_job import Job, Variant

_Params = list[torch.nn.Parameter]
_Task = tuple[torch.Tensor, ...]  # support images and labels, query images and labels


def variant(job: Job) -> Variant:
    """Returns the variant named by the job."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    params = [torch.nn.Parameter(value.to(device)) for value in _from_named(job.inputs.params)]
    columns = [column.to(device) for column in _columns(job)]
    make = {"conv4_step": _meta_step, "adapt": _adapt}[job.job]
    call, checked = make(job, params, columns)
    package = {"higher": "higher", "torchopt": "torchopt"}.get(job.variant, "torch")
    about = {
        "versions": {name: importlib.metadata.version(name) for name in {"torch", package}},
        "device": torch.cuda.get_device_name() if cuda else "cpu", "accelerator": cuda,
    }  # fmt: skip

    def waited() -> None:
        call()
        if cuda:
            torch.cuda.synchronize()

    return Variant(
        lambda: (waited, {}), lambda: _to_named(checked()), lambda size: _matmul(size, device), about,
        lambda: torch.cuda.max_memory_allocated() if cuda else None,
    )  # fmt: skip


def _from_named(params: dict[str, np.ndarray]) -> list[torch.Tensor]:
    """Returns the parameters in the order and layout of `_forward`."""
    return [torch.tensor(value.transpose(_to_torch(value.ndim)).copy()) for value in map(params.__getitem__, _NAMES)]


def _to_named(values: Any) -> dict[str, np.ndarray]:
    arrays = [value.detach().cpu().numpy() for value in values]
    return {
        name: array.transpose(np.argsort(_to_torch(array.ndim))) for name, array in zip(_NAMES, arrays, strict=True)
    }


def _to_torch(dimensions: int) -> tuple[int, ...]:
    """Returns the axis order of kernels: in JAX inputs come before outputs, in PyTorch outputs come first."""
    return (3, 2, 0, 1) if dimensions == 4 else tuple(reversed(range(dimensions)))


_NAMES = [f"block_{block}/{name}" for block in range(4) for name in ("kernel", "norm/scale", "norm/bias")]
_NAMES += ["head/kernel", "head/bias"]


def _columns(job: Job) -> list[torch.Tensor]:
    """Returns support images and labels and query images and labels, each for all tasks."""
    columns = []
    for images, labels in (job.inputs.support, job.inputs.query):
        columns += [torch.tensor(np.moveaxis(images, -1, -3).copy()), torch.tensor(labels.astype(np.int64))]
    return columns


def _fused_norm(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(values, None, None, scale, bias, training=True)


def _plain_norm(values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Batch norm from elementary operations. Under vmap, the fused second derivative is wrong (PyTorch 2.13)."""
    variance, mean = torch.var_mean(values, (0, 2, 3), correction=0, keepdim=True)
    return (values - mean) * torch.rsqrt(variance + 1e-5) * scale[:, None, None] + bias[:, None, None]


def _forward(params: Any, images: torch.Tensor, norm: Any = _fused_norm) -> torch.Tensor:
    values = images
    for index in range(4):
        kernel, scale, bias = params[3 * index : 3 * index + 3]
        values = norm(F.conv2d(values, kernel, padding=1), scale, bias)
        values = F.max_pool2d(F.relu(values), 2)
    return F.linear(values.flatten(1), params[-2], params[-1])


def _loss(params: Any, images: torch.Tensor, labels: torch.Tensor, norm: Any = _fused_norm) -> torch.Tensor:
    return F.cross_entropy(_forward(params, images, norm), labels)


def _meta_step(job: Job, params: _Params, columns: list[torch.Tensor]) -> tuple[Any, Any]:
    """Returns a call for one Adam step on the mean query loss, and a function that returns its gradient."""
    backward = _vmapped(job, params, columns) if job.variant == "torch.func vmap" else _looped(job, params, columns)
    optimizer = torch.optim.Adam(params, 1e-3)

    def call() -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    def checked() -> Any:
        backward()
        return [value.grad for value in params]

    return call, checked


def _looped(job: Job, params: _Params, columns: list[torch.Tensor]) -> Callable[[], None]:
    tasks = list(zip(*columns, strict=True))
    make = {"PyTorch loop": _task_loss, "higher": _task_loss_of_higher, "torchopt": _task_loss_of_torchopt}
    task_loss = make[job.variant](job, params)

    def backward() -> None:
        for task in tasks:
            (task_loss(task) / len(tasks)).backward()

    return backward


def _vmapped(job: Job, params: _Params, columns: list[torch.Tensor]) -> Callable[[], None]:
    """Uses torch.func: the gradient of the inner loss, vmapped over tasks."""
    loss = functools.partial(_loss, norm=_plain_norm)
    inner = torch.func.grad(loss)

    def task_loss(fast: _Params, *task: torch.Tensor) -> torch.Tensor:
        images, labels, *query = task
        for _ in range(job.steps):
            grads = inner(fast, images, labels)
            fast = [value - job.rate * grad for value, grad in zip(fast, grads, strict=True)]
        return loss(fast, *query)

    losses = torch.func.vmap(task_loss, in_dims=(None, 0, 0, 0, 0))
    return lambda: losses(params, *columns).mean().backward()


def _task_loss(job: Job, params: _Params) -> Callable[[_Task], torch.Tensor]:
    def call(task: _Task) -> torch.Tensor:
        images, labels, *query = task
        fast: Any = params
        for _ in range(job.steps):
            grads = torch.autograd.grad(_loss(fast, images, labels), fast, create_graph=True)
            fast = [value - job.rate * grad for value, grad in zip(fast, grads, strict=True)]
        return _loss(fast, *query)

    return call


class _Conv4(torch.nn.Module):
    """The parameters as a module, for libraries that require one."""

    def __init__(self, params: _Params):
        super().__init__()
        self.names = [f"value_{index}" for index in range(len(params))]
        for name, value in zip(self.names, params, strict=True):
            self.register_parameter(name, value)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return _forward([getattr(self, name) for name in self.names], images)


def _task_loss_of_higher(job: Job, params: _Params) -> Callable[[_Task], torch.Tensor]:
    import higher

    module = _Conv4(params)
    inner = torch.optim.SGD(module.parameters(), job.rate)

    def call(task: _Task) -> torch.Tensor:
        images, labels, query_images, query_labels = task
        with higher.innerloop_ctx(module, inner, copy_initial_weights=False, track_higher_grads=True) as (fast, rule):
            for _ in range(job.steps):
                rule.step(F.cross_entropy(fast(images), labels))
            return F.cross_entropy(fast(query_images), query_labels)

    return call


def _task_loss_of_torchopt(job: Job, params: _Params) -> Callable[[_Task], torch.Tensor]:
    import torchopt

    def call(task: _Task) -> torch.Tensor:
        images, labels, *query = task
        rule, fast = torchopt.FuncOptimizer(torchopt.sgd(job.rate)), tuple(params)
        for _ in range(job.steps):
            fast = rule.step(_loss(fast, images, labels), fast)
        return _loss(fast, *query)

    return call


def _adapt(job: Job, params: _Params, columns: list[torch.Tensor]) -> tuple[Any, Any]:
    """Returns a call that adapts to the first task, without second-order graph, and the change of the parameters."""
    images, labels, *_ = (column[0] for column in columns)
    make = {"PyTorch loop": _adapted, "higher": _adapted_by_higher, "torchopt": _adapted_by_torchopt}
    adapt = make[job.variant](job, params, images, labels)
    return adapt, lambda: [after - before for after, before in zip(adapt(), params, strict=True)]


def _adapted(job: Job, params: _Params, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        fast: Any = params
        for _ in range(job.steps):
            grads = torch.autograd.grad(_loss(fast, images, labels), fast)
            fast = [
                (value - job.rate * grad).detach().requires_grad_() for value, grad in zip(fast, grads, strict=True)
            ]
        return fast

    return call


def _adapted_by_higher(job: Job, params: _Params, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    import higher

    module = _Conv4(params)
    inner = torch.optim.SGD(module.parameters(), job.rate)

    def call() -> Any:
        with higher.innerloop_ctx(module, inner, track_higher_grads=False) as (fast, rule):
            for _ in range(job.steps):
                rule.step(F.cross_entropy(fast(images), labels))
            return list(fast.parameters())

    return call


def _adapted_by_torchopt(job: Job, params: _Params, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    import torchopt

    def call() -> Any:
        fast = [value.detach().clone().requires_grad_() for value in params]
        rule = torchopt.SGD(fast, job.rate)
        for _ in range(job.steps):
            rule.zero_grad()
            _loss(fast, images, labels).backward()
            rule.step()
        return fast

    return call


def _matmul(size: int, device: torch.device) -> Callable[[int], None]:
    matrix = torch.ones([size, size], device=device)

    def call(times: int) -> None:
        for _ in range(times):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call
