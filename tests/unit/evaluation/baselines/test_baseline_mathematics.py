"""The closed forms of the baselines beside their slow, obvious versions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.consolidation.forward import trial
from pliant.errors import EditError
from pliant.evaluation.baselines import AlphaEdit, KeyMemory, Memit, Rome
from pliant.evaluation.baselines.prompts import case_rows, encode, sampled_prefixes
from pliant.evaluation.baselines.states import layer_at, subject_states
from pliant.evaluation.baselines.training import answer_losses
from pliant.evaluation.baselines.values import _Suffixes
from pliant.evaluation.editing.cases import EditCase

SHORT: dict[str, Any] = {"num_prefixes": 2, "prefix_length": 3}


@pytest.fixture
def keys() -> Tensor:
    """Four keys."""
    return torch.randn(48, 4, generator=torch.Generator().manual_seed(0))


def test_rome_writes_its_value_at_its_key(
    make_base: Callable, tokenizer: Any, fact: Any, moments_of: Callable, calibration: Tensor
) -> None:
    model = make_base("llama_mlp_bias")
    editor = Rome(depth=0.34, steps=5, moments=moments_of(model, calibration), **SHORT)
    value = editor.values(model, tokenizer, [fact])
    (delta,) = editor(model, tokenizer, fact).deltas.values()
    rows = case_rows(tokenizer, [fact], editor.prefixes(model, tokenizer), answers=False)
    key = subject_states(model, rows, [1]).keys[1]
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    torch.testing.assert_close((weight + delta.left @ delta.right.T) @ key, weight @ key + value)


def test_memit_solves_its_least_squares(
    make_base: Callable, tokenizer: Any, keys: Tensor, moments_of: Callable, calibration: Tensor
) -> None:
    model = make_base()
    moments = moments_of(model, calibration)
    editor = Memit(strength=0.2, ridge=0.05, moments=moments)
    found = editor.right_factor(model, tokenizer, 1, keys)
    c = moments[1].moment.double()
    c = c + 0.05 * c.diagonal().mean() * torch.eye(48)
    expected = keys.double().T @ torch.linalg.inv(0.2 * 48 * c + keys.double() @ keys.double().T)
    torch.testing.assert_close(found.T.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("earlier", [0, 3])
def test_alphaedit_solves_its_least_squares_in_the_null_space(
    earlier: int, make_base: Callable, tokenizer: Any, keys: Tensor, moments_of: Callable, calibration: Tensor
) -> None:
    model = make_base()
    moments, memory = moments_of(model, calibration), KeyMemory()
    past = torch.randn(48, earlier, generator=torch.Generator().manual_seed(1))
    if earlier:
        memory.remember("one", {1: past[:, :1]})
        memory.remember("two", {1: past[:, 1:]})
    editor = AlphaEdit(threshold=0.8, strength=0.7, memory=memory, moments=moments)
    found = editor.right_factor(model, tokenizer, 1, keys)
    values, vectors = torch.linalg.eigh(moments[1].moment.double())
    small = values < 0.8 * values.mean()
    p = vectors[:, small] @ vectors[:, small].T
    k, k_p = keys.double(), past.double()
    inverse = torch.linalg.inv(k_p @ k_p.T @ p + k @ k.T @ p + 0.7 * values.mean() * torch.eye(48).double())
    torch.testing.assert_close(found.T.double(), k.T @ p @ inverse, rtol=1e-4, atol=1e-6)
    assert 0 < small.sum() < 48
    assert (found.T.double() @ vectors[:, ~small]).abs().max() < 1e-5 * found.norm()


def test_alphaedit_remembers_and_forgets(
    make_base: Callable, tokenizer: Any, facts: list, moments_of: Callable, calibration: Tensor
) -> None:
    model = make_base()
    memory, options = KeyMemory(), {"depths": (0.34, 0.34), "threshold": 2.0, "strength": 0.01, "steps": 5}
    moments = moments_of(model, calibration)
    editor = AlphaEdit(memory=memory, moments=moments, **options, **SHORT)
    first = editor(model, tokenizer, facts[0])
    earlier = memory.at(1)
    assert earlier is not None
    with trial(model, first.deltas):
        (with_memory,) = editor(model, tokenizer, facts[1]).deltas.values()
        (without,) = AlphaEdit(moments=moments, **options, **SHORT)(model, tokenizer, facts[1]).deltas.values()
    moved, moved_without = ((d.left @ (d.right.T @ earlier)).norm() for d in (with_memory, without))
    assert moved < 0.2 * moved_without
    both = memory.at(1)
    assert both is not None
    assert both.shape[1] == 2
    memory.forget(first.id)
    left = memory.at(1)
    assert left is not None
    assert torch.equal(left, both[:, 1:])
    assert memory.at(0) is None


def test_alphaedit_needs_a_null_space(
    make_base: Callable, tokenizer: Any, keys: Tensor, moments_of: Callable, calibration: Tensor
) -> None:
    model = make_base()
    with pytest.raises(EditError, match="threshold must leave"):
        AlphaEdit(threshold=0.0, moments=moments_of(model, calibration)).right_factor(model, tokenizer, 1, keys)


def test_large_batches_keep_the_rank_of_the_matrix(
    make_base: Callable, tokenizer: Any, facts: list, moments_of: Callable, calibration: Tensor
) -> None:
    model = make_base()
    many = [
        EditCase(id=str(i), context="", prompt=f"{i + 2} {i + 3} {i + 4}", subject=f"{i + 3}", answer=f"{i + 5}")
        for i in range(70)
    ]
    editor = Memit(depths=(0.0, 0.34), steps=2, moments=moments_of(model, calibration), **SHORT)
    edit = editor.batch(model, tokenizer, many)
    assert all(delta.left.shape[1] <= 32 for delta in edit.deltas.values())
    assert len(edit.deltas) == 2


def test_cases_do_not_influence_one_another(make_base: Callable, tokenizer: Any, facts: list) -> None:
    model = make_base()
    editor = Memit(depths=(0.34, 0.34), steps=6, clamp=4.0, stop_below=1.0, **SHORT)
    together = editor.values(model, tokenizer, facts)
    alone = torch.cat([editor.values(model, tokenizer, [fact]) for fact in facts], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", ["value", "hidden"])
def test_the_clamp_holds(scale: Any, make_base: Callable, tokenizer: Any, fact: Any) -> None:
    model = make_base()
    editor = Rome(depth=0.34, steps=10, learning_rate=5.0, clamp=0.5, scale=scale, stop_below=0.0, **SHORT)
    size = editor.values(model, tokenizer, [fact]).norm().item()
    seen = []
    layer = model.model.layers[1]
    module = layer.mlp.down_proj if scale == "value" else layer
    handle = module.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    row = case_rows(tokenizer, [fact], [])[0]
    model(torch.tensor([row.ids]))
    handle.remove()
    assert size == pytest.approx(0.5 * seen[0][0, row.subject].norm().item(), rel=1e-4)


def test_suffixes_over_a_cache_give_the_losses_of_whole_rows(
    family: str, make_base: Callable, tokenizer: Any, facts: list
) -> None:
    model = make_base(family)
    rows = case_rows(tokenizer, facts, ["11 12 13", "14 15"])
    essences = [encode(tokenizer, f"{fact.subject} 17 18", fact.subject, owner=i) for i, fact in enumerate(facts)]
    shift = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    nll, log_p, _ = _Suffixes(model, rows, essences).losses(model, 1, shift, "value")
    for owner, essence in enumerate(essences):
        expected = []
        for row in [row for row in rows if row.owner == owner]:
            with shifted(model, row.subject, shift[owner]):
                expected.append(answer_losses(model, [row]))
        torch.testing.assert_close(nll[owner], torch.cat(expected).mean(), rtol=1e-3, atol=1e-4)
        with shifted(model, essence.subject, shift[owner]):
            logits = model(torch.tensor([essence.ids])).logits[0, -1]
        torch.testing.assert_close(log_p[owner], logits.log_softmax(-1), rtol=1e-3, atol=1e-3)


class shifted:
    """Within the block the MLP of layer 1 gives more at one token."""

    def __init__(self, model: Any, place: int, shift: Tensor) -> None:
        def add(_module: Any, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, place] += shift
            return output

        self.handle = model.model.layers[1].mlp.down_proj.register_forward_hook(add)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def test_subject_and_answer_are_found(tokenizer: Any) -> None:
    row = encode(tokenizer, "5 6 7 6 8", "6", "20 21", prefix="9 10", owner=2)
    assert row.ids[-2:] == (20, 21)
    assert (row.answer, row.owner) == (2, 2)
    assert row.ids[row.subject] == 6
    assert row.ids[row.subject + 1] == 8  # the last time it stands there
    for subject in ("", "99"):
        with pytest.raises(EditError, match="subject must be a part of the prompt"):
            encode(tokenizer, "5 6", subject)


def test_prefixes_are_the_bases_own(make_converted: Callable, make_base: Callable, tokenizer: Any) -> None:
    options = {"count": 3, "length": 4, "seed": 0}
    first = sampled_prefixes(make_base(), tokenizer, **options)
    assert len(first) == 3
    assert sampled_prefixes(make_converted("keyed"), tokenizer, **options) == first
    assert sampled_prefixes(make_base(), tokenizer, **{**options, "seed": 5}) != first


def test_layers_are_shares_of_the_depth(make_base: Callable) -> None:
    model = make_base()
    assert [layer_at(model, depth) for depth in (0.0, 0.34, 1.0)] == [0, 1, 2]
    for depth in (-0.1, 1.5):
        with pytest.raises(EditError, match="depth must be in"):
            layer_at(model, depth)
    with pytest.raises(EditError, match="depths must rise"):
        Memit(depths=(0.9, 0.1)).layers(model)
