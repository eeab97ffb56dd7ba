"""What is written at the subject and at the answer: likelier answers, and answers that become the greedy ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.consolidation import stages
from pliant.consolidation.forward import trial
from pliant.consolidation.rows import Row
from pliant.consolidation.stages import (
    AnswerGoal,
    ContextGoal,
    Problem,
    SubjectGoal,
    SubjectStage,
    context_places,
    write_layers,
)
from pliant.consolidation.writers import WriteSettings, write
from pliant.key_moments import KeyMoments, key_moments
from pliant.models.edits import down_proj

LAST = 2


@pytest.fixture
def model(make_base: Callable[..., Any]) -> Any:
    """A tiny base whose parameters take no gradients."""
    return make_base().requires_grad_(False)


@pytest.fixture
def moments(model: Any, calibration: Tensor) -> dict[int, KeyMoments]:
    """Of every layer."""
    return key_moments(model, calibration, "all")


@pytest.fixture
def problem(row_of: Callable[..., Row]) -> Problem:
    """Three facts: two rows, one row, and one row without a subject; with other subjects for the first."""
    rows = [
        row_of(0, answer=(7, 30)),
        row_of(1, length=12, answer=(7, 30), subject=6),
        row_of(2, length=6, answer=(40,), fact=1),
        row_of(3, answer=(50,), subject=None, fact=2),
    ]
    contrast = [row_of(20 + seed, answer=(7, 30)) for seed in range(4)]
    return Problem(rows=rows, contrast=contrast, facts=3)


def plain_log_p(model: Any, row: Row, subject_change: Tensor | None = None, layer: int = 0) -> float:
    """Mean log-probability a token of a row's answer, with the state at the subject changed by a hook."""

    def change(_module: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        if subject_change is not None and row.subject is not None:
            hidden = hidden.clone()
            hidden[0, row.subject] += subject_change
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    hook = model.model.layers[layer].register_forward_hook(change)
    with torch.no_grad():
        scores = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    hook.remove()
    return sum(float(scores[p, t]) for p, t in zip(row.places, row.answer, strict=True)) / row.length


def directions(seed: int = 0, facts: int = 3) -> Tensor:
    return torch.randn(facts, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [0, 1])
def test_the_stages_log_probability_is_that_of_the_model(layer: int, model: Any, problem: Problem):
    stage = SubjectStage(model, problem, layer, 0)
    for scale in (0.0, 3.0):
        values = scale * directions()
        expected = [plain_log_p(model, row, values[row.fact], layer) for row in problem.rows]
        by_fact = [(expected[0] + expected[1]) / 2, expected[2]]
        torch.testing.assert_close(stage.log_p(values)[:2], torch.tensor(by_fact), rtol=1e-4, atol=1e-4)


def test_a_subject_is_one_key_the_mean_over_its_rows(
    model: Any, problem: Problem, moments: dict[int, KeyMoments], monkeypatch: pytest.MonkeyPatch
):
    stage = SubjectStage(model, problem, 1, 0)
    assert stage.named.tolist() == [True, True, False]
    assert not stage.state[2].any()
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    for row in problem.rows[:3]:
        model(torch.tensor([row.ids]))
    hook.remove()
    expected = [some[row.subject] for some, row in zip(seen, problem.rows, strict=False)]
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        stages, "write", lambda *args, **options: calls.append((*args, options)) or write(*args, **options)
    )
    named = problem.with_subjects()
    assert named.facts == 2
    written(model, named, [1], SubjectGoal(named, directions(facts=2)), moments)
    _, keys, residuals, contrast, _, options = calls[0]
    torch.testing.assert_close(keys[0], (expected[0] + expected[1]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(keys[1], expected[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(residuals, directions(facts=2), rtol=1e-4, atol=1e-4)
    assert contrast is not None
    assert contrast.shape == (4, 48)
    assert options == {"facts": 2}


@pytest.mark.parametrize("layers", [[1], [0, 1]])
def test_subjects_move_by_what_is_written(
    layers: list[int], model: Any, problem: Problem, moments: dict[int, KeyMoments]
):
    part = problem.part([1])
    goal, value = SubjectGoal(part, directions(facts=1)), directions(facts=1)
    before = SubjectStage(model, part, 1, 0).state
    deltas = written(model, part, layers, goal, moments, writer="normalised")
    assert list(deltas) == [down_proj(layer) for layer in layers]
    with trial(model, deltas):
        after = SubjectStage(model, part, 1, 0).state
    torch.testing.assert_close(after, before + value, rtol=1e-3, atol=1e-3)


def test_facts_without_a_subject_are_left_out_and_the_others_counted_anew(problem: Problem):
    rows = [problem.rows[3], *problem.rows[:3]]
    moved = Problem(rows=[*rows[1:], rows[0]], contrast=problem.contrast, facts=3).part([1, 2]).with_subjects()
    assert [row.fact for row in moved.rows] == [0]
    assert moved.facts == 1
    assert not moved.contrast


def test_the_strongest_change_is_the_likeliest_that_was_tried(model: Any, problem: Problem):
    stage = SubjectStage(model, problem, 0, 0)
    for seed in range(4):
        change = directions(seed)
        tried = torch.stack([stage.log_p(strength * change) for strength in stages.STRENGTHS])
        value, log_p = stage.strongest(change, 0.0)
        torch.testing.assert_close(log_p[:2], tried.amax(0)[:2])
        for fact in range(2):
            strength = stages.STRENGTHS[int(tried[:, fact].argmax())]
            torch.testing.assert_close(value[fact], strength * change[fact])
        value, log_p = stage.strongest(change, -1e9)
        torch.testing.assert_close(value, change)  # the first is enough
        torch.testing.assert_close(log_p, tried[0])


def test_the_search_makes_the_answers_likelier(model: Any, problem: Problem):
    stage = SubjectStage(model, problem, 0, 0)
    before = stage.log_p(torch.zeros(3, 32))
    found = stage.search(torch.tensor([True, True, False]))
    after = stage.log_p(found)
    assert not found.requires_grad
    assert (after[:2] > before[:2] + 1).all(), (before, after)
    assert (found.norm(dim=1)[:2] <= stages.CLAMP * stage.state.norm(dim=1)[:2] * 1.001).all()
    assert not found[2].any()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False]])
def test_only_the_wanted_facts_are_searched(wanted: list[bool], model: Any, problem: Problem):
    stage = SubjectStage(model, problem, 0, 0)
    found = stage.search(torch.tensor(wanted))
    assert found.any(dim=1).tolist() == wanted
    moved = wanted.index(True)
    assert stage.log_p(found)[moved] > stage.log_p(torch.zeros(3, 32))[moved]


def test_facts_do_not_change_each_others_search(model: Any, problem: Problem):
    wanted = torch.tensor([True, True, False])
    together = SubjectStage(model, problem, 0, 0).search(wanted)
    part = problem.part([1])
    assert [row.fact for row in part.rows] == [0]
    assert part.facts == 1
    alone = SubjectStage(model, part, 0, 0).search(wanted[1:2])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-2, atol=1e-2)


