"""Selection of a strategy for a family of tasks: successive halving against full training of all candidates.

    python -m experiments.select --out=runs/select
    python -m experiments.select --out=runs/select --data=OMNIGLOT      # a folder as `metajax.data.omniglot` takes it

There are six families, one for each script of the built-in characters, or of five alphabets of Omniglot each. Half of
the letters of a family are for training, a quarter for validation, and a quarter for testing. The experiment tests
whether the chosen strategy is within one 95 % interval of the best strategy, and measures the cost of the choice in
meta steps and in processor time of the steps. Prints a row for each family.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from metajax import run

_OUT = flags.DEFINE_string("out", "runs/select", "Folder of the table, the pictures, and what makes it go on.")
_DATA = flags.DEFINE_string("data", None, "Folder of Omniglot; without it, scripts of the embedded glyphs.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the division of letters, parameters and episodes.")
_BUDGET = flags.DEFINE_integer("budget", 1200, "Meta steps of all candidates together, for each family.")
_FACTOR = flags.DEFINE_integer("factor", 5, "How many times fewer candidates there are in the next rung.")
_EPISODES = flags.DEFINE_integer("episodes", 600, "Test episodes.")
_TOGETHER = flags.DEFINE_integer("together", 5, "Alphabets of Omniglot that make up a family.")
_FAMILIES = flags.DEFINE_integer("families", 6, "How many of the scripts or alphabets.")
_META_BATCH, _SIZE, _VALIDATION = 2, 14, 200


def main() -> int:
    """Selects a strategy for each family, trains all candidates, compares and prints the results."""
    run.prepare(host_devices=1)
    import jax

    import metajax
    from experiments import _runs

    out = _runs.out_folder(_OUT.value)
    if _TOGETHER.value < 1:
        raise ValueError(f"together must be an integer of at least 1, got {_TOGETHER.value}")
    families = list(_scripts() if _DATA.value is None else _alphabets(_DATA.value))
    if not 1 <= _FAMILIES.value <= len(families):
        raise ValueError(f"families must be an integer from 1 to {len(families)}, got {_FAMILIES.value}")
    candidates = _candidates()
    spec = metajax.data.EpisodeSpec(ways=5, shots=1, queries=5)
    rows: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    head = f"{'family':22s}{'chosen':>14s}{'test accuracy':>16s}{'best':>14s}{'test accuracy':>16s}"
    print(f"{head}  within  steps  processor time")
    for name, parts in families[: _FAMILIES.value]:
        found = metajax.select(
            candidates, (parts["train"], parts["val"]), _BUDGET.value, spec=spec, meta_batch=_META_BATCH,
            episodes=_VALIDATION, shots=(1, 5), factor=_FACTOR.value, seed=_SEED.value,
        )  # fmt: skip
        found.plot(out / f"{name.lower().replace(' ', '_')}.png")

        def stream(source: Any = parts["train"]) -> Iterator[Any]:
            index = 0
            while True:
                yield metajax.data.episode_batch(source, spec, seed=_SEED.value, start=index, count=_META_BATCH)
                index += _META_BATCH

        trained, cost, longest = {}, {}, found.rows[0].steps
        for candidate in candidates:
            example = metajax.data.episode(parts["train"], spec, seed=_SEED.value, index=0)
            state = candidate.outer.init(jax.random.key(_SEED.value), example)
            times: list[float] = []

            def clock(step: int, state: Any, metrics: Any, times: list[float] = times) -> None:
                float(metrics["loss"])  # waits for the step
                times.append(time.process_time())

            state = metajax.training.fit(candidate.outer, state, stream(), steps=longest, callbacks=[clock])
            trained[candidate.name] = state.params
            cost[candidate.name] = (times[-1] - times[0]) / (longest - 1)  # per step, without compilation

        def tested(candidate: Any, params: Any, source: Any = parts["test"]) -> Any:
            options = {"episodes": _EPISODES.value, "seed": _SEED.value, "num_steps": candidate.num_steps}
            return metajax.evaluation.evaluate(candidate.learner, params, source, spec, **options)

        judged = {candidate.name: tested(candidate, trained[candidate.name]) for candidate in candidates}
        chosen, best = tested(found.winner, found.params), max(judged, key=lambda one: judged[one].mean)
        row = {
            "family": name, "chosen": found.winner.name, "chosen_accuracy": [chosen.mean, chosen.ci95],
            "best": best, "best_accuracy": [judged[best].mean, judged[best].ci95],
            "within": bool(chosen.mean >= judged[best].mean - judged[best].ci95),
            "share_of_steps": found.steps / found.full_steps,
            "share_of_seconds": sum(row.steps * cost[row.name] for row in found.rows) / (longest * sum(cost.values())),
            "all": {one: [value.mean, value.ci95] for one, value in judged.items()},
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name[:22]:22s}{row['chosen']:>14s}{_told(chosen):>16s}{best:>14s}{_told(judged[best]):>16s}"
            f"{'yes' if row['within'] else 'no':>8s}{100 * row['share_of_steps']:5.0f} %"
            f"{100 * row['share_of_seconds']:14.0f} %",
            flush=True,
        )
        given = {flag.name: flag.value for flag in (_DATA, _TOGETHER, _SEED, _BUDGET, _FACTOR)}
        _runs.write_json(out / "select.json", {**given, "families": rows})
    print(f"chosen within one interval of the best: {sum(row['within'] for row in rows)} of {len(rows)}")
    print(found)
    return 0


def _candidates() -> list[Any]:
    """Returns ten strategies on two small networks."""
    import optax

    from metajax import hypergrad, learners, models, outer_update, run

    conv: dict[str, Any] = {"width": 16, "depth": 3, "pool": False, "normalisation": "support"}
    features, network = models.conv4(**conv), models.conv4(5, **conv)
    flat, step = models.mlp(5, hidden=(64,)), optax.sgd(0.4)
    first, exact = hypergrad.first_order(), hypergrad.mixed_mode()
    several: dict[str, Any] = {
        "proto": (learners.prototypical(features), exact, 3e-3),
        "proto_cosine": (learners.prototypical(features, distance="cosine"), exact, 3e-3),
        "proto_slow": (learners.prototypical(features), exact, 1e-4),
        "proto_flat": (learners.prototypical(models.mlp(64, hidden=(64,))), exact, 3e-3),
        "maml_1": (learners.maml(network, step, 1), exact, 3e-3),
        "maml_3": (learners.maml(network, step, 3), exact, 3e-3),
        "fomaml_3": (learners.maml(network, step, 3), first, 3e-3),
        "anil_3": (learners.maml(network, step, 3, adapts="head"), exact, 3e-3),
        "maml_flat": (learners.maml(flat, step, 3), exact, 3e-3),
        "reptile": (learners.reptile(network, optax.sgd(0.1), 3), hypergrad.displacement(), 1e-2),
    }
    return [
        run.Candidate(name, learner, outer_update(learner, optax.adam(rate), hypergrad=rule, before=False))
        for name, (learner, rule, rate) in several.items()
    ]


def _scripts() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each script with its letters in three parts. Look-alike letters are in the same part."""
    import numpy as np

    import metajax

    for split in ("train", "val", "test"):
        source: Any = metajax.data.glyphs(split, size=_SIZE)
        for script, members in source.nodes.items():
            rows = np.flatnonzero(np.isin(source.labels, members))
            labels = np.searchsorted(members, source.labels[rows])
            groups = source.groups[np.array(members)]
            yield script, _parts(script, source.inputs[rows], labels, groups, source.families[rows])


