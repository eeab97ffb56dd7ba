"""Dynamic Transformer, also known as Subjective Depth Transformer: surprise at one layer routes the next.

Layers stand in pairs. The decision layer takes x to h for every token, and a prior foresees the change from x alone.
With ``D_st = ‖h − x‖²/d`` and ``D_ch = ‖h − x − prior(x)‖²/d``, g is the probability that the change was a surprise, by
the criteria of :class:`SurpriseRouter`. Tokens of high g enter the dynamic layer. As g at t depends on the tokens up to
t alone, it is held against the threshold as it is, and needs no predictor.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pliant.architectures.dtf.config import DtfConfig
from pliant.architectures.routing import Memory, Route, RoutedLayer
from pliant.architectures.routing.layer import Hidden, PerToken
from pliant.architectures.routing.surprise import Prior, SurpriseRouter, divergence, mean_square
from pliant.errors import ConfigError


class DtfLayer(RoutedLayer):
    """Decoder layer of a pair: the decision layer remembers its input, and the dynamic one after it is routed.

    Attributes:
        router: What weighs the surprise; on a dynamic layer.
        prior: What foresees the change of the decision layer; on a dynamic layer.
        partner: The other layer of the pair; in a tuple, so that it does not become a part of this one.
        entry: The decision layer's input: kept there until the dynamic layer is called, and here until it is routed.
    """

    router: SurpriseRouter
    prior: Prior
    handed_over = ("entry",)

    def __init__(self, config: Any, layer_idx: int, layer_config: DtfConfig) -> None:
        super().__init__(config, layer_idx, layer_config)
        self.partner: tuple[DtfLayer, ...] = ()
        self.entry: Hidden | None = None
        if not self.routes:
            return
        self.router = SurpriseRouter(layer_config)
        self.prior = Prior(
            config.hidden_size, layer_config.prior_factor, has_variance=layer_config.surprise == "gaussian"
        )

    @property
    def routes(self) -> bool:
        """Whether this is the dynamic layer of the pair."""
        return self.layer_config.role == "dynamic"

    @property
    def capacity(self) -> float:
        """γ: the share of the tokens that runs; every one runs the decision layer."""
        return self.layer_config.capacity_gamma if self.routes else 1.0

    @property
    def keeps_keys(self) -> bool:
        """Whether only tokens that run leave keys in the cache."""
        return self.routes

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the input of a forward, which cannot be copied along with its graph."""
        return {**vars(self), "entry": None}

    def connect(self, layers: nn.ModuleList) -> None:
        """Finds the other layer of the pair.

        Raises:
            ConfigError: A decision layer is not followed by a dynamic one, or that not preceded by one.
        """
        wanted, place = ("decision", self.layer_idx - 1) if self.routes else ("dynamic", self.layer_idx + 1)
        partner = layers[place] if 0 <= place < len(layers) else None
        if not isinstance(partner, DtfLayer) or partner.layer_config.role != wanted:
            raise ConfigError(
                f"role must be 'decision' on one layer and 'dynamic' on the next; layer {self.layer_idx} is "
                f"{self.layer_config.role!r}, and layer {place} is not {wanted!r}. Convert both of a pair."
            )
        self.partner = (partner,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the entry over as an argument, so that recomputing this very forward finds it."""
        if self.routes and self.active and "entry" not in kwargs:
            (decision,) = self.partner
            kwargs["entry"], decision.entry = decision.entry, None
        return super().__call__(*args, **kwargs)

    def forward(
        self,
        hidden_states: Hidden,
        token_documents: Int[Tensor, "batch seq"] | None = None,
        *,
        entry: Hidden | None = None,
        **kwargs: Any,
    ) -> Hidden:
        """Returns the layer's output; further keywords are those of the family's decoder layer."""
        if self.routes:
            self.entry = entry
            return super().forward(hidden_states, token_documents, **kwargs)
        if any(dynamic.active for dynamic in self.partner):
            self.entry = hidden_states
        return self._enter(hidden_states, kwargs)

    def route(self, h: Hidden, documents: Tensor | None, memory: Memory | None) -> Route:
        """Weighs the change from the decision layer's input to ``h``, its output."""
        assert self.entry is not None
        entry, self.entry = self.entry.to(h.device).float(), None
        foreseen, log_variance = self.prior(entry)
        change = h.float() - entry
        gate, scores = self.router(mean_square(change), divergence(change - foreseen, log_variance), documents, memory)
        signals = {}
        if self.recording:
            signals = {"foreseen": entry + foreseen, "h": h}
            if log_variance is not None:
                signals["log_variance"] = log_variance
            if (always := self._always_run(scores, documents, memory)) is not None:
                signals["always"] = always
        return Route(scores=scores, gate=gate, signals=signals)

    def skip(self, h: Hidden) -> Hidden:
        """Leaves a token as it is, or moves it by what the prior foresees."""
        return h + self.prior(h)[0].to(h.dtype) if self.layer_config.forecast else h

    def losses(self, route: Route, runs: Bool[Tensor, "batch seq"]) -> dict[str, tuple[float, Float[Tensor, "..."]]]:
        """The prior's error at the decision layer's output; with a forecast, also at what this layer does.

        Tokens that always run do not count: their surprise decides nothing, and the first of a document changes by so
        much that its error would be all of the loss.
        """
        weight, h = self.layer_config.prior_loss_weight, route.signals["h"]
        missed = divergence(h.detach().float() - route.signals["foreseen"], route.signals.get("log_variance"))
        counted = ~route.signals["always"] if "always" in route.signals else torch.ones_like(runs)
        losses: dict[str, tuple[float, PerToken]] = {"prior": (weight, missed * counted)}
        if self.layer_config.forecast:
            error = mean_square(self.prior(h)[0] - route.signals["increment"].float())
            losses["forecast"] = (weight, error * (runs & counted))
        return losses