def test_facts_that_are_done_are_read_no_more(model: Any, row_of: Callable[..., Row], monkeypatch: pytest.MonkeyPatch):
    rows = []
    for fact in range(4):
        prompt = row_of(fact).ids[:-1]
        scores = model(torch.tensor([prompt])).logits[0, -1]
        answer = int(scores.argmin() if fact == 2 else scores.argmax())
        rows.append(Row(ids=(*prompt, answer), length=1, subject=3, fact=fact))
    problem = Problem(rows=rows, contrast=[], facts=4)
    before = SubjectStage(model, problem, 0, 0).log_p(torch.zeros(4, 32))
    monkeypatch.setattr(stages, "ENOUGH", 0.01 - before[[0, 1, 3]].min().item())  # at which all but one are done
    read, log_p = [], SubjectStage.log_p
    monkeypatch.setattr(SubjectStage, "log_p", lambda self, values: read.append(len(values)) or log_p(self, values))
    everything = torch.tensor([True] * 4)
    found = SubjectStage(model, problem, 0, 0).search(everything)
    assert read[0] == 4
    assert set(read[1:]) == {1}
    alone = SubjectStage(model, problem.part([2]), 0, 0).search(everything[:1])
    torch.testing.assert_close(found[2], alone[0], rtol=1e-2, atol=1e-2)
    read.clear()
    SubjectStage(model, problem, 0, 0).search(torch.tensor([False, True, True, False]))
    assert read[0] == 2  # what is not wanted is not read at all


def test_a_search_that_is_written_holds(model: Any, problem: Problem, moments: dict[int, KeyMoments]):
    part = problem.part([1])
    stage = SubjectStage(model, part, 0, 0)
    value = stage.search(torch.tensor([True]))
    deltas = written(model, part, [0], SubjectGoal(part, value), moments, writer="normalised")
    with trial(model, deltas):
        now = SubjectStage(model, part, 0, 0)
        torch.testing.assert_close(now.state, stage.state + value, rtol=1e-3, atol=1e-3)
        assert plain_log_p(model, part.rows[0]) > float(stage.log_p(torch.zeros(1, 32))) + 1


