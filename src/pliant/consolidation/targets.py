"""What the residual stream should hold for the answer to follow: closed forms, without any gradient."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

COMPETITORS = 12
"""How many other tokens the margin is held against, the likeliest ones."""
ROUNDS = 6
SLACK = 0.1


@torch.no_grad()
def margin_residual(
    model: PreTrainedModel,
    hidden: Float[Tensor, "n d_model"],
    answers: Int[Tensor, " n"],
    margin: float,
) -> Float[Tensor, "n d_model"]:
    """Returns the smallest δ for which the answer's logit leads every other by ``margin``, read straight off h + δ.

    With the final norm's weight γ and rows w of the LM head, δ is the least-norm solution of

        (γ ⊙ (w_answer − w_c)) · (h + δ) / rms(h + δ) = margin    for the competitors c that bind,

    which are found in a few rounds; a row that leads already gets δ = 0. What the layers between h and the head would
    add is not looked at, so h is best taken late.
    """
    norm, head = model.model.norm, model.lm_head
    gamma = norm.weight.float()
    delta = torch.zeros_like(hidden)
    binding: list[list[int]] = [[] for _ in answers]
    for _ in range(ROUNDS):
        state = hidden + delta
        logits = head(norm(state.to(head.weight.dtype))).float()  # (n, vocabulary)
        own = logits.gather(1, answers[:, None])[:, 0]
        logits.scatter_(1, answers[:, None], -torch.inf)
        values, others = logits.topk(3)
        short = own - values[:, 0] < margin - SLACK
        if not short.any():
            break
        scale = state.square().mean(1).add(norm.variance_epsilon).rsqrt()
        for i in short.nonzero()[:, 0].tolist():
            near = others[i][own[i] - values[i] < margin].tolist()
            binding[i] = (binding[i] + [c for c in near if c not in binding[i]])[-COMPETITORS:]
            delta[i], binding[i] = _least_norm(
                head.weight, gamma * scale[i], hidden[i], int(answers[i]), binding[i], margin
            )
    return delta


def _least_norm(
    head: Tensor, gain: Tensor, hidden: Tensor, answer: int, binding: list[int], margin: float
) -> tuple[Float[Tensor, " d_model"], list[int]]:
    """The least-norm δ that meets the binding margins, and those of them that pull and do not push."""
    while True:
        rows = (head[answer].float() - head[torch.tensor(binding, device=head.device)].float()) * gain
        gram = rows @ rows.T
        gram.diagonal().add_(1e-4 * gram.diagonal().mean())
        pull = torch.linalg.solve(gram, margin - rows @ hidden)
        kept = [c for c, p in zip(binding, pull.tolist(), strict=True) if p > 0]
        if len(kept) == len(binding) or not kept:
            return rows.T @ pull, binding
        binding = kept


def spread(
    target: Float[Tensor, "n d_model"], present: Float[Tensor, "n d_model"], layers_left: int
) -> Float[Tensor, "n d_model"]:
    """Returns the share of what is still missing that one of ``layers_left`` layers is to write."""
    return (target - present) / layers_left
