"""The two places that are written in: the subject, early, and the place of the answer, late.

What a text says after a subject was mentioned is drawn, layer by layer, from the state of the subject's last token. A
change there reaches every wording of a question, but not exactly. A change where the answer is predicted is least
squares over the prompts at hand: nearly exact there until the KL budget shrinks it, and hardly felt elsewhere. So the
subject is written first, and late layers add what is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from pliant.consolidation.forward import PartialPass, trial
from pliant.consolidation.rows import Row, gathered, padded
from pliant.consolidation.targets import margin_residual, spread
from pliant.consolidation.writers import WriteSettings, write
from pliant.key_moments import KeyMoments
from pliant.models.edits import Delta, down_proj

STRENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Multiples of the change of state that are tried at the subject, until the answer is likely enough."""
ROWS_AT_ONCE = 256
"""Rows that go through the model together."""
STEPS, LEARNING_RATE, CLAMP, DECAY = 15, 0.5, 4.0, 0.02
"""Of the search for a value by gradient: Adam's steps and rate, the largest norm beside the state's, weight decay."""
ENOUGH = 0.3
"""Nats a token at which the search for a value stops."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All rows of a batch of facts.

    Attributes:
        rows: What is to be answered, without the context.
        contrast: The same asked about other subjects, which is to stay as it is.
        facts: How many facts the rows are of.
    """

    rows: Sequence[Row]
    contrast: Sequence[Row]
    facts: int

    def part(self, start: int, stop: int) -> "Problem":
        """Returns the rows of the facts ``start`` to ``stop``, counted from 0."""
        rows, contrast = (
            [replace(row, fact=row.fact - start) for row in some if start <= row.fact < stop]
            for some in (self.rows, self.contrast)
        )
        return Problem(rows=rows, contrast=contrast, facts=min(stop, self.facts) - start)


class SubjectStage:
    """Writes at the last token of each subject, in one layer.

    The value v of a fact is what is added to the state after the layer; the key is the mean over the fact's rows of
    what ``down_proj`` reads there.

    Attributes:
        keys: (facts, d_ffn); zero for a fact that no row names the subject of.
        state: (facts, d_model), what the layer leaves there now.
        contrast: Keys of other subjects, if there are any.
        named: Which facts have a subject.
    """

    def __init__(self, model: PreTrainedModel, problem: Problem, layer: int, fill: int) -> None:
        self.model, self.facts = model, problem.facts
        self.rows = [row for row in problem.rows if row.subject is not None]
        self.owners = torch.tensor([row.fact for row in self.rows])
        self.named = torch.bincount(self.owners, minlength=self.facts) > 0
        self.above, keys, state = _at_subjects(model, self.rows, layer, fill)
        self.keys, self.state = self.mean(keys), self.mean(state)
        contrast = [row for row in problem.contrast if row.subject is not None]
        self.contrast = _at_subjects(model, contrast, layer, fill)[1] if contrast else None
        self.above.advance(layer + 1)
        self.places = torch.tensor([row.subject for row in self.rows], device=self.above.hidden.device)

    def mean(self, values: Float[Tensor, "rows ..."]) -> Float[Tensor, "facts ..."]:
        """Returns the mean over each fact's rows; zero for a fact without any."""
        owners = self.owners.to(values.device)
        total = values.new_zeros(self.facts, *values.shape[1:]).index_add(0, owners, values)
        counts = torch.bincount(owners, minlength=self.facts).clamp(min=1)
        return total / counts.view(-1, *[1] * (values.ndim - 1))

    def log_p(self, values: Float[Tensor, "facts d_model"]) -> Float[Tensor, " facts"]:
        """Returns the answers' mean log-probability a token with ``values`` added at the subjects."""
        hidden = self.above.hidden.clone()
        index = torch.arange(len(self.rows), device=hidden.device)
        owners = self.owners.to(hidden.device)
        hidden[index, self.places] = hidden[index, self.places] + values.to(hidden)[owners]
        _, last = self.above.run(len(self.above.layers) - 1, hidden=hidden)
        states = gathered(last, [row.places for row in self.rows])
        norm, head = self.model.model.norm, self.model.lm_head
        log_p = head(norm(states.to(head.weight.dtype))).float().log_softmax(-1)
        targets = torch.tensor([token for row in self.rows for token in row.answer], device=log_p.device)
        own = log_p.gather(1, targets[:, None])[:, 0]
        weights = torch.tensor([1 / row.length for row in self.rows for _ in row.answer], device=log_p.device)
        rows = torch.tensor([i for i, row in enumerate(self.rows) for _ in row.answer], device=log_p.device)
        per_row = own.new_zeros(len(self.rows)).index_add(0, rows, own * weights)
        return self.mean(per_row)

    @torch.no_grad()
    def strongest(
        self, change: Float[Tensor, "facts d_model"], enough: float
    ) -> tuple[Tensor, Float[Tensor, " facts"]]:
        """Returns the multiple of ``change`` under which each fact is likeliest, the first that is likely enough.

        Args:
            change: What the state should move by.
            enough: Log-probability a token at which a fact is done.
        """
        best, value = change.new_full((self.facts,), -torch.inf), torch.zeros_like(change)
        for strength in STRENGTHS:
            log_p = self.log_p(strength * change).to(best)
            better = (log_p > best) & (best < enough)
            best = torch.where(better, log_p, best)
            value = torch.where(better[:, None], strength * change, value)
            if (best >= enough).all():
                break
        return value, best

    @torch.inference_mode(False)
    @torch.enable_grad()
    def search(
        self, start: Float[Tensor, "facts d_model"], wanted: Bool[Tensor, " facts"]
    ) -> Float[Tensor, "facts d_model"]:
        """Returns values that Adam finds for the ``wanted`` facts, from ``start``; the others keep theirs."""
        moving = wanted.to(start.device)
        value = torch.where(moving[:, None], start, 0.0).clone().requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=LEARNING_RATE)
        size = self.state.norm(dim=1, keepdim=True).to(value.device)
        best, best_value = torch.full_like(size[:, 0], -torch.inf), value.detach().clone()
        for _ in range(STEPS):
            log_p = self.log_p(value).to(value.device)
            better = log_p.detach() > best
            best = torch.where(better, log_p.detach(), best)
            best_value = torch.where(better[:, None], value.detach(), best_value)
            going = moving & (best < -ENOUGH)
            if not going.any():
                break
            loss = -(log_p * going).sum() + DECAY * ((value / size).square().sum(1) * going).sum()
            (value.grad,) = torch.autograd.grad(loss, value)
            optimiser.step()
            with torch.no_grad():
                value.mul_((CLAMP * size / value.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1))
        return torch.where(moving[:, None], best_value, start)


