"""What is kept of a base between calls, and when it is made again."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.architectures.base import added_buffers
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


def test_a_file_is_known_by_its_content(model: Any, tokenizer: Any, tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    first = resources_of(model, tokenizer, path, 128)
    assert resources_of(model, tokenizer, path, 128) is first
    path.write_text(f"5 6 {TEXT}", encoding="utf-8")
    assert not torch.equal(resources_of(model, tokenizer, path, 128).neutral, first.neutral)


def test_only_the_newest_are_kept(model: Any, tokenizer: Any):
    first = weakref.ref(resources_of(model, tokenizer, TEXT, 128))
    resources_of(model, tokenizer, TEXT + " 5", 128)
    gc.collect()
    assert first() is None


def test_neutral_text_is_read_again_when_a_threshold_changes(make_routed: Callable[..., Any], tokenizer: Any):
    model = make_routed("mod")
    resources = resources_of(model, tokenizer, TEXT, 128)
    first = resources.neutral_text(model)
    assert resources.neutral_text(model) is first
    (name, threshold), *_ = added_buffers(model)
    threshold.fill_(-torch.inf)
    second = resources_of(model, tokenizer, TEXT, 128).neutral_text(model)
    assert second is not first, name
    assert first.kl(model) > 1e-4
    assert abs(second.kl(model)) < 1e-6


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
