"""A vehicle whose road, load and steering may change during a drive, and a model that learns its dynamics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metajax.core import _validate, squared_error
from metajax.core._types import Examples, Model
from metajax.models import mlp

GRAVITY = 9.81  # m/s^2
_SLOWEST = 1.0  # m/s, the minimum speed for slip angles
Tyre = Callable[["Vehicle", jax.Array, jax.Array], jax.Array]  # (vehicle, load N, slip rad) -> lateral force N


class Vehicle(NamedTuple):
    """The parameters of a vehicle: scalars, or leaves `[steps]` for a vehicle that changes during a drive.

    Attributes:
      friction: friction between tyre and road, no unit: 0.9 is dry asphalt, 0.35 packed snow.
      mass: mass including the load, kg.
      inertia: moment of inertia about the vertical axis, kg m^2.
      front: distance from the centre of mass to the front axle, m.
      rear: distance from the centre of mass to the rear axle, m.
      ratio: ratio of steering wheel angle to road wheel angle, no unit.
      stiffness: Pacejka's B, 1/rad. The cornering stiffness of an axle is B C times friction times load.
      shape: Pacejka's C, no unit.

    >>> Vehicle(friction=0.35).mass
    1500.0
    """

    friction: Any = 0.9
    mass: Any = 1500.0
    inertia: Any = 2500.0
    front: Any = 1.2
    rear: Any = 1.5
    ratio: Any = 15.0
    stiffness: Any = 10.0
    shape: Any = 1.3


class Motion(NamedTuple):
    """The motion of a vehicle relative to its lane.

    Attributes:
      offset: offset of the centre of mass from the centre of the lane, m, positive to the left.
      heading: heading relative to the lane, rad.
      speed: forward speed, m/s.
      sway: sideways speed, m/s.
      yaw_rate: yaw rate, rad/s.
      distance: distance along the lane, m.

    >>> Motion(speed=20.0).offset
    0.0
    """

    offset: Any = 0.0
    heading: Any = 0.0
    speed: Any = 0.0
    sway: Any = 0.0
    yaw_rate: Any = 0.0
    distance: Any = 0.0


def random_vehicle(key: jax.Array) -> Vehicle:
    """Draws a random vehicle for meta-training.

    Args:
      key: PRNG key.

    Returns:
      A `Vehicle`: friction 0.25 to 1, mass 1,300 to 2,100 kg, inertia 1.5 to 1.9 m^2 times the mass, the front axle 1.1
      to 1.4 m from the centre of mass, the axles 2.7 m apart, steering ratio 13 to 17, Pacejka's B 8 to 12 per rad; all
      uniform.

    >>> bool(0.25 <= random_vehicle(jax.random.key(0)).friction <= 1)
    True
    """
    draw = jax.random.uniform(key, [6])
    mass = 1300 + 800 * draw[1]
    return Vehicle(
        friction=0.25 + 0.75 * draw[0], mass=mass, inertia=mass * (1.5 + 0.4 * draw[2]), front=1.1 + 0.3 * draw[3],
        rear=1.6 - 0.3 * draw[3], ratio=13 + 4 * draw[4], stiffness=8 + 4 * draw[5],
    )  # fmt: skip


def pacejka(vehicle: Vehicle, load: Any, slip: Any) -> jax.Array:
    """Computes the lateral force of an axle with the magic formula, `friction load sin(C atan(B slip))`, in N.

    Args:
      vehicle: the vehicle, for its friction and tyres.
      load: load on the axle, N.
      slip: slip angle, rad.

    Source: Bakker, Nyborg and Pacejka 1987, Tyre Modelling for Use in Vehicle Dynamics Studies, SAE 870421.

    >>> float(pacejka(Vehicle(friction=0.5, shape=1.0), 1000.0, 1e6))  # sliding: half of the load
    500.0
    """
    return vehicle.friction * load * jnp.sin(vehicle.shape * jnp.arctan(vehicle.stiffness * jnp.asarray(slip)))


def linear_tyre(vehicle: Vehicle, load: Any, slip: Any) -> jax.Array:
    """Computes the lateral force of an axle that never slides, `friction load C B slip`, in N.

    This is the tangent of `pacejka` at 0.

    Args:
      vehicle: the vehicle, for its friction and tyres.
      load: load on the axle, N.
      slip: slip angle, rad.

    >>> float(linear_tyre(Vehicle(friction=0.5, shape=1.0), 1000.0, 0.01))
    50.0
    """
    return vehicle.friction * load * vehicle.shape * vehicle.stiffness * jnp.asarray(slip)


def lateral_accelerations(vehicle: Vehicle, motion: Motion, steering: Any, *, tyre: Tyre = pacejka) -> jax.Array:
    """Computes the accelerations by the tyres, `[2]`: lateral in m/s^2 and yaw in rad/s^2.

    The lateral acceleration is what an accelerometer measures, `d sway / dt + speed * yaw_rate`.

    Args:
      vehicle: the vehicle, with scalar leaves.
      motion: the motion; only speed, sway and yaw rate are used.
      steering: angle of the steering wheel, rad.
      tyre: `pacejka` or `linear_tyre`.

    >>> lateral_accelerations(Vehicle(), Motion(speed=20.0), 0.0).tolist()
    [0.0, 0.0]
    """
    wheel = steering / vehicle.ratio
    front_force, rear_force = _forces(vehicle, motion, wheel, tyre)
    sideways = front_force * jnp.cos(wheel)
    yaw = vehicle.front * sideways - vehicle.rear * rear_force
    return jnp.stack([(sideways + rear_force) / vehicle.mass, yaw / vehicle.inertia])


def _forces(vehicle: Vehicle, motion: Motion, wheel: Any, tyre: Tyre) -> tuple[jax.Array, jax.Array]:
    speed, weight = jnp.maximum(motion.speed, _SLOWEST), vehicle.mass * GRAVITY
    base = vehicle.front + vehicle.rear
    front_slip = wheel - jnp.arctan((motion.sway + vehicle.front * motion.yaw_rate) / speed)
    rear_slip = -jnp.arctan((motion.sway - vehicle.rear * motion.yaw_rate) / speed)
    return (
        tyre(vehicle, weight * vehicle.rear / base, front_slip),
        tyre(vehicle, weight * vehicle.front / base, rear_slip),
    )


def lane_rates(motion: Motion, accelerations: Any, curvature: Any, pull: Any = 0.0) -> Motion:
    """Computes the time derivative of the motion for given accelerations. This is kinematics and need not be learned.

    Args:
      motion: the current motion.
      accelerations: `[2]`, as returned by `lateral_accelerations`.
      curvature: curvature of the lane at the vehicle, 1/m, positive to the left.
      pull: measured forward acceleration, m/s^2.

    >>> round(float(lane_rates(Motion(speed=20.0), jnp.zeros(2), 0.01).heading), 6)  # rad/s: the lane turns away
    -0.2
    """
    cos, sin = jnp.cos(motion.heading), jnp.sin(motion.heading)
    # the lane is not defined beyond the centre of the curve
    along = (motion.speed * cos - motion.sway * sin) / jnp.maximum(1 - curvature * motion.offset, 0.1)
    return Motion(
        offset=motion.speed * sin + motion.sway * cos,
        heading=motion.yaw_rate - curvature * along,
        speed=pull + motion.sway * motion.yaw_rate,
        sway=accelerations[0] - motion.speed * motion.yaw_rate,
        yaw_rate=accelerations[1],
        distance=along,
    )


def vehicle_step(
    vehicle: Vehicle,
    motion: Motion,
    steering: Any,
    *,
    curvature: Any,
    pull: Any = 0.0,
    gust: Any = 0.0,
    dt: float = 0.05,
    tyre: Tyre = pacejka,
) -> Motion:
    """Takes one step of the dynamic bicycle model in a lane, with the classical Runge-Kutta method and constant inputs.

    Args:
      vehicle: the vehicle, with scalar leaves. For a vehicle that changes, scan over its steps.
      motion: motion at the start of the step, with float32 leaves `[]` if it is carried by a scan.
      steering: angle of the steering wheel, rad.
      curvature: curvature of the lane, 1/m, positive to the left.
      pull: acceleration by the engine or the brakes, m/s^2.
      gust: additional accelerations, scalar 0 or `[2]`, m/s^2 and rad/s^2.
      dt: length of the step, s.
      tyre: `pacejka` or `linear_tyre`.

    Raises:
      ValueError: `dt` is not a finite number above 0.

    Source: Rajamani 2012, Vehicle Dynamics and Control, chapter 2 (bicycle model, motion with respect to the road).

    >>> after = vehicle_step(Vehicle(), Motion(speed=20.0), 0.0, curvature=0.0)
    >>> float(after.distance), float(after.offset)
    (1.0, 0.0)
    """
    _validate.positive_float("dt", dt)

    def rates(motion: Motion) -> Motion:
        wheel = steering / vehicle.ratio
        drag = _forces(vehicle, motion, wheel, tyre)[0] * jnp.sin(wheel) / vehicle.mass
        felt = lateral_accelerations(vehicle, motion, steering, tyre=tyre) + gust
        return lane_rates(motion, felt, curvature, pull - drag)

    def moved(rate: Motion, time: float) -> Motion:
        return jax.tree.map(lambda value, slope: value + time * slope, motion, rate)

    first = rates(motion)
    second = rates(moved(first, dt / 2))
    third = rates(moved(second, dt / 2))
    fourth = rates(moved(third, dt))
    mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, first, second, third, fourth)
    return moved(mean, dt)


def motion_features(motion: Motion, steering: Any) -> jax.Array:
    """Returns the features that determine the accelerations, `[4]`: speed m/s, sway m/s, yaw rate rad/s, steering rad.

    The last one is the angle of the steering wheel.

    >>> motion_features(Motion(speed=20.0), 0.5).tolist()
    [20.0, 0.0, 0.0, 0.5]
    """
    parts = (motion.speed, motion.sway, motion.yaw_rate, steering)
    return jnp.stack([jnp.asarray(part, jnp.float32) for part in parts])


def motion_example(before: Motion, steering: Any, after: Motion, *, dt: float = 0.05) -> Examples:
    """Returns the training example of one step: the features and the mean measured accelerations.

    Args:
      before: motion at the start of the step. Sway and yaw rate count as measured.
      steering: constant angle of the steering wheel during the step, rad.
      after: motion at the end of the step.
      dt: length of the step, s.

    Returns:
      One example: inputs `[1, 4]` of `motion_features`, targets `[1, 2]` in m/s^2 and rad/s^2.

    Raises:
      ValueError: `dt` is not a finite number above 0.

    >>> motion_example(Motion(speed=20.0), 0.0, Motion(speed=20.0, sway=0.1), dt=0.1).targets.tolist()
    [[1.0, 0.0]]
    """
    _validate.positive_float("dt", dt)
    felt = jnp.stack(
        [
            (jnp.asarray(after.sway) - before.sway) / dt + before.speed * before.yaw_rate,
            (jnp.asarray(after.yaw_rate) - before.yaw_rate) / dt,
        ]
    )
    return Examples(motion_features(before, steering)[None], felt[None], jnp.ones(1, bool))


_CENTRE, _SPREAD = (20.0, 0.0, 0.0, 0.0), (5.0, 1.0, 0.2, 1.0)  # of the features, in their units
_SCALE = (4.0, 1.0)  # scale of the accelerations, m/s^2 and rad/s^2


def dynamics_loss(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the squared error `[n]` of accelerations `[n, 2]`, with 4 m/s^2 and 1 rad/s^2 as units.

    Args:
      outputs: predicted accelerations, m/s^2 and rad/s^2.
      targets: measured accelerations in the same units.

    Raises:
      ValueError: the shapes differ.

    >>> dynamics_loss(jnp.array([[4.0, 0.0]]), jnp.zeros([1, 2])).tolist()
    [0.5]
    """
    return squared_error(outputs / jnp.array(_SCALE), targets / jnp.array(_SCALE))


