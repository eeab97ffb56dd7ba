"""From facts to the changes of ``down_proj`` that hold them: rows, targets and writes, in order."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.consolidation.budget import NeutralText, shrunk
from pliant.consolidation.facts import Fact
from pliant.consolidation.forward import PartialPass
from pliant.consolidation.queries import OTHER_SUBJECTS
from pliant.consolidation.rows import Row, fill_token, gathered, open_ids, padded, row
from pliant.consolidation.settings import Consolidation
from pliant.consolidation.stages import (
    AnswerGoal,
    ContextGoal,
    Problem,
    SubjectStage,
    context_places,
    write_answers,
)
from pliant.consolidation.writers import write
from pliant.errors import EditError
from pliant.key_moments import KeyMoments
from pliant.models import DynamicCausalLM
from pliant.models.edits import Delta, down_proj

FACTS_AT_ONCE = 64
"""Facts whose subjects are looked at together."""
SUBJECT_BUDGET = 0.8
"""Share of the KL budget that the subjects may take, so that the answers have room."""


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

    def solve(
        self, subject_layers: Sequence[int], answer_layers: Sequence[int]
    ) -> tuple[dict[str, Delta], dict[str, Any]]:
        """Returns the changes, and what the ledger should say of them.

        Raises:
            EditError: There is nothing to write in these layers.
        """
        details: dict[str, Any] = {"layers": [*subject_layers, *answer_layers], "optimised": 0}
        deltas: dict[str, Delta] = {}
        for layer in subject_layers:
            if any(row.subject is not None for row in self.problem.rows):
                deltas[down_proj(layer)], details["optimised"] = self._write_subjects(layer)
        if deltas:
            budget = self.settings.kl_budget and self.settings.kl_budget * SUBJECT_BUDGET / self.settings.alpha**2
            deltas, _, details["subject_share"] = shrunk(self.model, deltas, self.neutral, budget)
        if answer_layers:
            deltas |= write_answers(
                self.model,
                self.problem,
                answer_layers,
                self._goal(answer_layers),
                self.settings.write,
                self.moments,
                deltas,
                self.fill,
            )
        if not deltas:
            raise EditError(
                "layers must leave something to write; got only layers that rewrite a subject, and no query names one. "
                "Give the subject as the queries write it, or layers of the upper half."
            )
        scale = 1.0 if self.settings.target == "context" else self.settings.alpha
        return {name: Delta(left=delta.left * scale, right=delta.right) for name, delta in deltas.items()}, details

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

    def _write_subjects(self, layer: int) -> tuple[Delta, int]:
        """Returns the change at the subjects, and how many facts needed gradients for it."""
        keys, values, contrast, optimised = [], [], [], 0
        for start in range(0, len(self.facts), FACTS_AT_ONCE):
            part = self.problem.part(start, start + FACTS_AT_ONCE)
            if not any(row.subject is not None for row in part.rows):
                continue
            stage = SubjectStage(self.model, part, layer, self.fill)
            value, log_p = stage.strongest(self._answer_change(part, layer), self.settings.enough)
            wanted = self._to_optimise(stage.named, log_p.cpu())
            if wanted.any():
                value = stage.search(value, wanted)
            keys.append(stage.keys[stage.named])
            values.append(value[stage.named.to(value.device)])
            if stage.contrast is not None:
                contrast.append(stage.contrast)
            optimised += int(wanted.sum())
        found = torch.cat(keys)
        delta = write(
            self.settings.subject_write,
            found.cpu(),
            torch.cat(values).cpu(),
            torch.cat(contrast).cpu() if contrast else None,
            self.moments[layer],
            facts=len(found),
        )
        return delta, optimised

    def _to_optimise(self, named: Bool[Tensor, " facts"], log_p: Float[Tensor, " facts"]) -> Bool[Tensor, " facts"]:
        """Which facts need gradients.

        Raises:
            EditError: They are asked for, and the model's weights let none through.
        """
        target = self.settings.target
        packed = getattr(self.model, "is_quantized", False) and self.model.device.type == "cpu"
        if target == "optimised" and packed:
            raise EditError(
                "target must be 'unembedding' or 'context' for a quantised model on a CPU, whose kernels give no "
                "gradients; got 'optimised'. Choose one of these, or load the model without quantization_config."
            )
        if target == "unembedding" or packed:
            return torch.zeros_like(named)
        return named if target == "optimised" else named & (log_p < self.settings.enough)

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

    def _goal(self, layers: Sequence[int]) -> AnswerGoal:
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
