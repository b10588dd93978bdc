"""Model-predictive lane keeping with learned dynamics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.vehicle._dynamics import Motion, lane_rates
from metajax.core import _validate

# (features [n, 4]) -> accelerations [n, 2], as computed by experiments.vehicle.residual_dynamics
Dynamics = Callable[[jax.Array], jax.Array]


class LaneKeeper(NamedTuple):
    """A lane-keeping controller as pure functions.

    Attributes:
      init: `() -> plan`, angles of the steering wheel for the next steps, rad, `[horizon]`.
      plan: `(dynamics, motion, plan, curvature) -> plan`. The first angle of the result is the one to steer now.
        `curvature` is the curvature of the lane at each step of the horizon, `[horizon]`, 1/m, and the argument `plan`
        is the plan of the previous step.
      predict: `(dynamics, motion, plan, curvature) -> motion`, leaves `[horizon]`, the predicted motion.

    >>> LaneKeeper._fields
    ('init', 'plan', 'predict')
    """

    init: Callable[..., jax.Array]
    plan: Callable[..., jax.Array]
    predict: Callable[..., Motion]


def lane_keeper(
    *,
    horizon: int = 20,
    dt: float = 0.05,
    limit: float = 8.0,
    iterations: int = 2,
    drift_weight: float = 0.3,
    effort: float = 0.3,
    damping: float = 1e-3,
) -> LaneKeeper:
    """Model-predictive control with a few Gauss-Newton steps, warm-started from the plan of the previous step.

    The cost of a plan is the sum over the horizon of the squares of the offset from the lane, its rate and the change
    of the steering angle. The heading has no cost, because the heading in a bend depends on the tyres. The residuals
    are differentiated in forward mode through the whole prediction, so a step is one linear least squares problem with
    `horizon` unknowns.

    Args:
      horizon: number of planned steps, at least 1.
      dt: length of a step, s.
      limit: largest angle of the steering wheel in either direction, rad.
      iterations: number of Gauss-Newton steps, at least 1.
      drift_weight: weight of a rate of the offset of 1 m/s relative to an offset of 1 m, s.
      effort: weight of a steering change of 1 rad between steps relative to an offset of 1 m, m/rad.
      damping: Levenberg-Marquardt damping, above 0. It keeps steps finite if the tyres slide and steering has no
        effect.

    Returns:
      A `LaneKeeper`. If the dynamics are not finite, the plan is not finite. Weights much below the defaults track the
      lane more closely, but far from the lane they demand more than the tyres can provide, and the vehicle slides.

    Raises:
      ValueError: an argument is out of its range.

    Source: Diehl et al. 2002, Real-time optimization and nonlinear model predictive control of processes governed by
    differential-algebraic equations (a few warm-started Gauss-Newton steps per time step).

    >>> from experiments.vehicle import Vehicle, lateral_accelerations
    >>> def dynamics(features):
    ...     speed, sway, yaw_rate, steering = features[0]
    ...     return lateral_accelerations(Vehicle(), Motion(0.0, 0.0, speed, sway, yaw_rate), steering)[None]
    >>> keeper = lane_keeper()
    >>> plan = keeper.plan(dynamics, Motion(offset=1.0, speed=20.0), keeper.init(), jnp.zeros(20))
    >>> bool(plan[0] < 0)  # left of the lane: to the right
    True
    """
    _validate.positive_int("horizon", horizon)
    _validate.positive_int("iterations", iterations)
    for name, value in (("dt", dt), ("limit", limit), ("damping", damping)):
        _validate.positive_float(name, value)
    for name, value in (("drift_weight", drift_weight), ("effort", effort)):
        _validate.non_negative_float(name, value)

    def predict(dynamics: Dynamics, motion: Motion, plan: jax.Array, curvature: jax.Array) -> Motion:
        def step(motion: Motion, inputs: tuple[jax.Array, jax.Array]) -> tuple[Motion, Motion]:
            steering, turn = inputs
            features = jnp.stack([motion.speed, motion.sway, motion.yaw_rate, steering])
            rates = lane_rates(motion, dynamics(features[None])[0], turn)
            rates = rates._replace(speed=jnp.zeros_like(rates.speed))  # kept constant by the cruise control
            motion = jax.tree.map(lambda value, rate: value + dt * rate, motion, rates)
            return motion, motion

        start = jax.tree.map(lambda leaf: jnp.asarray(leaf, plan.dtype), motion)
        return jax.lax.scan(step, start, (plan, curvature))[1]

    def improve(dynamics: Dynamics, motion: Motion, last: Any, plan: jax.Array, curvature: jax.Array) -> jax.Array:
        def residuals(plan: jax.Array) -> tuple[jax.Array, jax.Array]:
            ahead = predict(dynamics, motion, plan, curvature)
            drift = jnp.diff(ahead.offset, prepend=motion.offset) / dt
            values = jnp.concatenate([ahead.offset, drift_weight * drift, effort * jnp.diff(plan, prepend=last)])
            return values, values

        slopes, values = jax.jacfwd(residuals, has_aux=True)(plan)
        normal = slopes.T @ slopes + damping * jnp.eye(horizon, dtype=plan.dtype)
        step = jax.scipy.linalg.solve(normal, slopes.T @ values, assume_a="pos")
        return jnp.clip(plan - step, -limit, limit)

    def plan_next(dynamics: Dynamics, motion: Motion, plan: jax.Array, curvature: jax.Array) -> jax.Array:
        last, plan = plan[0], jnp.append(plan[1:], plan[-1])
        for _ in range(iterations):
            plan = improve(dynamics, motion, last, plan, curvature)
        return plan

    return LaneKeeper(lambda: jnp.zeros(horizon), plan_next, predict)
