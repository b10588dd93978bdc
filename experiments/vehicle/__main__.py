"""Lane keeping with online adaptation when the road turns slippery.

    python -m experiments.vehicle --out=runs/vehicle
    python -m experiments.vehicle --out=runs/recurrent --adaptation=recurrent

A network learns the error of a nominal bicycle model. It is meta-trained over vehicles that differ in friction, load,
steering ratio and tyres, such that the last M steps adapt it to the current vehicle (Nagabandi et al. 2019): with a few
gradient steps (GrBAL), or with the memory of a recurrent unit (ReBAL). A model-predictive lane keeper uses it to plan
on a winding road. Then friction drops without notice. The baselines are the same vehicle without adaptation from that
moment on, the meta-learned prior without any adaptation, and a lane keeper that is given the true vehicle. Prints
lateral errors and recovery times and draws `vehicle.png`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/vehicle", "Folder of the table and the figure.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of training, and of the first drive.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Drives: roads and gusts differ.")
_ADAPTATION = flags.DEFINE_enum("adaptation", "gradient", ["gradient", "recurrent"], "What fits the last steps.")
_STEPS = flags.DEFINE_integer("steps", 8000, "Meta steps.")
_WINDOW = flags.DEFINE_integer("window", 16, "Steps that are adapted to, M.")
_BEFORE = flags.DEFINE_float("before", 0.9, "Friction before the change.")
_AFTER = flags.DEFINE_float("after", 0.35, "Friction after the change.")
_DT, _SPEED = 0.05, 20.0  # s, m/s
_BEND = 0.006  # largest curvature, 1/m: 2.4 m/s^2 lateral, where the slippery road allows 3.4
_CHANGE, _DRIVE = 600, 800  # steps: 30 s, and 10 s more
_AVERAGE = 20  # steps over which lateral errors are averaged: 1 s
_TOLERANCE = 0.25  # relative to the earlier level
_INNER_RATE, _INNER_STEPS, _QUERY, _RATE = 0.3, 5, 20, 3e-3
_VEHICLES, _RECORD = 4096, 100  # training drives, and steps per drive
_GUST, _GUST_LASTS = (0.1, 0.02), 0.95  # standard deviation, m/s^2 and rad/s^2; correlation from step to step
_CAMERA, _CAMERA_LASTS = (0.04,), 0.975  # the same for the error of the measured offset, m
_ROWS = {
    "adaptive": "adapts to the last steps",
    "frozen": "stops to adapt at the change",
    "prior": "never adapts",
    "told": "is told the true vehicle (not known in life)",
}


def main() -> int:
    """Trains, drives, compares and draws the results."""
    run.prepare(host_devices=1)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import metajax
    from experiments import _runs
    from experiments import vehicle as world

    out = _runs.out_folder(_OUT.value)
    frictions = _BEFORE.value, _AFTER.value
    if not all(0 < value <= 2 for value in frictions):
        raise ValueError(f"before and after must be frictions above 0 and up to 2, got {frictions}")
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value)
    if not 1 <= _WINDOW.value <= _RECORD - _QUERY:
        raise ValueError(f"window must be an integer from 1 to {_RECORD - _QUERY}, got {_WINDOW.value}")

    model = world.residual_dynamics()
    hidden = 0.0  # gradient steps start from the prior, which is therefore trained too
    if _ADAPTATION.value == "recurrent":
        learner = metajax.learners.recurrent(model, 2, loss=world.dynamics_loss)
        hidden = 0.2  # the empty memory must be trained separately
    else:
        inner = optax.chain(metajax.inner.clip_by_global_norm(1.0), optax.sgd(_INNER_RATE))
        learner = metajax.learners.maml(model, inner, _INNER_STEPS, loss=world.dynamics_loss)
    params, fits = _train(learner, _SEED.value, hidden)
    print(f"mean squared error of the accelerations: {fits[0]:.4f} before adaptation, {fits[1]:.4f} after it")

    changed = np.arange(_DRIVE) >= _CHANGE
    before, after = (world.Vehicle(friction=value) for value in frictions)
    vehicles = jax.tree.map(lambda one, other: jnp.where(changed, other, one), before, after)
    learns = {"adaptive": np.ones(_DRIVE, bool), "frozen": ~changed, "prior": np.zeros(_DRIVE, bool), "told": ~changed}
    keys = jax.vmap(jax.random.key)(_SEED.value + jnp.arange(_SEEDS.value))
    drives = {
        told: jax.jit(jax.vmap(functools.partial(_drive, learner, told=told), (None, 0, None, None)))
        for told in (False, True)
    }
    errors = {
        name: np.abs(np.asarray(drives[name == "told"](params, keys, vehicles, jnp.array(steps)), np.float64))
        for name, steps in learns.items()
    }
    two = _CHANGE + round(2 / _DT)
    found: dict[str, dict[str, list[float]]] = {}
    print(f"friction {_BEFORE.value} to {_AFTER.value} at {_SPEED:.0f} m/s; lateral error in m, {_SEEDS.value} drives")
    heads = "".join(f"{head:>18s}" for head in ("before", "first 2 s", "later", "difference"))
    print(f"{'a vehicle that':46s}{heads}   back within 2 s")
    for name, title in _ROWS.items():
        series = errors[name]
        parts = {"before": series[:, :_CHANGE], "first_two_seconds": series[:, _CHANGE:two], "later": series[:, two:]}
        row = {part: values.mean(1).tolist() for part, values in parts.items()}
        row["change"] = np.subtract(row["later"], row["before"]).tolist()
        recovery = functools.partial(metajax.online.recovery_time, window=_AVERAGE, tolerance=_TOLERANCE)
        row["recovery"] = [_DT * recovery(one, _CHANGE) for one in series]
        quick = sum(time <= 2 for time in row["recovery"])
        told_parts = "".join(_runs.told(row[part], 3).rjust(18) for part in (*parts, "change"))
        print(f"{title:46s}{told_parts}   {quick} of {len(series)}")
        found[name] = row
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "adaptation": _ADAPTATION.value,
        "seed": _SEED.value,
        "steps": _STEPS.value,
        "window": _WINDOW.value,
        "dt": _DT,
        "change": _CHANGE,
    }
    _runs.write_json(out / "vehicle.json", {**settings, "model_error": fits, **found})
    _draw(out / "vehicle.png", errors)
    print(f"figure: {out / 'vehicle.png'}")
    return 0


def _road(key: Any, bend: Any) -> Any:
    """Returns the curvature in 1/m of a winding lane as a function of the distance in m.

    The curvature is a sine wave of random length and phase.
    """
    import jax
    import jax.numpy as jnp

    length, phase = jax.random.uniform(key, [2]) * jnp.array([40.0, 2 * jnp.pi])
    return lambda distance: bend * jnp.sin(2 * jnp.pi * distance / (110 + length) + phase)


def _noise(key: Any, steps: int, deviation: tuple[float, ...], lasts: float) -> Any:
    """Returns `[steps, n]` numbers with given standard deviations, each correlated with the previous one."""
    import jax
    import jax.numpy as jnp

    fresh = jnp.array(deviation) * jax.random.normal(key, [steps, len(deviation)])

    def step(value: Any, new: Any) -> Any:
        value = lasts * value + (1 - lasts**2) ** 0.5 * new
        return value, value

    return jax.lax.scan(step, fresh[0], fresh)[1]


def _drive(learner: Any, params: Any, key: Any, vehicles: Any, learns: Any, *, told: bool) -> Any:
    """Returns the `[steps]` offsets in m of one drive. `learns` selects the steps in which the vehicle observes."""
    import jax
    import jax.numpy as jnp

    import metajax
    from experiments import vehicle as world

    online, keeper = (
        metajax.online.recent(learner, window=_WINDOW.value),
        world.lane_keeper(dt=_DT, effort=0.15, drift_weight=0.1),
    )
    road_key, gust_key, camera_key = jax.random.split(key, 3)
    road, ahead = _road(road_key, _BEND), _SPEED * _DT * jnp.arange(len(keeper.init()))
    start = jax.tree.map(jnp.asarray, world.Motion(speed=_SPEED))

    def step(carry: Any, inputs: Any) -> Any:
        motion, plan, state = carry
        vehicle, learn, gust, noise = inputs
        adapted = online.adapt(state)

        def dynamics(features: Any) -> Any:
            if not told:
                return learner.predict(adapted, features)
            speed, sway, yaw_rate, steering = features[0]
            now = world.Motion(0.0, 0.0, speed, sway, yaw_rate, 0.0)
            then = world.vehicle_step(vehicle, now, steering, curvature=0.0, dt=_DT)
            return world.motion_example(now, steering, then, dt=_DT).targets

        seen = motion._replace(offset=motion.offset + noise[0])
        plan = keeper.plan(dynamics, seen, plan, jax.vmap(road)(motion.distance + ahead))
        moved = world.vehicle_step(
            vehicle, motion, plan[0], curvature=road(motion.distance), pull=_SPEED - motion.speed, gust=gust, dt=_DT
        )
        new = online.observe(state, world.motion_example(motion, plan[0], moved, dt=_DT))
        state = jax.tree.map(lambda new, old: jnp.where(learn, new, old), new, state)
        return (moved, plan, state), moved.offset

    gusts = _noise(gust_key, len(learns), _GUST, _GUST_LASTS)
    camera = _noise(camera_key, len(learns), _CAMERA, _CAMERA_LASTS)
    item = world.motion_example(start, 0.0, start, dt=_DT)
    carry = (start, keeper.init(), online.init(key, item, params))
    return jax.lax.scan(step, carry, (vehicles, learns, gusts, camera))[1]


def _record(key: Any) -> Any:
    """Returns the training examples `[steps, ...]` of a random vehicle, whose driver adds noise to the steering."""
    import jax
    import jax.numpy as jnp

    from experiments import vehicle as world

    kind, road_key, start_key, wag_key, gust_key = jax.random.split(key, 5)
    vehicle = world.random_vehicle(kind)
    begin = jax.random.uniform(start_key, [5]) * jnp.array([8.0, 1.0, 0.1, 0.4, 0.007])
    speed = 16 + begin[0]
    road = _road(road_key, 0.002 + begin[4])

    def step(carry: Any, inputs: Any) -> Any:
        motion, wag = carry
        gust, noise = inputs
        wag = 0.9 * wag + begin[3] * noise
        steering = 15 * (3.2 * road(motion.distance + 8) - 0.02 * motion.offset - 0.4 * motion.heading) + wag
        moved = world.vehicle_step(
            vehicle, motion, steering, curvature=road(motion.distance), pull=speed - motion.speed, gust=gust, dt=_DT
        )
        return (moved, wag), world.motion_example(motion, steering, moved, dt=_DT)

    zero = jnp.zeros([])
    start = world.Motion(begin[1] - 0.5, begin[2] - 0.05, speed, zero, zero, zero)
    inputs = _noise(gust_key, _RECORD, _GUST, _GUST_LASTS), jax.random.normal(wag_key, [_RECORD])
    return jax.tree.map(lambda leaf: leaf[:, 0], jax.lax.scan(step, (start, zero), inputs)[1])


def _train(learner: Any, seed: int, hidden: float) -> tuple[Any, list[float]]:
    """Returns meta-parameters, and the query losses before and after adaptation in 100 more batches.

    Args:
      learner: the learner to train.
      seed: seed of vehicles, batches and weights.
      hidden: fraction of training tasks whose support steps are all hidden.
    """
    import jax
    import numpy as np
    import optax

    import metajax

    records = jax.jit(jax.vmap(_record))(jax.random.split(jax.random.key(seed), _VEHICLES))
    # drives of a spinning vehicle are not useful for others: speed, sway, yaw rate and steering are bounded
    calm = np.all(np.abs(records.inputs) < np.array([40.0, 1.5, 0.6, 4.0]), axis=(1, 2))
    records = jax.tree.map(lambda leaf: np.asarray(leaf)[calm], records)
    rng = np.random.default_rng(seed)

    def batch(hidden: float) -> Any:
        rows = rng.integers(len(records.mask), size=[32, 1])
        first = rng.integers(_RECORD - _WINDOW.value - _QUERY + 1, size=[32, 1])

        def part(start: int, size: int) -> Any:
            return jax.tree.map(lambda leaf: leaf[rows, first + start + np.arange(size)], records)

        support = part(0, _WINDOW.value)
        if hidden:
            support = support._replace(mask=support.mask & (rng.random([32, 1]) >= hidden))
        return metajax.Episode(support, part(_WINDOW.value, _QUERY))

    rule = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(_RATE, _STEPS.value)))
    outer = metajax.outer_update(
        learner, rule, hypergrad=metajax.hypergrad.mixed_mode(), task_batching="vmap", before=False
    )
    state = outer.init(jax.random.key(seed), jax.tree.map(lambda leaf: leaf[0], batch(hidden)))
    params = metajax.training.fit(outer, state, iter(lambda: batch(hidden), None), steps=_STEPS.value).params

    @jax.jit
    @jax.vmap
    def errors(episode: Any) -> Any:
        return learner.outer_loss(learner.adapt(params, episode.support), params, episode.query)[0]

    return params, [float(np.mean([errors(batch(share)).mean() for _ in range(100)])) for share in (1.0, 0.0)]


def _draw(path: pathlib.Path, errors: dict[str, Any]) -> None:
    """Draws the mean over the drives with its 95 % interval."""
    import matplotlib.figure
    import numpy as np

    from experiments import _figures

    figure = matplotlib.figure.Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    shown = slice(_CHANGE - round(6 / _DT), None)
    time = (_DT * (np.arange(_DRIVE) - _CHANGE))[shown]
    for name, title in _ROWS.items():
        smooth = np.array([np.convolve(one, np.ones(_AVERAGE) / _AVERAGE)[:_DRIVE] for one in errors[name]])[:, shown]
        _figures.band(axes, time, smooth, title)
    axes.axvline(0, color="0.3", lw=1, ls=":")
    axes.set(
        xlabel="seconds after the change of friction",
        ylabel="lateral error, mean of the last second, m",
        ylim=(0, None),
    )
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