def residual_dynamics(nominal: Vehicle | None = None, *, hidden: tuple[int, ...] = (32, 32)) -> Model:
    """A nominal bicycle model plus a network that learns its error from the features and the nominal accelerations.

    Args:
      nominal: the nominal vehicle, with scalar leaves. None is `Vehicle()`, on dry asphalt.
      hidden: widths of the hidden layers.

    Returns:
      A `Model` from features `[n, 4]` (`motion_features`) to accelerations `[n, 2]` (`lateral_accelerations`). Columns
      after the first four are passed to the network unchanged, so the model also works in `learners.recurrent(model,
      2)`.

    Raises:
      ValueError: a width is below 1, or `nominal` is not a `Vehicle`; (in a call) there are fewer than 4 columns.

    >>> model = residual_dynamics()
    >>> features = motion_features(Motion(speed=20.0), 0.5)[None]
    >>> model.apply(model.init(jax.random.key(0), features), features).shape
    (1, 2)
    >>> remembering = jnp.concatenate([features, jnp.zeros([1, 8])], axis=1)  # with a memory of 8 numbers
    >>> model.init(jax.random.key(0), remembering)["layer_0"]["kernel"].shape
    (14, 32)
    """
    assumption = _validate.instance("nominal", Vehicle() if nominal is None else nominal, Vehicle)
    network = mlp(2, hidden=hidden)

    def assumed(features: jax.Array) -> jax.Array:
        speed, sway, yaw_rate, steering = features[:4]
        return lateral_accelerations(assumption, Motion(speed=speed, sway=sway, yaw_rate=yaw_rate), steering)

    def seen(inputs: Any, nominal: jax.Array) -> jax.Array:
        # clips the features, because a spinning vehicle is outside the training data and must not change weights much
        features = jnp.clip((inputs[:, :4] - jnp.array(_CENTRE)) / jnp.array(_SPREAD), -4, 4)
        return jnp.concatenate([features, nominal / jnp.array(_SCALE), inputs[:, 4:]], axis=1)

    def expected(inputs: Any) -> jax.Array:
        if inputs.ndim != 2 or inputs.shape[1] < 4:
            raise ValueError(f"inputs must be features [n, 4], or with more columns, got an array of {inputs.shape}")
        return jax.vmap(assumed)(inputs)

    def init(key: jax.Array, inputs: Any) -> Any:
        return network.init(key, seen(inputs, expected(inputs)))

    def apply(params: Any, inputs: Any) -> jax.Array:
        nominal = expected(inputs)
        return nominal + jnp.array(_SCALE) * network.apply(params, seen(inputs, nominal))

    return Model(init, apply)
