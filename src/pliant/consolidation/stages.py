"""The two places that are written in: the subject, early, and the place of the answer, late.

What a text says after a subject was mentioned is drawn, layer by layer, from the state of the subject's last token. A
change there reaches every wording of a question, but not exactly. A change where the answer is predicted is least
squares over the prompts at hand: nearly exact there until the KL budget shrinks it, and hardly felt elsewhere. So the
subject is written first, and late layers add what is missing.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from pliant.consolidation.forward import PartialPass, trial
from pliant.consolidation.rows import Row, aligned, gathered, padded
from pliant.consolidation.targets import margin_residual, spread
from pliant.consolidation.writers import WriteSettings, write
from pliant.key_moments import KeyMoments
from pliant.models.edits import Delta, down_proj

STRENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0)
"""Multiples of the change of state that are tried at the subject, until the answer is likely enough."""
ROWS_AT_ONCE = 256
"""Rows that go through the model together."""
STEPS, LEARNING_RATE, CLAMP, DECAY = 19, 0.5, 1.5, 0.05
"""Of the search for a value by gradient: Adam's steps and rate, the largest norm beside the state's, weight decay."""
ENOUGH = 0.1
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

    def with_subjects(self) -> "Problem":
        """Returns the rows that name their subject, of facts that have such rows, counted from 0."""
        rows, contrast = ([row for row in some if row.subject is not None] for some in (self.rows, self.contrast))
        named = Problem(rows=rows, contrast=contrast, facts=self.facts)
        return named.part(sorted({row.fact for row in rows}))

    def part(self, facts: Sequence[int]) -> "Problem":
        """Returns the rows of some facts, counted from 0 in the order given."""
        numbers = {fact: index for index, fact in enumerate(facts)}
        rows, contrast = (
            [replace(row, fact=numbers[row.fact]) for row in some if row.fact in numbers]
            for some in (self.rows, self.contrast)
        )
        return Problem(rows=rows, contrast=contrast, facts=len(facts))


class SubjectStage:
    """Finds what is to be added to the state at the last token of each subject, after one layer.

    Attributes:
        state: (facts, d_model), what the layer leaves there now, the mean over the fact's rows; zero for a fact that
            no row names the subject of.
        named: Which facts have a subject.
    """

    def __init__(self, model: PreTrainedModel, problem: Problem, layer: int, fill: int) -> None:
        self.model, self.problem, self.layer, self.fill = model, problem, layer, fill
        self.facts = problem.facts
        self.rows = [row for row in problem.rows if row.subject is not None]
        self.owners = torch.tensor([row.fact for row in self.rows])
        self.named = torch.bincount(self.owners, minlength=self.facts) > 0
        ids, mask, subject = aligned(self.rows, fill)
        self.above = PartialPass(model, ids, layer, mask=mask, first=subject)  # whose first column is the subject
        self.above.advance(layer + 1)
        self.state = mean_by(self.owners, self.above.hidden[:, 0].float(), self.facts)

    def log_p(self, values: Float[Tensor, "facts d_model"]) -> Float[Tensor, " facts"]:
        """Returns the answers' mean log-probability a token with ``values`` added at the subjects."""
        hidden = self.above.hidden
        subject = hidden[:, :1] + values.to(hidden)[self.owners.to(hidden.device), None]
        _, last = self.above.run(len(self.above.layers) - 1, hidden=torch.cat((subject, hidden[:, 1:]), dim=1))
        states = gathered(last, [[place - (row.subject or 0) for place in row.places] for row in self.rows])
        norm, head = self.model.model.norm, self.model.lm_head
        log_p = head(norm(states.to(head.weight.dtype))).float().log_softmax(-1)
        targets = torch.tensor([token for row in self.rows for token in row.answer], device=log_p.device)
        own = log_p.gather(1, targets[:, None])[:, 0]
        weights = torch.tensor([1 / row.length for row in self.rows for _ in row.answer], device=log_p.device)
        rows = torch.tensor([i for i, row in enumerate(self.rows) for _ in row.answer], device=log_p.device)
        per_row = own.new_zeros(len(self.rows)).index_add(0, rows, own * weights)
        return mean_by(self.owners, per_row, self.facts)

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
    def search(self, wanted: Bool[Tensor, " facts"]) -> Float[Tensor, "facts d_model"]:
        """Returns values that Adam finds for the ``wanted`` facts; zero for the others.

        It starts from zero: on the way from there a value gathers little that the answer does not need, and what it
        does not gather cannot spread to other subjects. Facts that are done are left out once they are half of what is
        read. On a CPU attention is plain products, whose gradient is faster for rows as short as these than that of the
        fused kernel.
        """
        moving = wanted.to(self.state.device)
        value = torch.zeros_like(self.state).requires_grad_(True)
        optimiser = torch.optim.Adam([value], lr=LEARNING_RATE)
        size = self.state.norm(dim=1, keepdim=True)
        best, best_value = torch.full_like(size[:, 0], -torch.inf), value.detach().clone()
        stage, active = self._narrowed(self, torch.arange(self.facts, device=moving.device), moving)
        with sdpa_kernel(SDPBackend.MATH) if value.device.type == "cpu" else nullcontext():
            for step in range(STEPS + 1):  # the last one only reads what the step before it found
                log_p = stage.log_p(value[active]).to(value.device)
                better = log_p.detach() > best[active]
                best[active] = torch.where(better, log_p.detach(), best[active])
                best_value[active] = torch.where(better[:, None], value.detach()[active], best_value[active])
                going = moving & (best < -ENOUGH)
                if step == STEPS or not going.any():
                    break
                loss = -(log_p * going[active]).sum() + DECAY * ((value / size).square().sum(1) * going).sum()
                (value.grad,) = torch.autograd.grad(loss, value)
                optimiser.step()
                with torch.no_grad():
                    value.mul_((CLAMP * size / value.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1))
                stage, active = self._narrowed(stage, active, going)
        return torch.where(moving[:, None], best_value, 0.0)

    def _narrowed(
        self, stage: "SubjectStage", active: Int[Tensor, " active"], going: Bool[Tensor, " facts"]
    ) -> tuple["SubjectStage", Int[Tensor, " going"]]:
        """Returns a stage of the facts that go on, and which they are, if they are at most half of the ``active``."""
        left = active[going[active]]
        if not len(left) or 2 * len(left) > len(active):
            return stage, active
        return SubjectStage(self.model, self.problem.part(left.tolist()), self.layer, self.fill), left


