"""Writes torch_maml.json: MAML on a small Conv4, as a loop in PyTorch with `create_graph`, in float64.

    python tests/parity/record_torch_maml.py

Needs torch (recorded with 2.13.0); `torch_test.py` reads the file only. Layouts are those of metajax: images
`[n, h, w, c]`, kernels `[3, 3, c_in, c_out]`, features flattened height first and channel last.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F

WAYS, WIDTH, DEPTH, SIZE, RATE = 3, 4, 2, 8, 0.4
CASES = {
    "pool, batch statistics, 3 steps": {"pool": True, "norm": True, "steps": 3, "adapts": "all", "exact": True},
    "stride, batch statistics, 2 steps": {"pool": False, "norm": True, "steps": 2, "adapts": "all", "exact": True},
    "pool, no normalisation, 2 steps": {"pool": True, "norm": False, "steps": 2, "adapts": "all", "exact": True},
    "pool, first order, 3 steps": {"pool": True, "norm": True, "steps": 3, "adapts": "all", "exact": False},
    "pool, only the head adapts, 3 steps": {"pool": True, "norm": True, "steps": 3, "adapts": "head", "exact": True},
}


def draw_weights(rng: np.random.Generator, norm: bool) -> dict[str, np.ndarray]:
    weights, channels = {}, 1
    for block in range(DEPTH):
        weights[f"block_{block}/kernel"] = rng.normal(size=(3, 3, channels, WIDTH)) * 0.4
        weights[f"block_{block}/norm/bias"] = rng.normal(size=WIDTH) * 0.2
        if norm:
            weights[f"block_{block}/norm/scale"] = 1 + rng.normal(size=WIDTH) * 0.2
        channels = WIDTH
    side = SIZE // 2**DEPTH
    weights["head/kernel"] = rng.normal(size=(side * side * WIDTH, WAYS)) * 0.3
    weights["head/bias"] = rng.normal(size=WAYS) * 0.2
    return weights


def forward(weights: dict[str, torch.Tensor], images: torch.Tensor, pool: bool, norm: bool) -> torch.Tensor:
    values = images.permute(0, 3, 1, 2)
    for block in range(DEPTH):
        kernel = weights[f"block_{block}/kernel"].permute(3, 2, 0, 1)
        if pool:
            values = F.conv2d(values, kernel, padding=1)
        else:  # an even side under "same" padding with stride 2: nothing before, one row and column behind
            values = F.conv2d(F.pad(values, (0, 1, 0, 1)), kernel, stride=2)
        bias = weights[f"block_{block}/norm/bias"]
        if norm:
            scale = weights[f"block_{block}/norm/scale"]
            values = F.batch_norm(values, None, None, scale, bias, training=True, eps=1e-5)
        else:
            values = values + bias[None, :, None, None]
        values = F.relu(values)
        values = F.max_pool2d(values, 2) if pool else values
    return values.permute(0, 2, 3, 1).flatten(1) @ weights["head/kernel"] + weights["head/bias"]


def hypergradient(start, support, query, *, pool, norm, steps, adapts, exact):
    meta = {name: torch.tensor(value, requires_grad=True) for name, value in start.items()}
    fast = dict(meta)
    chosen = [name for name in meta if adapts == "all" or name.startswith(adapts)]
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(forward(fast, support[0], pool, norm), support[1])
        slopes = torch.autograd.grad(loss, [fast[name] for name in chosen], create_graph=exact)
        fast = {**fast, **{name: fast[name] - RATE * slope for name, slope in zip(chosen, slopes, strict=True)}}
        losses.append(loss.item())
    logits = forward(fast, query[0], pool, norm)
    loss = F.cross_entropy(logits, query[1])
    grads = torch.autograd.grad(loss, list(meta.values()))
    return {
        "inner_losses": losses,
        "loss": loss.item(),
        "logits": logits.tolist(),
        "grads": {name: grad.tolist() for name, grad in zip(meta, grads, strict=True)},
    }


def main() -> None:
    torch.set_default_dtype(torch.float64)
    rng = np.random.default_rng(0)

    def examples(each: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(WAYS), each)
        waves = np.cos(np.arange(SIZE) * (1 + labels[:, None]))
        images = rng.normal(size=(len(labels), SIZE, SIZE, 1)) + waves[:, None, :, None]
        return np.round(images, 4), labels

    support, query = examples(2), examples(3)
    cases = {}
    for name, options in CASES.items():
        start = {path: np.round(value, 4) for path, value in draw_weights(rng, options["norm"]).items()}
        tensors = [tuple(torch.tensor(part) for part in examples) for examples in (support, query)]
        found = hypergradient(start, *tensors, **options)
        cases[name] = {"options": options, "start": {path: value.tolist() for path, value in start.items()}, **found}
    record = {
        "torch": torch.__version__, "rate": RATE, "ways": WAYS, "width": WIDTH, "depth": DEPTH,
        "support": [part.tolist() for part in support], "query": [part.tolist() for part in query], "cases": cases,
    }  # fmt: skip
    pathlib.Path(__file__).with_name("torch_maml.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
