"""Experiments as functions and their arguments: configs, runs on disk, and the launchers."""

from metajax.run._build import Experiment, build, load_config, load_facts, load_run, normalisation, on_features
from metajax.run._config import changed, complete, load
from metajax.run._folder import write_json
from metajax.run._job import Job, open_job
from metajax.run._process import LOST_PEER, launch, main, prepare
from metajax.run._select import Candidate, Selection, select
from metajax.run._sources import Facts, facts_of, input_form, open_out_of_scope, open_source

__all__ = [
    "LOST_PEER",
    "Candidate",
    "Experiment",
    "Facts",
    "Job",
    "Selection",
    "build",
    "changed",
    "complete",
    "facts_of",
    "input_form",
    "launch",
    "load",
    "load_config",
    "load_facts",
    "load_run",
    "main",
    "normalisation",
    "on_features",
    "open_job",
    "open_out_of_scope",
    "open_source",
    "prepare",
    "select",
    "write_json",
]
