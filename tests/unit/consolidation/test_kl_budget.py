"""The share of an edit that stays within a budget, for divergences that grow in different ways."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.consolidation import budget
from pliant.consolidation.budget import TRIALS, NeutralText, divergence, shrunk
from pliant.errors import EditError
from pliant.models.edits import Delta

PATH = "layers.1.mlp.down_proj"


@pytest.fixture
def model(make_base: Callable[..., Any]) -> Any:
    """A tiny base whose edit of one layer is seen in the weights alone."""
    return make_base()


def deltas_of(strength: float = 0.3) -> dict[str, Delta]:
    generator = torch.Generator().manual_seed(0)
    return {
        PATH: Delta(
            left=strength * torch.randn(32, 2, generator=generator), right=torch.randn(48, 2, generator=generator)
        )
    }


def log_p_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


class Growing(NeutralText):
    """A divergence that is some function of the share of the edit that is on the model."""

    def __init__(self, model: Any, tokens: Tensor, grows: Callable[[float], float], full: Delta) -> None:
        super().__init__(model, tokens)
        self.grows, self.full, self.shares = grows, full, []

    def kl(self, model: Any) -> float:
        (hook,) = model.model.get_submodule(PATH)._forward_hooks.values()
        (delta,) = hook.deltas
        self.shares.append(float(delta.left[0, 0] / self.full.left[0, 0]))
        return self.grows(self.shares[-1])


GROWTH: dict[str, Callable[[float], float]] = {
    "square": lambda share: 2 * share**2,
    "linear": lambda share: 3 * share,
    "cube": lambda share: 5 * share**3,
    "root": lambda share: 0.1 * math.sqrt(share),
    "saturating": lambda share: 0.4 * math.tanh(2 * share),
    "step": lambda share: 0.011 if share > 0.05 else 0.1 * share,
}


@pytest.mark.parametrize("growth", GROWTH)
def test_the_share_stays_within_the_budget(growth: str, model: Any, prompt: Tensor):
    full = deltas_of()
    neutral = Growing(model, prompt, GROWTH[growth], full[PATH])
    kept, kl, share = shrunk(model, full, neutral, 0.01)
    assert kl == GROWTH[growth](neutral.shares[-1]) <= 0.01
    assert share == pytest.approx(neutral.shares[-1], rel=1e-5)
    torch.testing.assert_close(kept[PATH].left, share * full[PATH].left)
    assert torch.equal(kept[PATH].right, full[PATH].right)
    assert neutral.shares[0] == 1
    assert len(neutral.shares) <= TRIALS
    if growth == "square":
        assert len(neutral.shares) == 2
        assert kl > 0.85 * 0.01


@pytest.mark.parametrize("budget", [None, 2.0])
def test_what_is_within_the_budget_stays_whole(budget: float | None, model: Any, prompt: Tensor):
    full = deltas_of()
    kept, kl, share = shrunk(model, full, Growing(model, prompt, lambda _: 1.5, full[PATH]), budget)
    assert share == 1
    assert kl == 1.5
    assert torch.equal(kept[PATH].left, full[PATH].left)


def test_a_divergence_that_is_known_is_not_measured_again(model: Any, prompt: Tensor):
    full = deltas_of()
    neutral = Growing(model, prompt, GROWTH["square"], full[PATH])
    expected = shrunk(model, full, neutral, 0.01)
    measured = neutral.shares.copy()
    neutral.shares.clear()
    found = shrunk(model, full, neutral, 0.01, whole=GROWTH["square"](1.0))
    assert found[1:] == expected[1:]
    assert neutral.shares == measured[1:]


@pytest.mark.parametrize("chunk", [1, 5, 1_000])
def test_the_size_of_chunks_makes_no_difference(
    chunk: int, model: Any, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
):
    kl = divergence(model, deltas_of(), NeutralText(model, prompt))
    monkeypatch.setattr(budget, "LOGITS_CHUNK", chunk)
    neutral = NeutralText(model, prompt)
    assert max(map(len, neutral.before)) == min(chunk, prompt.numel())
    assert divergence(model, deltas_of(), neutral) == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("grows", [lambda _: 1.0, lambda share: 1e9 * share**2], ids=["flat", "steep"])
def test_a_budget_that_leaves_nothing_is_refused(grows: Callable[[float], float], model: Any, prompt: Tensor):
    full = deltas_of()
    with pytest.raises(EditError, match=r"kl_budget must leave some of the edit; .* nats a token\. Raise"):
        shrunk(model, full, Growing(model, prompt, grows, full[PATH]), 0.01)
    assert not model.model.get_submodule(PATH)._forward_hooks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_divergence_that_is_not_finite_is_refused(value: float, model: Any, prompt: Tensor):
    full = deltas_of()
    with pytest.raises(EditError, match=rf"finite on neutral text; its KL divergence is {value}\. Lower alpha"):
        shrunk(model, full, Growing(model, prompt, lambda _: value, full[PATH]), None)
    assert not model.model.get_submodule(PATH)._forward_hooks


def test_the_divergence_is_that_of_the_logits(model: Any, prompt: Tensor):
    before = log_p_of(model, prompt)
    neutral, full = NeutralText(model, prompt), deltas_of()
    assert abs(neutral.kl(model)) < 1e-6
    _, kl, _ = shrunk(model, full, neutral, None)
    with torch.no_grad():
        model.model.get_submodule(PATH).weight += full[PATH].left @ full[PATH].right.T
    now = log_p_of(model, prompt)
    assert kl == pytest.approx(float((before.exp() * (before - now)).sum(-1).mean()), rel=1e-4)
    assert kl > 0.1
