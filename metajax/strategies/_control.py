"""Model-predictive lane keeping through dynamics that are learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _validate
from metajax.strategies._vehicle import Motion, lane_rates

# (features [n, 4]) -> accelerations [n, 2], as metajax.strategies.residual_dynamics gives them
Dynamics = Callable[[jax.Array], jax.Array]


class LaneKeeper(NamedTuple):
    """A controller as pure functions.

    Attributes:
      init: `() -> plan`, angles of the steering wheel for the next steps, rad, `[horizon]`.
      plan: `(dynamics, motion, plan, curvature) -> plan`; the first angle is to be steered now. `curvature` is that of
        the lane at each step of the horizon, `[horizon]`, 1/m, and `plan` the one of the step before.
      predict: `(dynamics, motion, plan, curvature) -> motion`, leaves `[horizon]`: where the plan leads.

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
    """Model-predictive control by a few Gauss-Newton steps, each started at the plan of the step before.

    The cost of a plan is the sum over the horizon of the squares of the offset from the lane, its rate and the change
    of the steering angle. The heading has no cost: in a bend a vehicle points inwards or outwards as its tyres ask.
    The residuals are differentiated forward through the whole prediction, so that a step is one linear least squares
    problem of `horizon` unknowns.

    Args:
      horizon: steps that are planned, at least 1.
      dt: length of a step, s.
      limit: largest angle of the steering wheel either way, rad.
      iterations: Gauss-Newton steps, at least 1.
      drift_weight: of one m/s by which the offset changes against one m of offset, s.
      effort: of one rad of change from step to step against one m of offset, m/rad.
      damping: of Levenberg and Marquardt, above 0: steps stay finite where the tyres slide and steering has no effect.

    Returns:
      A `LaneKeeper`. Dynamics that are not finite give a plan that is not. Weights much below the defaults track more
      closely, and far from the lane ask for more than the tyres can give: the vehicle slides.

    Raises:
      ValueError: an argument is out of its range.

    Source: Diehl et al. 2002, Real-time optimization and nonlinear model predictive control of processes governed by
    differential-algebraic equations (a few Gauss-Newton steps an instant, warm-started).

    >>> from metajax.strategies import Vehicle, lateral_accelerations
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
            rates = rates._replace(speed=jnp.zeros_like(rates.speed))  # held by the cruise control
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
