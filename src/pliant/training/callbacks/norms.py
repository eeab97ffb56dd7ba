"""How strongly the dynamic layers change their weights, measured while the model is trained."""

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pliant.models import DynamicCausalLM
from pliant.statistics import evaluating, input_device


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
    means = {f"layer_{index}": norm.float().mean().item() for index, norm in report.norms().items()}
    if means:
        means["mean"] = sum(means.values()) / len(means)
    return {f"modulation_norm/{name}": value for name, value in means.items()}


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """Returns the causal LM inside DDP, ``torch.compile`` and peft; adapters that peft has put into it stay."""
    inner: Any = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if isinstance(inner, PreTrainedModel) else inner.get_base_model()
