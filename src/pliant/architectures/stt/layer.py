"""Subjective Timescale Transformer: what surprises a layer teaches a student who is to enter it.

In training the block runs on all tokens without gradient, ``x⁺ = Block(x)`` and ``Δ = x⁺ − x``. A transition network
foresees Δ from the token before, ``Δ̂_t = prior(x⁺_{t−1})``. With ``D_st = ‖Δ‖²/d`` and ``D_ch = ‖Δ − Δ̂‖²/d``, g is the
probability of surprise by the criteria of :class:`SurpriseRouter`, and the tokens of the highest g are the teacher's.
The student sees x_t and x_{t−1} and learns which those are; it decides who runs, in training as ever after.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.routing import Memory, Route, RoutedLayer
from pliant.architectures.routing.layer import Hidden, PerToken, inverse_norm
from pliant.architectures.routing.selection import highest
from pliant.architectures.routing.surprise import INITIAL_STD, Prior, SurpriseRouter, mean_square
from pliant.architectures.stt.config import SttConfig

STUDENT_SHARE = 8
"""d_model over the width of the student."""


class StudentRouter(SurpriseRouter):
    """The teacher's criteria, and the student's logit ``v · silu(P [x_t/rms(x_t) ‖ x_{t−1}/rms(x_{t−1})])``."""

    def __init__(self, d_model: int, layer_config: SttConfig) -> None:
        super().__init__(layer_config)
        width = max(1, d_model // STUDENT_SHARE)
        self.student_in = nn.Parameter(torch.empty(width, 2 * d_model))
        self.student_out = nn.Parameter(torch.empty(width))

    def reset_parameters(self, init: Any = nn.init) -> None:
        super().reset_parameters(init)
        for parameter in (self.student_in, self.student_out):
            init.normal_(parameter, std=INITIAL_STD)

    def student(self, h: Hidden, documents: Tensor | None, memory: Memory | None) -> PerToken:
        """Returns the student's logits; the rest of the model does not feel them.

        Each token is projected once, for itself and for the token after it.
        """
        h = h.detach().float()
        rows = self.student_in.float().view(-1, h.shape[-1])  # in turn of this token, and of the one before
        seen = functional.linear(h, rows) * inverse_norm(h)[..., None]
        own, handed_on = seen.unflatten(-1, (-1, 2)).unbind(-1)
        before = previous_states(handed_on, documents, memory)
        return functional.silu(own + before) @ self.student_out.float()


class SttLayer(RoutedLayer):
    """Decoder layer that the student of its own surprise lets tokens into.

    Attributes:
        router: The teacher's criteria, and the student.
        prior: The transition network.
        dense: What the block made of every token, from the start of a forward until it is routed; in training alone.
    """

    router: StudentRouter

    def __init__(self, config: Any, layer_idx: int, layer_config: SttConfig) -> None:
        super().__init__(config, layer_idx, layer_config)
        self.router = StudentRouter(config.hidden_size, layer_config)
        self.prior = Prior(config.hidden_size, layer_config.transition_factor)
        self.dense: Hidden | None = None

    def forward(
        self, hidden_states: Hidden, token_documents: Int[Tensor, "batch seq"] | None = None, **kwargs: Any
    ) -> Hidden:
        """Returns the layer's output; further keywords are those of the family's decoder layer."""
        self.dense = None
        if self.active and self.training:
            memory = self._memory(kwargs)
            if memory is None or not memory.seen:
                with torch.no_grad():
                    self.dense = self._enter(hidden_states, {**kwargs, "past_key_values": None})
        return super().forward(hidden_states, token_documents, **kwargs)

    def route(self, h: Hidden, documents: Tensor | None, memory: Memory | None) -> Route:
        """Scores by the student's logit; in training the gate is the teacher's g."""
        student = self.router.student(h, documents, memory)
        if self.dense is None:  # in evaluation
            return Route(scores=student, gate=torch.ones_like(student), signals={})
        dense, self.dense = self.dense, None
        change = dense.float() - h.detach().float()
        foreseen, _ = self.prior(previous_states(dense, documents, None))
        missed = mean_square(change - foreseen)
        gate, surprise = self.router(mean_square(change), missed, documents)
        allowed = None if documents is None else documents >= 0
        taught = highest(surprise.detach(), self.capacity, allowed).mask(h.shape[1])
        return Route(scores=student, gate=gate, signals={"student": student, "taught": taught, "transition": missed})

    def losses(self, route: Route, runs: Bool[Tensor, "batch seq"]) -> dict[str, tuple[float, Float[Tensor, "..."]]]:
        """The student's cross-entropy with the teacher and the transition network's error; none without a teacher."""
        if "taught" not in route.signals:
            return {}
        signals, config = route.signals, self.layer_config
        student = functional.binary_cross_entropy_with_logits(
            signals["student"], signals["taught"].to(torch.float32), reduction="none"
        )
        return {
            "student": (config.student_loss_weight, student),
            "transition": (config.prior_loss_weight, signals["transition"]),
        }


def previous_states(h: Hidden, documents: Int[Tensor, "batch seq"] | None, memory: Memory | None) -> Hidden:
    """Returns the vector of the token before each one in its document, padding left out; zeros for the first.

    Args:
        h: A vector of each token: its state, or what is made of that.
        documents: Document of each token, −1 for padding; ``None`` for one document and no padding.
        memory: Where the last vector of earlier forwards is, and that of this one goes; ``None`` without a cache.
    """
    earlier = None if memory is None else memory.recall("previous")
    before = torch.zeros_like(h[:, :1]) if earlier is None else earlier[:, -1:]
    if documents is None:
        last, previous = h, torch.cat((before, h[:, :-1]), dim=1)
    else:
        # 0 is the token before this forward; from there on the last token that counts
        order = torch.arange(1, h.shape[1] + 1, device=h.device)
        places = torch.where(documents >= 0, order, 0).cummax(1).values
        last = torch.cat((before, h), dim=1).gather(1, places[..., None].expand_as(h))
        previous = torch.cat((before, last[:, :-1]), dim=1)
        owners = functional.pad(documents, (1, 0)).gather(1, functional.pad(places[:, :-1], (1, 0)))
        previous = previous * (owners == documents)[..., None].to(h.dtype)
    if memory is not None:
        memory.remember("previous", last, most=1)
    return previous
