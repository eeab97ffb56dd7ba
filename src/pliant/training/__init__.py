"""Training runs: what is trained on what, towards what, and what is kept of it."""

from pliant.training.plan import Plan, make_plan
from pliant.training.run import TrainingResult, train

__all__ = ["Plan", "TrainingResult", "make_plan", "train"]
