"""Evaluates a run on fixed episodes, and writes evaluation.json into its folder.

python -m experiments.evaluate --workdir=RUN                                 # as it was trained for, 600 episodes
python -m experiments.evaluate --workdir=RUN --ways=20 --shots=5             # other episodes
python -m experiments.evaluate --workdir=RUN --data=PATH --split=test        # other data of the same kind
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from absl import flags

from experiments import _launch

_WORKDIR = flags.DEFINE_string("workdir", None, "Run folder of experiments.train.", required=True)
_EPISODES = flags.DEFINE_integer("episodes", 600, "How many episodes, at least 2.")
_SEED = flags.DEFINE_integer("seed", None, "Which list of episodes; that of the run's config by default.")
_WAYS = flags.DEFINE_integer("ways", None, "Classes in an episode; as in the run's config by default.")
_SHOTS = flags.DEFINE_integer("shots", None, "Support examples of a class; as in the run's config by default.")
_QUERIES = flags.DEFINE_integer("queries", None, "Query examples of a class; as in the run's config by default.")
_STEPS = flags.DEFINE_integer("steps", None, "Inner steps; as in the run's config by default.")
_DATA = flags.DEFINE_string(
    "data", None, "Other data of the same kind: what data.path takes; for a run on glyphs, CLASS/NAME.png."
)
_SPLIT = flags.DEFINE_string(
    "split", "test", "train, val or test; of a folder that is not divided, test is a fifth of its classes."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best (by validation), or start: the pretrained weights.")

_OUTPUT = flags.DEFINE_string("output", None, "File for the result; evaluation.json in the run folder by default.")


def main() -> int:
    """Evaluates and prints the table; the last line is the result."""
    _launch.prepare()
    import metajax
    from experiments import _inputs, _runs

    workdir = pathlib.Path(_WORKDIR.value)
    config = metajax.training.load_config(workdir)
    experiment = metajax.training.build(config)
    given: dict[str, Any] = {"ways": _WAYS.value, "shots": _SHOTS.value, "queries": _QUERIES.value}
    spec = dataclasses.replace(experiment.spec, **{name: size for name, size in given.items() if size is not None})
    if _STEPS.value is not None and config["learner"]["name"] == "prototypical":
        raise ValueError(f"steps must not be given for prototypical, which takes no inner steps, got {_STEPS.value}")
    learner, params = metajax.load_run(workdir, checkpoint=_CHECKPOINT.value)
    source = metajax.training.open_source(config, _SPLIT.value, path=_DATA.value)
    one = metajax.data.episode(source, spec, seed=0, index=0)
    _inputs.check_inputs("data", one.query.inputs, learner, params)
    found = metajax.evaluation.evaluate(
        learner, params, source, spec,
        episodes=_EPISODES.value,
        seed=config["evaluation"]["seed"] if _SEED.value is None else _SEED.value,
        num_steps=experiment.eval_steps if _STEPS.value is None else _STEPS.value,
        normalisation=metajax.training.normalisation(config),
    )  # fmt: skip
    result = {
        "learner": config["learner"]["name"],
        **_runs.describe(found),
        "data": _DATA.value or config["data"]["path"] or config["data"]["name"],
        "split": _SPLIT.value,
        "checkpoint": _CHECKPOINT.value,
        "params_sha256": _runs.params_sha256(params),
    }
    _runs.write_json(pathlib.Path(_OUTPUT.value or workdir / "evaluation.json"), result)
    print(f"{'learner':<13}  {config['learner']['name']} from {workdir}")
    print(found)
    return 0


if __name__ == "__main__":
    _launch.run(main)
