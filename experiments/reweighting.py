"""Learning from wrong labels: a small network learns the weight of each training example.

    python -m experiments.reweighting --out=runs/reweighting

Each problem has ten letters. Each letter has 80 training images, 40 % of them with a wrong label, and two clean images.
The outer loop learns a network from the loss of an example to its weight (Shu et al. 2019, Meta-Weight-Net), such that
a whole training run with these weights has a low loss on the clean images. Prints the test accuracy over several
problems, compared with plain training on the same data.
"""

from __future__ import annotations

import itertools
from typing import Any

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/reweighting", "Folder of the table.")
_STEPS = flags.DEFINE_integer("steps", 60, "Outer steps on each problem.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Problems: letters, wrong labels and weights differ.")
_TRAIN = flags.DEFINE_integer("train", 80, "Training images a letter.")
_WRONG = flags.DEFINE_float("wrong", 0.4, "Share of the training labels that is wrong.")
_LETTERS, _CLEAN, _TEST, _PER_FAMILY = 10, 2, 30, 64
_INNER_STEPS, _INNER_RATE, _OUTER_RATE = 60, 0.2, 0.01
_ROWS = {
    "plain": "plain training",
    "stopped": "plain, stopped where the clean images say",
    "clean": "on the clean images alone",
    "learned": "with learned weights",
    "known": "without the wrong labels (not known in life)",
}


def main() -> int:
    """Learns the weights of each problem, compares and prints the results."""
    run.prepare(host_devices=1)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    source = metajax.data.glyphs("val", size=14, per_family=_PER_FAMILY)
    most = int(np.bincount(source.labels).min()) - _CLEAN - _TEST
    if not 1 <= _TRAIN.value <= most:
        raise ValueError(f"train must be an integer from 1 to {most}, got {_TRAIN.value}")
    if not 0 < _WRONG.value < 1:
        raise ValueError(f"wrong must be a number above 0 and below 1, got {_WRONG.value}")
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value)
    model, net = metajax.models.mlp(_LETTERS, hidden=(64,)), metajax.models.mlp(1, hidden=(16,))

    def weights(params: Any, meta_params: Any, examples: metajax.Examples) -> tuple[Any, Any]:
        """Returns the losses of the examples and their weights in (0, 2), which are about 1 before training."""
        losses = metajax.core.cross_entropy(model.apply(params, examples.inputs), examples.targets)
        if meta_params["net"] is None:
            return losses, jnp.ones_like(losses)
        return losses, 2 * jax.nn.sigmoid(net.apply(meta_params["net"], jax.lax.stop_gradient(losses)[:, None])[:, 0])

    def inner_loss(params: Any, meta_params: Any, support: metajax.Examples, step: Any, key: Any) -> Any:
        losses, weighs = weights(params, meta_params, support)
        return jnp.sum(support.mask * weighs * losses) / jnp.sum(support.mask)

    def outer_loss(params: Any, meta_params: Any, query: metajax.Examples, *, key: Any = None) -> Any:
        outputs = model.apply(params, query.inputs)
        return jnp.mean(metajax.core.cross_entropy(outputs, query.targets)), {"outputs": outputs}

    problem = metajax.InnerProblem(
        init=lambda meta_params, support, key: meta_params["start"],
        loss=inner_loss,
        optimizer=lambda meta_params: optax.sgd(_INNER_RATE, momentum=0.9),
        num_steps=_INNER_STEPS,
        finalize=lambda params, meta_params, support, key: params,
    )
    learner = metajax.learners.bilevel(problem, outer_loss)
    # the result of a training run is sensitive to the weights, hence small, clipped steps with decay to 0
    rule = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(_OUTER_RATE, _STEPS.value))
    )
    estimator = metajax.hypergrad.mixed_mode()
    outer = metajax.outer_update(learner, rule, hypergrad=estimator, trainable="net", before=False)
    adapt, judge = jax.jit(learner.adapt), jax.jit(learner.outer_loss)
    inner_step = jax.jit(metajax.inner_update(problem))

    def accuracy(params: Any, examples: metajax.Examples) -> float:
        return float(metajax.core.accuracy(model.apply(params, examples.inputs), examples))

    def stopped(meta_params: Any, support: metajax.Examples, clean: metajax.Examples) -> Any:
        """Returns the fast weights after the inner step with the lowest loss on the clean images."""
        state, best = metajax.inner_init(problem)(meta_params, support), (float("inf"), meta_params["start"])
        for _ in range(_INNER_STEPS):
            state = inner_step(state, meta_params, support)
            loss = float(judge(state.params, meta_params, clean)[0])
            best = min(best, (loss, state.params), key=lambda pair: pair[0])
        return best[1]

    rows: dict[str, list[float]] = {name: [] for name in _ROWS}
    found: dict[str, list[float]] = {"weight_of_wrong": [], "weight_of_right": []}
    for seed in range(_SEEDS.value):
        everything, right, clean, test = _problem(source, seed, _TRAIN.value, _WRONG.value)
        train = np.arange(len(right)) < _LETTERS * _TRAIN.value  # the clean images come last
        support = everything._replace(mask=train)
        start_key, net_key, key = jax.random.split(jax.random.key(seed), 3)
        start = model.init(start_key, test.inputs[:1])
        plain = {"start": start, "net": None}
        state = outer.init(key, metajax.Episode(support, clean), {**plain, "net": net.init(net_key, jnp.ones([1, 1]))})
        batch = jax.tree.map(lambda leaf: leaf[None], metajax.Episode(support, clean))
        state = metajax.training.fit(outer, state, itertools.repeat(batch), steps=_STEPS.value)
        learned = adapt(state.params, support)
        trained = {
            "plain": adapt(plain, everything),
            "stopped": stopped(plain, support, clean),
            "clean": adapt(plain, everything._replace(mask=~train)),
            "learned": learned,
            "known": adapt(plain, everything._replace(mask=right)),
        }
        for name, params in trained.items():
            rows[name].append(100 * accuracy(params, test))
        weighs = np.asarray(weights(learned, state.params, everything)[1])
        found["weight_of_wrong"].append(float(weighs[train & ~right].mean()))
        found["weight_of_right"].append(float(weighs[train & right].mean()))

    print(f"test accuracy in %, {_SEEDS.value} problems: mean and 95 % interval")
    for name, title in _ROWS.items():
        print(f"{title:46s}" + _told(rows[name]))
    for name, title in (("plain", "learned weights over plain training"), ("stopped", "learned weights over stopping")):
        print(f"{title:46s}" + _told(np.subtract(rows["learned"], rows[name])))
    for name, title in (("weight_of_wrong", "weight of a wrong label"), ("weight_of_right", "weight of a right label")):
        print(f"{title:46s}" + _told(found[name]))
    out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": _STEPS.value, "seeds": _SEEDS.value, "train": _TRAIN.value, "wrong": _WRONG.value}
    _runs.write_json(out / "reweighting.json", {**settings, "accuracy": rows, **found})
    return 0


