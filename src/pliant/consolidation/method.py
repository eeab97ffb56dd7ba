"""What settings that are left out stand for, so that two runs can be told apart by what they did."""

import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from pliant.consolidation import budget, queries, solve, stages, targets
from pliant.consolidation.resources import neutral_tokens
from pliant.consolidation.settings import Consolidation
from pliant.key_moments import NUM_TOKENS
from pliant.models import DynamicCausalLM

CONSTANTS = {
    stages: ("STRENGTHS", "STEPS", "LEARNING_RATE", "CLAMP", "DECAY", "ENOUGH"),
    targets: ("COMPETITORS", "ROUNDS", "SLACK"),
    solve: ("SUBJECT_BUDGET",),
    budget: ("TRIALS", "SMALLEST", "CLOSER"),
}
"""What the stages are fixed to, by module."""


def method_of(settings: Consolidation, model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what decides an edit beside ``settings``, as JSON values.

    The layers of this model that are written in, the constants of the stages, and twelve digits each for the default
    neutral text and for the other subjects.
    """
    subject_layers, answer_layers = settings.places(model)
    fixed = {name.lower(): getattr(module, name) for module, names in CONSTANTS.items() for name in names}
    return {
        "subject_layers": subject_layers,
        "answer_layers": answer_layers,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in fixed.items()},
        "moment_tokens": NUM_TOKENS,
        "neutral_text": _digits(neutral_tokens(model, tokenizer).numpy().tobytes()),
        "other_subjects": _digits("\n".join(queries.OTHER_SUBJECTS).encode()),
    }


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
