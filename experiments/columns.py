"""Progressive networks on a sequence of alphabets: the benefit of earlier columns.

    python -m experiments.columns --out=runs/columns                      # scripts of the embedded glyphs
    python -m experiments.columns --out=runs/columns --data=OMNIGLOT      # a folder as `metajax.data.omniglot` takes it

Uses the streams of experiments.replay with known alphabets (task-incremental). A column is frozen once its alphabet is
learned, so that nothing is forgotten, and later columns read its layers (Rusu et al. 2016). The baselines are a
separate network for each alphabet, and columns next to untrained columns, which read as many inputs but cannot benefit
from other alphabets. Prints the accuracy over several streams, and draws it for each alphabet.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from experiments import _alphabets
from metajax import run

_OUT = flags.DEFINE_string("out", "runs/columns", "Folder of the table and the figure.")
_DATA = flags.DEFINE_string("data", None, "Folder of Omniglot; without it, scripts of the embedded glyphs.")
_SEED = flags.DEFINE_integer("seed", 0, "The first stream's; each differs in alphabets, letters, order and weights.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Streams.")
_STEPS = flags.DEFINE_integer("steps", 100, "Meta steps on each alphabet.")
_ROWS = {
    "own": "a network of its own",
    "untrained": "a column beside untrained ones",
    "columns": "a column beside learned ones",
}


def main() -> int:
    """Learns each stream in each way, compares and draws the results."""
    run.prepare(host_devices=1)
    import jax
    import numpy as np

    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value)
    alphabets = _alphabets.alphabets(_DATA.value)
    learn = _ways()
    found: dict[str, list[list[float]]] = {name: [] for name in _ROWS}  # by stream, then by alphabet
    for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
        _, stream, test = _alphabets.draw(alphabets, seed, _STEPS.value)
        for name, shares in learn(jax.random.key(seed), stream, test).items():
            found[name].append(shares)
    accuracy = {name: 100 * np.array(shares) for name, shares in found.items()}
    print(
        f"{_SEEDS.value} streams of {_alphabets.ALPHABETS} alphabets, {_STEPS.value} meta steps on each; accuracy in %"
    )
    for name, title in _ROWS.items():
        print(f"{title:34s}{_runs.told(accuracy[name].mean(1), 1):>16s}")
    for name in ("own", "untrained"):
        more = (accuracy["columns"] - accuracy[name])[:, 1:].mean(1)  # the first alphabet has no earlier column
        print(f"from the second alphabet on, beside learned ones more than {_ROWS[name]}: {_runs.told(more, 1)}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"steps": _STEPS.value, "seed": _SEED.value, "seeds": _SEEDS.value, "data": _DATA.value or "glyphs"}
    rows = {name: values.tolist() for name, values in accuracy.items()}
    _runs.write_json(out / "columns.json", {**settings, "accuracy": rows})
    _draw(out / "columns.png", accuracy)
    print(f"figure: {out / 'columns.png'}")
    return 0


def _ways() -> Any:
    """Returns a function `(key, stream, test) -> {row: accuracy on each alphabet, as a fraction}`."""
    import jax
    import numpy as np

    import metajax

    blank = np.zeros([1, _alphabets.SIZE, _alphabets.SIZE, 1], np.float32)
    models = [_alphabets.network(_alphabets.LETTERS)]
    outers, params = [_alphabets.reptile(models[0])], models[0].init(jax.random.key(0), blank)
    for place in range(1, _alphabets.ALPHABETS):
        models.append(metajax.models.progressive_column(params, _alphabets.LETTERS, **_alphabets.FORM))
        outers.append(_alphabets.reptile(models[-1], adapts=f"^column_{place}/"))
        params = models[-1].init(jax.random.key(0), blank)
    steps = [_alphabets.in_turn(outer) for outer in outers]

    def trained(place: int, key: Any, before: Any, batches: Any, test: Any) -> tuple[Any, float]:
        """Returns parameters with one more column, and the accuracy on its test images as a fraction."""
        inputs, targets = test
        first = place * _alphabets.LETTERS
        batches = jax.tree.map(lambda leaf: leaf - first if leaf.dtype == np.int32 else leaf, batches)
        start = models[len(before)].init(key, blank)
        start = {**start, **before} if before else start
        state = outers[len(before)].init(key, jax.tree.map(lambda leaf: leaf[0, 0], batches), start)
        params = steps[len(before)](state, batches).params
        hits = np.asarray(models[len(before)].apply(params, inputs)).argmax(-1) == targets - first
        return params, float(np.mean(hits))

    def untrained(key: Any, count: int) -> Any:
        """Returns `count` untrained columns."""
        params = models[count - 1].init(key, blank)
        return {"column_0": params} if count == 1 else params

    def learn(key: Any, stream: list[Any], test: list[Any]) -> dict[str, list[float]]:
        shares: dict[str, list[float]] = {name: [] for name in _ROWS}
        before: Any = {}
        for place, (batches, judged) in enumerate(zip(stream, test, strict=True)):
            key = jax.random.fold_in(key, place)
            alone, share = trained(place, key, {}, batches, judged)
            shares["own"].append(share)
            if not before:  # the first column has no others to read
                before = {"column_0": alone}
                shares["untrained"].append(share)
                shares["columns"].append(share)
                continue
            beside = untrained(jax.random.fold_in(key, 1), place)
            shares["untrained"].append(trained(place, key, beside, batches, judged)[1])
            before, share = trained(place, key, before, batches, judged)
            shares["columns"].append(share)
        return shares

    return learn


def _draw(path: pathlib.Path, accuracy: dict[str, Any]) -> None:
    """Draws the mean over the streams with its 95 % interval."""
    import matplotlib.figure
    import numpy as np

    from experiments import _figures

    figure = matplotlib.figure.Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    places = 1 + np.arange(_alphabets.ALPHABETS)
    for shift, (name, title) in zip((-0.08, 0.0, 0.08), _ROWS.items(), strict=True):
        axes.errorbar(places + shift, *_figures.interval(accuracy[name]), fmt="o-", capsize=3, label=title)
    axes.set(xlabel="alphabet of the stream", ylabel="test accuracy in %", xticks=places)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
