"""Means over records with bootstrap intervals, and differences of two runs on the same cases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pliant.errors import ConfigError, DataError

RESAMPLES = 2_000
SEED = 0
SCORE = "score"
SCORE_FIELDS = ("efficacy", "paraphrase", "neighbourhood")
"""What S is the harmonic mean of."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over records with its 95 % bootstrap interval.

    Attributes:
        value: The mean.
        low: 2.5 % of resamples are below.
        high: 2.5 % of resamples are above.
        count: How many records have the value.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] (n={self.count})"


def summary(records: Records) -> dict[str, Interval]:
    """Returns the mean of every numeric field, and S under ``"score"`` where the records have its three parts.

    ``S = 100 · 3 / (1/efficacy + 1/paraphrase + 1/neighbourhood)`` of the means; 0 if one of them is 0. A field that
    some records lack is the mean over those that have it.

    Raises:
        DataError: There are no records.
    """
    if not records:
        raise DataError("records must hold at least one record; got none. Evaluate some cases first.")
    fields = sorted({name for record in records for name, value in record.items() if is_number(value)})
    weights = _weights(len(records))
    means = {name: _means(_column(records, name), weights) for name in fields}
    found = {name: _interval(means[name], int(np.isfinite(_column(records, name)).sum())) for name in fields}
    if all(name in means for name in SCORE_FIELDS):
        found[SCORE] = _interval(_harmonic([means[name] for name in SCORE_FIELDS]), len(records))
    return found


def paired_difference(records_a: Records, records_b: Records, field: str) -> Interval:
    """Returns the mean of ``field`` in ``records_a`` less that in ``records_b``, over the cases that both have.

    Both sides are resampled together, case by case. ``"score"`` is the difference of S.

    Raises:
        DataError: No case is in both, with a value.
        ConfigError: No record has the field.
    """
    names = SCORE_FIELDS if field == SCORE else (field,)
    for records in (records_a, records_b):
        if missing := [name for name in names if not any(is_number(record.get(name)) for record in records)]:
            raise ConfigError(f"field must be a numeric field of the records; got {missing[0]!r}, which none has.")
    left = {record["id"]: record for record in records_a if all(is_number(record.get(name)) for name in names)}
    right = {record["id"]: record for record in records_b if all(is_number(record.get(name)) for name in names)}
    common = [name for name in left if name in right]
    if not common:
        raise DataError(
            f"records must share cases with a value for {field!r}; they share none. Evaluate the same cases."
        )
    weights = _weights(len(common))

    def measure(side: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
        chosen = [side[name] for name in common]
        means = [_means(_column(chosen, name), weights) for name in names]
        return _harmonic(means) if field == SCORE else means[0]

    return _interval(measure(left) - measure(right), len(common))


def recovered(before: Records, upper: Records, after: Records, field: str) -> Interval:
    """Returns the share of a gap that was closed, ``(after − before) / (upper − before)`` of the means of ``field``.

    Args:
        before: Records of the untouched model.
        upper: Those that mark the other end, such as with the context in view.
        after: Those of the edited model.
        field: A numeric field.

    Raises:
        DataError: The three share no case with a value.
    """
    sides = [
        {record["id"]: record for record in records if is_number(record.get(field))}
        for records in (before, upper, after)
    ]
    common = [name for name in sides[0] if all(name in side for side in sides)]
    if not common:
        raise DataError(
            f"records must share cases with a value for {field!r}; they share none. Evaluate the same cases."
        )
    weights = _weights(len(common))
    low, high, now = (_means(_column([side[name] for name in common], field), weights) for side in sides)
    gap = high - low
    return _interval(np.divide(now - low, gap, out=np.full_like(gap, np.nan), where=gap != 0), len(common))


def ratio_of_sums(
    records: Records, field: str, weight: str, *, transform: Callable[[np.ndarray], np.ndarray] = np.positive
) -> Interval:
    """Returns ``transform(Σ field / Σ weight)`` over the records: a mean over tokens where a record is a text of many.

    Args:
        records: What is resampled.
        field: A sum over what a record holds.
        weight: How much that is, such as its number of tokens.
        transform: Taken of the quotient, such as ``numpy.exp`` for a perplexity.

    Raises:
        DataError: There are no records.
    """
    if not records:
        raise DataError("records must hold at least one record; got none. Evaluate some text first.")
    weights = _weights(len(records))
    total, amount = weights @ _column(records, field), weights @ _column(records, weight)
    with np.errstate(over="ignore"):
        return _interval(transform(total / amount), len(records))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _column(records: Records, name: str) -> np.ndarray:
    return np.array([float(record[name]) if is_number(record.get(name)) else np.nan for record in records])


@lru_cache(maxsize=4)
def _weights(count: int) -> np.ndarray:
    """How often each record is drawn: once in the first row, then in every resample."""
    drawn = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.concatenate([np.ones((1, count)), drawn])


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    number = weights @ known
    total = weights @ np.where(known, values, 0.0)
    return np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)


def _harmonic(means: Sequence[np.ndarray]) -> np.ndarray:
    stacked = np.stack(means)
    with np.errstate(divide="ignore"):
        return np.where((stacked > 0).all(0), 100 * len(means) / (1 / stacked).sum(0), 0.0)


def _interval(values: np.ndarray, count: int) -> Interval:
    resampled = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (np.nan, np.nan)
    return Interval(value=float(values[0]), low=float(low), high=float(high), count=count)