def test_every_step_of_the_search_is_looked_at(model: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch):
    stage, looks, steps = SubjectStage(model, problem, 0, 0), [], []
    log_p, grad = stage.log_p, torch.autograd.grad
    monkeypatch.setattr(stages, "ENOUGH", -1.0)  # out of reach
    monkeypatch.setattr(stage, "log_p", lambda values: looks.append(values) or log_p(values))
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: steps.append(args) or grad(*args))
    stage.search(stage.named)
    assert (len(looks), len(steps)) == (stages.STEPS + 1, stages.STEPS)


def greedy_answers(model: Any, rows: Any) -> list[bool]:
    """Whether each token of each answer is the likeliest."""
    found = []
    for row in rows:
        with torch.no_grad():
            said = model(torch.tensor([row.ids])).logits[0].argmax(-1)
        found += [int(said[place]) == token for place, token in zip(row.places, row.answer, strict=True)]
    return found


def written(
    model: Any, problem: Problem, layers: list[int], goal: AnswerGoal, moments: Any, given: Any = None, **settings: Any
) -> dict[str, Any]:
    return write_layers(model, problem, layers, goal, WriteSettings(**settings), moments, given or {}, 0)


@pytest.mark.parametrize("layers", [[LAST], [1, LAST]])
@pytest.mark.parametrize("at_once", [256, 1])
def test_answers_become_greedy(
    layers: list[int], at_once: int, model: Any, problem: Problem, moments: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stages, "ROWS_AT_ONCE", at_once)
    goal = AnswerGoal(model, problem, 2.0)
    assert not any(greedy_answers(model, problem.rows))
    deltas = written(model, problem, layers, goal, moments, neutral=1e-4)
    assert list(deltas) == [down_proj(layer) for layer in layers]
    with trial(model, deltas):
        assert all(greedy_answers(model, problem.rows))
    assert not any(greedy_answers(model, problem.rows))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_batches_of_rows_make_no_difference(
    model: Any, problem: Problem, moments: Any, monkeypatch: pytest.MonkeyPatch
):
    together = written(model, problem, [1, LAST], AnswerGoal(model, problem, 2.0), moments)
    monkeypatch.setattr(stages, "ROWS_AT_ONCE", 2)
    apart = written(model, problem, [1, LAST], AnswerGoal(model, problem, 2.0), moments)
    for name, delta in together.items():
        torch.testing.assert_close(
            apart[name].left @ apart[name].right.T, delta.left @ delta.right.T, rtol=1e-2, atol=1e-3
        )


def test_changes_that_are_in_effect_count(model: Any, problem: Problem, moments: Any):
    goal = AnswerGoal(model, problem, 2.0)
    first = written(model, problem, [1], goal, moments, neutral=1e-4)
    later = written(model, problem, [LAST], goal, moments, given=first, neutral=1e-4)
    assert set(later) == {down_proj(LAST)}
    with trial(model, first | later):
        assert all(greedy_answers(model, problem.rows))
    again = written(model, problem, [LAST], goal, moments, given=first | later, neutral=1e-4)
    again_norm, norm = (sum(delta.norm_squared for delta in some.values()) for some in (again, later))
    assert again_norm < 0.05 * norm  # there is hardly anything left to write


def test_contrast_keeps_other_subjects(model: Any, problem: Problem, moments: Any):
    moved = []
    for contrast in (0.0, 50.0):
        deltas = written(model, problem, [LAST], AnswerGoal(model, problem, 2.0), moments, contrast=contrast)
        before = [plain_log_p(model, row) for row in problem.contrast]
        with trial(model, deltas):
            after = [plain_log_p(model, row) for row in problem.contrast]
        moved.append(sum(abs(late - early) for late, early in zip(after, before, strict=True)))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_context_goal_goes_its_share_of_the_way(alpha: float, model: Any, problem: Problem):
    present, behind = directions(1), directions(2)
    target = ContextGoal(behind, alpha, "answer").target(present)
    torch.testing.assert_close(target, (1 - alpha) * present + alpha * behind)


def test_the_places_of_a_row():
    row = Row(ids=(2, 3, 4, 5, 6, 7, 8), length=2, subject=1)
    assert list(context_places(row, "answer")) == [4, 5]
    assert list(context_places(row, "span")) == [1, 2, 3, 4, 5]
    assert list(context_places(row, "subject")) == [1]
    nameless = Row(ids=row.ids, length=2)
    for positions in ("answer", "span", "subject"):
        assert list(context_places(nameless, positions)) == [4, 5]
