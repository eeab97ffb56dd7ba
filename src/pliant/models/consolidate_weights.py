"""One step from context to weights: what a layer's form writes for a token becomes an edit."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pliant.architectures import LayerReport
from pliant.architectures.base import Write
from pliant.errors import ConversionError, EditError
from pliant.models.edits import Delta, Edit
from pliant.models.ledger import dense_weight, is_plain
from pliant.models.placement import compute_device
from pliant.models.selection import Layers, select_layers

Positions = int | Sequence[int] | str
ROWS_AT_ONCE = 512


def consolidate_weights(
    model: Any, context_tokens: Tensor, token_idx: Positions, alpha: float, layers: Layers | None
) -> dict[str | int, Any]:
    """See ``DynamicCausalLM.consolidate_weights``."""
    wanted = _layers(model, layers)
    ids = _tokens(model, context_tokens)
    positions = _positions(token_idx, ids.shape[1])
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise EditError(f"alpha must be a finite number other than 0; got {alpha!r}. 0.1 is a usual one.")
    reports = _reports(model, ids, wanted)
    deltas: dict[int, dict[str, Delta]] = {}
    for index in wanted:
        writes = reports[index].writes or {}
        deltas[index] = {
            f"layers.{index}.mlp.{name}": _delta(write, positions, float(alpha)) for name, write in writes.items()
        }
    edit = Edit(
        context=f"{ids.shape[1]} tokens: {' '.join(map(str, ids[0].tolist()))}",
        deltas={path: delta for changes in deltas.values() for path, delta in changes.items()},
        details={
            "writer": "own modulation",
            "architecture": model.spec.architecture,
            "layers": wanted,
            "token_idx": positions,
            "alpha": float(alpha),
        },
    )
    edit = model.edits.add(edit)
    return {"edit": edit.id, **{index: _size(model, deltas[index]) for index in wanted}}


def _layers(model: Any, layers: Layers | None) -> list[int]:
    converted = model.dynamic_layers
    if not converted:
        raise EditError("the model must have converted layers to write from; got a dense one. Convert it first.")
    try:
        wanted = list(converted) if layers is None else select_layers(layers, model.config.num_hidden_layers)
    except ConversionError as error:
        raise EditError(str(error)) from error
    if missing := [index for index in wanted if index not in converted]:
        raise EditError(f"layers must be converted ones ({list(converted)}); got {missing}. Convert them first.")
    if silent := [index for index in wanted if not converted[index].active]:
        raise EditError(f"layers must be active to write; got {silent}, which are off. Use set_active(True, {silent}).")
    return wanted


def _tokens(model: Any, tokens: Tensor) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.is_complex():
        raise EditError(
            f"context_tokens must be a tensor of token ids; got {tokens!r}. Give tokenizer(text).input_ids."
        )
    ids = tokens[None] if tokens.ndim == 1 else tokens
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise EditError(
            f"context_tokens must be the ids of one text, (tokens) or (1, tokens); got shape {tuple(tokens.shape)}. "
            "Call it once for each text."
        )
    vocabulary = model.config.vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise EditError(f"context_tokens must be in 0..{vocabulary - 1}; got {wrong}. Use the model's own tokenizer.")
    return ids


def _positions(token_idx: Positions, length: int) -> list[int]:
    """Returns the positions meant, counted from the start and each once."""
    if token_idx == "all":
        return list(range(length))
    given = [token_idx] if isinstance(token_idx, int) else token_idx
    is_list = isinstance(given, Sequence) and not isinstance(given, str) and len(given) > 0
    if not is_list or any(type(i) is not int or not -length <= i < length for i in given):
        raise EditError(
            f"token_idx must be an index in {-length}..{length - 1}, a list of them, or 'all'; got {token_idx!r}. "
            "-1 is the last token."
        )
    positions = [int(i) % length for i in given]
    if len(set(positions)) != len(positions):
        raise EditError(f"token_idx must name each token once; got {token_idx!r}. Leave the repetitions out.")
    return positions


@torch.no_grad()
def _reports(model: Any, ids: Tensor, wanted: Sequence[int]) -> dict[int, LayerReport]:
    device = compute_device(model.get_input_embeddings())
    with model.report(writes=True) as report:
        model.model(ids.to(device), use_cache=False)
    return {index: report.layers[index] for index in wanted}


def _delta(write: Write, positions: list[int], alpha: float) -> Delta:
    """Returns α times the mean of a write over the tokens at ``positions``."""
    value, key = write.value[0, positions].flatten(0, 1).float().cpu(), write.key[0, positions].flatten(0, 1).cpu()
    scale = None
    if write.scale is not None:
        scale = alpha * write.scale[0, positions].float().cpu().mean(0)
        added = torch.zeros_like(write.effect) if write.added is None else write.added
        value = added[0, positions].float().cpu()
        if write.added is None:
            value, key = value[:0], key[:0]
    left, right = (alpha / len(positions)) * value.T, key.T.float()
    if left.shape[1] > min(left.shape[0], right.shape[0]):  # more tokens than the matrix has ranks
        product = left @ right.T
        is_tall = product.shape[0] > product.shape[1]
        left, right = (product, torch.eye(product.shape[1])) if is_tall else (torch.eye(product.shape[0]), product.T)
    return Delta(left=left.contiguous(), right=right.contiguous(), scale=scale)


def _size(model: Any, deltas: dict[str, Delta]) -> dict[str, float]:
    """Returns the norm of the changes of one layer, and its share of the projections' own."""
    change, own = 0.0, 0.0
    with model.edits.suspended(), torch.no_grad():
        for path, delta in deltas.items():
            weight = base_weight(model.edits.projection(path))
            own += float(weight.double().pow(2).sum())
            if delta.scale is None:
                change += delta.norm_squared
            else:
                change += float((delta.left @ delta.right.T + delta.scale[:, None] * weight).double().pow(2).sum())
    return {"norm": math.sqrt(change), "ratio": math.sqrt(change / own) if own else math.inf}


def squared_norm(model: Any, path: str) -> float:
    """Returns ``‖W‖²_F`` of a projection as the base has it, edits left out."""
    with model.edits.suspended():
        module = model.edits.projection(path)
        weight = dense_weight(module) if is_plain(module) else base_weight(module)
    return float(weight.double().pow(2).sum())


def base_weight(module: Any) -> Float[Tensor, "out in"]:
    """Returns the weight of a projection, packed or offloaded as it may be, in fp32 on the CPU: read by calling it."""
    device = compute_device(module)
    dtype = module.weight.dtype if module.weight.is_floating_point() else torch.float32
    zero = module(torch.zeros(1, module.in_features, device=device, dtype=dtype))
    columns = []
    for rows in torch.eye(module.in_features).split(ROWS_AT_ONCE):
        columns.append((module(rows.to(device, dtype)) - zero).float().cpu())
    return torch.cat(columns).T
