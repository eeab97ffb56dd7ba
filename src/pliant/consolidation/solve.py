"""From facts to the changes of ``down_proj`` that hold them: rows, targets and writes, in order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.consolidation.budget import NeutralText, divergence, shrunk
from pliant.consolidation.facts import Fact
from pliant.consolidation.forward import PartialPass
from pliant.consolidation.queries import OTHER_SUBJECTS
from pliant.consolidation.rows import Row, fill_token, gathered, open_ids, padded, row
from pliant.consolidation.settings import Consolidation
from pliant.consolidation.stages import (
    AnswerGoal,
    ContextGoal,
    Goal,
    Problem,
    SubjectGoal,
    SubjectStage,
    context_places,
    write_layers,
)
from pliant.consolidation.writers import WriteSettings
from pliant.errors import EditError
from pliant.key_moments import KeyMoments
from pliant.models import DynamicCausalLM
from pliant.models.edits import Delta
from pliant.models.quantised import without_gradient

FACTS_AT_ONCE = 64
"""Facts whose subjects are looked at together."""
SUBJECT_BUDGET = 0.8
"""Share of the KL budget that the subjects may take, so that the answers have room."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What is to be written.

    Attributes:
        deltas: The changes by projection.
        kl: The divergence that they cause on neutral text, in nats a token.
        details: Where they are, how many facts needed gradients, and the share of the subject's change that is left.
    """

    deltas: Mapping[str, Delta]
    kl: float
    details: Mapping[str, Any]


class Solver:
    """Solves for one edit of a batch of facts.

    Args:
        model: The model, in evaluation mode, its parameters frozen.
        tokenizer: Its tokenizer.
        facts: What to learn.
        settings: How.
        moments: Of the keys of every layer that is written in.
        prefixes: Beginnings of text to ask behind.
        neutral: Text on which the model should stay as it is.
    """

    def __init__(
        self,
        model: DynamicCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Fact],
        settings: Consolidation,
        *,
        moments: Mapping[int, KeyMoments],
        prefixes: Sequence[str],
        neutral: NeutralText,
    ) -> None:
        self.model, self.tokenizer, self.facts, self.settings = model, tokenizer, facts, settings
        self.moments, self.prefixes, self.neutral = moments, prefixes, neutral
        self.fill = fill_token(tokenizer)
        self.problem = self._problem()

    def solve(self, subject_layers: Sequence[int], answer_layers: Sequence[int]) -> Solution:
        """Returns the changes, within the KL budget, and what the ledger should say of them.

        Raises:
            EditError: There is nothing to write in these layers, or the budget leaves nothing of it.
        """
        details: dict[str, Any] = {"layers": [*subject_layers, *answer_layers], "optimised": 0}
        named = self.problem.with_subjects()
        subjects: dict[str, Delta] = {}
        if subject_layers and named.rows:
            values, details["optimised"] = self._subject_values(named, subject_layers[-1])
            goal = SubjectGoal(named, values)
            subjects = self._write(named, subject_layers, goal, self.settings.subject_write, {})
        if not subjects and not answer_layers:
            raise EditError(
                "layers must leave something to write; got only layers that rewrite a subject, and no query names one. "
                "Give the subject as the queries write it, or layers of the upper half."
            )
        solved, budget = self._with_answers(subjects, answer_layers), self._budget()
        kl = divergence(self.model, solved, self.neutral)
        if budget is None or kl <= budget:
            return Solution(deltas=solved, kl=kl, details={**details, "share": 1.0})
        share = 1.0
        if subjects:  # less there leaves more to the answer, which is solved for anew
            part = budget * SUBJECT_BUDGET / self.settings.alpha**2
            subjects, _, share = shrunk(self.model, subjects, self.neutral, part)
            if share < 1.0:
                solved = self._with_answers(subjects, answer_layers)
                kl = divergence(self.model, solved, self.neutral)
        solved, kl, left = shrunk(self.model, solved, self.neutral, budget, whole=kl)
        return Solution(deltas=solved, kl=kl, details={**details, "share": left * share})

    def _budget(self) -> float | None:
        """Returns the divergence that the facts may cause together."""
        return None if self.settings.kl_budget is None else self.settings.kl_budget * math.sqrt(len(self.facts))

    def _with_answers(self, subjects: Mapping[str, Delta], layers: Sequence[int]) -> dict[str, Delta]:
        """Returns the changes at the subjects, and those that then are missing where the answers are predicted."""
        deltas = dict(subjects)
        if layers:
            deltas |= self._write(self.problem, layers, self._goal(layers), self.settings.write, subjects)
        scale = 1.0 if self.settings.target == "context" else self.settings.alpha
        return {name: Delta(left=delta.left * scale, right=delta.right) for name, delta in deltas.items()}

    def _write(
        self,
        problem: Problem,
        layers: Sequence[int],
        goal: Goal,
        settings: WriteSettings,
        given: Mapping[str, Delta],
    ) -> dict[str, Delta]:
        return write_layers(self.model, problem, layers, goal, settings, self.moments, given, self.fill)

    def _problem(self) -> Problem:
        """The rows that ask for the facts behind the prefixes, and the same asked about other subjects."""
        rows, contrast = [], []
        count = self.settings.contrast
        others = max(1, count // len(self.facts)) if count else 0
        for index, fact in enumerate(self.facts):
            for ask in fact.asks:
                for prefix in self._prefixes(ask.takes_prefix):
                    prompt = prefix + ask.prompt
                    rows.append(row(self.tokenizer, prompt, ask.answer, subject=fact.subject, fact=index))
            first = fact.asks[0]
            if not fact.subject or fact.subject not in first.prompt:
                continue
            for shift in range(others):
                other = OTHER_SUBJECTS[(index * others + shift) % len(OTHER_SUBJECTS)]
                if other not in fact.context:
                    prompt = first.prompt.replace(fact.subject, other)
                    contrast.append(row(self.tokenizer, prompt, first.answer, subject=other, fact=index))
        return Problem(rows=rows, contrast=contrast, facts=len(self.facts))

    def _prefixes(self, wanted: bool) -> Sequence[str]:
        return self.prefixes if wanted else ("",)

    def _subject_values(self, problem: Problem, layer: int) -> tuple[Float[Tensor, "facts d_model"], int]:
        """Returns what to add to the subjects' states after ``layer``, and how many facts needed gradients for it."""
        target, values, optimised = self._searched_target(), [], 0
        for start in range(0, problem.facts, FACTS_AT_ONCE):
            part = problem.part(range(start, min(start + FACTS_AT_ONCE, problem.facts)))
            stage = SubjectStage(self.model, part, layer, self.fill)
            if target == "optimised":
                value, wanted = torch.zeros_like(stage.state), stage.named
            else:
                value, log_p = stage.strongest(self._answer_change(part, layer), self.settings.enough)
                wanted = stage.named & (log_p.cpu() < self.settings.enough) & (target == "auto")
            if wanted.any():
                value = torch.where(wanted.to(value.device)[:, None], stage.search(wanted).to(value), value)
            values.append(value.cpu())
            optimised += int(wanted.sum())
        return torch.cat(values), optimised

    def _searched_target(self) -> str:
        """Returns the target, which without gradients is ``unembedding`` in the place of ``auto``.

        Raises:
            EditError: Gradients are asked for, and the model's weights let none through.
        """
        target = self.settings.target
        if without_gradient(self.model) is None:
            return target
        if target == "optimised":
            raise EditError(
                "target must be 'unembedding' or 'context' for a model whose quantised layers pass no gradient on, "
                "as int8 on a CPU; got 'optimised'. Choose one of these, or load the model without quantization_config."
            )
        return "unembedding" if target == "auto" else target

    @torch.no_grad()
    def _answer_change(self, problem: Problem, layer: int) -> Float[Tensor, "facts d_model"]:
        """Returns, for each fact, what its answer's state after ``layer`` has over that of what the model would say.

        The states are those of the last token of each, read behind the prefixes.
        """
        firsts = {row.fact: row for row in reversed(problem.rows)}
        order = [firsts[fact] for fact in range(problem.facts)]
        asked = [Row(ids=row.ids[: len(row.ids) - row.length + 1], length=1) for row in order]
        states = PartialPass(self.model, padded(asked, self.fill), layer)
        _, last = states.run(len(states.layers) - 1)
        norm, head = self.model.model.norm, self.model.lm_head
        ends = gathered(last, [row.places for row in asked])
        said = head(norm(ends.to(head.weight.dtype))).argmax(-1).tolist()
        leads = [open_ids(self.tokenizer, prefix or "\n") for prefix in self.prefixes]
        words = [row.answer for row in order] + [(token,) for token in said]
        rows = [Row(ids=(*lead, *word), length=1) for word in words for lead in leads]
        _, after = PartialPass(self.model, padded(rows, self.fill), layer).run(layer)
        means = gathered(after, [[len(row.ids) - 1] for row in rows]).view(len(words), len(leads), -1).mean(1)
        return means[: len(order)] - means[len(order) :]

    def _goal(self, layers: Sequence[int]) -> Goal:
        if self.settings.target == "context":
            return self._context_goal(layers)
        return AnswerGoal(self.model, self.problem, self.settings.margin)

    @torch.no_grad()
    def _context_goal(self, layers: Sequence[int]) -> ContextGoal:
        """Reads the states behind each fact's context; the places of a row are counted from its end."""
        asks = [
            (fact, ask, prefix)
            for fact in self.facts
            for ask in fact.asks
            for prefix in self._prefixes(ask.takes_prefix)
        ]
        states = []
        for (fact, ask, prefix), without in zip(asks, self.problem.rows, strict=True):
            full = row(self.tokenizer, ask.in_context(fact.context, prefix), ask.answer, subject=fact.subject)
            shift = len(full.ids) - len(without.ids)
            places = [place + shift for place in context_places(without, self.settings.positions)]
            _, after = PartialPass(self.model, padded([full], self.fill), layers[0]).run(layers[-1])
            states.append(gathered(after, [places]))
        return ContextGoal(torch.cat(states), self.settings.alpha, self.settings.positions)
