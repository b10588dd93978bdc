"""Evaluates a run on fixed episodes, and writes evaluation.json into its folder.

python -m metajax.run evaluate --workdir=RUN                                 # as it was trained for, 600 episodes
python -m metajax.run evaluate --workdir=RUN --ways=20 --shots=5             # other episodes
python -m metajax.run evaluate --workdir=RUN --data=PATH --split=test        # other data of the same kind
python -m metajax.run evaluate --workdir=RUN --data=FILE --checkpoint=start  # texts, by the weights that it began with
python -m metajax.run evaluate --workdir=RUN --checkpoint=start --override=learner=maml --override=learner.inner=sgd
python -m metajax.run evaluate --workdir=RUN --soup=RUN2,RUN3                # the mean of the weights of three runs
python -m metajax.run evaluate --workdir=RUN --names=fin_Latn,swh_Latn       # texts, some domains of the split alone
python -m metajax.run evaluate --workdir=RUN --suite=cross_domain --suite_data=omniglot=PATH,mine=FOLDER  # other images

For a run on text, FILE is .json (as CLINC150), .jsonl, .csv or .tsv, maybe with .gz, and all its labels are classes.
Where a .json file has parts of texts of no class (oos_test and others), the AUROC of telling them from queries is found
too.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

from absl import flags

from metajax.run import _process

FLAGS = flags.FlagValues()  # of this launcher alone
_bool = functools.partial(flags.DEFINE_bool, flag_values=FLAGS)
_enum = functools.partial(flags.DEFINE_enum, flag_values=FLAGS)
_integer = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_list = functools.partial(flags.DEFINE_list, flag_values=FLAGS)
_multi_string = functools.partial(flags.DEFINE_multi_string, flag_values=FLAGS)
_string = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_WORKDIR = _string("workdir", None, "Run folder of metajax.run train.", required=True)
_EPISODES = _integer("episodes", 600, "How many episodes, at least 2.")
_SEED = _integer("seed", None, "Which list of episodes; that of the run's config by default.")
_WAYS = _integer("ways", None, "Classes in an episode; as in the run's config by default.")
_SHOTS = _integer("shots", None, "Support examples of a class; as in the run's config by default.")
_QUERIES = _integer("queries", None, "Query examples of a class; as in the run's config by default.")
_STEPS = _integer("steps", None, "Inner steps; as in the run's config by default.")
_DATA = _string("data", None, "Other data of the same kind: what data.path takes; for a run on glyphs, CLASS/NAME.png.")
_TEXT = _string("text_column", None, "Column of texts in such a file; as in the run's config by default.")
_LABEL = _string("label_column", None, "Column of labels; as in the run's config by default.")
_NAMES = _list("names", None, "Texts: some of the classes or domains of the split, alone.")
_SPLIT = _string(
    "split", "test", "train, val or test; of a folder that is not divided, test is a fifth of its classes."
)
_CHECKPOINT = _string("checkpoint", "last", "last, best (by validation), or start: the pretrained weights.")
_OVERRIDE = _multi_string(
    "override",
    [],
    "FIELD=VALUE of the run's config to evaluate with, such as learner.distance=cosine; the parameters must fit. With "
    "--checkpoint=start they are made for it: another learner over the same pretrained weights. As often as needed.",
)
_SOUP = _list(
    "soup",
    [],
    "Runs that began as this one did (config.init, or else seed): the mean of all their weights is evaluated.",
)
_SHUFFLE = _bool("shuffle_support", False, "Also evaluate with shuffled support labels: stands at chance.")
_SUITE = _enum("suite", None, ["cross_domain"], "Also evaluates on other sources of images, in one table.")
_SUITE_DATA = _list(
    "suite_data",
    [],
    "Beside the built-in characters: NAME=PATH, where NAME is omniglot, cifar_fs and so on, or any other "
    "for a folder CLASS/NAME.png.",
)
_OUTPUT = _string("output", None, "File for the result; evaluation.json in the run folder by default.")


def main() -> int:
    """Evaluates and prints the table; the last line is the result."""
    _process.prepare()
    import metajax
    from metajax.run import _build, _config, _folder, _inputs, _job, _sources, _suite

    workdir = pathlib.Path(_WORKDIR.value)
    trained_with, facts = _build.load_config(workdir), _build.load_facts(workdir)
    config = _config.changed(
        _inputs.with_columns(_build.load_config(workdir), _TEXT.value, _LABEL.value), _OVERRIDE.value
    )
    if _NAMES.value:
        if _DATA.value:
            raise ValueError(f"names must not be given with data, all of whose labels are classes, got {_NAMES.value}")
        config = _inputs.with_names(config, _SPLIT.value, _NAMES.value)
    output = _folder.out_file(_OUTPUT.value or workdir / "evaluation.json")
    experiment = _build.build(config, facts)
    if _SUITE_DATA.value and not _SUITE.value:
        raise ValueError(f"suite_data must come with suite, got {_SUITE_DATA.value}")
    others = _suite.parse(_SUITE_DATA.value, config, facts) if _SUITE.value else {}
    if not all(_SOUP.value):
        raise ValueError(f"soup must hold folders of runs, got {_SOUP.value}")
    if _SOUP.value and _CHECKPOINT.value == "start":
        raise ValueError(f"soup must not be given with --checkpoint=start, got {_SOUP.value}")
    given: dict[str, Any] = {"ways": _WAYS.value, "shots": _SHOTS.value, "queries": _QUERIES.value}
    spec = dataclasses.replace(experiment.spec, **{name: size for name, size in given.items() if size is not None})
    if _DATA.value and "files" in config.data:
        spec = dataclasses.replace(spec, hierarchical=False)  # other texts have no domains
    _inputs.check_steps(_STEPS.value, config)
    source = _sources.open_source(config, _SPLIT.value, path=_DATA.value)
    inputs = metajax.data.episode(source, spec, seed=0, index=0).query.inputs
    learner, params = _build.load_run(workdir, checkpoint=_CHECKPOINT.value, config=config, inputs=inputs)
    params = _soup(trained_with, params) if _SOUP.value else params
    _inputs.check_inputs("data", inputs, learner, params)
    options: dict[str, Any] = {
        "episodes": _EPISODES.value,
        "seed": config.evaluation.seed if _SEED.value is None else _SEED.value,
        "num_steps": experiment.num_steps if _STEPS.value is None else _STEPS.value,
    }
    if _SHUFFLE.value and not metajax.tasks.of(learner).classes:
        raise ValueError(f"shuffle_support must not be given for {config.data.name}, which has no classes, got True")
    outside = _sources.open_out_of_scope(config, path=_DATA.value) if source.split == "test" else None
    truncated = getattr(source, "truncated", 0)
    deployed, known, (source, outside) = _build.on_features(config, facts, learner, params, source, outside)
    with _job.bar(options["episodes"], "evaluation") as progress:
        found = metajax.evaluation.evaluate(
            deployed, known, source, spec, normalisation=_build.normalisation(config), progress=progress,
            **options,
        )  # fmt: skip
    more, notes = _more(config, found, deployed, known, source, outside, spec, options)
    if truncated:
        more["truncated"] = truncated
        notes.append(f"{'truncated':<13}  {truncated} texts of more than {config.data.max_length} tokens")
    if _SUITE.value:
        more["suite"] = _suite.evaluate(config, deployed, known, source, spec, others, options)
        notes.append(_suite.table(more["suite"]))
    name = deployed_name(config)
    result = {
        "learner": name,
        **_folder.describe(found),
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
    print(f"{'learner':<13}  {name} from {workdir}")
    told = " (the pretrained weights, before meta-training)" if _CHECKPOINT.value == "start" else ""
    print(f"{'checkpoint':<13}  {_CHECKPOINT.value}{told}")
    if _SOUP.value:
        print(f"{'soup':<13}  the mean of its weights and those of {', '.join(_SOUP.value)}")
    for note in notes:
        print(note)
    print(found)
    _folder.write_json(output, result)
    return 0


def deployed_name(config: Any) -> str:
    """The name of the learner that is evaluated."""
    deployed = config.deployed
    return deployed.name if deployed is not None and "name" in deployed else config.learner.name


def _soup(config: Any, params: Any) -> Any:
    """The mean of these parameters and those of the runs of --soup, which must have begun at the same ones.

    Parameters of other beginnings mean nothing in the mean: units come in another order.
    """
    import jax
    import numpy as np

    import metajax
    from metajax.run import _build, _values

    def beginning(config: Any) -> dict[str, Any]:
        told = {name: _values.plain(config[name]) for name in ("init", "model", "wrap", "learner")}
        return told if told["init"] else {**told, "seed": config.seed}

    solutions, wanted = [params], beginning(config)
    for run in _SOUP.value:
        of_run = _build.load_config(run)
        other = beginning(of_run)
        for name in wanted:
            if other.get(name) != wanted[name]:
                raise ValueError(
                    f"soup must hold runs that began as workdir did, with {name} {wanted[name]!r}, got {run!r} with "
                    f"{other.get(name)!r}"
                )
        solutions.append(_build.load_run(run, checkpoint=_CHECKPOINT.value, config=of_run)[1])
    return jax.tree.map(np.asarray, metajax.training.soup(solutions))


def _more(
    config: Any, found: Any, learner: Any, params: Any, source: Any, outside: Any, spec: Any, options: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What is evaluated beside the accuracy: `(fields of the result, lines)`."""
    import metajax
    from metajax.run import _job

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
        score: Any = "logit" if deployed_name(config) == "prototypical" else "probability"
        with _job.bar(options["episodes"], "out of scope") as progress:
            judge = metajax.evaluation.out_of_scope(outside, score=score)
            told = metajax.evaluation.evaluate(learner, params, source, spec, judge=judge, progress=progress, **options)
        fields |= {"oos_auroc_mean": told.mean, "oos_auroc_ci95": told.ci95, "oos_score": score}
        notes.append(f"{'out of scope':<13}  {len(outside.labels)} texts: {told.summary()} by {score}")
    return fields, notes
