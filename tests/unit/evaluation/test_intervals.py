"""Means with bootstrap intervals, S, and differences of two runs."""

import math
import random
from typing import Any

import pytest

from pliant.errors import ConfigError, DataError
from pliant.evaluation.intervals import Interval, paired_difference, recovered, summary

Made = list[dict[str, Any]]


def made(values: dict[str, list[float]]) -> Made:
    count = len(next(iter(values.values())))
    return [{"id": str(i), **{name: column[i] for name, column in values.items()}} for i in range(count)]


def test_means_and_the_harmonic_mean():
    records = made({"efficacy": [1.0, 1.0], "paraphrase": [1.0, 0.0], "neighbourhood": [0.0, 0.5]})
    records[0] |= {"answers": ["text"], "edit": {"id": "x"}}
    found = summary(records)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(
        {"efficacy": 1.0, "paraphrase": 0.5, "neighbourhood": 0.25, "score": 100 * 3 / (1 + 2 + 4)}
    )
    assert found["efficacy"] == Interval(value=1.0, low=1.0, high=1.0, count=2)
    assert str(found["efficacy"]) == "1.000 [1.000, 1.000] (n=2)"


def test_no_score_without_its_parts_and_zero_with_a_zero():
    assert "score" not in summary(made({"efficacy": [1.0], "paraphrase": [1.0]}))
    found = summary(made({"efficacy": [1.0, 1.0], "paraphrase": [0.0, 0.0], "neighbourhood": [1.0, 1.0]}))
    assert found["score"].value == found["score"].high == 0.0


def test_a_missing_field_is_left_out_of_its_mean():
    records = [*made({"f1": [0.25, 0.75]}), {"id": "x", "exact": True}]
    found = summary(records)
    assert found["f1"].value == 0.5
    assert found["f1"].count == 2
    assert found["exact"] == Interval(value=1.0, low=1.0, high=1.0, count=1)


def test_the_interval_is_that_of_the_mean():
    generator = random.Random(0)
    values = [generator.gauss(3.0, 2.0) for _ in range(400)]
    found = summary(made({"log_prob": values}))["log_prob"]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert summary(made({"log_prob": values}))["log_prob"] == found


def test_pairs_are_resampled_together():
    generator = random.Random(0)
    values = [generator.random() for _ in range(100)]
    left, right = made({"f1": [value + 0.1 for value in values]}), made({"f1": values})
    found = paired_difference(left, list(reversed(right)), "f1")
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.count == 100
    assert paired_difference(left[:60], right[40:], "f1").count == 20


def test_difference_of_scores():
    parts = {"efficacy": [1.0, 1.0], "paraphrase": [1.0, 1.0], "neighbourhood": [1.0, 1.0]}
    left, right = made(parts), made({**parts, "paraphrase": [0.0, 1.0]})
    assert paired_difference(left, right, "score").value == pytest.approx(100 - 75)


def test_share_of_a_gap():
    before, upper = made({"f1": [0.1, 0.1]}), made({"f1": [0.5, 0.9]})
    after = made({"f1": [0.3, 0.5]})
    assert recovered(before, upper, after, "f1").value == pytest.approx(0.5)
    assert math.isnan(recovered(before, before, after, "f1").value)


def test_what_cannot_be_compared_is_refused():
    records = made({"f1": [1.0]})
    with pytest.raises(DataError, match="at least one record"):
        summary([])
    with pytest.raises(ConfigError, match="field must be a numeric field of the records; got 'exact'"):
        paired_difference(records, records, "exact")
    with pytest.raises(DataError, match="share none"):
        paired_difference(records, [{"id": "other", "f1": 1.0}], "f1")
    with pytest.raises(DataError, match="share none"):
        recovered(records, records, [], "f1")
