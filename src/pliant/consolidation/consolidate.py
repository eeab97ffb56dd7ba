"""``pliant.consolidate``: what a context says becomes an edit of the weights, written in closed form.

What is written at a subject may be searched for by gradient first, as ``target`` says.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pliant.consolidation.facts import Fact, facts_of
from pliant.consolidation.resources import Resources, resources_of
from pliant.consolidation.settings import Consolidation
from pliant.consolidation.solve import Solution, Solver
from pliant.consolidation.writers import WriteSettings
from pliant.key_moments import NUM_TOKENS
from pliant.models import DynamicCausalLM, Layers
from pliant.models.edits import Edit
from pliant.statistics import Progress, evaluating, frozen

SHOWN = 16
"""Facts of a batch that the ledger describes in words."""


def consolidate(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    context: str | Sequence[str],
    queries: str | Sequence[Any] | None = None,
    answer: str | Sequence[str | None] | None = None,
    subject: str | Sequence[str | None] | None = None,
    *,
    layers: Layers | None = None,
    writer: str = "covariance",
    target: str = "auto",
    alpha: float = 1.0,
    settings: Consolidation | None = None,
    text: str | os.PathLike | Iterable[str] | None = None,
    num_tokens: int = NUM_TOKENS,
    progress: Progress | None = None,
) -> Edit:
    """Learns ``context`` for good: writes it into the weights as one edit of the ledger, and returns that edit.

    Afterwards the model answers the queries without the context. No weight is trained; ``optimised``, and ``auto``
    where a forward pass falls short, take gradients of one vector a fact. ``pliant.revert(model, edit.id)`` takes the
    edit back.

    Args:
        model: A pliant model, dense or converted, quantised or not.
        tokenizer: Its tokenizer.
        context: A text to learn, or several: these make one edit.
        queries: What the text answers: a question, or a beginning that the answer completes, or several of them;
            for several contexts a list of these. By default the model makes them.
        answer: The answer, one a context. By default the model's own with the context in view.
        subject: What the fact is about, as the queries write it, one a context. By default found by surprise.
        layers: Where to write; see :class:`Consolidation`.
        writer: Closed form of the write.
        target: What is written.
        alpha: Strength.
        settings: All of these and more, in place of the four above.
        text: Neutral text for the statistics of the keys, as for ``pliant.key_moments.cached_key_moments``.
        num_tokens: How much of it to read, once for each base.
        progress: Called with a label, the steps done and the steps there are.

    Raises:
        ConfigError: A setting is out of range.
        ConversionError: A layer does not exist.
        DataError: The embedded texts are missing.
        EditError: A context is empty, lists differ in length, a query cannot be made, tokens are routed past the MLP
            of a layer to write in, the KL budget leaves nothing, or the edit is not finite. The model is unchanged.
    """
    if settings is None:
        settings = Consolidation(layers=layers, target=target, alpha=alpha, write=WriteSettings(writer=writer))
    settings.places(model)  # refused before anything is read
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), frozen(model):
        facts = facts_of(model, tokenizer, context, queries, answer, subject)
        resources = resources_of(model, tokenizer, text, num_tokens)
        solution = solution_of(model, tokenizer, facts, settings, resources, progress)
    details = {
        **solution.details,
        "target": settings.target,
        "writer": settings.write.writer,
        "alpha": settings.alpha,
        "facts": len(facts),
        "queries": [list(fact.prompts) for fact in facts[:SHOWN]],
        "answers": [fact.answers[0] for fact in facts[:SHOWN]],
        "subjects": [fact.subject for fact in facts[:SHOWN]],
    }
    context = "\n".join(fact.context for fact in facts)
    edit = Edit(context=context, deltas=dict(solution.deltas), kl=solution.kl, details=details)
    return model.edits.add(edit)


def solution_of(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    settings: Consolidation,
    resources: Resources,
    progress: Progress | None = None,
) -> Solution:
    """Returns what is to be written for ``facts``; the model is in evaluation mode, its parameters frozen.

    Raises:
        EditError: As :func:`consolidate` does.
    """
    subject_layers, answer_layers = settings.places(model)
    solver = Solver(
        model,
        tokenizer,
        facts,
        settings,
        moments=resources.moments(model, [*subject_layers, *answer_layers], progress),
        prefixes=resources.prefixes(model, settings.num_prefixes, settings.seed),
        neutral=resources.neutral_text(model),
    )
    return solver.solve(subject_layers, answer_layers)