@torch.no_grad()
def write_layers(
    model: PreTrainedModel,
    problem: Problem,
    layers: Sequence[int],
    goal: "Goal",
    settings: WriteSettings,
    moments: Mapping[int, KeyMoments],
    given: Mapping[str, Delta],
    fill: int,
) -> dict[str, Delta]:
    """Writes in ``layers``, one after another, what the states of the goal still lack after the last of them.

    Each takes an equal share of what is left, so that all of them move neutral text less than one would.

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
        keys, residual = goal.joined(keys), goal.joined(spread(target, after, len(layers) - index))
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


@runtime_checkable
class Goal(Protocol):
    """Which places of the rows are written at, and what the state should be there."""

    def places(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        """Where to write in each row."""
        ...

    def target(self, present: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        """Returns what the state should be at these places, given what it is."""
        ...

    def joined(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        """Returns one value for each key that is written, from one for each place."""
        ...


class SubjectGoal:
    """The state at a subject's last token is to move by ``values``; each fact is one key, the mean over its rows.

    Args:
        problem: Rows that all have a subject, of facts that all have rows.
        values: What is added, fact by fact.
    """

    def __init__(self, problem: Problem, values: Float[Tensor, "facts d_model"]) -> None:
        self.owners, self.values = torch.tensor([row.fact for row in problem.rows]), values.cpu()

    def places(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        return [[row.subject or 0] for row in rows]

    def target(self, present: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return present + self.values[self.owners].to(present)

    def joined(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        return mean_by(self.owners, values, len(self.values))


class AnswerGoal:
    """The answer's logit is to lead every other by a margin, wherever a token of the answer is predicted."""

    def __init__(self, model: PreTrainedModel, problem: Problem, margin: float) -> None:
        self.model, self.margin = model, margin
        self.answers = torch.tensor([token for row in problem.rows for token in row.answer])

    def places(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        return [row.places for row in rows]

    def target(self, present: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        device = self.model.lm_head.weight.device
        parts = zip(present.split(ROWS_AT_ONCE), self.answers.split(ROWS_AT_ONCE), strict=True)
        missing = [margin_residual(self.model, some.to(device), own.to(device), self.margin) for some, own in parts]
        return present + torch.cat(missing).to(present)

    def joined(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        return values


class ContextGoal:
    """The state is to be what it is behind the context, by ``h + α (h_context − h)``."""

    def __init__(self, behind: Float[Tensor, "n d_model"], alpha: float, positions: str) -> None:
        self.behind, self.alpha, self.positions = behind, alpha, positions

    def places(self, rows: Sequence[Row]) -> list[Sequence[int]]:
        return [context_places(row, self.positions) for row in rows]

    def target(self, present: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return present + self.alpha * (self.behind.to(present) - present)

    def joined(self, values: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        return values


def mean_by(owners: Int[Tensor, " n"], values: Float[Tensor, "n ..."], count: int) -> Float[Tensor, "facts ..."]:
    """Returns the mean of the values of each of ``count`` owners; zero for one without any."""
    owners = owners.to(values.device)
    total = values.new_zeros(count, *values.shape[1:]).index_add(0, owners, values)
    counts = torch.bincount(owners, minlength=count).clamp(min=1)
    return total / counts.view(-1, *[1] * (values.ndim - 1))


def context_places(row: Row, positions: str) -> Sequence[int]:
    """Returns the places of ``answer``, ``span`` (from the subject's last token on) or ``subject`` in a row."""
    if positions == "answer" or row.subject is None:
        return row.places
    return [row.subject] if positions == "subject" else range(row.subject, row.places.stop)
