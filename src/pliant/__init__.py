"""Make a pretrained language model dynamic; importing this registers its models too."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The command line answers --help without torch: each of its commands imports what it needs.
_IS_COMMAND = bool(sys.argv) and (
    Path(sys.argv[0]).stem == "pliant"
    or (sys.argv[0] == "-m" and any(argument.startswith("pliant.cli") for argument in sys.orig_argv))
)

if TYPE_CHECKING or not _IS_COMMAND:
    from pliant.architectures import ARCHITECTURES, DtfConfig, ModConfig, NptConfig, SttConfig
    from pliant.conversion import calibrate, convert
    from pliant.errors import PliantError
    from pliant.metrics import perplexity
    from pliant.models import load
    from pliant.models.ledger import edits, revert
if TYPE_CHECKING:
    from pliant.consolidation import consolidate
    from pliant.evaluation import evaluate
    from pliant.evaluation.comparison.compare import compare
    from pliant.training import train

__all__ = [
    "ARCHITECTURES",
    "DtfConfig",
    "ModConfig",
    "NptConfig",
    "PliantError",
    "SttConfig",
    "calibrate",
    "compare",
    "consolidate",
    "convert",
    "edits",
    "evaluate",
    "load",
    "perplexity",
    "revert",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "consolidate":  # not needed to load a model and run it
        from pliant.consolidation import consolidate

        return consolidate
    if name == "evaluate":
        from pliant.evaluation import evaluate

        return evaluate
    if name == "compare":
        from pliant.evaluation.comparison.compare import compare

        return compare
    if name == "train":  # brings the trainer of transformers, which takes seconds to import
        from pliant.training import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
