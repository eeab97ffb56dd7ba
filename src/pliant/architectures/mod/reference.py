"""The slow, obvious Mixture-of-Depths layer, token by token; the fast one is tested against it."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from pliant.architectures.mod.layer import LinearRouter, ModLayer
from pliant.architectures.routing.reference import (
    Reference,
    Rope,
    Ropes,
    Row,
    RowRoute,
    by_row,
    finished,
    routed_row,
    unit,
)


def reference_output(
    layer: ModLayer, h: Float[Tensor, "batch seq d_model"], documents: Int[Tensor, "batch seq"], ropes: Ropes
) -> Reference:
    """Returns what ``layer`` makes of its input ``h``; documents are −1 for padding."""

    def row(h_row: Row, owners: list[int], rope: Rope) -> tuple[Row, list[int], list[Tensor]]:
        config = layer.layer_config
        logits = [layer.router.weight @ unit(h_t) for h_t in h_row]
        samplers = [predicted(layer.router, h_t) for h_t in h_row] if config.sampler == "predictor" else logits
        gate = [torch.sigmoid(r) for r in logits] if config.gate == "sigmoid" else logits
        route = RowRoute(scores=samplers, ranks=logits, gate=gate)
        _, after, chosen = routed_row(layer, h_row, owners, rope, route)
        penalty = []
        for t, (logit, sampler) in enumerate(zip(logits, samplers, strict=True)):
            missed = -functional.logsigmoid(sampler if t in chosen else -sampler)
            penalty.append(config.auxiliary_loss_weight * missed + config.z_loss_weight * logit**2)
        return finished(layer, after, rope), chosen, penalty

    return by_row(row, h, documents, ropes)


def predicted(router: LinearRouter, h: Float[Tensor, " d_model"]) -> Float[Tensor, ""]:
    """``v · silu(P sg[h/rms(h)])``."""
    assert router.predictor_in is not None
    assert router.predictor_out is not None
    return router.predictor_out @ functional.silu(router.predictor_in @ unit(h.detach()))
