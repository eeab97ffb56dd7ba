"""What the dynamic layers do, measured while the model is trained: how strong a change, how many tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.models import DynamicCausalLM
from pliant.statistics import evaluating, input_device
from pliant.training.callbacks.routing import warn_if_unwell


@torch.no_grad()
def modulation_norms(model: nn.Module, tokens: Int[Tensor, "windows window"]) -> dict[str, float]:
    """Returns the mean ``‖ΔW_t‖_F`` over tokens, as ``modulation_norm/layer_12`` …, and over layers, as ``…/mean``.

    Args:
        model: A converted model, also one wrapped by peft or DDP; any other gives ``{}``, and so does one whose change
            is switched off.
        tokens: A few validation windows; they are read one by one.
    """
    bare = unwrapped(model)
    if not isinstance(bare, DynamicCausalLM):
        return {}
    with evaluating(bare), bare.report() as report:
        for window in tokens:
            bare.model(window.unsqueeze(0).to(input_device(bare)), use_cache=False)
    return _by_layer("modulation_norm", {index: norm.float().mean().item() for index, norm in report.norms().items()})


@torch.no_grad()
def routing_shares(model: DynamicCausalLM, tokens: Int[Tensor, "windows window"], step: int) -> dict[str, float]:
    """Returns the share of the tokens that runs under the threshold, as ``routing_capacity/layer_12`` …; warns if odd.

    Args:
        model: A routed model; any other gives ``{}``.
        tokens: A few validation windows.
        step: For the warning.
    """
    if not model.routed_layers:
        return {}
    with evaluating(model), model.report() as report:
        model.model(tokens.to(input_device(model)), use_cache=False)
    reports = {index: layer for index, layer in report.layers.items() if layer.routing is not None}
    warn_if_unwell(model, reports, step)
    shares = {index: layer.routing.runs.float().mean().item() for index, layer in reports.items() if layer.routing}
    return _by_layer("routing_capacity", shares)


def _by_layer(kind: str, values: Mapping[int, float]) -> dict[str, float]:
    """Names the values of layers, and their mean."""
    named = {f"layer_{index}": value for index, value in values.items()}
    if named:
        named["mean"] = sum(named.values()) / len(named)
    return {f"{kind}/{name}": value for name, value in named.items()}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Returns the causal LM inside DDP, ``torch.compile`` and peft; adapters that peft has put into it stay."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if isinstance(inner, PreTrainedModel) else inner.get_base_model()
