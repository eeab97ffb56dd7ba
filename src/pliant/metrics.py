"""Perplexity, and how far a dynamic model is from its own base."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from pliant.errors import DataError
from pliant.models import DynamicCausalLM, family_of
from pliant.statistics import Progress, evaluating, input_device

LOGITS_CHUNK = 16
SUMS: tuple[str, ...] = ("nll", "base_nll", "kl", "agreement")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A dynamic model beside its base on the same tokens.

    Attributes:
        perplexity: Of the model, token-weighted.
        base_perplexity: Of the base, in the same run.
        agreement: Share of positions where both have the same most likely token.
        kl: Mean ``KL(base ‖ model)`` of the next-token distributions, in nats a token.
    """

    perplexity: float
    base_perplexity: float
    agreement: float
    kl: float

    @property
    def ratio(self) -> float:
        """Perplexity over that of the base."""
        return self.perplexity / self.base_perplexity


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokens: Int[Tensor, "windows window"], *, progress: Progress | None = None
) -> float:
    """Returns ``exp(mean −log p(x_t | x_<t))`` over all predicted tokens of all windows.

    Each window is read on its own; its first token is context only.

    Args:
        model: A causal LM of a family that converts, converted or not.
        tokens: Token windows, e.g. ``pliant.data.token_windows(texts, tokenizer, num_tokens=12_288)``.
        progress: Called after each window.

    Raises:
        DataError: A window has fewer than two tokens, or the result is not finite.
        ConversionError: The model belongs to another family.
    """
    _check(tokens)
    family_of(model.config)  # the logits of other families may be scaled or capped after the head
    total, count = 0.0, 0
    with evaluating(model):
        for done, window in enumerate(tokens, start=1):
            total += window_sums(model, window)["nll"]
            count += len(window) - 1
            if progress is not None:
                progress("Measuring perplexity", done, len(tokens))
    return _exponential(total / count)


@torch.no_grad()
def compare_to_base(
    model: DynamicCausalLM,
    tokens: Int[Tensor, "windows window"],
    *,
    base: DynamicCausalLM | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measures a dynamic model and its base, window by window, on the same tokens.

    Args:
        model: The model.
        tokens: Token windows, each read on its own.
        base: A model to compare with, where ``model`` does not hold its own base, such as one whose every weight was
            trained, or one with adapters of peft; by default ``model`` in base mode.
        progress: Called after each window.

    Raises:
        DataError: As for :func:`perplexity`.
    """
    _check(tokens)
    sums = dict.fromkeys(SUMS, 0.0)
    reference = model if base is None else base
    with evaluating(model), evaluating(reference):
        for done, window in enumerate(tokens, start=1):
            for name, value in window_sums(model, window, base=reference).items():
                sums[name] += value
            if progress is not None:
                progress("Comparing with the base", done, len(tokens))
    count = len(tokens) * (tokens.shape[1] - 1)
    return Comparison(
        perplexity=_exponential(sums["nll"] / count),
        base_perplexity=_exponential(sums["base_nll"] / count),
        agreement=sums["agreement"] / count,
        kl=sums["kl"] / count,
    )


@torch.no_grad()
def window_sums(
    model: PreTrainedModel,
    window: Int[Tensor, " window"],
    *,
    scored: int | None = None,
    base: DynamicCausalLM | None = None,
) -> dict[str, float]:
    """Returns sums over the last ``scored`` tokens of a window, all but its first by default, logits in pieces.

    ``nll = Σ −log p(x_t | x_<t)`` in nats; and with ``base``, which is taken in base mode, its ``base_nll``,
    ``kl = Σ KL(base ‖ model)`` and ``agreement``, how often both have the same most likely token.
    """
    count = len(window) - 1 if scored is None else scored
    hidden = _hidden(model, window, count)
    if base is not None:
        with base.base_mode():
            base_hidden = _hidden(base, window, count)
    sums = dict.fromkeys(SUMS[:1] if base is None else SUMS, 0.0)
    targets = window[-count:].to(hidden.device)
    for start in range(0, count, LOGITS_CHUNK):
        part = slice(start, min(start + LOGITS_CHUNK, count))
        log_p = model.lm_head(hidden[part]).float().log_softmax(-1)
        sums["nll"] += functional.nll_loss(log_p, targets[part], reduction="sum").item()
        if base is not None:
            base_log_p = base.lm_head(base_hidden[part]).float().log_softmax(-1)
            sums["base_nll"] += functional.nll_loss(base_log_p, targets[part], reduction="sum").item()
            sums["kl"] += functional.kl_div(log_p, base_log_p, reduction="sum", log_target=True).item()
            sums["agreement"] += (log_p.argmax(-1) == base_log_p.argmax(-1)).sum().item()
    return sums


def _hidden(model: PreTrainedModel, window: Int[Tensor, " window"], scored: int) -> Float[Tensor, "scored d_model"]:
    """The states that the last ``scored`` tokens are predicted from."""
    states = model.model(window.unsqueeze(0).to(input_device(model)), use_cache=False).last_hidden_state
    return states[0, -scored - 1 : -1]


def _check(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < 2 or len(tokens) == 0:
        raise DataError(
            f"tokens must have shape (windows, window) with at least one window of two tokens; got "
            f"{tuple(tokens.shape)}. Make them with pliant.data.token_windows."
        )


def _exponential(mean_nll: float) -> float:
    if not math.isfinite(mean_nll):
        raise DataError(f"the mean negative log-likelihood must be finite; got {mean_nll}. Load the model in bfloat16.")
    return math.exp(mean_nll)
