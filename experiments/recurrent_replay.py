"""Initial states for replaying parts of sequences to a recurrent network.

    python -m experiments.recurrent_replay --out=runs/recurrent_replay

The tasks are sequences of points of sine waves. Only the first points of a sequence include their value, and the
network must remember the wave for the rest. It trains on short stretches from a memory (Kapturowski et al. 2019, R2D2),
most of which start long after those points. They start from a zero state, from the state stored when the stretch was
recorded, or from either of these after a burn-in with the current weights. All stretches have the same length. Without
a burn-in, all of their steps are trained on. Prints the squared error on whole sequences of new waves over several
seeds, and draws it over the steps of a sequence.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/recurrent_replay", "Folder of the table and the figure.")
_SEED = flags.DEFINE_integer("seed", 0, "The first seed, of waves, weights and draws.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Seeds.")
_STEPS = flags.DEFINE_integer("steps", 4000, "Optimizer steps.")
_BURN_IN = flags.DEFINE_integer("burn_in", 8, "First steps of a stretch that bring its state up to date.")
_LENGTH, _TOLD, _LATE = 64, 8, 32  # steps of a sequence; steps with a given value; first evaluated step
_ROWS, _BLOCK, _CAPACITY = 8, 8, 8192  # parallel sequences; steps between updates; stored steps of a row
_STRETCH, _COUNT = 24, 16  # steps of a stretch, stretches of an update
_HIDDEN, _RATE, _JUDGED = 64, 2e-3, 256


class _Step(NamedTuple):
    """A step, with leaves `[..., k]`. `state` is the recurrent state before the step."""

    inputs: Any
    target: Any
    first: Any
    state: Any


class _Way(NamedTuple):
    title: str
    stored: bool
    burn_in: bool


_WAYS = {
    "zero": _Way("zeros", False, False),
    "zero_burn_in": _Way("zeros, then a burn-in", False, True),
    "stored": _Way("the stored state", True, False),
    "stored_burn_in": _Way("the stored state, then a burn-in", True, True),
}


def main() -> int:
    """Trains in each way on the same waves, compares and draws the results."""
    run.prepare(host_devices=1)
    import jax
    import numpy as np

    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value)
    if not 1 <= _BURN_IN.value < _STRETCH:
        raise ValueError(f"burn_in must be an integer from 1 to {_STRETCH - 1}, got {_BURN_IN.value}")
    keys = jax.vmap(jax.random.key)(_SEED.value + np.arange(_SEEDS.value))
    errors = {name: np.asarray(jax.jit(jax.vmap(_learned(way)))(keys), np.float64) for name, way in _WAYS.items()}
    print(
        f"squared error on sequences of {_LENGTH} points, the first {_TOLD} told; {_SEEDS.value} seeds, mean and 95 %"
    )
    print(f"{'stretches begin from':36s}{f'steps {_LATE} to {_LENGTH}':>20s}{'less than from zeros':>24s}")
    late = {name: values[:, _LATE:].mean(1) for name, values in errors.items()}
    for name, way in _WAYS.items():
        less = "" if name == "zero" else _runs.told(late["zero"] - late[name], 3)
        print(f"{way.title:36s}{_runs.told(late[name], 3):>20s}{less:>24s}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": _SEED.value, "seeds": _SEEDS.value, "steps": _STEPS.value, "burn_in": _BURN_IN.value}
    told = {"error": {k: v.tolist() for k, v in late.items()}, "curves": {k: v.tolist() for k, v in errors.items()}}
    _runs.write_json(out / "recurrent_replay.json", {**settings, **told})
    _draw(out / "recurrent_replay.png", errors)
    print(f"figure: {out / 'recurrent_replay.png'}")
    return 0


def _wave(key: Any) -> _Step:
    """Returns a sequence `[_LENGTH, ...]` of points of a random sine wave, with an empty state."""
    import jax
    import jax.numpy as jnp

    size_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude, phase = jax.random.uniform(size_key, (), minval=0.5, maxval=2.0), jax.random.uniform(phase_key) * jnp.pi
    x = jax.random.uniform(x_key, [_LENGTH], minval=-3.0, maxval=3.0)
    y, time = amplitude * jnp.sin(x + phase), jnp.arange(_LENGTH)
    told = time < _TOLD
    return _Step(jnp.stack([x, told * y, told], axis=-1), y, time == 0, jnp.zeros([_LENGTH, 0]))


def _network() -> tuple[Any, Any]:
    """Returns `(init, apply)` of a gated recurrent unit, and a small network that reads its state and the point."""
    import jax
    import jax.numpy as jnp

    import metajax
    from metajax.learners import Cell

    cell = metajax.models.from_nnx(lambda rngs: Cell(3, _HIDDEN, rngs))
    head = metajax.models.mlp(1, hidden=(64,))

    def init(key: Any) -> Any:
        cell_key, head_key = jax.random.split(key)
        return {
            "cell": cell.init(cell_key, jnp.zeros([1, _HIDDEN + 3])),
            "head": head.init(head_key, jnp.zeros([1, 1 + _HIDDEN])),
        }

    def apply(params: Any, state: Any, step: _Step) -> tuple[Any, Any]:
        before = jnp.where(step.first, 0.0, state)
        # the value of a point is read after its prediction
        guess = head.apply(params["head"], jnp.concatenate([step.inputs[:1], before])[None])[0, 0]
        return cell.apply(params["cell"], jnp.concatenate([before, step.inputs])[None])[0], guess

    return init, apply


def _learned(way: _Way) -> Any:
    """Returns a function from a key to the squared errors `[_LENGTH]` on new waves after training."""
    import jax
    import jax.numpy as jnp
    import optax

    from metajax import replay

    init, apply = _network()
    rule, burn_in = optax.adam(_RATE), _BURN_IN.value if way.burn_in else 0
    memory = replay.sequences(_CAPACITY, _STRETCH, rows=_ROWS, period=_BLOCK, exponent=0.0)

    def block(key: Any, number: Any) -> _Step:
        """Returns the next steps `[_ROWS, _BLOCK, ...]` of the stream."""
        sequence, place = number * _BLOCK // _LENGTH, number * _BLOCK % _LENGTH
        waves = jax.vmap(_wave)(jax.random.split(jax.random.fold_in(key, sequence), _ROWS))
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place, _BLOCK, 1), waves)

    def record(params: Any, state: Any, steps: _Step) -> tuple[Any, _Step]:
        """Runs over new steps of one row, and stores the state before each step."""

        def run(state: Any, step: _Step) -> tuple[Any, Any]:
            return apply(params, state, step)[0], state

        state, states = jax.lax.scan(run, state, steps)
        return state, steps._replace(state=states)

    def errors(params: Any, stretch: _Step) -> Any:
        """Returns the squared errors of one stretch after its burn-in."""
        start = stretch.state[0] if way.stored else jnp.zeros(_HIDDEN)
        state, rest = replay.burn_in(apply, params, start, stretch, burn_in)
        _, guesses = jax.lax.scan(lambda state, step: apply(params, state, step), state, rest)
        return jnp.square(guesses - rest.target)

    def loss(params: Any, stretches: _Step) -> Any:
        return jnp.mean(jax.vmap(errors, (None, 0))(params, stretches))

    def learn(key: Any) -> Any:
        params_key, stream_key, draw_key, judge_key = jax.random.split(key, 4)

        def update(carry: Any, number: Any) -> tuple[Any, None]:
            params, opt_state, kept, states = carry
            states, steps = jax.vmap(record, (None, 0, 0))(params, states, block(stream_key, number))
            kept = memory.add(kept, steps)
            drawn = memory.sample(kept, _COUNT, key=jax.random.fold_in(draw_key, number))
            updates, opt_state = rule.update(jax.grad(loss)(params, drawn.items), opt_state)
            return (optax.apply_updates(params, updates), opt_state, kept, states), None

        params, states = init(params_key), jnp.zeros([_ROWS, _HIDDEN])
        one = _wave(params_key)._replace(state=jnp.zeros([_LENGTH, _HIDDEN]))
        kept = memory.init(jax.tree.map(lambda leaf: leaf[0], one))
        before = -(-_STRETCH // _BLOCK)  # blocks until the first stretch is complete
        for number in range(before):
            states, steps = jax.vmap(record, (None, 0, 0))(params, states, block(stream_key, number))
            kept = memory.add(kept, steps)
        numbers = before + jnp.arange(_STEPS.value)
        params = jax.lax.scan(update, (params, rule.init(params), kept, states), numbers)[0][0]

        def judge(wave: _Step) -> Any:
            _, guesses = jax.lax.scan(lambda state, step: apply(params, state, step), jnp.zeros(_HIDDEN), wave)
            return jnp.square(guesses - wave.target)

        return jax.vmap(judge)(jax.vmap(_wave)(jax.random.split(judge_key, _JUDGED))).mean(0)

    return learn


def _draw(path: pathlib.Path, errors: dict[str, Any]) -> None:
    """Draws the mean over seeds with its 95 % interval."""
    import matplotlib.figure

    from experiments import _figures

    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        _figures.band(axes, range(_LENGTH), values, _WAYS[name].title)
    axes.axvline(_TOLD, color="0.3", lw=1, ls=":")
    axes.axvspan(_LATE, _LENGTH - 1, color="0.95")
    axes.set(xlabel="step of a sequence", ylabel="squared error", ylim=(0, None))
    axes.legend(fontsize=8, title="stretches begin from")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
