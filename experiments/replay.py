"""Learning alphabets one after the other: what a memory of a few images keeps from being forgotten.

    python -m experiments.replay --out=runs/replay                      # scripts of the embedded glyphs
    python -m experiments.replay --out=runs/replay --data=OMNIGLOT      # a folder as `metajax.data.omniglot` takes it

One convolutional network with one output for each character of all alphabets learns them in turn by Reptile, from new
images alone, and from new and remembered ones (Riemer et al. 2019, Meta-Experience Replay) in as many updates of the
same size. Prints the accuracy in the end and the forgetting (for each alphabet but the last, best minus final accuracy)
over several streams, and draws the accuracy of each alphabet over time. Where it is told of which alphabet an image is,
a network can grow instead by a column for each (Rusu et al. 2016), which forgets nothing: that is compared with the
same network, and with one of its own for each alphabet.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from experiments import _launch

_OUT = flags.DEFINE_string("out", "runs/replay", "Folder of the table and the figure.")
_DATA = flags.DEFINE_string("data", None, "Folder of Omniglot; without it, scripts of the embedded glyphs.")
_SEED = flags.DEFINE_integer("seed", 0, "The first stream's; each differs in alphabets, letters, order and weights.")
_SEEDS = flags.DEFINE_integer("seeds", 10, "Streams.")
_STEPS = flags.DEFINE_integer("steps", 100, "Meta steps on each alphabet.")
_CAPACITY = flags.DEFINE_integer("capacity", 200, "Images that a memory holds.")
_ALPHABETS, _LETTERS, _SIZE, _TEST = 5, 10, 14, 5
_NEW, _REPLAYED = 10, 30  # images of a step
_WIDTH, _DEPTH = 16, 3
_FORM: dict[str, Any] = {"pool": False, "normalisation": "layer"}
_INNER_STEPS, _BATCH, _INNER_RATE, _OUTER_RATE = 5, 10, 0.1, 0.5
_ROWS = {"without": "without replay", "reservoir": "a reservoir", "balanced": "as many of each alphabet"}
_TOLD = {"one": "one network, without replay", "own": "a network of its own", "columns": "a column of its own"}


def main() -> int:
    """Learns each stream without and with a memory, compares, draws."""
    _launch.prepare(host_devices=1)
    import jax
    import numpy as np

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    if _SEEDS.value < 2 or _STEPS.value < 1:
        raise ValueError(f"seeds must be at least 2 and steps at least 1, got {_SEEDS.value} and {_STEPS.value}")
    if _CAPACITY.value < max(_REPLAYED, _ALPHABETS):
        raise ValueError(f"capacity must be at least {_REPLAYED}, the images of a step, got {_CAPACITY.value}")
    alphabets = _alphabets(_DATA.value)
    model = metajax.models.conv4(_ALPHABETS * _LETTERS, width=_WIDTH, depth=_DEPTH, **_FORM)
    plain = _reptile(model)
    memories = {
        "reservoir": metajax.strategies.reservoir(_CAPACITY.value),
        "balanced": metajax.strategies.balanced(
            _ALPHABETS, _CAPACITY.value // _ALPHABETS, lambda item: item.targets // _LETTERS
        ),
    }
    outers = {"without": plain} | {
        name: metajax.strategies.replayed(plain, memory, _REPLAYED, what="examples")
        for name, memory in memories.items()
    }
    learn = {name: _in_turn(outer) for name, outer in outers.items()}
    columns = _columns()
    judge = jax.jit(lambda params, inputs: model.apply(params, inputs).argmax(-1))

    accuracies: dict[str, list[Any]] = {name: [] for name in _ROWS}
    shares: dict[str, list[float]] = {name: [] for name in _TOLD}
    order = []
    for seed in range(_SEED.value, _SEED.value + _SEEDS.value):
        names, stream, test = _stream(alphabets, seed, _STEPS.value)
        order.append(names)
        for name, outer in outers.items():
            state = outer.init(jax.random.key(seed), jax.tree.map(lambda leaf: leaf[0, 0], stream[0]))
            table = []  # a line after each alphabet
            for batches in stream:
                state = learn[name](state, batches)
                hits = [np.mean(np.asarray(judge(state.params, inputs)) == targets) for inputs, targets in test]
                table.append([100 * float(share) for share in hits])
            accuracies[name].append(table)
            if name == "without":
                shares["one"].append(_told_accuracy(model, state.params, test))
        for name, share in columns(jax.random.key(seed), stream, test).items():
            shares[name].append(share)
    print(f"{_SEEDS.value} streams of {_ALPHABETS} alphabets of {_LETTERS} letters, {_STEPS.value} meta steps on each")
    print(f"{'%, mean and 95 % interval':32s}{'accuracy in the end':>20s}{'forgetting':>20s}")
    rows = {}
    for name, title in _ROWS.items():
        tables = np.array(accuracies[name])  # [seeds, after, of]
        final = tables[:, -1].mean(-1)
        forgetting = (tables.max(1) - tables[:, -1])[:, :-1].mean(-1)
        rows[name] = {"accuracy": final, "forgetting": forgetting}
        print(f"{title:32s}{_runs.told(final, 1):>20s}{_runs.told(forgetting, 1):>20s}")
    found: dict[str, Any] = {}
    for name in memories:
        gain = rows[name]["accuracy"] - rows["without"]["accuracy"]
        ratio = float(rows[name]["forgetting"].mean() / rows["without"]["forgetting"].mean())
        found[name] = {"gain": metajax.evaluation.mean_and_interval(gain), "forgetting_ratio": ratio}
        print(f"{_ROWS[name]}: {_runs.told(gain, 1)} above no replay, {ratio:.2f} of its forgetting")
    print("told of which alphabet an image is, accuracy in the end:")
    for name, title in _TOLD.items():
        print(f"{title:32s}{_runs.told(shares[name], 1):>20s}")
    more = np.subtract(shares["columns"], shares["own"])
    print(f"a column of its own: {_runs.told(more, 1)} above a network of its own")
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "steps": _STEPS.value, "seed": _SEED.value, "seeds": _SEEDS.value, "capacity": _CAPACITY.value,
        "data": "glyphs" if _DATA.value is None else "omniglot",
    }  # fmt: skip
    told = {name: {key: values.tolist() for key, values in row.items()} for name, row in rows.items()}
    _runs.write_json(
        out / "replay.json", {**settings, **found, "rows": told, "told": shares, "order": order, "accuracy": accuracies}
    )
    _draw(out / "replay.png", accuracies)
    print(f"figure: {out / 'replay.png'}")
    return 0


def _reptile(model: Any, adapts: str | None = None) -> Any:
    """A meta step on the parameters of `model`, or on those that a regex picks."""
    import optax

    import metajax

    learner = metajax.learners.reptile(model, optax.sgd(_INNER_RATE), _INNER_STEPS, batch_size=_BATCH, adapts=adapts)
    hypergrad = metajax.hypergrad.displacement()
    return metajax.outer_update(learner, optax.sgd(_OUTER_RATE), hypergrad=hypergrad, trainable=adapts)


def _in_turn(outer: Any) -> Any:
    """The compiled meta steps on one alphabet: `(state, batches) -> state`."""
    import jax

    return jax.jit(lambda state, batches: jax.lax.scan(outer.update, state, batches)[0])


def _told_accuracy(model: Any, params: Any, test: list[Any]) -> float:
    """In %, where only the letters of the alphabet that an image is of are outputs."""
    import numpy as np

    hits = []
    for place, (inputs, targets) in enumerate(test):
        letters = slice(place * _LETTERS, (place + 1) * _LETTERS)
        found = np.asarray(model.apply(params, inputs))[:, letters].argmax(-1)
        hits.append(np.mean(found == targets - place * _LETTERS))
    return 100 * float(np.mean(hits))


def _columns() -> Any:
    """A function `(key, stream, test) -> {"own": accuracy, "columns": accuracy}` in %.

    Each alphabet gets a network of `_LETTERS` outputs, alone or as a column beside those that were learned before.
    """
    import jax
    import numpy as np

    import metajax

    first = metajax.models.conv4(_LETTERS, width=_WIDTH, depth=_DEPTH, **_FORM)
    blank = np.zeros([1, _SIZE, _SIZE, 1], np.float32)
    models, outers, params = [first], [_reptile(first)], first.init(jax.random.key(0), blank)
    for place in range(1, _ALPHABETS):
        models.append(metajax.strategies.progressive_column(params, _LETTERS, **_FORM))
        outers.append(_reptile(models[-1], adapts=f"^column_{place}/"))
        params = models[-1].init(jax.random.key(0), blank)
    learn = [_in_turn(outer) for outer in outers]

    def trained(place: int, key: Any, params: Any, batches: Any, test: Any) -> tuple[Any, float]:
        inputs, targets = test
        batches = jax.tree.map(lambda leaf: leaf % _LETTERS if leaf.dtype == np.int32 else leaf, batches)
        state = outers[place].init(key, jax.tree.map(lambda leaf: leaf[0, 0], batches), params)
        params = learn[place](state, batches).params
        hits = np.asarray(models[place].apply(params, inputs)).argmax(-1) == targets % _LETTERS
        return params, 100 * float(np.mean(hits))

    def run(key: Any, stream: list[Any], test: list[Any]) -> dict[str, float]:
        before: dict[str, Any] = {}
        own, columns = [], []
        for place, (batches, judged) in enumerate(zip(stream, test, strict=True)):
            key = jax.random.fold_in(key, place)
            alone, share = trained(0, key, first.init(key, blank), batches, judged)
            own.append(share)
            if place:
                start = models[place].init(key, blank) | before
                before, share = trained(place, key, start, batches, judged)
            else:
                before = {"column_0": alone}
            columns.append(share)
        return {"own": float(np.mean(own)), "columns": float(np.mean(columns))}

    return run


def _alphabets(path: str | None) -> dict[str, list[Any]]:
    """The images `[n, side, side, 1]` of the letters of each alphabet, of which no two look alike."""
    import numpy as np

    import metajax

    if path is None:
        sources = [metajax.data.glyphs(split, size=_SIZE) for split in ("train", "val", "test")]
    else:
        sources = [metajax.data.omniglot(path, protocol="lake", rotations=False, size=_SIZE)]
    found = {}
    for source in sources:
        groups = np.arange(source.num_classes) if source.groups is None else source.groups
        taken: set[int] = set()
        for name, classes in source.nodes.items():
            letters = []
            for number in classes:
                if groups[number] not in taken:
                    taken.add(groups[number])
                    letters.append(np.asarray(source.inputs[source.labels == number], np.float32) / 255)
            if len(letters) >= _LETTERS:
                found[name] = letters
    if len(found) < _ALPHABETS:
        raise ValueError(f"data must have {_ALPHABETS} alphabets of {_LETTERS} letters, got {', '.join(found)}")
    return found


def _stream(alphabets: dict[str, list[Any]], seed: int, steps: int) -> tuple[list[str], list[Any], list[Any]]:
    """Draws one stream.

    Returns:
      The names of its alphabets in order; of each, the new images of every step as episodes `[steps, 1, ...]`; of each,
      test images and their labels.
    """
    import numpy as np

    import metajax

    rng = np.random.default_rng(seed)
    names = rng.choice(sorted(alphabets), _ALPHABETS, replace=False).tolist()
    stream, test = [], []
    for place, name in enumerate(names):
        letters = [alphabets[name][number] for number in rng.permutation(len(alphabets[name]))[:_LETTERS]]
        parts = [rng.permutation(images) for images in letters]
        labels = place * _LETTERS + np.arange(_LETTERS, dtype=np.int32)
        test.append((np.concatenate([images[:_TEST] for images in parts]), np.repeat(labels, _TEST)))
        inputs = np.concatenate([images[_TEST:] for images in parts])
        targets = np.repeat(labels, [len(images) - _TEST for images in parts])
        rows = rng.integers(0, len(targets), [steps, 1, _NEW])
        new = metajax.Examples(inputs[rows], targets[rows], np.ones(rows.shape, bool))
        stream.append(metajax.Episode(new, new))
    return names, stream, test


def _draw(path: pathlib.Path, accuracies: dict[str, list[Any]]) -> None:
    """One panel for each way of learning: the accuracy of every alphabet after each, averaged over streams."""
    import matplotlib.figure
    import numpy as np

    figure = matplotlib.figure.Figure(figsize=(4 * len(_ROWS), 3.6), layout="constrained")
    panels = figure.subplots(1, len(_ROWS), sharey=True)
    for panel, (name, title) in zip(panels, _ROWS.items(), strict=True):
        mean = np.mean(accuracies[name], axis=0)
        for place in range(_ALPHABETS):
            panel.plot(range(place + 1, _ALPHABETS + 1), mean[place:, place], "o-", label=f"alphabet {place + 1}")
        panel.set_title(title)
        panel.set_xlabel("alphabets learned")
        panel.set_xticks(range(1, _ALPHABETS + 1))
        panel.set_ylim(0, 100)
    panels[0].set_ylabel("test accuracy in %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _launch.run(main)
