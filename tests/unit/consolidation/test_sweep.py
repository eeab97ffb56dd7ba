"""Layers that are found by trying: what is tried, what is weighed, and what is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pliant
from pliant.consolidation import Consolidation, sweep_layers
from pliant.consolidation import sweep as sweep_module
from pliant.errors import EditError
from pliant.models.edits import Delta

TEXT = "A quiet river carries old boats past green hills while the miller counts his coins by candle light. " * 12


@pytest.fixture
def model(make_base: Callable[..., Any], tmp_path: Path) -> Any:
    """A dense model of twelve layers."""
    make_base(num_hidden_layers=12, vocab_size=330, max_position_embeddings=256).save_pretrained(tmp_path / "base")
    return pliant.load(tmp_path / "base").eval()


@pytest.fixture
def look(model: Any, byte_speaker: Any) -> Callable[..., Consolidation]:
    """A function that looks for layers with little text."""

    def run(settings: Consolidation | None = None, **options: Any) -> Consolidation:
        settings = settings or Consolidation(target="unembedding", kl_budget=None, num_prefixes=1, contrast=1)
        return sweep_layers(model, byte_speaker, settings, text=TEXT, num_tokens=256, **options)

    return run


def test_every_choice_is_tried_and_the_best_is_kept(
    look: Callable[..., Consolidation], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    tried, worth, progress, steps = [], {2: 0.5, 4: 3.0}, sweep_module.solution_of, []

    def note(*args: Any) -> Any:
        tried.append(args[3].layers)
        return progress(*args)

    def read(_model: Any, _tokenizer: Any, deltas: dict[str, Delta]) -> tuple[float, torch.Tensor]:
        first = min((int(name.split(".")[1]) for name in deltas), default=-1)
        return worth.get(first, 0.0), torch.zeros(2, 3).log_softmax(-1)

    monkeypatch.setattr(sweep_module, "solution_of", note)
    monkeypatch.setattr(sweep_module, "_read", read)
    found = look(progress=lambda label, done, total: steps.append((done, total)))
    assert tried == [[0, 1, 11], [1, 2, 11], [2, 3, 11], [4, 5, 11], [5, 11]]
    assert steps == [(number, 5) for number in range(1, 6)]
    assert (found.layers, found.positions, found.target) == ([4, 5, 11], "answer", "unembedding")
    assert look() == found
    assert len(tried) == 5  # and not tried again
    (file,) = (cache / "layer-sweeps").iterdir()
    assert list(json.loads(file.read_text()).values()) == [{"positions": "answer", "layers": [4, 5, 11]}]
    look(Consolidation(target="unembedding", kl_budget=None, num_prefixes=1, contrast=2))
    assert len(tried) == 10  # with other settings it is


def test_what_other_subjects_suffer_counts_against_a_choice(
    look: Callable[..., Consolidation], monkeypatch: pytest.MonkeyPatch
):
    def read(_model: Any, _tokenizer: Any, deltas: dict[str, Delta]) -> tuple[float, torch.Tensor]:
        first = min((int(name.split(".")[1]) for name in deltas), default=-1)
        others = torch.zeros(2, 3)
        if first == 4:
            others[:, 0] = 5.0
        return {2: 0.5, 4: 1.0}.get(first, 0.0), others.log_softmax(-1)

    monkeypatch.setattr(sweep_module, "_read", read)
    assert look().layers == [2, 3, 11]


def test_the_answers_gain_and_the_others_move(model: Any, byte_speaker: Any):
    before, others = sweep_module._read(model, byte_speaker, {})
    generator = torch.Generator().manual_seed(0)
    shape = model.model.layers[11].mlp.down_proj.weight.shape
    left, right = (torch.randn(size, 1, generator=generator) for size in shape)
    after, moved = sweep_module._read(model, byte_speaker, {"layers.11.mlp.down_proj": Delta(left=left, right=right)})
    assert before < 0
    assert after != before
    assert others.shape == moved.shape == (12, 330)
    assert sweep_module.kl_sum(moved, others) > 0
    again, same = sweep_module._read(model, byte_speaker, {})
    assert again == before
    assert torch.equal(same, others)


def test_a_choice_that_is_refused_is_left_out(look: Callable[..., Consolidation], monkeypatch: pytest.MonkeyPatch):
    solve = sweep_module.solution_of

    def refuse(*args: Any) -> Any:
        if args[3].layers != [2, 3, 11]:
            raise EditError("kl_budget must leave some of the edit")
        return solve(*args)

    monkeypatch.setattr(sweep_module, "solution_of", refuse)
    assert look().layers == [2, 3, 11]


def test_a_sweep_of_which_nothing_is_left_says_why(look: Callable[..., Consolidation], cache: Path):
    with pytest.raises(EditError, match="kl_budget must leave some of the edit"):
        look(Consolidation(target="unembedding", kl_budget=1e-14, num_prefixes=1, contrast=1))
    assert not (cache / "layer-sweeps").exists()


def test_context_chooses_positions_too(look: Callable[..., Consolidation], model: Any):
    choices = list(sweep_module._choices(model, Consolidation(target="context")))
    assert [choice["layers"] for choice in choices[:3]] == [[8, 10], [6, 8, 10], [*range(2, 11)]]
    assert [choice["positions"] for choice in choices[::3]] == ["answer", "span", "subject"]
    found = look(Consolidation(target="context", kl_budget=None, num_prefixes=1, contrast=1))
    assert {"positions": found.positions, "layers": found.layers} in choices


def test_layers_that_tokens_pass_by_are_not_tried(model: Any, byte_speaker: Any):
    tokens = pliant.data.calibration_tokens(byte_speaker, TEXT, num_tokens=320, window=32)
    pliant.convert(model, pliant.ModConfig(capacity_gamma=0.5), calibration=tokens)
    for target in ("auto", "context"):
        choices = list(sweep_module._choices(model, Consolidation(target=target)))
        assert choices
        assert all(index % 2 == 0 for choice in choices for index in choice["layers"])


def test_a_sweep_leaves_the_model_as_it_was(look: Callable[..., Consolidation], model: Any, state_of: Callable):
    before = state_of(model)
    look()
    assert state_of(model) == before
    assert not len(model.edits)


def test_a_damaged_file_is_named(look: Callable[..., Consolidation], cache: Path):
    found = look()
    (file,) = (cache / "layer-sweeps").iterdir()
    file.write_text("{")
    with pytest.raises(EditError, match=r"layer-sweeps/.*json must be JSON; it is damaged.*Delete it"):
        look()
    file.unlink()
    assert look() == found
