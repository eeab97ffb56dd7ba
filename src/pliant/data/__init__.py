"""Texts and the tokens made from them: for calibration, and for training.

Training data takes one way, a module a step: a name in the settings (`sources`, `local`) is opened as documents in one
column (`conversations`, `loading`); those are mixed and some held out (`mixture`); a tokenizer makes ids and labels
of them (`chat`, `packing`), which fill rows (`packing`) and batches (`collator`). `training_data` runs all of it.
"""

from pliant.data.calibration import calibration_tokens
from pliant.data.checks import DataCheck, check_data
from pliant.data.collator import Collator
from pliant.data.embedded import EMBEDDED_SOURCES, EmbeddedSource, documents
from pliant.data.sources import DATASETS, DatasetSource
from pliant.data.text import read_text, token_windows
from pliant.data.training import TrainingData, training_data

__all__ = [
    "DATASETS",
    "EMBEDDED_SOURCES",
    "Collator",
    "DataCheck",
    "DatasetSource",
    "EmbeddedSource",
    "TrainingData",
    "calibration_tokens",
    "check_data",
    "documents",
    "read_text",
    "token_windows",
    "training_data",
]
