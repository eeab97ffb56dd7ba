"""What the editors share: reading keys and hidden states, searching by gradient, finishing an edit."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.kept import Kept, base_of
from pliant.errors import EditError
from pliant.evaluation.baselines.prompts import Row
from pliant.evaluation.editing.cases import EditCase
from pliant.key_moments import KeyMoments, cached_key_moments
from pliant.models.edits import Delta, Edit, down_proj
from pliant.statistics import evaluating, frozen, input_device

ROWS = 64
"""Rows that are read at once."""

_MOMENTS: Kept[dict[tuple[int, int], KeyMoments]] = Kept()


Editor = Callable[[PreTrainedModel, PreTrainedTokenizerBase, EditCase], Edit]
"""Makes an edit of a model for a case, and leaves the model as it was."""


class _Enough(Exception):
    """Ends a forward pass after the last layer that is read."""


@dataclass
class States:
    """What rows hold at the last token of their subject.

    Attributes:
        keys: Layer → inputs of its ``down_proj`` (d_ffn, cases), the mean over the rows of each case.
        hidden: Outputs of the last layer (d_model, cases), of the first row of each case.
    """

    keys: dict[int, Float[Tensor, "d_ffn cases"]] = field(default_factory=dict)
    hidden: Float[Tensor, "d_model cases"] | None = None


def layer_at(model: PreTrainedModel, depth: float) -> int:
    """The layer at a share of the depth: ``round(depth · num_layers)``, at most the last.

    Raises:
        EditError: ``depth`` lies outside 0..1.
    """
    if not 0 <= depth <= 1:
        raise EditError(f"depth must be in 0..1 (a share of the layers); got {depth}. Try 0.2.")
    count = model.config.num_hidden_layers
    return min(round(depth * count), count - 1)


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Removes the given hooks after the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def searching(model: PreTrainedModel) -> Iterator[None]:
    """Within the block gradients are on, none of them of a parameter, and the model is in evaluation mode."""
    with frozen(model), evaluating(model), torch.inference_mode(False), torch.enable_grad():
        yield


def padded(rows: Iterable[Sequence[int]], *, left: bool = False) -> tuple[Int[Tensor, "rows n"], Int[Tensor, "rows n"]]:
    """Returns rows as one tensor, and 1 where it holds a token."""
    rows = list(rows)
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, part], mask[index, part] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


@torch.no_grad()
def subject_states(
    model: PreTrainedModel, rows: Sequence[Row], layers: Sequence[int], *, hidden_after: int | None = None
) -> States:
    """Reads keys, and the hidden state after a layer, at the last token of the subject of ``rows``.

    Only the tokens up to there and the layers up to the last one are run, in bounded memory.

    Args:
        model: The model.
        rows: Those of a case together, the cases in order.
        layers: Where keys are read.
        hidden_after: The layer after which the hidden state is read.

    Raises:
        EditError: Tokens are routed past the MLP of a layer where keys are read.
    """
    if refused := [index for index in layers if getattr(model.model.layers[index], "skips_mlp", False)]:
        raise EditError(
            f"an editor must write in layers whose MLP every token enters; got {', '.join(map(str, refused))}, where "
            "tokens are routed past it. Choose other depths, or route with granularity='attention'."
        )
    owners = torch.tensor([row.owner for row in rows])
    counts = owners.bincount().float()
    firsts = torch.tensor([index == 0 or rows[index - 1].owner != row.owner for index, row in enumerate(rows)])
    seen: dict[int | str, list[Tensor]] = {}
    last = max((*layers, -1 if hidden_after is None else hidden_after))
    here: list[Tensor] = []

    def read(name: int | str, states: Tensor) -> None:
        at = here[-1].to(states.device)
        seen.setdefault(name, []).append(states[torch.arange(len(at), device=states.device), at].float().cpu())

    def key_hook(layer: int) -> Callable[..., None]:
        return lambda _module, args: read(layer, args[0])

    def end(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if hidden_after is not None:
            read("hidden", output)
        raise _Enough

    inner, device = model.model, input_device(model)
    handles = [inner.get_submodule(down_proj(i)).register_forward_pre_hook(key_hook(i)) for i in layers]
    with evaluating(model), hooks(*handles, inner.layers[last].register_forward_hook(end)):
        for start in range(0, len(rows), ROWS):
            chunk = rows[start : start + ROWS]
            here.append(torch.tensor([row.subject for row in chunk]))
            ids, mask = padded(row.ids[: row.subject + 1] for row in chunk)
            with suppress(_Enough):
                inner(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
    states = States()
    for layer in layers:
        keys = torch.cat(seen[layer])
        sums = keys.new_zeros(len(counts), keys.shape[1]).index_add_(0, owners, keys)
        states.keys[layer] = (sums / counts[:, None]).T
    if hidden_after is not None:
        states.hidden = torch.cat(seen["hidden"])[firsts].T
    return states


def moments_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Sequence[int], num_tokens: int
) -> dict[int, KeyMoments]:
    """Returns the second moments of keys of ``layers`` on the default text, read once for each base."""
    known = _MOMENTS.at(model, base_of(model), dict)
    if missing := [layer for layer in layers if (layer, num_tokens) not in known]:
        for layer, moments in cached_key_moments(model, tokenizer, missing, num_tokens=num_tokens).items():
            known[layer, num_tokens] = moments
    return {layer: known[layer, num_tokens] for layer in layers}


def low_rank(matrix: Float[Tensor, "out in"], *, tolerance: float = 1e-6) -> Delta:
    """Returns ``U Σ Vᵀ`` of a change as factors, without singular values below ``tolerance`` of the largest."""
    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    rank = max(1, int((s > tolerance * s[0]).sum()))
    return Delta(left=(u[:, :rank] * s[:rank]).contiguous(), right=v[:rank].T.contiguous())


def settings_of(editor: Any) -> dict[str, Any]:
    """The settings of an editor as JSON values, without the tensors that it was given."""
    found = {setting.name: getattr(editor, setting.name) for setting in fields(editor) if setting.repr}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def finished(cases: Sequence[EditCase], deltas: Mapping[str, Delta], details: Mapping[str, Any]) -> Edit:
    """Returns the edit that ``deltas`` make for ``cases``.

    Raises:
        EditError: A value is not finite.
    """
    for path, delta in deltas.items():
        if not (delta.left.isfinite().all() and delta.right.isfinite().all()):
            raise EditError(f"the change of {path} must be finite; it is not. Lower the learning rate or the strength.")
    return Edit(
        context="\n".join(case.context for case in cases),
        deltas=dict(deltas),
        details={**details, "cases": [case.id for case in cases]},
    )