@torch.no_grad()
def _at_subjects(
    model: PreTrainedModel, rows: Sequence[Row], layer: int, fill: int
) -> tuple[PartialPass, Float[Tensor, "rows d_ffn"], Float[Tensor, "rows d_model"]]:
    """Runs rows up to ``layer``; returns the pass, the keys at the subjects, and the states that the layer leaves."""
    states = PartialPass(model, padded(rows, fill), layer)
    keys, after = states.run(layer, keys=layer)
    assert keys is not None
    places = [[row.subject or 0] for row in rows]
    return states, gathered(keys, places), gathered(after, places)


@torch.no_grad()
def write_answers(
    model: PreTrainedModel,
    problem: Problem,
    layers: Sequence[int],
    goal: "AnswerGoal",
    settings: WriteSettings,
    moments: Mapping[int, KeyMoments],
    given: Mapping[str, Delta],
    fill: int,
) -> dict[str, Delta]:
    """Writes in ``layers``, one after another, what the rows still lack after the last of them.

    Args:
        model: The model.
        problem: The rows.
        layers: Where to write, upwards.
        goal: Which places, and what the state should be there.
        settings: The writer.
        moments: Of every layer.
        given: Changes that are in effect already.
        fill: Token to pad rows with.
    """
    written: dict[str, Delta] = {}
    with trial(model, given):
        rows = _Chunks(model, problem.rows, goal.places(problem.rows), layers[0], fill)
        others = _Chunks(model, problem.contrast, goal.places(problem.contrast), layers[0], fill)
        target = goal.target(rows.after(layers[-1]))
    for index, layer in enumerate(layers):
        with trial(model, {**given, **written}):
            keys, after = rows.at(layer, layers[-1])
            contrast = others.at(layer, layer)[0] if problem.contrast else None
        residual = spread(target, after, len(layers) - index)
        written[down_proj(layer)] = write(settings, keys, residual, contrast, moments[layer], facts=problem.facts)
    return written


class _Chunks:
    """Rows in batches of bounded size, each with its part of the forward pass; what is read comes to the CPU."""

    def __init__(
        self, model: PreTrainedModel, rows: Sequence[Row], places: Sequence[Sequence[int]], start: int, fill: int
    ) -> None:
        self.parts = [
            (PartialPass(model, padded(rows[first:last], fill), start), places[first:last])
            for first, last in pairwise([*range(0, len(rows), ROWS_AT_ONCE), len(rows)])
        ]

    def after(self, last: int) -> Float[Tensor, "places d_model"]:
        """Returns the states after layer ``last`` at all places."""
        return torch.cat([gathered(states.run(last)[1], places).cpu() for states, places in self.parts])

    def at(self, layer: int, last: int) -> tuple[Float[Tensor, "places d_ffn"], Float[Tensor, "places d_model"]]:
        """Moves on to ``layer``; returns the keys there and the states after ``last``, at all places."""
        keys, states = [], []
        for part, places in self.parts:
            part.advance(layer)
            found, after = part.run(last, keys=layer)
            assert found is not None
            keys.append(gathered(found, places).cpu())
            states.append(gathered(after, places).cpu())
        return torch.cat(keys), torch.cat(states)


class AnswerGoal:
    """The answer's logit is to lead every other by a margin, wherever a token of the answer is predicted."""

    def __init__(self, model: PreTrainedModel, problem: Problem, margin: float) -> None:
        self.model, self.margin = model, margin
        self.answers = torch.tensor([token for row in problem.rows for token in row.answer])

    def places(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        """Where to write in each row."""
        return [row.places for row in rows]

    def target(self, present: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Returns what the state should be at these places, given what it is."""
        device = self.model.lm_head.weight.device
        parts = zip(present.split(ROWS_AT_ONCE), self.answers.split(ROWS_AT_ONCE), strict=True)
        missing = [margin_residual(self.model, some.to(device), own.to(device), self.margin) for some, own in parts]
        return present + torch.cat(missing).to(present)


class ContextGoal(AnswerGoal):
    """The state is to be what it is behind the context, by ``h + α (h_context − h)``."""

    def __init__(
        self,
        behind: Float[Tensor, "n d_model"],
        alpha: float,
        positions: str,
    ) -> None:
        self.behind, self.alpha, self.positions = behind, alpha, positions

    def places(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        return [context_places(row, self.positions) for row in rows]

    def target(self, present: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return present + self.alpha * (self.behind.to(present) - present)


def context_places(row: Row, positions: str) -> Sequence[int]:
    """Returns the places of ``answer``, ``span`` (from the subject's last token on) or ``subject`` in a row."""
    if positions == "answer" or row.subject is None:
        return row.places
    return [row.subject] if positions == "subject" else range(row.subject, row.places.stop)
