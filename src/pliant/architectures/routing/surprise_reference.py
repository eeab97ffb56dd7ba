"""The slow, obvious surprise, token by token; :mod:`~pliant.architectures.routing.surprise` is tested against it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pliant.architectures.routing.reference import Vector, unit
from pliant.architectures.routing.surprise import WINDOW, Prior, SurpriseRouter

Scalar = Float[Tensor, ""]


def foreseen(prior: Prior, h: Vector) -> tuple[Vector, Vector | None]:
    """Returns the mean of the change, and ``log σ²`` where the prior has one."""
    x = unit(h)
    hidden = functional.silu(prior.gate @ x) * (prior.up @ x)
    return prior.down @ hidden, None if prior.log_variance is None else prior.log_variance @ hidden


def distance(change: Vector, mean: Vector, log_variance: Vector | None) -> Scalar:
    """How far ``change`` is from what was foreseen: D_ch."""
    if log_variance is None:
        return (change - mean).square().mean()
    variance = log_variance.exp()
    return ((variance.log() + ((change - mean) ** 2 + 1) / variance - 1) / 2).mean()


def surprise_of(
    router: SurpriseRouter, static: list[Tensor], changed: list[Tensor], documents: list[int]
) -> tuple[list[Scalar], list[Scalar]]:
    """Returns g of each token of one row, and ``−log(1 − g)``."""
    averages = averages_of([float(value.detach()) for value in static], documents)
    gates, scores = [], []
    for d_st, d_ch, average in zip(static, changed, averages, strict=True):
        misses = torch.ones(())
        if router.expected_slope is not None and router.expected_offset is not None:
            evidence = d_st - (d_ch - torch.log(positive(router.expected_offset) + 1e-10))
            misses = misses * torch.sigmoid(-positive(router.expected_slope) * evidence)
        if router.unexpected_slope is not None and router.unexpected_margin is not None:
            evidence = d_st - positive(router.unexpected_margin) * average
            misses = misses * torch.sigmoid(-positive(router.unexpected_slope) * evidence)
        gates.append(1 - misses)
        scores.append(-misses.log())
    return gates, scores


def averages_of(values: list[float], documents: list[int]) -> list[float]:
    """Returns for each token the mean of the last 100 values of its document, without the first one after it."""
    averages = []
    for t, document in enumerate(documents):
        own = [values[s] for s in range(t + 1) if documents[s] == document and document >= 0] or [values[t]]
        window = (own[1:] or own)[-WINDOW:]
        averages.append(sum(window) / len(window))
    return averages


def positive(raw: Tensor) -> Scalar:
    """``log(1 + eˣ)`` of a parameter."""
    return torch.log1p(raw.exp()).squeeze(0)
