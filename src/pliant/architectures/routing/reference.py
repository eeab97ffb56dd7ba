"""The slow, obvious routed layer: rows, documents, tokens and heads one by one, and whole attention matrices.

Fast layers are tested against it, outputs, losses and gradients. There is no cache, and nothing here is gathered or
scattered: the tokens of a document that run are a short text of their own, whose positions have gaps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.architectures.routing.layer import RoutedLayer

Vector = Float[Tensor, " d_model"]
Row = Float[Tensor, "seq d_model"]
Some = Float[Tensor, "k d_model"]
Rope = tuple[Float[Tensor, "seq d_head"], Float[Tensor, "seq d_head"]]
Ropes = tuple[Float[Tensor, "rows seq d_head"], Float[Tensor, "rows seq d_head"]]
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a routed layer makes of a batch, which tokens ran, and the weighted losses of each token."""

    output: Float[Tensor, "batch seq d_model"]
    runs: Bool[Tensor, "batch seq"]
    penalty: Float[Tensor, "batch seq"]


@dataclass(frozen=True, kw_only=True)
class RowRoute:
    """What the router says of each token of one row; see :class:`Route`."""

    scores: list[Tensor]
    ranks: list[Tensor]
    gate: list[Tensor]


def by_row(
    rows: Callable[[Row, list[int], Rope], tuple[Row, list[int], list[Tensor]]],
    h: Tensor,
    documents: Tensor,
    ropes: Ropes,
) -> Reference:
    """Runs a layer on each row with its documents and its rotary factors."""
    outputs, runs, penalties = [], torch.zeros(h.shape[:2], dtype=torch.bool), []
    for row in range(len(h)):
        factors = ropes[0][row % len(ropes[0])], ropes[1][row % len(ropes[1])]
        output, chosen, penalty = rows(h[row], documents[row].tolist(), factors)
        runs[row, chosen] = True
        outputs.append(output)
        penalties.append(torch.stack(penalty))
    return Reference(output=torch.stack(outputs), runs=runs, penalty=torch.stack(penalties))


def routed_row(
    layer: RoutedLayer,
    h: Row,
    documents: list[int],
    rope: Rope,
    route: RowRoute,
    skip: Callable[[Vector], Vector] = lambda h_t: h_t,
) -> tuple[Row, Row, list[int]]:
    """Returns the states before and after the routed part, and the tokens that ran."""
    before = whole_part(layer, attended, h, documents, rope) if layer.part == "mlp" else h
    chosen, part = who_runs(layer, route, documents), PARTS[layer.part]
    after = [skip(h_t) for h_t in before]
    for document in sorted(set(documents)):
        members = [t for t in chosen if documents[t] == document]
        if members:
            new = part(layer, before[members], members, rope)
            for t, new_t in zip(members, new, strict=True):
                after[t] = before[t] + multiplier(layer, route.gate[t]) * (new_t - before[t])
    return before, torch.stack(after), chosen


def finished(layer: RoutedLayer, h: Row, rope: Rope) -> Row:
    """Returns the states after the part that every token runs, where that comes last."""
    return thought(layer, h, [], rope) if layer.part == "attention" else h


def who_runs(layer: RoutedLayer, route: RowRoute, documents: list[int]) -> list[int]:
    """Returns the tokens that run: the highest-ranked while training, else those that reach the threshold.

    The first token of a document runs in any case, unless it is the MLP alone that tokens skip.
    """
    leading = {} if layer.part == "mlp" else dict.fromkeys(first_tokens(documents), torch.tensor(math.inf))
    if layer.training and not layer.by_threshold:
        return highest_of(layer, [leading.get(t, rank) for t, rank in enumerate(route.ranks)], documents)
    scores = [leading.get(t, score) for t, score in enumerate(route.scores)]
    config, ran = layer.layer_config, []
    for t, document in enumerate(documents):
        members = [s for s in range(t) if documents[s] == document]
        window = members[len(members) + 1 - config.budget_window :]
        is_spent = config.budget is not None and sum(s in ran for s in window) >= config.most
        if document >= 0 and scores[t] >= layer.router.threshold and (layer.training or not is_spent):
            ran.append(t)
    counted = [t for t, document in enumerate(documents) if document >= 0]
    if layer.training and counted and not ran:
        return [max(counted, key=lambda t: float(scores[t].detach()))]
    return ran


