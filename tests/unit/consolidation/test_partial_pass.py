"""A pass from one layer on is the plain pass, and leaves the layers as they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pliant
from pliant.consolidation.forward import PartialPass, trial
from pliant.consolidation.rows import Row, aligned
from pliant.models.edits import Delta, down_proj

KINDS = ("dense", "keyed")
TOLERANCE = 1e-6


@pytest.fixture
def make_model(make_base: Callable[..., Any], convert_randomly: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a tiny base, or its keyed conversion."""

    def make(kind: str, base: str = "llama", **overrides: Any) -> Any:
        model = make_base(base, **overrides)
        return model if kind == "dense" else convert_randomly(model, "keyed", layers=[0, 2])

    return make


def plain(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The state before each layer and after the last one, and the keys of each layer, by hooks alone."""
    states: dict[int, Tensor] = {}
    keys: dict[int, Tensor] = {}
    hooks = []
    for index, layer in enumerate(model.model.layers):

        def before(_module: Any, args: Any, index: int = index) -> None:
            states[index] = args[0].detach().clone()

        def after(_module: Any, _args: Any, out: Any, index: int = index) -> None:
            states[index + 1] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        def key(_module: Any, args: Any, index: int = index) -> None:
            keys[index] = args[0].detach().clone()

        hooks += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(key))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [states[index] for index in range(len(states))], [keys[index] for index in range(len(keys))]


def traces(model: nn.Module) -> list[Any]:
    """What a pass could leave behind: the forward of every module that has its own, and all hooks."""
    return [
        (name, vars(module).get("forward"), list(module._forward_hooks), list(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_partial_pass_is_the_plain_one(
    kind: str, attention: str, family: str, make_model: Callable[..., Any], prompt: Tensor,
    largest_difference: Callable[..., float],
):  # fmt: skip
    model = make_model(kind, family)
    model.set_attn_implementation(attention)
    states, keys = plain(model, prompt)
    left = traces(model)
    for start in range(3):
        passing = PartialPass(model, prompt, start)
        assert traces(model) == left
        assert torch.equal(passing.hidden, states[start])
        for last in range(start, 3):
            for watched in range(start, last + 1):
                read, after = passing.run(last, keys=watched)
                assert read is not None
                assert largest_difference(read, keys[watched]) < TOLERANCE
                assert largest_difference(after, states[last + 1]) < TOLERANCE
        assert torch.equal(passing.hidden, states[start])  # to go on from again
    assert traces(model) == left


def test_a_pass_moves_on(make_model: Callable[..., Any], prompt: Tensor, largest_difference: Callable[..., float]):
    model = make_model("keyed")
    states, _ = plain(model, prompt)
    passing = PartialPass(model, prompt, 0)
    passing.advance(2)
    assert passing.start == 2
    assert largest_difference(passing.hidden, states[2]) < TOLERANCE
    passing.advance(1)
    assert passing.start == 2
    read, after = passing.run(2)
    assert read is None
    assert largest_difference(after, states[3]) < TOLERANCE
    passing.advance(3)
    assert largest_difference(passing.hidden, states[3]) < TOLERANCE


def test_a_pass_goes_on_from_given_states_with_gradients(make_model: Callable[..., Any], prompt: Tensor):
    model = make_model("dense").requires_grad_(False)
    passing = PartialPass(model, prompt, 1)
    assert not passing.hidden.requires_grad
    moved = (passing.hidden + 0.1).requires_grad_(True)
    _, after = passing.run(2, hidden=moved)
    (gradient,) = torch.autograd.grad(after.square().sum(), moved)
    assert gradient.abs().sum() > 0
    _, unmoved = passing.run(2)
    assert not torch.allclose(after.detach(), unmoved, atol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_aligned_at_their_subjects_are_each_row_alone(
    attention: str, family: str, dynamic_kind: str, make_dynamic: Callable[..., Any], row_of: Callable[..., Row],
    largest_difference: Callable[..., float],
):  # fmt: skip
    model = make_dynamic(dynamic_kind, family)
    model.set_attn_implementation(attention)
    rows = [row_of(0), row_of(1, length=12, subject=0), row_of(2, length=5, subject=4, answer=(7, 8, 9))]
    ids, mask, subject = aligned(rows, 0)
    assert subject == 4
    last = len(model.model.layers) - 1
    passing = PartialPass(model, ids, 0, mask=mask, first=subject)
    passing.advance(1)
    for _ in range(2):  # a run leaves nothing behind for the next
        _, after = passing.run(last)
        for index, one in enumerate(rows):
            states, _ = plain(model, torch.tensor([one.ids]))
            count = len(one.ids) - one.subject
            assert largest_difference(passing.hidden[index, :count], states[1][0, one.subject :]) < 1e-5
            assert largest_difference(after[index, :count], states[-1][0, one.subject :]) < 1e-5


def test_rows_that_begin_with_their_subjects_need_no_cache(
    make_model: Callable[..., Any], row_of: Callable[..., Row], largest_difference: Callable[..., float]
):
    model = make_model("dense")
    rows = [row_of(0, subject=0), row_of(1, length=5, subject=0)]
    ids, mask, subject = aligned(rows, 0)
    passing = PartialPass(model, ids, 0, mask=mask, first=subject)
    assert passing.before is None
    _, after = passing.run(2)
    for index, one in enumerate(rows):
        states, _ = plain(model, torch.tensor([one.ids]))
        assert largest_difference(after[index, : len(one.ids)], states[-1][0]) < 1e-5


def test_a_pass_that_fails_leaves_the_layers_as_they_were(
    make_model: Callable[..., Any], prompt: Tensor, monkeypatch: pytest.MonkeyPatch
):
    model = make_model("dense")
    own = model.model.layers[2].forward
    model.model.layers[2].forward = own  # as offloading leaves it: an attribute of the layer itself
    left = traces(model)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.norm, "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            PartialPass(model, prompt, 1)
    assert traces(model) == left
    assert vars(model.model.layers[2])["forward"] is own
    passing = PartialPass(model, prompt, 1)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2], "forward", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            passing.run(2, keys=1)
    assert traces(model) == left


def changes(seed: int = 2) -> dict[str, Delta]:
    generator = torch.Generator().manual_seed(seed)
    return {
        down_proj(index): Delta(
            left=torch.randn(32, 2, generator=generator), right=0.1 * torch.randn(48, 2, generator=generator)
        )
        for index in (0, 2)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_is_the_changed_weights_and_leaves_no_hook(
    kind: str, make_model: Callable[..., Any], prompt: Tensor, largest_difference: Callable[..., float]
):
    model = make_model(kind)
    left, first, second = traces(model), changes(), changes(3)
    with torch.no_grad():
        before = model(prompt).logits
        with trial(model, first), trial(model, second):
            tried = model(prompt).logits
        assert traces(model) == left
        assert torch.equal(model(prompt).logits, before)
        for deltas in (first, second):
            for name, delta in deltas.items():
                model.model.get_submodule(name).weight += delta.left @ delta.right.T
        assert largest_difference(tried, model(prompt).logits) < 1e-5
    assert not torch.allclose(tried, before, atol=0.01)


def test_a_trial_stands_beside_the_ledger(make_base: Callable[..., Any], tmp_path: Any, prompt: Tensor):
    make_base().save_pretrained(tmp_path / "base")
    model = pliant.load(tmp_path / "base").eval()
    edits = [pliant.models.Edit(context="a", deltas=changes(seed)) for seed in (2, 3)]
    with torch.no_grad():
        model.edits.add(edits[0])
        alone = model(prompt).logits
        with trial(model, edits[1].deltas):
            both = model(prompt).logits
        assert torch.equal(model(prompt).logits, alone)
        model.edits.add(edits[1])
        torch.testing.assert_close(both, model(prompt).logits, rtol=1e-4, atol=1e-4)


def test_a_trial_that_fails_leaves_no_hook(make_model: Callable[..., Any]):
    model = make_model("dense")
    left = traces(model)

    def use() -> None:
        with trial(model, changes()):
            assert traces(model) != left
            raise KeyError

    with pytest.raises(KeyError):
        use()
    assert traces(model) == left
    with trial(model, {}):
        assert traces(model) == left


def test_a_trial_of_an_unknown_place_leaves_no_hook(make_model: Callable[..., Any]):
    model = make_model("dense")
    left, some = traces(model), changes()
    with (
        pytest.raises(AttributeError),
        trial(model, {**some, down_proj(7): some[down_proj(0)]}),
    ):
        pass
    assert traces(model) == left