def _alphabets(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields groups of alphabets of the background set, in order of their names, with their letters in three parts."""
    import numpy as np

    import metajax

    letters: dict[str, list[Any]] = {}  # images of each letter, by alphabet
    for split in ("train", "val"):
        source: Any = metajax.data.omniglot(path, split=split, protocol="lake", rotations=False, size=_SIZE)
        for alphabet, members in source.nodes.items():
            letters[alphabet] = [source.inputs[source.labels == member] for member in members]
    names = sorted(letters)
    for start in range(0, len(names), _TOGETHER.value):
        some = names[start : start + _TOGETHER.value]
        images = [letter for alphabet in some for letter in letters[alphabet]]
        labels = np.repeat(np.arange(len(images)), [len(letter) for letter in images])
        yield f"{some[0]} to {some[-1]}", _parts(some[0], np.concatenate(images), labels, np.arange(len(images)), None)


def _parts(name: str, inputs: Any, labels: Any, groups: Any, families: Any) -> dict[str, Any]:
    """Splits the classes of a family for training, validation and test. Each group `[classes]` is in one part."""
    import numpy as np

    import metajax

    order = np.random.default_rng(_SEED.value).permutation(np.unique(groups))
    places = np.array([0.5, 0.75]) * len(order)
    parts = {}
    for part, some in zip(("train", "val", "test"), np.split(order, places.astype(int)), strict=True):
        kept = np.flatnonzero(np.isin(groups, some))
        rows = np.flatnonzero(np.isin(labels, kept))
        parts[part] = metajax.data.arrays(
            inputs[rows], labels[rows], split=part, groups=groups[kept],
            families=None if families is None else families[rows], name=name.lower(),
        )  # fmt: skip
    return parts


def _told(found: Any) -> str:
    return f"{100 * found.mean:.2f} +- {100 * found.ci95:.2f}"


if __name__ == "__main__":
    run.launch(main)
