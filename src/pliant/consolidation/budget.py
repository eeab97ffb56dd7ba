"""The KL budget: how far an edit may move the model on neutral text."""

import math
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from pliant.consolidation.forward import trial
from pliant.errors import EditError
from pliant.models.edits import Delta
from pliant.statistics import input_device

TRIALS = 8
"""Strengths that are tried, from what was asked for down."""
SMALLEST = 1e-3
"""Share below which nothing of use is left."""
LOGITS_CHUNK = 128
"""Tokens whose logits are made at once: with fewer the LM head waits for memory, with more so do the sums over them."""
CLOSER = 0.95
"""Of the strength at which a divergence that grows with its square would meet the budget; squared with every trial, as
some fall more slowly."""


class NeutralText:
    """Neutral text, and what the model says there before an edit."""

    def __init__(self, model: PreTrainedModel, tokens: Int[Tensor, "windows window"]) -> None:
        self.tokens = tokens
        self.before = list(self._log_p(model))

    @torch.no_grad()
    def _log_p(self, model: PreTrainedModel) -> Iterator[Float[Tensor, "chunk vocabulary"]]:
        hidden = model.model(self.tokens.to(input_device(model)), use_cache=False).last_hidden_state
        yield from log_probs(model, hidden.flatten(0, 1))

    @torch.no_grad()
    def kl(self, model: PreTrainedModel) -> float:
        """Returns the KL divergence of the model as it is now from the model before, in nats a token."""
        pairs = zip(self._log_p(model), self.before, strict=True)
        return sum(kl_sum(now, before) for now, before in pairs) / self.tokens.numel()


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, hidden: Float[Tensor, "tokens d_model"]
) -> Iterator[Float[Tensor, "chunk vocabulary"]]:
    """Yields the log-probabilities that follow from the last hidden states, some tokens at a time."""
    for part in hidden.split(LOGITS_CHUNK):
        yield model.lm_head(part).float().log_softmax(-1)


def kl_sum(now: Float[Tensor, "chunk vocabulary"], before: Float[Tensor, "chunk vocabulary"]) -> float:
    """Returns ``Σ KL(before ‖ now)`` over some tokens, in nats."""
    return functional.kl_div(now, before, log_target=True, reduction="sum").item()


def divergence(model: PreTrainedModel, deltas: Mapping[str, Delta], neutral: NeutralText) -> float:
    """Returns the KL divergence that ``deltas`` would cause on neutral text, in nats a token.

    Raises:
        EditError: It is not finite.
    """
    with trial(model, deltas):
        kl = neutral.kl(model)
    if not math.isfinite(kl):
        raise EditError(
            f"the edit must leave the model finite on neutral text; its KL divergence is {kl}. Lower alpha, or "
            "load the model in bfloat16 or float32."
        )
    return kl


def shrunk(
    model: PreTrainedModel,
    deltas: Mapping[str, Delta],
    neutral: NeutralText,
    budget: float | None,
    whole: float | None = None,
) -> tuple[dict[str, Delta], float, float]:
    """Returns ``deltas``, or the share of them that stays within ``budget``, with its KL divergence and the share.

    Args:
        model: The model.
        deltas: The changes.
        neutral: Text on which the divergence is measured.
        budget: Largest divergence, in nats a token; ``None`` for any.
        whole: The divergence of all of ``deltas``, where it is known.

    Raises:
        EditError: The divergence is not finite, or no share of use stays within it.
    """
    share = 1.0
    for attempt in range(TRIALS):
        some = {name: Delta(left=share * delta.left, right=delta.right) for name, delta in deltas.items()}
        kl = whole if whole is not None and share == 1.0 else divergence(model, some, neutral)
        if budget is None or kl <= budget:
            return some, kl, share
        smaller = share * CLOSER ** (2**attempt) * math.sqrt(budget / kl)
        if smaller < SMALLEST:
            break
        share = smaller
    raise EditError(
        f"kl_budget must leave some of the edit; at {share:.2%} of it the divergence is still {kl:.3g} nats a token. "
        "Raise kl_budget, lower alpha, or choose other layers."
    )
