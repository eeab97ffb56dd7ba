"""A decoder layer that only some tokens enter.

h (batch, seq, d_model) is the layer's input. A token t that runs gets ``h_t + m_t f(h)_t``, f the increment of the
routed part computed among the running tokens alone, with their own positions; every other token passes as it is. The
first token of a document always runs, unless the MLP is all that is skipped.
m = 1 + φ − sg[φ] + s (sg[φ] − 1), from 1 at s = 0 to the gate φ at s = 1, always with the gradient of φ.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.base import AddedModule, LayerReport, RoutingReport
from pliant.architectures.routing.attention import Memory, attention_arguments
from pliant.architectures.routing.selection import (
    Selection,
    at_least_one,
    highest,
    row_thresholds,
    selected,
    threshold_for,
    within_budget,
)

Hidden = Float[Tensor, "batch seq d_model"]
PerToken = Float[Tensor, "batch seq"]

EPSILON = 1e-6
MOMENTUM = 0.05
"""Weight of one training batch in the running threshold."""


class Router(AddedModule):
    """What decides who runs, and the score from which on a token does.

    Attributes:
        threshold: τ; −∞ lets every token run.
        noted: Thresholds of the rows of the last training batch, which τ has not followed yet.
    """

    component: ClassVar[str] = "router"
    threshold: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.full((), -torch.inf))
        self.noted: Tensor | None = None

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Lets every token run."""
        init.constant_(self.threshold, -torch.inf)

    def note(self, thresholds: Float[Tensor, " rows"]) -> None:
        """Keeps what the threshold of each row of a batch would be, until :meth:`follow`."""
        self.noted = thresholds

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the threshold a little towards the mean of what was noted, over the rows of all processes.

        This comes after the backward pass: a layer that runs again there must choose the same tokens again.
        """
        if (noted := self.noted) is None:
            return
        self.noted = None
        total = torch.stack((noted.sum(), noted.new_tensor(len(noted))))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        mean = (total[0] / total[1]).to(self.threshold)
        moved = torch.where(self.threshold.isinf(), mean, self.threshold.lerp(mean, MOMENTUM))
        self.threshold.copy_(torch.where(mean.isfinite(), moved, self.threshold))


def inverse_norm(h: Hidden) -> PerToken:
    """Returns ``1/rms(h)`` in fp32."""
    square = torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32).square()
    return (square / h.shape[-1] + EPSILON).rsqrt()


@dataclass(frozen=True, kw_only=True)
class Route:
    """What a router says of each token.

    Attributes:
        scores: What is held against the threshold.
        gate: φ, what a running token's increment is multiplied by.
        signals: What the losses of the router are computed from.
        ranks: What training picks by, where that is not the score.
    """

    scores: PerToken
    gate: PerToken
    signals: Mapping[str, Tensor]
    ranks: PerToken | None = None


class RoutedLayer(nn.Module):
    """Mixed in before a family's decoder layer; an architecture brings ``route`` and ``losses``.

    Attributes:
        router: The router, with the threshold.
        layer_config: Its configuration; ``capacity_gamma`` and ``gate_share`` are read at every forward.
        by_threshold: Whether training, too, goes by the threshold, and takes no longer the highest of each row.
        active: Off, the layer is exactly the family's own.
        handed_over: Keywords that the layer takes over from the one before, in a forward of the model.
        calibrating: On, the next forward sets the threshold to what lets γ of its tokens run.
        recording: ``None``, ``"norms"`` or ``"writes"``: whether the next forward leaves a report in ``layer_report``.
    """

    # What the family's own layer brings.
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    router: Router
    part: str
    handed_over: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, layer_idx: int, layer_config: Any) -> None:
        super().__init__(config, layer_idx)
        self.part = layer_config.granularity
        self.layer_idx, self.layer_config = layer_idx, layer_config
        self.active, self.by_threshold, self.calibrating = True, False, False
        self.recording: str | None = None
        self.layer_report: LayerReport | None = None

    @abstractmethod
    def route(self, h: Hidden, documents: Tensor | None, memory: Memory | None) -> Route:
        """Returns what the router says of each token; at t it may depend on tokens up to t alone."""

    @abstractmethod
    def losses(self, route: Route, runs: Bool[Tensor, "batch seq"]) -> dict[str, tuple[float, PerToken]]:
        """Returns the weight and the value, token by token, of each loss of the router.

        Among the signals is ``increment`` (batch, seq, d_model): what each token's state moved by, without gradient.
        """

    def connect(self, layers: nn.ModuleList) -> None:
        """Takes note of the layers that this one looks at; of none, unless an architecture says so."""

    def skip(self, h: Hidden) -> Hidden:
        """Returns what a token that does not run goes on with."""
        return h

    def forward(
        self, hidden_states: Hidden, token_documents: Int[Tensor, "batch seq"] | None = None, **kwargs: Any
    ) -> Hidden:
        """Returns the layer's output; further keywords are those of the family's decoder layer."""
        if not self.active:
            return super().forward(hidden_states, **kwargs)
        memory = self._memory(kwargs)
        route = self.route(hidden_states, token_documents, memory)
        before = self._attend(hidden_states, kwargs) if self.part == "mlp" else hidden_states
        if self.capacity >= 1 and token_documents is None and (memory is None or memory.is_full):
            runs = torch.ones_like(route.scores, dtype=torch.bool)
            after = self._gated(before, self._enter(before, kwargs), route.gate)
        else:
            selection = self._select(route, token_documents, memory)
            after, runs = self.skip(before), torch.zeros_like(route.scores, dtype=torch.bool)
            if selection is not None:
                new = self._run(before, selection, route, token_documents, kwargs)
                after, runs = selection.scatter(after, new), selection.mask(before.shape[1])
            if memory is not None:
                memory.advance(hidden_states.shape[1])
        if self.recording:
            self._report(route, runs, before, after)
        return self._think(after) if self.part == "attention" else after

    @property
    def routes(self) -> bool:
        """Whether the layer routes; one of an architecture whose layers pair up may only look on."""
        return True

    @property
    def capacity(self) -> float:
        """γ: the share of the tokens that runs in training, and that calibration aims at."""
        return self.layer_config.capacity_gamma

    @property
    def keeps_keys(self) -> bool:
        """Whether only tokens that run leave keys in the cache."""
        return self.part != "mlp"

    @property
    def skips_mlp(self) -> bool:
        """Whether only tokens that run enter the MLP."""
        return self.part != "attention" and self.capacity < 1

    def _memory(self, kwargs: dict[str, Any]) -> Memory | None:
        cache = kwargs.get("past_key_values")
        return cache.layers[self.layer_idx] if cache is not None and self.keeps_keys else None

    def _always_run(self, scores: PerToken, documents: Tensor | None, memory: Memory | None) -> Tensor | None:
        """Returns which tokens run whatever their score: first ones of documents, where skipping leaves no keys.

        Attention rests on that token where it has nothing else to look at (arXiv 2309.17453). ``None`` if none do.
        """
        begun = memory is not None and memory.begun
        if begun is True or not self.keeps_keys:
            return None
        if documents is None:
            is_first = torch.zeros_like(scores, dtype=torch.bool)
            is_first[:, 0] = True
        else:
            is_first = documents > functional.pad(documents.cummax(1).values[:, :-1], (1, 0), value=-1)
        return is_first if begun is False else is_first & ~begun[:, None]

    def _select(self, route: Route, documents: Tensor | None, memory: Memory | None) -> Selection | None:
        always, router = self._always_run(route.scores, documents, memory), self.router
        scores = _lifted(route.scores, always)
        allowed = None if documents is None else documents >= 0
        if self.calibrating:
            router.threshold.copy_(
                threshold_for(scores.flatten() if allowed is None else scores[allowed], self.capacity)
            )
        elif self.training:
            if self.capacity < 1:
                router.note(row_thresholds(scores, self.capacity, allowed))
            if not self.by_threshold:
                ranks = scores if route.ranks is None else _lifted(route.ranks, always)
                return highest(ranks, self.capacity, allowed)
        runs = scores >= (router.threshold if self.capacity < 1 else -torch.inf)
        if allowed is not None:
            runs = runs & allowed
        if self.training:
            runs = at_least_one(runs, scores, allowed)
        elif self.layer_config.budget is not None and self.capacity < 1:
            runs = self._afford(runs, documents, memory)
        return selected(runs)

    def _afford(self, runs: Bool[Tensor, "batch seq"], documents: Tensor | None, memory: Memory | None) -> Tensor:
        """Takes tokens back that are over the budget."""
        config, length = self.layer_config, runs.shape[1]
        owners = torch.zeros_like(runs, dtype=torch.long) if documents is None else documents
        if memory is None:
            return within_budget(runs, owners, most=config.most, window=config.budget_window, earlier=0)
        ran, past = memory.recall("ran"), memory.recall("owners")
        memory.remember("owners", owners)
        if ran is None or past is None:
            ran, past = runs[:, :0], owners[:, :0]
        behind = (past >= 0).flip(1).cumsum(1)  # tokens from there on that count
        first = past.shape[1] - int((behind < config.budget_window).sum(1).max()) if past.shape[1] else 0
        runs = within_budget(
            torch.cat((ran[:, first:], runs), dim=1),
            torch.cat((past[:, first:], owners), dim=1),
            most=config.most,
            window=config.budget_window,
            earlier=past.shape[1] - first,
        )[:, -length:]
        memory.remember("ran", runs)
        return runs

    def _run(
        self, before: Hidden, selection: Selection, route: Route, documents: Tensor | None, kwargs: dict[str, Any]
    ) -> Float[Tensor, "batch k d_model"]:
        chosen, arguments = selection.gather(before), kwargs
        if self.part != "mlp":
            arguments = attention_arguments(
                selection,
                documents,
                self._memory(kwargs),
                kwargs,
                length=before.shape[1],
                implementation=self.self_attn.config._attn_implementation,
                window=self._window(),
                dtype=before.dtype,
            )
        return self._gated(chosen, self._enter(chosen, arguments), selection.gather(route.gate))

    def _window(self) -> int | None:
        """How far attention looks back; Mistral's keeps it in the configuration alone."""
        attention = self.self_attn
        return getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))

    def _enter(self, h: Float[Tensor, "batch k d_model"], kwargs: dict[str, Any]) -> Float[Tensor, "batch k d_model"]:
        """Runs the routed part."""
        if self.part == "attention":
            return self._attend(h, kwargs)
        return self._think(h) if self.part == "mlp" else super().forward(h, **kwargs)

    def _attend(self, h: Hidden, kwargs: dict[str, Any]) -> Hidden:
        return h + self.self_attn(hidden_states=self.input_layernorm(h), **kwargs)[0]

    def _think(self, h: Hidden) -> Hidden:
        return h + self.mlp(self.post_attention_layernorm(h))

    def _gated(self, h: Tensor, new: Tensor, gate: Tensor) -> Float[Tensor, "batch k d_model"]:
        """``h + m (new − h)``, written so that m = 1 leaves ``new`` as it is, bit for bit."""
        share, has_gradient = self.layer_config.gate_share, torch.is_grad_enabled() and gate.requires_grad
        if not share and not has_gradient:
            return new
        excess = gate - gate.detach() + share * (gate.detach() - 1)
        return new + excess[..., None].to(new.dtype) * (new - h)

    def _report(self, route: Route, runs: Bool[Tensor, "batch seq"], before: Hidden, after: Hidden) -> None:
        increment = (after - before).detach()
        route = replace(route, signals={**route.signals, "increment": increment})
        penalty = torch.zeros_like(route.scores)
        for weight, value in self.losses(route, runs).values():
            penalty = penalty + weight * value
        self.layer_report = LayerReport(
            norm=torch.linalg.vector_norm(increment, dim=-1, dtype=torch.float32),
            regulariser=penalty,
            routing=RoutingReport(scores=route.scores.detach(), runs=runs, gate=route.gate.detach()),
        )


def _lifted(scores: PerToken, always: Bool[Tensor, "batch seq"] | None) -> PerToken:
    """Returns scores without gradient, those of tokens that always run above every threshold."""
    return scores.detach() if always is None else scores.detach().masked_fill(always, torch.inf)
