"""Evaluates a run on fixed episodes, and writes evaluation.json into its folder.

python -m experiments.evaluate --workdir=RUN                                 # as it was trained for, 600 episodes
python -m experiments.evaluate --workdir=RUN --ways=20 --shots=5             # other episodes
python -m experiments.evaluate --workdir=RUN --data=PATH --split=test        # other data of the same kind
python -m experiments.evaluate --workdir=RUN --data=FILE --checkpoint=start  # texts, by the weights that it began with
python -m experiments.evaluate --workdir=RUN --checkpoint=start --override=learner.name=maml --override=inner.steps=10
python -m experiments.evaluate --workdir=RUN --soup=RUN2,RUN3                # the mean of the weights of three runs
python -m experiments.evaluate --workdir=RUN --names=fin_Latn,swh_Latn       # texts, some domains of the split alone
python -m experiments.evaluate --workdir=RUN --suite=cross_domain --suite_data=omniglot=PATH,mine=FOLDER  # other images

For a run on text, FILE is .json (as CLINC150), .jsonl, .csv or .tsv, maybe with .gz, and all its labels are classes.
Where a .json file has parts of texts of no class (oos_test and others), the AUROC of telling them from queries is found
too.
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
_TEXT = flags.DEFINE_string("text_column", None, "Column of texts in such a file; as in the run's config by default.")
_LABEL = flags.DEFINE_string("label_column", None, "Column of labels; as in the run's config by default.")
_NAMES = flags.DEFINE_list("names", None, "Texts: some of the classes or domains of the split, alone.")
_SPLIT = flags.DEFINE_string(
    "split", "test", "train, val or test; of a folder that is not divided, test is a fifth of its classes."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "last", "last, best (by validation), or start: the pretrained weights.")
_OVERRIDE = flags.DEFINE_multi_string(
    "override",
    [],
    "FIELD=VALUE of the run's config to evaluate with, such as learner.distance=cosine; the parameters must fit. With "
    "--checkpoint=start they are made for it: another learner over the same pretrained weights. As often as needed.",
)
_SOUP = flags.DEFINE_list(
    "soup",
    [],
    "Runs that began as this one did (config.init, or else seed): the mean of all their weights is evaluated.",
)
_SHUFFLE = flags.DEFINE_bool("shuffle_support", False, "Also evaluate with shuffled support labels: stands at chance.")
_SUITE = flags.DEFINE_enum("suite", None, ["cross_domain"], "Also evaluates on other sources of images, in one table.")
_SUITE_DATA = flags.DEFINE_list(
    "suite_data",
    [],
    "Beside the built-in characters: NAME=PATH, where NAME is omniglot, cifar_fs and so on, or any other "
    "for a folder CLASS/NAME.png.",
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the result; evaluation.json in the run folder by default.")


def main() -> int:
    """Evaluates and prints the table; the last line is the result."""
    _launch.prepare()
    import metajax
    from experiments import _inputs, _job, _runs, _suite

    workdir = pathlib.Path(_WORKDIR.value)
    trained_with = metajax.training.load_config(workdir)
    config = _inputs.with_columns(trained_with, _TEXT.value, _LABEL.value)
    config = _inputs.with_fields(config, _OVERRIDE.value)
    if _NAMES.value:
        if _DATA.value:
            raise ValueError(f"names must not be given with data, all of whose labels are classes, got {_NAMES.value}")
        config = _inputs.with_names(config, _SPLIT.value, _NAMES.value)
    output = _runs.out_file(_OUTPUT.value or workdir / "evaluation.json")
    experiment = metajax.training.build(config)
    if _SUITE_DATA.value and not _SUITE.value:
        raise ValueError(f"suite_data must come with suite, got {_SUITE_DATA.value}")
    others = _suite.parse(_SUITE_DATA.value, config) if _SUITE.value else {}
    if not all(_SOUP.value):
        raise ValueError(f"soup must hold folders of runs, got {_SOUP.value}")
    if _SOUP.value and _CHECKPOINT.value == "start":
        raise ValueError(f"soup must not be given with --checkpoint=start, got {_SOUP.value}")
    given: dict[str, Any] = {"ways": _WAYS.value, "shots": _SHOTS.value, "queries": _QUERIES.value}
    spec = dataclasses.replace(experiment.spec, **{name: size for name, size in given.items() if size is not None})
    if _DATA.value and config["data"]["name"] == "text":
        spec = dataclasses.replace(spec, hierarchical=False)  # other texts have no domains
    _inputs.check_steps(_STEPS.value, config)
    source = metajax.training.open_source(config, _SPLIT.value, path=_DATA.value)
    inputs = metajax.data.episode(source, spec, seed=0, index=0).query.inputs
    learner, params = metajax.load_run(workdir, checkpoint=_CHECKPOINT.value, config=config, inputs=inputs)
    params = _soup(trained_with, params) if _SOUP.value else params
    _inputs.check_inputs("data", inputs, learner, params)
    options: dict[str, Any] = {
        "episodes": _EPISODES.value,
        "seed": config["evaluation"]["seed"] if _SEED.value is None else _SEED.value,
        "num_steps": experiment.eval_steps if _STEPS.value is None else _STEPS.value,
    }
    if _SHUFFLE.value and not metajax.tasks.of(learner).classes:
        name = config["data"]["name"]
        raise ValueError(f"shuffle_support must not be given for {name}, which has no classes, got True")
    outside = metajax.training.open_out_of_scope(config, path=_DATA.value) if source.split == "test" else None
    truncated = getattr(source, "truncated", 0)
    deployed, known, (source, outside) = metajax.training.on_features(config, learner, params, source, outside)
    with _job.bar(options["episodes"], "evaluation") as progress:
        found = metajax.evaluation.evaluate(
            deployed, known, source, spec, normalisation=metajax.training.normalisation(config), progress=progress,
            **options,
        )  # fmt: skip
    more, notes = _more(config, found, deployed, known, source, outside, spec, options)
    if truncated:
        more["truncated"] = truncated
        notes.append(f"{'truncated':<13}  {truncated} texts of more than {config['data']['length']} tokens")
    if _SUITE.value:
        more["suite"] = _suite.evaluate(config, deployed, known, source, spec, others, options)
        notes.append(_suite.table(more["suite"]))
    result = {
        "learner": config["learner"]["name"],
        **_runs.describe(found),
        "data": _DATA.value or found.source,
        "split": _SPLIT.value,
        **({"names": _NAMES.value} if _NAMES.value else {}),
        **({} if _STEPS.value is None else {"steps": _STEPS.value}),
        **({"override": _OVERRIDE.value} if _OVERRIDE.value else {}),
        "checkpoint": _CHECKPOINT.value,
        **({"soup": _SOUP.value} if _SOUP.value else {}),
        **more,
        "params_sha256": metajax.training.params_sha256(params),
    }
    print(f"{'learner':<13}  {config['learner']['name']} from {workdir}")
    told = " (the pretrained weights, before meta-training)" if _CHECKPOINT.value == "start" else ""
    print(f"{'checkpoint':<13}  {_CHECKPOINT.value}{told}")
    if _SOUP.value:
        print(f"{'soup':<13}  the mean of its weights and those of {', '.join(_SOUP.value)}")
    for note in notes:
        print(note)
    print(found)
    _runs.write_json(output, result)
    return 0


def _soup(config: dict[str, Any], params: Any) -> Any:
    """The mean of these parameters and those of the runs of --soup, which must have begun at the same ones.

    Parameters of other beginnings mean nothing in the mean: units come in another order.
    """
    import jax
    import numpy as np

    import metajax

    def beginning(config: dict[str, Any]) -> dict[str, Any]:
        told = {name: config[name] for name in ("init", "model", "adapter", "learner")}
        return told if told["init"] else {**told, "seed": config["seed"]}

    solutions, wanted = [params], beginning(config)
    for run in _SOUP.value:
        of_run = metajax.training.load_config(run)
        other = beginning(of_run)
        for name in wanted:
            if other.get(name) != wanted[name]:
                raise ValueError(
                    f"soup must hold runs that began as workdir did, with {name} {wanted[name]!r}, got {run!r} with "
                    f"{other.get(name)!r}"
                )
        solutions.append(metajax.load_run(run, checkpoint=_CHECKPOINT.value, config=of_run)[1])
    return jax.tree.map(np.asarray, metajax.strategies.soup(solutions))


def _more(
    config: Any, found: Any, learner: Any, params: Any, source: Any, outside: Any, spec: Any, options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What is evaluated beside the accuracy: `(fields of the result, lines)`."""
    import metajax
    from experiments import _job

    fields: dict[str, Any] = {}
    notes: list[str] = []
    if _SHUFFLE.value:
        with _job.bar(options["episodes"], "control") as progress:
            control = metajax.evaluation.evaluate(
                learner, params, source, spec, shuffle_support=True, progress=progress, **options
            )
        fields |= {
            f"shuffled_support_{found.metric}_mean": control.mean,
            f"shuffled_support_{found.metric}_ci95": control.ci95,
        }
        notes.append(f"{'control':<13}  {control.summary()} with shuffled support labels")
    if outside is not None:
        # the nearest prototype says how far a text is from all of them, which probabilities leave out
        score: Any = "logit" if config["learner"]["name"] == "prototypical" else "probability"
        with _job.bar(options["episodes"], "out of scope") as progress:
            judge = metajax.evaluation.out_of_scope(outside, score=score)
            told = metajax.evaluation.evaluate(learner, params, source, spec, judge=judge, progress=progress, **options)
        fields |= {"oos_auroc_mean": told.mean, "oos_auroc_ci95": told.ci95, "oos_score": score}
        notes.append(f"{'out of scope':<13}  {len(outside.labels)} texts: {told.summary()} by {score}")
    return fields, notes


if __name__ == "__main__":
    _launch.run(main)
