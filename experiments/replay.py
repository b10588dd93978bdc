"""Replay against forgetting: learning a sequence of alphabets with a memory of a few images.

    python -m experiments.replay --out=runs/replay                      # scripts of the embedded glyphs
    python -m experiments.replay --out=runs/replay --data=OMNIGLOT      # a folder as `metajax.data.omniglot` takes it

A convolutional network with one output for each character of all alphabets learns the alphabets in turn with Reptile,
from new images only, or from new and remembered images (Riemer et al. 2019, Meta-Experience Replay), with the same
number of updates of the same size. Prints the final accuracy, the final accuracy among the letters of an image's own
alphabet (task-incremental instead of class-incremental), and the forgetting (best minus final accuracy, for each
alphabet except the last) over several streams, and draws the accuracy of each alphabet over time.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from experiments import _alphabets
from metajax import run

_OUT = flags.DEFINE_string("out", "runs/replay", "Folder of the table and the figure.")
_DATA = flags.DEFINE_string("data", None, "Folder of Omniglot; without it, scripts of the embedded glyphs.")
_SEED = flags.DEFINE_integer("seed", 0, "The first stream's; each differs in alphabets, letters, order and weights.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Streams.")
_STEPS = flags.DEFINE_integer("steps", 100, "Meta steps on each alphabet.")
_CAPACITY = flags.DEFINE_integer("capacity", 200, "Images that a memory holds.")
_REPLAYED = 30  # replayed images per step, in addition to the new ones
_ROWS = {"without": "without replay", "reservoir": "a reservoir", "balanced": "a memory for each alphabet"}


def main() -> int:
    """Learns each stream with and without a memory, compares and draws the results."""
    run.prepare(host_devices=1)
    import jax
    import numpy as np

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    _runs.require_seeds(_SEEDS.value, "steps", _STEPS.value)
    if _CAPACITY.value < max(_REPLAYED, _alphabets.ALPHABETS):
        raise ValueError(f"capacity must be at least {_REPLAYED}, the images of a step, got {_CAPACITY.value}")
    alphabets = _alphabets.alphabets(_DATA.value)
    model = _alphabets.network(_alphabets.ALPHABETS * _alphabets.LETTERS)
    plain = _alphabets.reptile(model)
    memories = {
        "reservoir": metajax.replay.reservoir(_CAPACITY.value),
        "balanced": metajax.replay.balanced(
            _alphabets.ALPHABETS,
            _CAPACITY.value // _alphabets.ALPHABETS,
            lambda item: item.targets // _alphabets.LETTERS,
        ),
    }
    outers = {"without": plain} | {
        name: metajax.replay.replayed(plain, memory, _REPLAYED, what="examples") for name, memory in memories.items()
    }
    learn = {name: _alphabets.in_turn(outer) for name, outer in outers.items()}
    judge = jax.jit(lambda params, inputs: model.apply(params, inputs).argmax(-1))

    accuracies: dict[str, list[Any]] = {name: [] for name in _ROWS}
    told: dict[str, list[float]] = {name: [] for name in _ROWS}
    order = []
    for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
        names, stream, test = _alphabets.draw(alphabets, seed, _STEPS.value)
        order.append(names)
        for name, outer in outers.items():
            state = outer.init(jax.random.key(seed), jax.tree.map(lambda leaf: leaf[0, 0], stream[0]))
            table = []  # a row after each alphabet
            for batches in stream:
                state = learn[name](state, batches)
                hits = [np.mean(np.asarray(judge(state.params, inputs)) == targets) for inputs, targets in test]
                table.append([100 * float(share) for share in hits])
            accuracies[name].append(table)
            told[name].append(100 * _told(state.params, model, test))
    size = f"{_alphabets.ALPHABETS} alphabets of {_alphabets.LETTERS} letters"
    print(f"{_SEEDS.value} streams of {size}, {_STEPS.value} meta steps on each")
    heads = "".join(f"{head:>24s}" for head in ("accuracy in the end", "of its own alphabet", "forgetting"))
    print(f"{'%, mean and 95 % interval':32s}{heads}")
    rows = {}
    for name, title in _ROWS.items():
        tables = np.array(accuracies[name])  # [seeds, after, of]
        final = tables[:, -1].mean(-1)
        forgetting = (tables.max(1) - tables[:, -1])[:, :-1].mean(-1)
        rows[name] = {"accuracy": final, "of_own_alphabet": np.array(told[name]), "forgetting": forgetting}
        print(f"{title:32s}" + "".join(f"{_runs.told(values, 1):>24s}" for values in rows[name].values()))
    found: dict[str, Any] = {}
    for name in memories:
        gain = rows[name]["accuracy"] - rows["without"]["accuracy"]
        ratio = float(rows[name]["forgetting"].mean() / rows["without"]["forgetting"].mean())
        found[name] = {"gain": metajax.evaluation.mean_and_interval(gain), "forgetting_ratio": ratio}
        print(f"{_ROWS[name]}: {_runs.told(gain, 1)} above no replay, {ratio:.2f} of its forgetting")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": _STEPS.value, "seed": _SEED.value, "seeds": _SEEDS.value, "capacity": _CAPACITY.value,
        "data": "glyphs" if _DATA.value is None else "omniglot",
    }  # fmt: skip
    listed = {name: {key: values.tolist() for key, values in row.items()} for name, row in rows.items()}
    _runs.write_json(out / "replay.json", {**settings, **found, "rows": listed, "order": order, "accuracy": accuracies})
    _draw(out / "replay.png", accuracies)
    print(f"figure: {out / 'replay.png'}")
    return 0


def _told(params: Any, model: Any, test: list[Any]) -> float:
    """Returns the accuracy among the letters of an image's own alphabet, as a fraction."""
    import numpy as np

    hits = []
    for place, (inputs, targets) in enumerate(test):
        first = place * _alphabets.LETTERS
        outputs = np.asarray(model.apply(params, inputs))[:, first : first + _alphabets.LETTERS]
        hits.append(np.mean(outputs.argmax(-1) == targets - first))
    return float(np.mean(hits))


def _draw(path: pathlib.Path, accuracies: dict[str, list[Any]]) -> None:
    """Draws one panel for each method: the accuracy of every alphabet after each alphabet, averaged over streams."""
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(4 * len(_ROWS), 3.6), layout="constrained")
    panels = figure.subplots(1, len(_ROWS), sharey=True)
    for panel, (name, title) in zip(panels, _ROWS.items(), strict=True):
        mean = np.mean(accuracies[name], axis=0)
        for place in range(_alphabets.ALPHABETS):
            panel.plot(
                range(place + 1, _alphabets.ALPHABETS + 1), mean[place:, place], "o-", label=f"alphabet {place + 1}"
            )
        panel.set_title(title)
        panel.set_xlabel("alphabets learned")
        panel.set_xticks(range(1, _alphabets.ALPHABETS + 1))
        panel.set_ylim(0, 100)
    panels[0].set_ylabel("test accuracy in %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run.launch(main)
