"""Which tokens enter a routed layer: a fixed share while training, a threshold ever after.

Training takes the highest scores of each row, which looks ahead; a threshold does not, so that it gives the same answer
for a prompt at once, in pieces, token by token, alone or in a batch.
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The tokens that run, each row's in order of time.

    Attributes:
        places: Where they stand in their row: (batch, k), all different; a row that runs fewer is filled up behind.
        valid: Which of the places run; ``None`` if all do.
    """

    places: Int[Tensor, "batch k"]
    valid: Bool[Tensor, "batch k"] | None

    def gather(self, values: Float[Tensor, "rows seq ..."]) -> Float[Tensor, "batch k ..."]:
        """Returns the values of the selected tokens; one row of values counts for every row of the batch."""
        rows, count = self.places.shape
        if self._is_all(values.shape[1]):
            return values.expand(rows, *values.shape[1:])
        if len(values) == 1:
            return values[0].index_select(0, self.places.flatten()).unflatten(0, (rows, count))
        return values.flatten(0, 1).index_select(0, self._flat(values.shape[1])).unflatten(0, (rows, count))

    def scatter(
        self, values: Float[Tensor, "batch seq ..."], new: Float[Tensor, "batch k ..."]
    ) -> Float[Tensor, "batch seq ..."]:
        """Returns ``values`` with those of the selected tokens replaced."""
        if self.valid is not None:
            new = torch.where(self.valid.view(*self.valid.shape, *[1] * (new.ndim - 2)), new, self.gather(values))
        if self._is_all(values.shape[1]):
            return new
        return values.flatten(0, 1).index_copy(0, self._flat(values.shape[1]), new.flatten(0, 1)).view_as(values)

    def mask(self, length: int) -> Bool[Tensor, "batch seq"]:
        """Returns which of ``length`` tokens a row run."""
        chosen = torch.ones_like(self.places, dtype=torch.bool) if self.valid is None else self.valid
        return chosen.new_zeros(len(chosen), length).scatter(1, self.places, chosen)

    def _is_all(self, length: int) -> bool:
        """Whether every one of ``length`` tokens runs."""
        return self.valid is None and self.places.shape[1] == length

    def _flat(self, length: int) -> Int[Tensor, " chosen"]:
        """The places counted through all rows."""
        rows = torch.arange(len(self.places), device=self.places.device)
        return (self.places + rows[:, None] * length).flatten()


def highest(
    scores: Float[Tensor, "batch seq"], capacity: float, allowed: Bool[Tensor, "batch seq"] | None
) -> Selection:
    """Returns the ``⌈capacity · n⌉`` highest-scored of the n tokens of each row that are ``allowed``.

    How many places there are depends on the shape alone: no wait for the device, and one graph for the compiler.
    """
    length = scores.shape[1]
    if allowed is None:
        places = scores.topk(share_of(capacity, length), dim=1).indices
        return Selection(places=places.sort(dim=1).values, valid=None)
    ranked = scores.masked_fill(~allowed, -torch.inf).topk(share_of(capacity, length), dim=1).indices
    counts = (allowed.sum(1, keepdim=True) * capacity - 1e-4).ceil()
    valid = torch.arange(ranked.shape[1], device=ranked.device) < counts
    order = torch.where(valid, ranked, ranked + length).argsort(dim=1)
    return Selection(places=ranked.gather(1, order), valid=valid.gather(1, order))


def selected(runs: Bool[Tensor, "batch seq"]) -> Selection | None:
    """Returns the tokens that run; ``None`` if there are none."""
    if runs.shape[1] == 1:  # decoding: each row has one place
        count, places = int(runs.sum()), torch.zeros_like(runs, dtype=torch.long)
        return Selection(places=places, valid=None if count == len(runs) else runs) if count else None
    counts = runs.sum(1)
    fewest, most = torch.stack(counts.aminmax()).tolist()  # one wait for the device
    if not most:
        return None
    places = (~runs).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    valid = None if most == fewest else torch.arange(most, device=runs.device) < counts[:, None]
    return Selection(places=places, valid=valid)


