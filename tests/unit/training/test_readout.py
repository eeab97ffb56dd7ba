"""Losses by pieces are the losses at once, values and gradients, whatever is trained."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pliant.training import readout

POSITIONS, WIDTH, VOCABULARY = 37, 12, 53


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, the last one not full."""
    monkeypatch.setattr(readout, "CHUNK", 8)


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def head() -> nn.Linear:
    layer = nn.Linear(WIDTH, VOCABULARY, bias=True)
    with torch.no_grad():
        layer.weight.copy_(make(VOCABULARY, WIDTH, seed=1))
        layer.bias.copy_(make(VOCABULARY, seed=2))
    return layer


def at_once(name: str, head: nn.Linear, hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    if name == "cross_entropy":
        return functional.cross_entropy(logits, targets, reduction="sum")
    expected = head(teacher_hidden).detach().log_softmax(-1)
    return functional.kl_div(logits.log_softmax(-1), expected, reduction="sum", log_target=True)


def by_pieces(name: str, head: nn.Linear, hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> Tensor:
    if name == "cross_entropy":
        return readout.cross_entropy(head, hidden, targets)
    frozen = nn.Linear(WIDTH, VOCABULARY)
    frozen.load_state_dict(head.state_dict())
    return readout.divergence(head, hidden, frozen.requires_grad_(False), teacher_hidden)


@pytest.mark.parametrize("name", ["cross_entropy", "divergence"])
@pytest.mark.parametrize("trained", [True, False])
def test_pieces_add_up_to_the_whole(name: str, trained: bool, head: nn.Linear) -> None:
    head.requires_grad_(trained)
    targets = torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(3))
    teacher_hidden = make(POSITIONS, WIDTH, seed=4)
    results = []
    for compute in (at_once, by_pieces):
        hidden = make(POSITIONS, WIDTH, seed=5).requires_grad_()
        value = compute(name, head, hidden, teacher_hidden, targets)
        inputs = [hidden, *head.parameters()] if trained else [hidden]
        results.append((value.detach(), *torch.autograd.grad(0.25 * value, inputs)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_a_gradient_nothing_is_kept(head: nn.Linear) -> None:
    with torch.no_grad():
        value = readout.cross_entropy(head, make(POSITIONS, WIDTH), torch.zeros(POSITIONS, dtype=torch.long))
    assert not value.requires_grad


def test_no_piece_of_logits_is_larger_than_a_chunk(head: nn.Linear) -> None:
    seen: list[int] = []
    head.register_forward_hook(lambda _module, _args, out: seen.append(len(out)))
    hidden = make(POSITIONS, WIDTH).requires_grad_()
    readout.cross_entropy(head, hidden, torch.zeros(POSITIONS, dtype=torch.long)).backward()
    assert seen == [8, 8, 8, 8, 5]


def test_the_divergence_from_itself_is_nothing(head: nn.Linear) -> None:
    hidden = make(POSITIONS, WIDTH).requires_grad_()
    value = readout.divergence(head, hidden, head, hidden.detach())
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), atol=1e-6, rtol=0.0)


def test_positions_are_those_before_a_label() -> None:
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, 9]])
    assert readout.predicted(labels).tolist() == [[True, False, True, False], [False, True, True, False]]
    assert readout.targets_of(labels).tolist() == [6, 7, 8, 9]


def test_scores_are_those_of_whole_distributions(head: nn.Linear) -> None:
    hidden, teacher_hidden = make(POSITIONS, WIDTH), make(POSITIONS, WIDTH, seed=9)
    targets = torch.arange(POSITIONS)
    found = readout.scores(head, hidden, targets, (head, teacher_hidden))
    log_p, log_q = head(hidden).log_softmax(-1), head(teacher_hidden).log_softmax(-1)
    expected = torch.stack(
        [
            -log_p[torch.arange(POSITIONS), targets],
            -log_q[torch.arange(POSITIONS), targets],
            (log_q.exp() * (log_q - log_p)).sum(-1),
            (log_p.argmax(-1) == log_q.argmax(-1)).float(),
        ],
        dim=-1,
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert readout.scores(head, hidden[:0], targets[:0]).shape == (0, 1)


def test_bfloat16_is_near_float32(head: nn.Linear) -> None:
    targets = torch.zeros(POSITIONS, dtype=torch.long)
    exact = readout.cross_entropy(head, make(POSITIONS, WIDTH), targets)
    rounded = readout.cross_entropy(head.bfloat16(), make(POSITIONS, WIDTH).bfloat16(), targets)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-2)
