"""The margin that is solved for at the last layer holds in the logits, at little cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.consolidation import targets
from pliant.consolidation.targets import COMPETITORS, SLACK, margin_residual, spread


def lead(model: Any, hidden: Tensor, answers: Tensor) -> Tensor:
    """How far the answer's logit is above every other."""
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(hidden)).float()
    own = logits.gather(1, answers[:, None])[:, 0]
    return own - logits.scatter(1, answers[:, None], -torch.inf).amax(1)


def states_of(model: Any, prompt: Tensor) -> Tensor:
    """What the last layer leaves, place by place."""
    seen: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(prompt)
    hook.remove()
    return seen[0].flatten(0, 1)


def answers_of(count: int) -> Tensor:
    return torch.randint(2, 97, (count,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_the_answer_leads_by_the_margin(margin: float, family: str, make_base: Callable[..., Any], prompt: Tensor):
    model = make_base(family)
    hidden = states_of(model, prompt)
    answers = answers_of(len(hidden))
    assert (lead(model, hidden, answers) < 0).float().mean() > 0.8
    delta = margin_residual(model, hidden, answers, margin)
    assert delta.shape == hidden.shape
    reached = lead(model, hidden + delta, answers)
    assert (reached >= margin - 2 * SLACK).float().mean() > 0.9, reached
    before = lead(model, hidden, answers)
    assert (reached > before)[before < margin - SLACK].all()
    assert reached.median() < margin + 1.0  # and not by far more


def test_what_leads_already_stays(make_base: Callable[..., Any], prompt: Tensor):
    model = make_base()
    hidden = states_of(model, prompt)
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(hidden))
    answers = logits.argmax(-1)
    leading = lead(model, hidden, answers)
    margin = float(leading.median())
    delta = margin_residual(model, hidden, answers, margin)
    assert 0 < (leading >= margin).sum() < len(hidden)
    assert not delta[leading >= margin].any()
    assert delta[leading < margin - SLACK].any(dim=1).all()


def naive(model: Any, hidden: Tensor, answer: Tensor, margin: float) -> Tensor:
    """The shortest step along the answer's own row of the head after which it leads by the margin."""
    direction = model.lm_head.weight[answer[0]] * model.model.norm.weight
    direction = (direction / direction.norm()).detach()
    for size in torch.linspace(0, 40, 2001):
        if lead(model, hidden + size * direction, answer)[0] >= margin:
            return size * direction[None]
    return torch.full_like(hidden, torch.inf)  # out of reach


def test_it_costs_less_than_a_step_along_the_answer(make_base: Callable[..., Any], prompt: Tensor):
    model = make_base()
    hidden = states_of(model, prompt)[:12]
    answers = answers_of(len(hidden))
    delta = margin_residual(model, hidden, answers, 2.0)
    reached = lead(model, hidden + delta, answers)
    shares = []
    for index in range(len(hidden)):
        plain = naive(model, hidden[index : index + 1], answers[index : index + 1], float(reached[index]))
        shares.append(float(delta[index].norm() / plain.norm()))
    assert max(shares) < 1.1, shares
    assert sum(shares) / len(shares) < 0.95, shares


def test_rows_do_not_depend_on_each_other(make_base: Callable[..., Any], prompt: Tensor):
    model = make_base()
    hidden = states_of(model, prompt)
    answers = answers_of(len(hidden))
    together = margin_residual(model, hidden, answers, 2.0)
    for index in (0, 7, 21):
        alone = margin_residual(model, hidden[index : index + 1], answers[index : index + 1], 2.0)
        torch.testing.assert_close(alone[0], together[index], rtol=1e-3, atol=1e-3)


def test_a_half_precision_head_gives_the_same(make_base: Callable[..., Any], prompt: Tensor):
    model = make_base()
    hidden = states_of(model, prompt)
    answers = answers_of(len(hidden))
    delta = margin_residual(model.bfloat16(), hidden, answers, 2.0)
    assert delta.dtype == torch.float32
    assert (lead(model.float(), hidden + delta, answers) > 1.0).float().mean() > 0.8


def test_few_competitors_bind(make_base: Callable[..., Any], prompt: Tensor, monkeypatch: pytest.MonkeyPatch):
    counts: list[int] = []
    solve = targets._least_norm

    def counted(*args: Any) -> Any:
        delta, binding = solve(*args)
        counts.append(len(binding))
        return delta, binding

    monkeypatch.setattr(targets, "_least_norm", counted)
    model = make_base()
    hidden = states_of(model, prompt)
    margin_residual(model, hidden, answers_of(len(hidden)), 2.0)
    assert 1 <= min(counts) <= max(counts) <= COMPETITORS


def test_what_is_missing_is_spread_over_the_layers_left():
    present, target, written = torch.zeros(2, 4), torch.ones(2, 4), torch.zeros(2, 4)
    for left in (3, 2, 1):
        share = spread(target, written, left)
        torch.testing.assert_close(share, torch.full((2, 4), 1 / 3))
        written = written + share
    torch.testing.assert_close(written, target - present)
