"""What is kept of a base between calls, and when it is made again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.consolidation.resources import resources_of
from pliant.key_moments import key_moments

TEXT = " ".join(str(2 + 7 * index % 95) for index in range(700))


@pytest.fixture
def model(make_base: Callable[..., Any], tmp_path: Path) -> Any:
    """A dense pliant model of a tiny base."""
    make_base().save_pretrained(tmp_path / "base")
    return pliant.load(tmp_path / "base").eval()


def test_resources_are_kept_for_a_base_and_a_text(model: Any, tokenizer: Any, tmp_path: Path):
    first = resources_of(model, tokenizer, TEXT, 128)
    assert resources_of(model, tokenizer, TEXT, 128) is first
    assert resources_of(model, tokenizer, TEXT, 192) is not first
    assert resources_of(model, tokenizer, TEXT + " 5", 128) is not first
    several = resources_of(model, tokenizer, (text for text in (TEXT,)), 128)
    assert resources_of(model, tokenizer, [TEXT], 128) is several
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert torch.equal(resources_of(model, tokenizer, tmp_path / "text.txt", 128).neutral, first.neutral)
    assert first.neutral.shape == (8, 64)


def test_another_base_has_its_own(model: Any, tokenizer: Any, make_base: Callable[..., Any], tmp_path: Path):
    first = resources_of(model, tokenizer, TEXT, 128)
    make_base(seed=5).save_pretrained(tmp_path / "other")
    other = pliant.load(tmp_path / "other").eval()
    assert resources_of(other, tokenizer, TEXT, 128) is not first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert resources_of(model, tokenizer, TEXT, 128) is not first


def test_moments_are_those_of_the_text(model: Any, tokenizer: Any):
    resources = resources_of(model, tokenizer, TEXT, 128)
    moments = resources.moments(model, [0, 2])
    tokens = pliant.data.calibration_tokens(tokenizer, TEXT, num_tokens=128, window=64)
    expected = key_moments(model, tokens, [0, 2])
    assert list(moments) == [0, 2]
    for layer, moment in moments.items():
        torch.testing.assert_close(moment.moment, expected[layer].moment)
    again = resources.moments(model, [2])
    assert again[2] is moments[2]


def test_prefixes_are_of_the_base(model: Any, tokenizer: Any):
    prefixes = resources_of(model, tokenizer, TEXT, 128).prefixes(model, 3, 0)
    edited = pliant.models.Edit(
        context="a",
        deltas={"layers.2.mlp.down_proj": pliant.models.Delta(left=torch.randn(32, 1), right=torch.randn(48, 1))},
    )
    model.edits.add(edited)
    fresh = resources_of(model, tokenizer, TEXT + " 5", 128)
    assert fresh.prefixes(model, 3, 0) == prefixes
    assert fresh.prefixes(model, 3, 1) != prefixes
    assert fresh.prefixes(model, 2, 0)[0] == ""