def _told(values: Any) -> str:
    import metajax

    mean, ci95 = metajax.evaluation.mean_and_interval(values)
    return f"{mean:8.2f} +- {ci95:.2f}"


def _problem(source: Any, seed: int, train: int, wrong: float) -> Any:
    """Draws one problem.

    Returns:
      The training images with some wrong labels, followed by the clean images; which of these labels are right; the
      clean images; the test images.
    """
    import numpy as np

    import metajax

    rng = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {"train": [], "clean": [], "test": []}
    for letter in rng.choice(source.num_classes, _LETTERS, replace=False):
        picked = rng.permutation(np.flatnonzero(source.labels == letter))[: train + _CLEAN + _TEST]
        for name, indices in zip(parts, np.split(picked, [train, train + _CLEAN]), strict=True):
            parts[name].append(indices)
    labels = {name: np.repeat(np.arange(_LETTERS), len(parts[name][0])) for name in parts}

    def examples(indices: Any, targets: Any) -> metajax.Examples:
        inputs = np.asarray(source.inputs[indices], np.float32) / 255
        return metajax.Examples(inputs, targets.astype(np.int32), np.ones(len(targets), bool))

    drawn = {name: np.concatenate(parts[name]) for name in parts}
    other = (labels["train"] + rng.integers(1, _LETTERS, len(labels["train"]))) % _LETTERS
    right = rng.random(len(labels["train"])) >= wrong
    told = np.concatenate([np.where(right, labels["train"], other), labels["clean"]])
    everything = examples(np.concatenate([drawn["train"], drawn["clean"]]), told)
    right = np.concatenate([right, np.ones(len(labels["clean"]), bool)])
    clean, test = (examples(drawn[name], labels[name]) for name in ("clean", "test"))
    return everything, right, clean, test


if __name__ == "__main__":
    run.launch(main)
