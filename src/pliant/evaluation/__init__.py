"""What edits and conversions do to a model: editors on cases, and benchmark tasks beside the base."""

from pliant.evaluation.editing.cases import EditCase, counterfact, squad, zsre
from pliant.evaluation.editing.editors import EDITORS, Learn
from pliant.evaluation.editing.figures import MODES, report
from pliant.evaluation.editing.runs import evaluate_batches, evaluate_edits, evaluate_sequence
from pliant.evaluation.editing.scores import neighbour_continuations, score_case, score_cases
from pliant.evaluation.intervals import Interval, paired_difference, recovered, summary
from pliant.evaluation.retention import HeldOut, choice_records, held_out_tokens, hellaswag, mmlu
from pliant.evaluation.scoring import AnswerScores, answer_log_probs, continuations, free_answers, free_running_exact
from pliant.evaluation.suites import SUITES, evaluate
from pliant.evaluation.tasks.run import evaluate_tasks
from pliant.evaluation.tasks.settings import Benchmarks
from pliant.evaluation.tasks.table import TASK_NAMES, TASKS

__all__ = [
    "EDITORS",
    "MODES",
    "SUITES",
    "TASKS",
    "TASK_NAMES",
    "AnswerScores",
    "Benchmarks",
    "EditCase",
    "HeldOut",
    "Interval",
    "Learn",
    "answer_log_probs",
    "choice_records",
    "continuations",
    "counterfact",
    "evaluate",
    "evaluate_batches",
    "evaluate_edits",
    "evaluate_sequence",
    "evaluate_tasks",
    "free_answers",
    "free_running_exact",
    "held_out_tokens",
    "hellaswag",
    "mmlu",
    "neighbour_continuations",
    "paired_difference",
    "recovered",
    "report",
    "score_case",
    "score_cases",
    "squad",
    "summary",
    "zsre",
]
