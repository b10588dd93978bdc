"""Evaluation on fixed episodes, and the report of a run."""

from metajax.evaluation._fewshot import Evaluation, Outputs, evaluate, predict, predict_query
from metajax.evaluation._metrics import mean_and_interval
from metajax.evaluation._report import report

__all__ = ["Evaluation", "Outputs", "evaluate", "mean_and_interval", "predict", "predict_query", "report"]
