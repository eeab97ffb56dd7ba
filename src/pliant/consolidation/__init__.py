"""Learning from a context for good: what a text says becomes an edit of the weights, written in closed form.

The way of a fact: it is asked for in several wordings (`facts`, `queries`), which become rows of tokens (`rows`); what
the states should be at the subject and at the answer is solved for (`solve`, `stages`, `targets`), written into
``down_proj`` (`writers`), held to a budget (`budget`), and entered in the model's ledger (`consolidate`).
Which layers serve a model best is found by trying (`sweep`).
"""

from pliant.consolidation.consolidate import consolidate
from pliant.consolidation.settings import POSITIONS, TARGETS, TASKS, Consolidation
from pliant.consolidation.sweep import sweep_layers
from pliant.consolidation.writers import WRITERS, WriteSettings

__all__ = ["POSITIONS", "TARGETS", "TASKS", "WRITERS", "Consolidation", "WriteSettings", "consolidate", "sweep_layers"]
