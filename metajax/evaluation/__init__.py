"""Evaluation on fixed episodes, and the report of a run."""

from metajax.evaluation._answers import answer_scores, best_span
from metajax.evaluation._fewshot import Evaluation, Outputs, evaluate, predict, predict_query
from metajax.evaluation._metrics import mean_and_interval
from metajax.evaluation._report import report
from metajax.evaluation._spans import AnswerEvaluation, AnswerScores, evaluate_answers

__all__ = [
    "AnswerEvaluation",
    "AnswerScores",
    "Evaluation",
    "Outputs",
    "answer_scores",
    "best_span",
    "evaluate",
    "evaluate_answers",
    "mean_and_interval",
    "predict",
    "predict_query",
    "report",
]
