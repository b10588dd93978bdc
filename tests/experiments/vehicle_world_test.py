"""The bicycle model against an independent NumPy one and closed forms, and lane keeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import vehicle as world
from experiments.vehicle import Motion, Vehicle

_FIELDS = ("offset", "heading", "speed", "sway", "yaw_rate", "distance")


def numpy_rates(vehicle, state, steering, curvature, pull, gust, linear=False):
    """The equations of motion written anew: state in the order of `_FIELDS`."""
    offset, heading, u, v, r, _ = state
    delta = steering / vehicle.ratio
    base, weight = vehicle.front + vehicle.rear, vehicle.mass * 9.81
    forces = []
    for arm, load, wheel in ((vehicle.front, vehicle.rear, delta), (-vehicle.rear, vehicle.front, 0.0)):
        slip = wheel - np.arctan2(v + arm * r, u)
        curve = vehicle.shape * vehicle.stiffness * slip
        if not linear:
            curve = np.sin(vehicle.shape * np.arctan(vehicle.stiffness * slip))
        forces.append(vehicle.friction * weight * load / base * curve)
    along = (u * np.cos(heading) - v * np.sin(heading)) / (1 - curvature * offset)
    return np.array([
        u * np.sin(heading) + v * np.cos(heading),
        r - curvature * along,
        pull + v * r - forces[0] * np.sin(delta) / vehicle.mass,
        (forces[0] * np.cos(delta) + forces[1]) / vehicle.mass - u * r + gust[0],
        (vehicle.front * forces[0] * np.cos(delta) - vehicle.rear * forces[1]) / vehicle.inertia + gust[1],
        along,
    ])  # fmt: skip


@pytest.mark.parametrize("linear", [False, True])
def test_a_step_is_that_of_fine_midpoint_steps_in_numpy(x64, linear):
    vehicle = Vehicle(friction=0.5, mass=1800.0, ratio=14.0, front=1.3)
    state = np.array([0.3, -0.05, 18.0, -0.4, 0.1, 5.0])
    steering, curvature, pull, gust = 0.9, 0.004, 0.5, np.array([0.3, -0.1])
    expected = state.copy()
    for _ in range(1000):
        middle = expected + 0.05 / 2000 * numpy_rates(vehicle, expected, steering, curvature, pull, gust, linear)
        expected += 0.05 / 1000 * numpy_rates(vehicle, middle, steering, curvature, pull, gust, linear)
    tyre = world.linear_tyre if linear else world.pacejka
    found = world.vehicle_step(
        vehicle, Motion(*state), steering, curvature=curvature, pull=pull, gust=gust, dt=0.05, tyre=tyre
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)  # of one step of 50 ms


def test_steady_cornering_on_linear_tyres_is_the_closed_form(x64):
    """yaw_rate / wheel angle = v / (L + K v^2), K = m / L (rear / C_front - front / C_rear) (Rajamani 2012, 3.3)."""
    vehicle, speed, wheel = Vehicle(), 20.0, 0.002
    base = vehicle.front + vehicle.rear
    grip = vehicle.friction * vehicle.mass * 9.81 * vehicle.shape * vehicle.stiffness / base
    front, rear = grip * vehicle.rear, grip * vehicle.front  # cornering stiffnesses, N/rad
    understeer = vehicle.mass / base * (vehicle.rear / front - vehicle.front / rear)
    motion = Motion(speed=speed)
    for _ in range(200):
        moved = world.vehicle_step(vehicle, motion, vehicle.ratio * wheel, curvature=0.0, tyre=world.linear_tyre)
        motion = moved._replace(speed=speed, heading=0.0, offset=0.0)
    assert float(motion.yaw_rate) == pytest.approx(speed * wheel / (base + understeer * speed**2), rel=1e-3)
    # the axles carry load in the ratio of their grip here: neutral steer
    assert understeer == pytest.approx(0, abs=1e-12)


def test_friction_is_what_the_tyres_can_do():
    slips = jnp.linspace(-1.5, 1.5, 301)
    for friction in (0.35, 0.9):
        force = world.pacejka(Vehicle(friction=friction), 1000.0, slips)
        assert float(jnp.max(force)) == pytest.approx(1000 * friction, rel=1e-3)
        np.testing.assert_allclose(force, -force[::-1], rtol=1e-3, atol=1e-2)
    small = 1e-4
    assert float(world.pacejka(Vehicle(), 1000.0, small)) == pytest.approx(
        float(world.linear_tyre(Vehicle(), 1000.0, small)), rel=1e-4
    )


def test_an_example_holds_the_accelerations_of_its_step(x64):
    vehicle = Vehicle(friction=0.7)
    before = Motion(0.0, 0.0, 20.0, -0.2, 0.1, 0.0)
    after = world.vehicle_step(vehicle, before, 0.6, curvature=0.0, dt=1e-4)
    example = world.motion_example(before, 0.6, after, dt=1e-4)
    np.testing.assert_allclose(example.inputs, [[20.0, -0.2, 0.1, 0.6]], rtol=1e-6)
    expected = world.lateral_accelerations(vehicle, before, 0.6)
    np.testing.assert_allclose(example.targets[0], expected, rtol=1e-2)


def test_residual_dynamics_are_the_nominal_ones_where_the_network_is_silent():
    nominal = Vehicle(friction=0.6)
    model = world.residual_dynamics(nominal, hidden=(8,))
    motion = Motion(speed=22.0, sway=0.3, yaw_rate=-0.2)
    features = world.motion_features(motion, -0.7)[None]
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), features))
    np.testing.assert_allclose(
        model.apply(params, features)[0], world.lateral_accelerations(nominal, motion, -0.7), rtol=1e-5
    )
    params["head"]["bias"] = jnp.ones(2)
    moved = model.apply(params, features)[0] - world.lateral_accelerations(nominal, motion, -0.7)
    np.testing.assert_allclose(moved, [4.0, 1.0], rtol=1e-5)


def test_residual_dynamics_hand_further_columns_to_the_network():
    model = world.residual_dynamics(hidden=(8,))
    inputs = jnp.concatenate([world.motion_features(Motion(speed=22.0), 0.5), jnp.array([0.5, -9.0])])[None]
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), inputs))
    assert params["layer_0"]["kernel"].shape == (8, 8)  # features, what the nominal model says, and the two
    np.testing.assert_array_equal(model.apply(params, inputs), model.apply(params, inputs.at[0, 4:].set(0.0)))
    # one unit that reads the last column alone, unscaled and not clipped
    params["layer_0"]["kernel"] = params["layer_0"]["kernel"].at[7, 0].set(-1.0)
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 1].set(1.0)
    moved = model.apply(params, inputs) - model.apply(params, inputs.at[0, 5].set(0.0))
    np.testing.assert_allclose(moved, [[0.0, 9.0]], atol=1e-5)


def true_dynamics(vehicle):
    def dynamics(features):
        speed, sway, yaw_rate, steering = features[0]
        motion = Motion(speed=speed, sway=sway, yaw_rate=yaw_rate)
        return world.lateral_accelerations(vehicle, motion, steering)[None]

    return dynamics


def test_a_prediction_is_what_the_vehicle_then_does():
    vehicle, keeper = Vehicle(friction=0.5), world.lane_keeper(horizon=10, dt=0.005)
    start = Motion(*map(jnp.float32, (0.2, 0.01, 20.0, 0.1, 0.05, 0.0)))
    plan, curvature = jnp.linspace(0, 1, 10), jnp.full(10, 0.003)
    ahead = keeper.predict(true_dynamics(vehicle), start, plan, curvature)
    motion = start
    for steering in plan:
        motion = world.vehicle_step(vehicle, motion, steering, curvature=0.003, dt=0.005)
    last = jax.tree.map(lambda leaf: leaf[-1], ahead)
    np.testing.assert_allclose(last.offset, motion.offset, atol=1e-3)
    np.testing.assert_allclose(last.heading, motion.heading, atol=1e-3)
    np.testing.assert_allclose(last.yaw_rate, motion.yaw_rate, atol=3e-3)


def test_a_vehicle_that_is_known_returns_to_its_lane_and_stays():
    vehicle, keeper = Vehicle(friction=0.5), world.lane_keeper()

    @jax.jit
    def drive():
        def step(carry, _):
            motion, plan = carry
            plan = keeper.plan(true_dynamics(vehicle), motion, plan, jnp.full(20, 0.004))
            moved = world.vehicle_step(vehicle, motion, plan[0], curvature=0.004, pull=20.0 - motion.speed)
            return (moved, plan), moved.offset

        start = Motion(*map(jnp.float32, (1.0, 0.0, 20.0, 0.0, 0.0, 0.0)))
        return jax.lax.scan(step, (start, keeper.init()), length=100)[1]

    offsets = np.abs(drive())
    assert offsets[60:].max() < 0.02
    assert np.all(np.isfinite(offsets))


@pytest.mark.slow
def test_a_plan_solves_its_least_squares_problem_where_the_dynamics_are_linear():
    """Straight lane, linear dynamics, small angles: one Gauss-Newton step and 20 give the same plan."""

    def dynamics(features):
        return jnp.stack([-2 * features[:, 1] + features[:, 3], -3 * features[:, 2] + 0.5 * features[:, 3]], axis=1)

    start = Motion(*map(jnp.float32, (1e-3, 0.0, 20.0, 0.0, 0.0, 0.0)))
    plans = [
        world.lane_keeper(iterations=count, damping=1e-7).plan(dynamics, start, jnp.zeros(20), jnp.zeros(20))
        for count in (1, 20)
    ]
    np.testing.assert_allclose(plans[0], plans[1], rtol=0.02, atol=1e-5)
    assert np.abs(plans[0]).max() > 1e-4


def test_angles_stay_within_the_limit():
    keeper = world.lane_keeper(limit=0.3)
    start = Motion(*map(jnp.float32, (5.0, 0.0, 20.0, 0.0, 0.0, 0.0)))
    plan = keeper.plan(true_dynamics(Vehicle()), start, keeper.init(), jnp.zeros(20))
    assert float(plan[0]) == pytest.approx(-0.3)
    assert np.abs(plan).max() <= 0.3 + 1e-6


@pytest.mark.parametrize(
    ("keyword", "value", "accepted"),
    [
        ("horizon", 0, "an integer of at least 1"),
        ("iterations", 0, "an integer of at least 1"),
        ("dt", 0.0, "a finite number above 0"),
        ("limit", -1.0, "a finite number above 0"),
        ("damping", 0.0, "a finite number above 0"),
        ("drift_weight", -1.0, "a finite number of at least 0"),
        ("effort", float("nan"), "a finite number of at least 0"),
    ],
)
def test_bad_input_of_a_lane_keeper_is_refused(keyword, value, accepted):
    with pytest.raises(ValueError, match=f"{keyword} must be {accepted}, got"):
        world.lane_keeper(**{keyword: value})


def test_bad_input_of_a_vehicle_is_refused():
    with pytest.raises(ValueError, match=r"dt must be a finite number above 0, got 0"):
        world.vehicle_step(Vehicle(), Motion(), 0.0, curvature=0.0, dt=0)
    with pytest.raises(ValueError, match=r"dt must be a finite number above 0, got -1"):
        world.motion_example(Motion(), 0.0, Motion(), dt=-1)
    with pytest.raises(ValueError, match="nominal must be of type Vehicle"):
        world.residual_dynamics(0.9)
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1, got 0"):
        world.residual_dynamics(hidden=(0,))
    with pytest.raises(ValueError, match=r"inputs must be features \[n, 4\], .* got an array of \(2, 3\)"):
        world.residual_dynamics().init(jax.random.key(0), jnp.zeros([2, 3]))


def test_random_vehicles_stay_within_their_bounds():
    vehicles = jax.vmap(world.random_vehicle)(jax.random.split(jax.random.key(0), 500))
    bounds = {"friction": (0.25, 1), "mass": (1300, 2100), "front": (1.1, 1.4), "rear": (1.3, 1.6), "ratio": (13, 17)}
    for name, (low, high) in bounds.items():
        values = np.asarray(getattr(vehicles, name))
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high
    np.testing.assert_allclose(vehicles.front + vehicles.rear, 2.7, rtol=1e-6)


def test_the_loss_weighs_both_accelerations():
    found = world.dynamics_loss(jnp.array([[4.0, 0.0], [0.0, 2.0]]), jnp.zeros([2, 2]))
    np.testing.assert_allclose(found, [0.5, 2.0])
