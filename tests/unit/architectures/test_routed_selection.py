"""The threshold that lets a wanted share of scores run."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pliant.architectures.routing.selection import row_thresholds, threshold_for

INF = torch.inf


@pytest.mark.parametrize(
    ("scores", "capacity", "expected"),
    [
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 0.6, 1.5),  # ⌈2.4⌉ = 3
        ([4.0, 1.0, 3.0, 2.0], 0.9, 1.0),  # all four: there is no next
        ([2.0, 2.0, 2.0, 1.0], 0.5, 2.0),  # equal scores run together
        ([INF, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([4.0, 1.0, 3.0, 2.0], 1.0, -INF),
    ],
)
def test_threshold_lies_between_the_last_that_runs_and_the_next(
    scores: list[float], capacity: float, expected: float
) -> None:
    assert threshold_for(torch.tensor(scores), capacity).item() == expected


def test_where_as_many_always_run_nothing_else_reaches_the_threshold() -> None:
    scores = torch.tensor([INF, 3.0, INF, 2.0])
    threshold = threshold_for(scores, 0.5)
    assert threshold.isfinite()
    assert (scores >= threshold).tolist() == [True, False, True, False]


def test_neighbours_in_floating_point_are_still_told_apart() -> None:
    ladder = [torch.tensor(1.0)]
    for _ in range(7):
        ladder.append(ladder[-1].nextafter(torch.tensor(2.0)))
    for lower, upper in pairwise(ladder):
        scores = torch.stack((lower, upper))
        assert (scores >= threshold_for(scores, 0.5)).tolist() == [False, True]


@pytest.mark.parametrize("capacity", [0.25, 0.5, 0.75])
def test_rows_have_thresholds_of_their_own_and_padding_has_none(capacity: float) -> None:
    scores = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    lengths = (16, 9, 1, 0)
    allowed: Tensor = torch.arange(16) < torch.tensor(lengths)[:, None]
    expected = [threshold_for(row[:length], capacity) for row, length in zip(scores, lengths, strict=True) if length]
    assert row_thresholds(scores, capacity, allowed).tolist() == [each.item() for each in expected]
    whole = [threshold_for(row, capacity).item() for row in scores]
    assert row_thresholds(scores, capacity, None).tolist() == whole
