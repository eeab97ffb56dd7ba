"""The forms of NPT beside each other on a base that is made on the spot."""

import math

import pytest

from pliant.errors import ConfigError
from pliant.evaluation.comparison import versions as module
from pliant.evaluation.comparison.versions import VERSIONS, compare_versions, source_bytes


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "BASE_STEPS", 12)
    monkeypatch.setattr(module, "REPEATS", 2)


def test_every_form_is_measured_before_and_after():
    found = compare_versions(rank=8, steps=6)
    assert tuple(found["versions"]) == VERSIONS
    for form, own in found["versions"].items():
        assert own["parameters"] > 0
        assert all(math.isfinite(value) for value in own.values() if isinstance(value, float))
        assert own["step_seconds"] > 0
        if form == "v1":
            assert own["start_kl"] == pytest.approx(0, abs=1e-6)
            assert own["kl"] == own["start_kl"]
            assert own["norm"] == 0
        elif form != "keyed":  # whose closed form leaves little to gain
            assert own["kl"] < own["start_kl"]
            assert own["norm"] > 0
    assert found["versions"]["v1"]["step_ratio"] == 1.0
    assert found["base"]["perplexity"] < 256


def test_parameters_are_those_of_the_forms():
    d, f, layers, rank = 64, 160, 3, 8
    found = compare_versions(("v1", "v2", "keyed"), rank=rank, steps=1)["versions"]
    assert found["v1"]["parameters"] == layers * rank * (d + f)
    assert found["v2"]["parameters"] == 2 * layers * rank * (d + f)
    assert found["keyed"]["parameters"] == 2 * layers * rank * d


def test_the_text_is_the_source_of_the_package():
    text = bytes(source_bytes().tolist())
    assert b"class PliantError" in text
    assert len(text) > 200_000


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"versions": ("v1", "v1_singel")}, "Did you mean 'v1_single'"),
        ({"versions": ()}, "at least one form"),
        ({"versions": ("v1", "v1")}, "each form once"),
        ({"size": "smaller"}, "Did you mean 'small'"),
        ({"rank": 65}, r"1\.\.64"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_what_is_out_of_range_is_named(arguments, word):
    with pytest.raises(ConfigError, match=word):
        compare_versions(**arguments)
