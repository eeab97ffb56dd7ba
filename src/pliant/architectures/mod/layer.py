"""Mixture-of-Depths (arXiv 2404.02258): ``r_t = w · x_t`` decides who runs, x the RMS-normalised input of the layer.

Training takes the highest r of each row. As that looks ahead, a logit learns which tokens were taken: r itself, or that
of a predictor which sees x behind a stop-gradient. From then on a token runs if the logit reaches the threshold.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.mod.config import ModConfig
from pliant.architectures.routing import Memory, Route, RoutedLayer, Router
from pliant.architectures.routing.layer import Hidden, PerToken, inverse_norm

INITIAL_STD = 0.02
PREDICTOR_SHARE = 8
"""d_model over the width of the predictor."""


class LinearRouter(Router):
    """``r = w · x/rms(x)``, and the predictor's logit ``v · silu(P sg[x/rms(x)])`` where there is one."""

    def __init__(self, d_model: int, *, predicts: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_model))
        self.predictor_in = self.predictor_out = None
        if predicts:
            width = max(1, d_model // PREDICTOR_SHARE)
            self.predictor_in = nn.Parameter(torch.empty(width, d_model))
            self.predictor_out = nn.Parameter(torch.empty(width))

    def reset_parameters(self, init: Any = nn.init) -> None:
        super().reset_parameters(init)
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, std=INITIAL_STD)

    def forward(self, h: Hidden) -> tuple[PerToken, PerToken | None]:
        """Returns the router's logits, and the predictor's."""
        h, scale = h.float(), inverse_norm(h)
        logits = (h @ self.weight.float()) * scale
        if self.predictor_in is None or self.predictor_out is None:
            return logits, None
        seen = functional.linear(h.detach(), self.predictor_in.float()) * scale.detach()[..., None]
        return logits, functional.silu(seen) @ self.predictor_out.float()


class ModLayer(RoutedLayer):
    """Decoder layer that a linear router lets tokens into."""

    router: LinearRouter

    def __init__(self, config: Any, layer_idx: int, layer_config: ModConfig) -> None:
        super().__init__(config, layer_idx, layer_config)
        self.router = LinearRouter(config.hidden_size, predicts=layer_config.sampler == "predictor")

    def route(self, h: Hidden, documents: Tensor | None, memory: Memory | None) -> Route:
        """Ranks by the router's logit, and scores by that of the sampler."""
        logits, predicted = self.router(h)
        sampler = logits if predicted is None else predicted
        return Route(
            scores=sampler,
            ranks=logits,
            gate=logits.sigmoid() if self.layer_config.gate == "sigmoid" else logits,
            signals={"logits": logits, "sampler": sampler},
        )

    def losses(self, route: Route, runs: Bool[Tensor, "batch seq"]) -> dict[str, tuple[float, Float[Tensor, "..."]]]:
        """The sampler's cross-entropy with who ran, and the squared logit."""
        sampler = functional.binary_cross_entropy_with_logits(
            route.signals["sampler"], runs.to(torch.float32), reduction="none"
        )
        config = self.layer_config
        return {
            "auxiliary": (config.auxiliary_loss_weight, sampler),
            "z": (config.z_loss_weight, route.signals["logits"].square()),
        }
