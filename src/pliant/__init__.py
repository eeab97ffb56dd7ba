"""Make a pretrained language model dynamic; importing this also registers its models with
transformers."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

# The command line answers --help without torch: its commands import what they need, when they need
# it.
_IS_COMMAND = bool(sys.argv) and (
    Path(sys.argv[0]).stem == "pliant" or (sys.argv[0] == "-m" and "pliant.cli" in sys.orig_argv)
)

if TYPE_CHECKING or not _IS_COMMAND:
    from pliant.architectures import ARCHITECTURES, NptConfig
    from pliant.conversion import convert
    from pliant.errors import PliantError
    from pliant.metrics import perplexity
    from pliant.models import load

__all__ = ["ARCHITECTURES", "NptConfig", "PliantError", "convert", "load", "perplexity"]
