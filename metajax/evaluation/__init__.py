"""Evaluation on fixed episodes, and a report of a run as an image."""

from metajax.evaluation._answers import answer_scores, best_span
from metajax.evaluation._fewshot import Evaluation, Outputs, default_judge, evaluate, predict, predict_query
from metajax.evaluation._judges import Judge
from metajax.evaluation._metrics import auroc, mean_and_interval, softmax
from metajax.evaluation._out_of_scope import out_of_scope
from metajax.evaluation._report import report
from metajax.evaluation._spans import answers

__all__ = [
    "Evaluation",
    "Judge",
    "Outputs",
    "answer_scores",
    "answers",
    "auroc",
    "best_span",
    "default_judge",
    "evaluate",
    "mean_and_interval",
    "out_of_scope",
    "predict",
    "predict_query",
    "report",
    "softmax",
]
