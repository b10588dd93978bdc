"""A road turns slippery while a vehicle drives: who keeps the lane?

    python -m experiments.vehicle --out=runs/vehicle

A network learns what a nominal bicycle model misses, meta-trained over vehicles that differ in friction, load, steering
ratio and tyres such that a few gradient steps on the last M steps fit it to the vehicle at hand (Nagabandi et al. 2019,
GrBAL). A model-predictive lane keeper plans through it on a winding road. Then friction drops without notice. Compared
with the same vehicle whose adaptation ends at that moment, with the prior that never adapts, and with a lane keeper that
is told the true vehicle. Prints lateral errors and recovery times over 10 seeds, and draws `vehicle.png`.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from absl import flags

from experiments import _launch

_OUT = flags.DEFINE_string("out", "runs/vehicle", "Folder of the table and the figure.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of training; drives have seeds of their own from it on.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Drives: roads and gusts differ.")
_STEPS = flags.DEFINE_integer("steps", 6000, "Meta steps.")
_WINDOW = flags.DEFINE_integer("window", 16, "Steps that are adapted to, M.")
_BEFORE = flags.DEFINE_float("before", 0.9, "Friction before the change.")
_AFTER = flags.DEFINE_float("after", 0.35, "Friction after the change.")
_DT, _SPEED = 0.05, 20.0  # s, m/s
_CHANGE, _DRIVE = 160, 320  # steps
_AVERAGE = 20  # steps over which lateral errors are averaged: 1 s
_INNER_RATE, _INNER_STEPS, _QUERY = 0.1, 5, 20
_VEHICLES, _RECORD = 4096, 100  # training drives, and their steps
_GUST = (0.2, 0.05)  # standard deviation in each step, m/s^2 and rad/s^2
_ROWS = {
    "adaptive": "adapts to the last steps",
    "frozen": "stops to adapt at the change",
    "prior": "never adapts",
    "told": "is told the true vehicle (not known in life)",
}


def main() -> int:
    """Trains, drives, compares, draws."""
    _launch.prepare(host_devices=1)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import metajax
    from experiments import _runs

    out = pathlib.Path(_OUT.value)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got {str(out)!r}")
    for name, value in (("before", _BEFORE.value), ("after", _AFTER.value)):
        if not 0 < value <= 2:
            raise ValueError(f"{name} must be a friction above 0 and up to 2, got {value}")
    if _SEEDS.value < 2 or _STEPS.value < 1:
        raise ValueError(f"seeds must be at least 2 and steps at least 1, got {_SEEDS.value} and {_STEPS.value}")
    longest = _RECORD - _QUERY
    if not 1 <= _WINDOW.value <= longest:
        raise ValueError(f"window must be an integer from 1 to {longest}, got {_WINDOW.value}")

    def loss(outputs: Any, targets: Any) -> Any:
        return metajax.core.squared_error(outputs / jnp.array([4.0, 1.0]), targets / jnp.array([4.0, 1.0]))

    model = metajax.strategies.residual_dynamics()
    learner = metajax.learners.maml(model, optax.sgd(_INNER_RATE), _INNER_STEPS, loss=loss)
    params = _train(learner, _SEED.value)
    online = metajax.strategies.recent(learner, window=_WINDOW.value)
    before, after = (metajax.strategies.Vehicle(friction=value) for value in (_BEFORE.value, _AFTER.value))
    changed = np.arange(_DRIVE) >= _CHANGE
    vehicles = jax.tree.map(lambda a, b: jnp.where(changed, b, a), before, after)
    learning = {"adaptive": np.ones(_DRIVE, bool), "frozen": ~changed, "prior": np.zeros(_DRIVE, bool), "told": ~changed}
    keys = jax.vmap(jax.random.key)(_SEED.value + jnp.arange(_SEEDS.value))
    errors: dict[str, Any] = {}
    for name in _ROWS:
        drive = functools.partial(_drive, online, params, told=name == "told")
        errors[name] = np.asarray(jax.jit(jax.vmap(drive, (0, None, None)))(keys, vehicles, jnp.array(learning[name])))

    def recovery(series: Any) -> float:
        return _DT * metajax.strategies.recovery_time(series, _CHANGE, window=_AVERAGE)

    rows = {
        name: {
            "before": np.abs(series[:, _CHANGE // 2 : _CHANGE]).mean(1).tolist(),
            "first_2s": np.abs(series[:, _CHANGE : _CHANGE + 40]).mean(1).tolist(),
            "after_2s": np.abs(series[:, _CHANGE + 40 :]).mean(1).tolist(),
            "recovery": [recovery(np.abs(one)) for one in series],
        }
        for name, series in errors.items()
    }
    print(f"friction {_BEFORE.value} to {_AFTER.value} at {_SPEED} m/s; lateral error in m, {_SEEDS.value} drives")
    print(f"{'a vehicle that':46s}{'before':>16s}{'first 2 s':>16s}{'later':>16s}   recovered within 2 s, at all")
    for name, title in _ROWS.items():
        told = "".join(_told(rows[name][part]) for part in ("before", "first_2s", "after_2s"))
        times = np.array(rows[name]["recovery"])
        print(f"{title:46s}{told}   {np.sum(times <= 2)}, {np.sum(np.isfinite(times))}; longest {times.max():.2f} s")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": _SEED.value, "steps": _STEPS.value, "window": _WINDOW.value, "dt": _DT, "change": _CHANGE}
    _runs.write_json(out / "vehicle.json", {**settings, **rows})
    _draw(out / "vehicle.png", errors)
    print(f"figure: {out / 'vehicle.png'}")
    return 0


def _told(values: Any) -> str:
    import metajax

    mean, ci95 = metajax.evaluation.mean_and_interval(values)
    return f"{mean:8.3f} +- {ci95:.3f}"


def _road(key: Any) -> Any:
    """The curvature in 1/m of a winding lane at a distance in m: two waves whose lengths and phases are random."""
    import jax
    import jax.numpy as jnp

    lengths = jax.random.uniform(jax.random.fold_in(key, 0), [2], minval=100.0, maxval=250.0)
    phases = jax.random.uniform(jax.random.fold_in(key, 1), [2], maxval=2 * jnp.pi)
    return lambda distance: 0.0028 * jnp.sum(jnp.sin(2 * jnp.pi * distance / lengths + phases))


def _drive(online: Any, params: Any, key: Any, vehicles: Any, learning: Any, *, told: bool) -> Any:
    """`[steps]` lateral errors in m of one drive; `learning` says in which steps the vehicle observes."""
    import jax
    import jax.numpy as jnp

    import metajax
    from metajax import strategies

    learner = metajax.learners.maml(strategies.residual_dynamics(), __import__("optax").sgd(_INNER_RATE), _INNER_STEPS)
    keeper, road = strategies.lane_keeper(dt=_DT), _road(key)
    ahead = _SPEED * _DT * jnp.arange(len(keeper.init()))
    start = jax.tree.map(jnp.asarray, strategies.Motion(speed=_SPEED))
    item = strategies.motion_example(start, 0.0, start, dt=_DT)

    def step(carry: Any, inputs: Any) -> Any:
        motion, plan, state = carry
        vehicle, learns, number = inputs
        adapted = online.adapt(state)

        def dynamics(features: Any) -> Any:
            if told:
                speed, sway, yaw_rate, steering = features[0]
                now = strategies.Motion(speed=speed, sway=sway, yaw_rate=yaw_rate)
                return strategies.lateral_accelerations(vehicle, now, steering)[None]
            return learner.predict(adapted, features)

        plan = keeper.plan(dynamics, motion, plan, jax.vmap(road)(motion.distance + ahead))
        gust = jnp.array(_GUST) * jax.random.normal(jax.random.fold_in(key, number), [2])
        moved = strategies.vehicle_step(
            vehicle, motion, plan[0], curvature=road(motion.distance), pull=_SPEED - motion.speed, gust=gust, dt=_DT
        )
        seen = online.observe(state, strategies.motion_example(motion, plan[0], moved, dt=_DT))
        state = jax.tree.map(lambda new, old: jnp.where(learns, new, old), seen, state)
        return (moved, plan, state), moved.offset

    carry = (start, keeper.init(), online.init(key, item, params))
    return jax.lax.scan(step, carry, (vehicles, learning, 2 + jnp.arange(len(learning))))[1]


def _train(learner: Any, seed: int) -> Any:
    """Meta-parameters, from drives of vehicles of all kinds under a crude driver who wags the wheel."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import metajax
    from metajax import strategies

    @jax.jit
    @jax.vmap
    def record(key: Any) -> Any:
        kind, road_key, start_key, wag_key = jax.random.split(key, 4)
        draw = jax.random.uniform(kind, [6])
        mass = 1300 + 800 * draw[1]
        vehicle = strategies.Vehicle(
            friction=0.25 + 0.75 * draw[0], mass=mass, inertia=mass * (1.5 + 0.4 * draw[2]),
            front=1.1 + 0.3 * draw[3], rear=1.6 - 0.3 * draw[3], ratio=13 + 4 * draw[4], stiffness=8 + 4 * draw[5],
        )  # fmt: skip
        speed, offset, heading = jax.random.uniform(start_key, [3]) * jnp.array([8.0, 1.0, 0.1])
        start = strategies.Motion(offset=offset - 0.5, heading=heading - 0.05, speed=16.0 + speed)
        road = _road(road_key)

        def step(carry: Any, key: Any) -> Any:
            motion, wag = carry
            wag = 0.9 * wag + 0.35 * jax.random.normal(key)
            curve = road(motion.distance + 8)
            steering = 15 * (3.2 * curve - 0.02 * motion.offset - 0.4 * motion.heading) + wag
            gust = jnp.array(_GUST) * jax.random.normal(jax.random.fold_in(key, 1), [2])
            pull = 16.0 + speed - motion.speed
            moved = strategies.vehicle_step(
                vehicle, motion, steering, curvature=road(motion.distance), pull=pull, gust=gust, dt=_DT
            )
            return (moved, wag), strategies.motion_example(motion, steering, moved, dt=_DT)

        carry = (jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start), jnp.zeros([]))
        return jax.tree.map(lambda leaf: leaf[:, 0], jax.lax.scan(step, carry, jax.random.split(wag_key, _RECORD))[1])

    records = jax.tree.map(np.asarray, record(jax.random.split(jax.random.key(seed), _VEHICLES)))
    # a vehicle that spins tells of itself and of nothing else
    calm = np.all(np.isfinite(records.inputs) & (np.abs(records.inputs) < [40, 3, 1.5, 8]), axis=(1, 2))
    print(calm.mean(), np.abs(records.inputs[calm]).mean((0,1)), records.inputs[calm].std((0,1)), records.targets[calm].std((0,1)))
    records = jax.tree.map(lambda leaf: leaf[calm], records)
    rng = np.random.default_rng(seed)

    def stream() -> Any:
        while True:
            rows = rng.integers(len(records.mask), size=[32, 1])
            first = rng.integers(_RECORD - _WINDOW.value - _QUERY + 1, size=[32, 1])

            def part(start: int, size: int, rows: Any = rows, first: Any = first) -> Any:
                return jax.tree.map(lambda leaf: leaf[rows, first + start + np.arange(size)], records)

            yield metajax.Episode(part(0, _WINDOW.value), part(_WINDOW.value, _QUERY))

    batches = stream()
    rule = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(optax.cosine_decay_schedule(2e-3, _STEPS.value)))
    outer = metajax.outer_update(learner, rule, hypergrad=metajax.hypergrad.mixed_mode(), task_batching="vmap")
    state = outer.init(jax.random.key(seed), jax.tree.map(lambda leaf: leaf[0], next(batches)))
    told: list[Any] = []

    def tell(step: int, state: Any, metrics: Any) -> None:
        if step % 500 == 0:
            told.append([float(metrics["loss_before"]), float(metrics["loss"])])
            print(step, told[-1])

    return metajax.training.fit(outer, state, batches, steps=_STEPS.value, callbacks=[tell]).params


def _draw(path: pathlib.Path, errors: dict[str, Any]) -> None:
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    time = _DT * (np.arange(_DRIVE) - _CHANGE)
    for color, (name, title) in enumerate(_ROWS.items()):
        for number, series in enumerate(np.abs(errors[name])):
            smooth = np.convolve(series, np.ones(_AVERAGE) / _AVERAGE)[: len(series)]
            axes.plot(time, smooth, color=f"C{color}", alpha=0.5, lw=1, label=None if number else title)
    axes.axvline(0, color="0.3", lw=1, ls=":")
    axes.set(xlabel="seconds after the change of friction", ylabel="lateral error, mean of 1 s, m", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _launch.run(main)
