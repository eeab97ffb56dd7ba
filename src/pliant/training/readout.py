"""Losses that take the logits piece by piece, so that (batch, seq, vocabulary) never lies in memory.

Each piece's gradient is taken at once, in the forward pass, and only that of the hidden states (and of a head that is
trained) is kept: the logits are computed once, and the memory is that of one piece.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional

from pliant.data.packing import IGNORED

CHUNK = 128
"""Positions whose logits exist at a time."""

Logits = Float[Tensor, "piece vocabulary"]
FP16_LIFT = 2.0**10
"""What gradients of fp16 logits are multiplied by while they are fp16, whose range ends above the smallest."""

PieceLoss = Callable[[Logits, slice], tuple[Float[Tensor, ""], Logits]]
"""fp32 logits of some positions → their summed loss, and its gradient in the logits."""


def predicted(labels: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Where a next token is to be predicted: position t if token t + 1 has a label."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def targets_of(labels: Int[Tensor, "batch seq"]) -> Int[Tensor, " positions"]:
    """The tokens to predict, in the order of the positions where :func:`predicted` is true."""
    following = labels[:, 1:]
    return following[following != IGNORED]


def cross_entropy(
    head: nn.Module, hidden: Float[Tensor, "positions d_model"], targets: Int[Tensor, " positions"]
) -> Float[Tensor, ""]:
    """``Σ −log p(target)`` in nats, over positions."""

    def piece_loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_p, chosen = logits.log_softmax(-1), targets[part, None]
        value = -log_p.gather(-1, chosen).sum()
        gradient = log_p.exp_()
        gradient.scatter_add_(-1, chosen, gradient.new_full((), -1.0).expand_as(chosen))
        return value, gradient

    return summed(head, hidden, piece_loss)


def divergence(
    head: nn.Module,
    hidden: Float[Tensor, "positions d_model"],
    teacher_head: nn.Module,
    teacher_hidden: Float[Tensor, "positions d_model"],
) -> Float[Tensor, ""]:
    """``Σ KL(teacher ‖ model)`` of the next-token distributions in nats, over positions."""

    def piece_loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_expected = teacher_head(teacher_hidden[part]).float().log_softmax(-1)
        log_p, expected = logits.log_softmax(-1), log_expected.exp()
        value = expected.flatten() @ log_expected.sub_(log_p).flatten()
        return value, log_p.exp_().sub_(expected)

    return summed(head, hidden, piece_loss)


def summed(head: nn.Module, hidden: Float[Tensor, "positions d_model"], piece_loss: PieceLoss) -> Float[Tensor, ""]:
    """Sum of ``piece_loss`` over pieces, differentiable in ``hidden`` and in the parameters of ``head``."""
    trained = [weight for weight in head.parameters() if weight.requires_grad]
    return _Summed.apply(hidden, head, piece_loss, *trained)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: nn.Module, piece_loss: PieceLoss, *weights: Tensor) -> Tensor:  # pyright: ignore
        wanted = [needed for i, needed in enumerate(ctx.needs_input_grad) if i not in (1, 2)]
        inputs = (hidden, *weights)
        # Sums in fp32 where fp16 would lose them; the others need no more than their own type.
        gradients = [
            torch.zeros_like(x, dtype=torch.float32 if x.dtype == torch.float16 else None) if needed else None
            for x, needed in zip(inputs, wanted, strict=True)
        ]
        total = hidden.new_zeros((), dtype=torch.float32)
        for part in pieces(len(hidden)):
            with torch.set_grad_enabled(any(wanted)):
                piece = hidden[part].detach().requires_grad_(wanted[0])
                logits = head(piece)
            value, gradient = piece_loss(logits.detach().float(), part)
            total += value
            if any(wanted):
                _collect(gradients, logits, gradient, (piece, *weights), part)
        ctx.save_for_backward(*(g for g in gradients if g is not None))
        ctx.dtypes = [x.dtype if needed else None for x, needed in zip(inputs, wanted, strict=True)]
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        saved = iter(ctx.saved_tensors)
        hidden, *weights = (None if dtype is None else (next(saved) * scale).to(dtype) for dtype in ctx.dtypes)
        return (hidden, None, None, *weights)


def _collect(
    gradients: list[Tensor | None], logits: Tensor, gradient: Tensor, inputs: tuple[Tensor, ...], part: slice
) -> None:
    """Adds the gradient of one piece: a slice of that of the hidden states, a term of those of the head."""
    chosen = [i for i, sum_ in enumerate(gradients) if sum_ is not None]
    lift = FP16_LIFT if logits.dtype == torch.float16 else 1.0
    found = torch.autograd.grad(logits, [inputs[i] for i in chosen], (lift * gradient).to(logits.dtype))
    for i, term in zip(chosen, found, strict=True):
        sum_ = gradients[i]
        assert sum_ is not None
        term = term if lift == 1.0 else term.float() / lift
        if i == 0:
            sum_[part] = term
        else:
            sum_ += term


def pieces(length: int) -> Iterator[slice]:
    """Slices of ``CHUNK`` positions."""
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))


@torch.no_grad()
def scores(
    head: nn.Module,
    hidden: Float[Tensor, "positions d_model"],
    targets: Int[Tensor, " positions"],
    teacher: tuple[nn.Module, Tensor] | None = None,
) -> Shaped[Tensor, "positions scores"]:
    """Per position: ``−log p(target)`` and, beside a teacher, its ``−log p``, the KL from it, agreement (0 or 1)."""
    rows = []
    for part in pieces(len(hidden)):
        log_p = head(hidden[part]).float().log_softmax(-1)
        columns = [functional.nll_loss(log_p, targets[part], reduction="none")]
        if teacher is not None:
            teacher_head, teacher_hidden = teacher
            expected = teacher_head(teacher_hidden[part]).float().log_softmax(-1)
            columns += [
                functional.nll_loss(expected, targets[part], reduction="none"),
                functional.kl_div(log_p, expected, reduction="none", log_target=True).sum(-1),
                (log_p.argmax(-1) == expected.argmax(-1)).float(),
            ]
        rows.append(torch.stack(columns, dim=-1))
    return torch.cat(rows) if rows else hidden.new_zeros((0, 1 if teacher is None else 4), dtype=torch.float32)
