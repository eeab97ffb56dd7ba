"""Editors to compare with: settings that are called with a model, its tokenizer and a case, and return an edit."""

from pliant.evaluation.baselines.alphaedit import AlphaEdit, KeyMemory
from pliant.evaluation.baselines.finetune import FineTune
from pliant.evaluation.baselines.lora import Lora
from pliant.evaluation.baselines.memit import Memit
from pliant.evaluation.baselines.random_direction import RandomDirection, randomised
from pliant.evaluation.baselines.rome import Rome
from pliant.evaluation.baselines.states import Editor

__all__ = [
    "AlphaEdit",
    "Editor",
    "FineTune",
    "KeyMemory",
    "Lora",
    "Memit",
    "RandomDirection",
    "Rome",
    "randomised",
]
