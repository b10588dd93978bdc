"""Evaluation on fixed episodes, and the report of a run."""

from metajax.evaluation._answers import answer_scores, best_span
from metajax.evaluation._fewshot import Evaluation, Outputs, evaluate, predict, predict_query
from metajax.evaluation._metrics import auroc, mean_and_interval
from metajax.evaluation._out_of_scope import OutOfScope, evaluate_out_of_scope
from metajax.evaluation._report import report
from metajax.evaluation._spans import AnswerEvaluation, AnswerScores, evaluate_answers

__all__ = [
    "AnswerEvaluation",
    "AnswerScores",
    "Evaluation",
    "OutOfScope",
    "Outputs",
    "answer_scores",
    "auroc",
    "best_span",
    "evaluate",
    "evaluate_answers",
    "evaluate_out_of_scope",
    "mean_and_interval",
    "predict",
    "predict_query",
    "report",
]
