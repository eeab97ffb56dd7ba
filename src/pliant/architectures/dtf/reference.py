"""The slow, obvious DTF layer, token by token; the fast one is tested against it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pliant.architectures.dtf.layer import DtfLayer
from pliant.architectures.routing.reference import (
    Reference,
    Rope,
    Ropes,
    Row,
    RowRoute,
    by_row,
    finished,
    first_tokens,
    routed_row,
)
from pliant.architectures.routing.surprise_reference import distance, foreseen, surprise_of


def reference_output(
    layer: DtfLayer,
    h: Float[Tensor, "batch seq d_model"],
    entry: Float[Tensor, "batch seq d_model"],
    documents: Int[Tensor, "batch seq"],
    ropes: Ropes,
) -> Reference:
    """Returns what a dynamic ``layer`` makes of its input ``h``, the decision layer's output for ``entry``."""

    def row(both: Tensor, owners: list[int], rope: Rope) -> tuple[Row, list[int], list[Tensor]]:
        h_row, entry_row = both.chunk(2, dim=-1)
        static, changed, losses = [], [], []
        for h_t, entry_t in zip(h_row, entry_row, strict=True):
            mean, log_variance = foreseen(layer.prior, entry_t)
            static.append((h_t - entry_t).square().mean())
            changed.append(distance(h_t - entry_t, mean, log_variance))
            losses.append(distance(h_t.detach() - entry_t, mean, log_variance))
        for t in first_tokens(owners):
            losses[t] = torch.zeros(())
        gate, scores = surprise_of(layer.router, static, changed, owners)
        has_forecast = layer.layer_config.forecast
        before, after, chosen = routed_row(
            layer,
            h_row,
            owners,
            rope,
            RowRoute(scores=scores, ranks=scores, gate=gate),
            skip=lambda h_t: h_t + foreseen(layer.prior, h_t)[0] if has_forecast else h_t,
        )
        for t in set(chosen) - set(first_tokens(owners)) if has_forecast else []:
            increment = (after[t] - before[t]).detach()
            losses[t] = losses[t] + (foreseen(layer.prior, before[t])[0] - increment).square().mean()
        return finished(layer, after, rope), chosen, [layer.layer_config.prior_loss_weight * loss for loss in losses]

    return by_row(row, torch.cat((h, entry), dim=-1), documents, ropes)
