"""How many of its leading directions each layer carries, when the layers share one budget.

Truncating layer l at rank r_l loses ``a − P a``, P the projection on its r_l leading directions. Let a gate g_l give
that loss back, ``P a + g_l (a − P a)``. With every layer truncated, ``−∂KL/∂g_l`` at g = 0 is what the layer's loss
costs in ``KL(base ‖ truncated)``; divided by the energy lost it is the layer's price w_l of a unit of energy. The ranks
then go to the directions of largest ``w_l λ_{l,i}`` over all layers.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from pliant.conversion.closed_form import Spectrum
from pliant.errors import ConfigError
from pliant.models.quantised import repacking
from pliant.statistics import Progress, base_mode, evaluating, input_device

CHUNK = 32
MIN_RANK = 8
NO_ENERGY = 1e-9
ROUNDS = 2


def check_gradients(model: PreTrainedModel) -> None:
    """Raises a :class:`ConfigError` if the base has no gradient after a forward without one.

    On a CPU with AVX512-BF16 bitsandbytes repacks 4-bit weights for inference, and drops their gradient.
    """
    if (name := repacking(model)) is not None:
        raise ConfigError(
            "allocation must be 'uniform' over an NF4 base that transformers loaded on this processor, where "
            f"bitsandbytes leaves no gradient to measure sensitivities with ({name}); got 'sensitivity'. Load it with "
            "pliant.load."
        )


def share_ranks(
    model: PreTrainedModel,
    ranks: Mapping[int, int],
    spectra: Mapping[int, Spectrum],
    tokens: Int[Tensor, "windows window"],
    progress: Progress | None = None,
) -> dict[int, int]:
    """Returns the ranks that a budget, the sum of ``ranks``, gives to layers that share it by sensitivity.

    Args:
        model: The base, or a converted model; it is run in base mode.
        ranks: Of each layer to begin with, below d_model.
        spectra: Of the same layers.
        tokens: Text to measure sensitivities on.
        progress: Called after each window.
    """
    shared, budget = dict(ranks), sum(ranks.values())
    for _ in range(ROUNDS):
        costs = truncation_costs(model, {i: spectra[i].leading(r) for i, r in shared.items()}, tokens, progress)
        prices = {i: _price(costs[i], spectra[i].values, rank) for i, rank in shared.items()}
        shared = share_budget(prices, {i: spectra[i].values for i in shared}, budget)
    return shared


def _price(cost: float, values: Float[Tensor, " d_model"], rank: int) -> float:
    """Cost of a unit of the energy lost; nothing where nothing is lost but rounding."""
    lost = values[rank:].sum().item()
    return cost / lost if lost > NO_ENERGY * values.sum().item() else 0.0


def share_budget(
    prices: Mapping[int, float], values: Mapping[int, Float[Tensor, " d_model"]], budget: int
) -> dict[int, int]:
    """Gives the ranks of a budget to the directions of largest ``w_l λ_{l,i}``.

    Each layer gets at least eight, and never all, so that there is a loss to price in the next round.
    """
    layers = list(prices)
    worth = torch.stack([values[i].clamp_min(0.0) * max(prices[i], 0.0) for i in layers])  # (L, d)
    worth[:, : min(MIN_RANK, budget // len(layers))] = torch.inf
    worth[:, -1] = -torch.inf
    chosen = worth.flatten().topk(budget).indices
    counts = torch.bincount(chosen // worth.shape[1], minlength=len(layers))
    return dict(zip(layers, counts.tolist(), strict=True))


def truncation_costs(
    model: PreTrainedModel,
    bases: Mapping[int, Float[Tensor, "d_model rank"]],
    tokens: Int[Tensor, "windows window"],
    progress: Progress | None = None,
) -> dict[int, float]:
    """Returns ``−∂KL(base ‖ truncated)/∂g_l`` at g = 0, in nats a token, with every layer of ``bases`` truncated.

    The model is left as it is: hooks take ``(1 − g_l)(a − P a)`` from each layer's output.
    """
    device = input_device(model)
    gates = torch.zeros(max(bases) + 1, device=device, requires_grad=True)
    totals = torch.zeros(len(gates), device=device)
    with evaluating(model), base_mode(model):
        for done, window in enumerate(tokens, start=1):
            totals -= _gate_gradient(model, bases, gates, window.unsqueeze(0).to(device))
            if progress is not None:
                progress("Measuring what each layer's loss costs", done, len(tokens))
    return {i: (totals[i] / tokens.numel()).item() for i in bases}


def _gate_gradient(
    model: PreTrainedModel, bases: Mapping[int, Tensor], gates: Tensor, window: Int[Tensor, "1 window"]
) -> Tensor:
    with torch.no_grad():
        target = model.model(window, use_cache=False).last_hidden_state[0]
    with torch.enable_grad(), ExitStack() as stack:
        for index, vectors in bases.items():
            for handle in _truncate(model.model.layers[index], vectors, gates[index]):
                stack.callback(handle.remove)
        hidden = model.model(window, use_cache=False).last_hidden_state[0]
        by_hidden = torch.cat(
            [_kl_gradient(model.lm_head, *part) for part in zip(hidden.split(CHUNK), target.split(CHUNK), strict=True)]
        )
        return torch.autograd.grad(hidden, gates, by_hidden)[0]


def _kl_gradient(lm_head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
    """``∂ Σ_t KL(base ‖ truncated)/∂hidden`` of a few tokens: the logits of a whole window never exist at once."""
    leaf = hidden.detach().requires_grad_()
    log_p = lm_head(leaf).float().log_softmax(-1)
    base_log_p = lm_head(target).float().log_softmax(-1).detach()
    return torch.autograd.grad(functional.kl_div(log_p, base_log_p, reduction="sum", log_target=True), leaf)[0]


def _truncate(layer: nn.Module, vectors: Tensor, gate: Tensor) -> list[Any]:
    """Hooks that make a base layer carry ``P a + g (a − P a)`` in place of a."""
    found: list[Tensor] = []

    def remember(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0])

    def take_away(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        a = found.pop()
        kept = vectors.to(a.device, a.dtype)
        lost = a - (a @ kept) @ kept.T
        return output - (1 - gate.to(a.device, a.dtype)) * lost

    return [layer.get_submodule("self_attn").register_forward_hook(remember), layer.register_forward_hook(take_away)]
