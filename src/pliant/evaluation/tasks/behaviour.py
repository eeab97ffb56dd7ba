"""What a model does beside its figures: what it writes after fixed prompts, how strongly it rewrites itself, and where
its tokens run."""

import math

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.evaluation.editing.cases import prompt_tokens
from pliant.evaluation.scoring import continuations
from pliant.models import DynamicCausalLM
from pliant.models.consolidate_weights import squared_norm
from pliant.statistics import evaluating, input_device

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "In order to bake a good loaf of bread, you",
    "The difference between weather and climate is",
    "def fibonacci(n):",
)
NEW_TOKENS = 48


def generation_samples(
    model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase, *, with_base: bool
) -> list[dict[str, str]]:
    """Returns what the model writes greedily after each of a few fixed prompts, ``base`` beside it."""
    prompts = [prompt_tokens(tokenizer, prompt) for prompt in PROMPTS]
    sides = {"model": continuations(model, prompts, NEW_TOKENS)}
    if with_base:
        with model.base_mode():
            sides["base"] = continuations(model, prompts, NEW_TOKENS)
    return [
        {"prompt": prompt, **{side: _text(tokenizer, written[i]) for side, written in sides.items()}}
        for i, prompt in enumerate(PROMPTS)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of tokens up to the first end token."""
    end = tokenizer.eos_token_id
    before = tokens[: tokens.index(end)] if end in tokens else tokens
    return str(tokenizer.decode(before, skip_special_tokens=True))


@torch.no_grad()
def layer_figures(model: DynamicCausalLM, tokens: Int[Tensor, " tokens"]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns what each converted layer does to a text, by layer.

    Returns:
        ``modulation``: ``norm``, the mean of ``‖ΔW_t‖_F`` over tokens; ``weight_norm``, ``‖W‖_F`` of the projections
        that the layer rewrites; and their ``ratio``. ``routing``: ``share``, of the tokens that a routed layer runs.
    """
    if not model.dynamic_layers:
        return {"modulation": {}, "routing": {}}
    ids = tokens[None].to(input_device(model))
    with evaluating(model), model.report() as report:
        model.model(ids, use_cache=False)
    shares = {i: layer.routing.runs.float().mean().item() for i, layer in report.layers.items() if layer.routing}
    norms = {i: norm.float().mean().item() for i, norm in report.norms().items() if i not in shares}
    sizes = _weight_norms(model, ids[:, :2]) if norms else {}
    return {
        "modulation": {
            str(i): {"norm": norm, "weight_norm": sizes[i], "ratio": norm / sizes[i]} for i, norm in norms.items()
        },
        "routing": {str(i): {"share": share} for i, share in shares.items()},
    }


def _weight_norms(model: DynamicCausalLM, ids: Tensor) -> dict[int, float]:
    """Returns ``‖W‖_F`` of the projections that each layer rewrites, which its writes for any token name."""
    with evaluating(model), model.report(writes=True) as report:
        model.model(ids, use_cache=False)
    squares = {
        index: sum(squared_norm(model, f"layers.{index}.mlp.{name}") for name in layer.writes or {})
        for index, layer in report.layers.items()
    }
    return {index: math.sqrt(square) for index, square in squares.items() if square}