def first_tokens(documents: list[int]) -> list[int]:
    """Returns the first token of each document."""
    return [documents.index(document) for document in set(documents) - {-1}]


def highest_of(layer: RoutedLayer, ranks: Sequence[Tensor], documents: list[int]) -> list[int]:
    """Returns the ``⌈γ n⌉`` highest-ranked of the n tokens that are no padding, in order of time."""
    counted = [t for t, d in enumerate(documents) if d >= 0]
    number = math.ceil(layer.capacity * len(counted) - 1e-9)
    return sorted(sorted(counted, key=lambda t: float(ranks[t].detach()), reverse=True)[:number])


def multiplier(layer: RoutedLayer, gate: Tensor) -> Tensor:
    """``1 + φ − sg[φ] + s (sg[φ] − 1)``."""
    return 1 + gate - gate.detach() + layer.layer_config.gate_share * (gate.detach() - 1)


def whole_part(
    layer: RoutedLayer,
    part: Callable[[RoutedLayer, Some, list[int], Rope], Some],
    h: Row,
    documents: list[int],
    rope: Rope,
) -> Row:
    """Runs a part on all tokens of each document; padding stays as it is."""
    rows = list(h)
    for document in sorted(set(documents) - {-1}):
        members = [t for t, d in enumerate(documents) if d == document]
        for t, new in zip(members, part(layer, h[members], members, rope), strict=True):
            rows[t] = new
    return torch.stack(rows)


def block(layer: RoutedLayer, h: Some, places: list[int], rope: Rope) -> Some:
    """The family's layer: attention, then the MLP."""
    return thought(layer, attended(layer, h, places, rope), places, rope)


def thought(layer: RoutedLayer, h: Some, _places: list[int], _rope: Rope) -> Some:
    """``h + MLP(norm(h))``."""
    return torch.stack([h_t + layer.mlp(layer.post_attention_layernorm(h_t)) for h_t in h])


def attended(layer: RoutedLayer, h: Some, places: list[int], rope: Rope) -> Some:
    """``h + attention(norm(h))`` among the tokens given, which stand at ``places`` of their row."""
    attention: Any = layer.self_attn
    x = torch.stack([layer.input_layernorm(h_t) for h_t in h])
    queries, keys = (heads_of(attention, kind, x, places, rope) for kind in ("q", "k"))
    values = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))  # (k, heads, d_head)
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    rows = []
    for i, place in enumerate(places):
        seen = [j for j in range(i + 1) if window is None or place - places[j] < window]
        heads = []
        for head in range(queries.shape[1]):
            group = head * keys.shape[1] // queries.shape[1]
            scores = torch.stack([queries[i, head] @ keys[j, group] * attention.scaling for j in seen])
            shares = scores.softmax(0)
            heads.append(sum(share * values[j, group] for share, j in zip(shares, seen, strict=True)))
        rows.append(attention.o_proj(torch.cat(heads)))
    return h + torch.stack(rows)


def heads_of(attention: Any, kind: str, x: Some, places: list[int], rope: Rope) -> Float[Tensor, "k heads d_head"]:
    """Queries or keys, each turned by its own position."""
    heads = getattr(attention, f"{kind}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    if hasattr(attention, f"{kind}_norm"):
        heads = getattr(attention, f"{kind}_norm")(heads)
    if not getattr(attention, "use_rope", True):
        return heads
    cosine, sine = rope[0][places][:, None], rope[1][places][:, None]
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-second, first), dim=-1) * sine


def unit(h: Vector) -> Vector:
    """``h/rms(h)``."""
    return h / (h.square().mean() + EPSILON).sqrt()


PARTS: dict[str, Callable[[RoutedLayer, Some, list[int], Rope], Some]] = {
    "block": block,
    "attention": attended,
    "mlp": thought,
}
