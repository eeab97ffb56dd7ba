"""The slow, obvious STT layer, token by token; the fast one is tested against it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from pliant.architectures.routing.reference import (
    PARTS,
    Reference,
    Rope,
    Ropes,
    Row,
    RowRoute,
    by_row,
    finished,
    highest_of,
    routed_row,
    unit,
    whole_part,
)
from pliant.architectures.routing.surprise_reference import distance, foreseen, surprise_of
from pliant.architectures.stt.layer import SttLayer, StudentRouter


def reference_output(
    layer: SttLayer, h: Float[Tensor, "batch seq d_model"], documents: Int[Tensor, "batch seq"], ropes: Ropes
) -> Reference:
    """Returns what ``layer`` makes of its input ``h``; documents are −1 for padding."""

    def row(h_row: Row, owners: list[int], rope: Rope) -> tuple[Row, list[int], list[Tensor]]:
        config = layer.layer_config
        fixed = h_row.detach()
        logits = [
            student(layer.router, h_t, before) for h_t, before in zip(fixed, predecessors(fixed, owners), strict=True)
        ]
        ones = [torch.ones(()) for _ in owners]
        if not layer.training:
            route = RowRoute(scores=logits, ranks=logits, gate=ones)
            _, after, chosen = routed_row(layer, h_row, owners, rope, route)
            return finished(layer, after, rope), chosen, [torch.zeros(()) for _ in owners]
        with torch.no_grad():
            dense = whole_part(layer, PARTS[layer.part], fixed, owners, rope)
        changes = dense - fixed
        missed = [
            distance(change, foreseen(layer.prior, before)[0], None)
            for change, before in zip(changes, predecessors(dense, owners), strict=True)
        ]
        gate, scores = surprise_of(layer.router, [change.square().mean() for change in changes], missed, owners)
        taught = highest_of(layer, scores, owners)
        _, after, chosen = routed_row(layer, h_row, owners, rope, RowRoute(scores=logits, ranks=logits, gate=gate))
        penalty = []
        for t, logit in enumerate(logits):
            wrong = -functional.logsigmoid(logit if t in taught else -logit)
            penalty.append(config.student_loss_weight * wrong + config.prior_loss_weight * missed[t])
        return finished(layer, after, rope), chosen, penalty

    return by_row(row, h, documents, ropes)


def predecessors(h: Row, documents: list[int]) -> list[Tensor]:
    """Returns for each token the state of the one before it in its document, or zeros."""
    before = []
    for t, document in enumerate(documents):
        earlier = [s for s in range(t) if documents[s] == document]
        before.append(h[earlier[-1]] if earlier else torch.zeros_like(h[t]))
    return before


def student(
    router: StudentRouter, h: Float[Tensor, " d_model"], before: Float[Tensor, " d_model"]
) -> Float[Tensor, ""]:
    """``v · silu(P [h/rms(h) ‖ h⁻/rms(h⁻)])``, h⁻ the state of the token before."""
    return router.student_out @ functional.silu(router.student_in @ torch.cat((unit(h), unit(before))))
