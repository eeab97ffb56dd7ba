"""Made-up facts in the words of the tiny tokenizer, and what keys of random text look like."""

from collections.abc import Callable

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from pliant.evaluation.editing.cases import EditCase
from pliant.key_moments import KeyMoments, key_moments


@pytest.fixture
def facts() -> list[EditCase]:
    """Three facts, of different lengths."""
    given = [("5 6 7", "6 7", "20"), ("31 32 33", "31", "40"), ("50 51 52 53 54 55", "52 53", "60 61 62")]
    return [
        EditCase(id=f"fact-{i}", context=f"{prompt} {answer}", prompt=prompt, answer=answer, subject=subject)
        for i, (prompt, subject, answer) in enumerate(given)
    ]


@pytest.fixture
def fact(facts: list[EditCase]) -> EditCase:
    """The first of them."""
    return facts[0]


@pytest.fixture
def moments_of() -> Callable[[PreTrainedModel, Tensor], dict[int, KeyMoments]]:
    """A function that returns second moments of the keys of all layers on random text."""
    return lambda model, tokens: key_moments(model, tokens, "all")