def at_least_one(
    runs: Bool[Tensor, "batch seq"], scores: Float[Tensor, "batch seq"], allowed: Bool[Tensor, "batch seq"] | None
) -> Bool[Tensor, "batch seq"]:
    """Lets the highest-scored token of each row run in which none does, so that every parameter has a gradient."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    best = torch.zeros_like(runs).scatter(1, scores.argmax(1, keepdim=True), True)
    best = best & ~runs.any(1, keepdim=True)
    return runs | (best if allowed is None else best & allowed)


def within_budget(
    wanted: Bool[Tensor, "batch seq"], documents: Int[Tensor, "batch seq"], *, most: int, window: int, earlier: int
) -> Bool[Tensor, "batch seq"]:
    """Returns the tokens that run if of any ``window`` successive ones of a document at most ``most`` may.

    Args:
        wanted: Tokens that reach the threshold.
        documents: Document of each token, −1 for padding, which does not count.
        most: Tokens that may run.
        window: Among how many.
        earlier: Tokens at the front that are past: what they did is given, and stays.
    """
    rows = wanted.tolist()
    for row, owners in zip(rows, documents.tolist(), strict=True):
        ran: deque[int] = deque()  # which tokens of the window ran, each by its number in the document
        number, owner = 0, None
        for place, document in enumerate(owners):
            if document < 0:
                continue
            if document != owner:
                ran.clear()
                owner = document
            number += 1
            if ran and ran[0] <= number - window:
                ran.popleft()
            if row[place] and (place < earlier or len(ran) < most):
                ran.append(number)
            else:
                row[place] = False
    return torch.tensor(rows, device=wanted.device)


def share_of(capacity: float, length: int) -> int:
    """``⌈capacity · length⌉``, and not one more where the product is an integer up to rounding."""
    return max(1, math.ceil(capacity * length - 1e-9))


def threshold_for(scores: Float[Tensor, " n"], capacity: float) -> Float[Tensor, ""]:
    """Returns τ such that a share ``capacity`` of the scores reaches it: midway from the last that does to the next.

    No score lies at τ, so that rounding does not decide who runs. Where scores of ∞, of tokens that run in any case,
    are as many as are to run, τ is the least that no other score reaches.
    """
    if capacity >= 1:
        return scores.new_full((), -torch.inf)
    return row_thresholds(scores[None], capacity, None)[0]


def row_thresholds(
    scores: Float[Tensor, "batch seq"], capacity: float, allowed: Bool[Tensor, "batch seq"] | None
) -> Float[Tensor, " rows"]:
    """Returns :func:`threshold_for` of each row that has a token."""
    if allowed is None:
        length = scores.shape[1]
        kept = share_of(capacity, length)
        last, following = (scores.kthvalue(length - rank + 1, dim=1).values for rank in (kept, min(kept + 1, length)))
        return _finite(_midway(last, following), scores)
    counts = allowed.sum(1)
    kept = (counts * capacity - 1e-4).ceil().long().clamp(min=1)
    ranked = scores.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True).values
    last, following = (
        ranked.gather(1, (rank - 1)[:, None])[:, 0] for rank in (kept, (kept + 1).minimum(counts.clamp(min=1)))
    )
    return _finite(_midway(last, following), ranked)[counts > 0]


def _midway(last: Float[Tensor, " rows"], following: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """The middle of each two, or the higher where there is nothing between them."""
    middle = (last + following) / 2
    return torch.where(middle > following, middle, last)


def _finite(threshold: Tensor, scores: Tensor) -> Tensor:
    """A threshold of ∞ as the least above every other score."""
    highest_other = scores.masked_fill(scores == torch.inf, -torch.inf).amax(-1)
    return torch.where(threshold == torch.inf, highest_other.nextafter(highest_other.new_tensor(torch.inf)), threshold)
