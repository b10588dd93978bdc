"""The regression figure of the MAML paper: MAML against pre-training on all tasks, with 10 points and one step.

    python -m experiments.sinusoids --out=runs/sinusoids

Trains both networks, selects the best fine-tuning step size of the pre-trained network on validation tasks, prints the
table and draws `sinusoids.png` (Finn et al. 2017, figures 2 and 3).
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/sinusoids", "Folder of the figure and the table.")
_STEPS = flags.DEFINE_integer("steps", 30000, "Meta steps of either network.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of weights and episodes.")
_RATES = (0.0003, 0.001, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1)
_INNER_RATE, _SHOTS, _GRADIENT_STEPS = 0.01, 10, (0, 1, 10)


def main() -> int:
    """Trains, compares and draws both networks."""
    run.prepare(host_devices=1)
    import jax
    import optax

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    model, loss = metajax.models.mlp(1), metajax.core.squared_error

    def adapting(rate: float) -> Any:
        return metajax.learners.maml(model, optax.sgd(rate), 1, loss=loss)

    def fit(learner: Any, hypergrad: Any) -> Any:
        outer = metajax.outer_update(learner, optax.adam(1e-3), hypergrad=hypergrad, before=False)
        spec = metajax.data.EpisodeSpec(1, _SHOTS, _SHOTS)
        stream = metajax.data.episodes(metajax.data.sinusoids(), spec, batch=25, seed=_SEED.value)
        example = jax.tree.map(lambda leaf: leaf[0], next(stream))
        bar = metajax.training.Progress(_STEPS.value, meta_batch=25)
        state = outer.init(jax.random.key(_SEED.value), example)
        return metajax.training.fit(outer, state, stream, steps=_STEPS.value, callbacks=[bar]).params

    maml = fit(adapting(_INNER_RATE), metajax.hypergrad.mixed_mode())
    # without adaptation: one network for all tasks, trained on the same points
    pretrained = fit(metajax.learners.pretrain(model, loss=loss), metajax.hypergrad.unrolled())["backbone"]

    def error(params: Any, rate: float, split: str, steps: int = 1) -> Any:
        spec = metajax.data.EpisodeSpec(1, _SHOTS, 100)
        source = metajax.data.sinusoids(split=split)
        return metajax.evaluation.evaluate(adapting(rate), params, source, spec, episodes=600, num_steps=steps)

    rate = min(_RATES, key=lambda rate: error(pretrained, rate, "val").mean)
    rows: dict[str, Any] = {"pretrained_rate": rate, "steps": _STEPS.value, "seed": _SEED.value}
    print(f"best step size of the pre-trained network: {rate}")
    print("MSE (600 tasks)       " + "".join(f"{steps:>20d} steps" for steps in _GRADIENT_STEPS))
    for name, params, step_size in (("MAML", maml, _INNER_RATE), ("pretrained", pretrained, rate)):
        found = [error(params, step_size, "test", steps) for steps in _GRADIENT_STEPS]
        rows[name] = [[one.mean, one.ci95] for one in found]
        print(f"{name:22s}" + "".join(f"{one.mean:>17.3f} +- {one.ci95:.3f}" for one in found))
    rows["ratio_after_one_step"] = rows["pretrained"][1][0] / rows["MAML"][1][0]
    print(f"after one step MAML's error is {rows['ratio_after_one_step']:.1f} times lower")
    out.mkdir(parents=True, exist_ok=True)
    _draw(out / "sinusoids.png", adapting, {"MAML": (maml, _INNER_RATE), "pre-trained": (pretrained, rate)})
    _runs.write_json(out / "sinusoids.json", rows)
    print(f"figure: {out / 'sinusoids.png'}")
    return 0


def _draw(path: pathlib.Path, adapting: Any, networks: dict[str, tuple[Any, float]]) -> None:
    """Draws one column for each network: two tasks, before and after 1 and 10 steps."""
    import matplotlib.figure
    import numpy as np

    import metajax

    figure = matplotlib.figure.Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    source, spec = metajax.data.sinusoids(split="test"), metajax.data.EpisodeSpec(1, _SHOTS, 200)
    for row in range(2):
        task = metajax.data.episode(source, spec, seed=1, index=row)
        order = np.argsort(task.query.inputs[:, 0])
        x = task.query.inputs[order]
        for column, (name, (params, rate)) in enumerate(networks.items()):
            panel = axes[row][column]
            panel.plot(x, task.query.targets[order], color="0.2", label="task")
            for steps, style in zip(_GRADIENT_STEPS, (":", "--", "-"), strict=True):
                y = metajax.evaluation.predict(adapting(rate), params, task.support, x, num_steps=steps)
                panel.plot(x, y, style, color=f"C{column}", label=f"{steps} gradient steps")
            panel.plot(task.support.inputs, task.support.targets, "^", color="purple", label="10 points")
            if row == 0:
                panel.set_title(f"{name}, step size {rate}")
                panel.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
