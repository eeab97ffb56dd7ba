"""Surprise: how much more a block changed a token than was foreseen, and than it changes the tokens before it.

D_st (batch, seq) is the mean squared change of a token by a block, and D_ch how far off a small network was that
foresaw it. Neither looks ahead, so that a threshold on the surprise routes text at once and token by token alike.
"""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.base import AddedModule
from pliant.architectures.routing.attention import Memory
from pliant.architectures.routing.config import is_number
from pliant.architectures.routing.layer import Hidden, PerToken, Router, inverse_norm
from pliant.errors import ConfigError

WINDOW = 100
"""Tokens in the moving average of D_st."""
INITIAL_OFFSET = 1.025
INITIAL_MARGIN = 1.1
OFFSET_FLOOR = 1e-10
INITIAL_STD = 0.02

SURPRISES = ("mse", "gaussian")
CRITERIA = ("ce", "cu", "or")


class Prior(AddedModule):
    """Foresees a change as ``W_d (silu(W_g x) ⊙ W_u x)``, ``x = h/rms(h)``; also its ``log σ²``, where asked to.

    The width is ``d_model · factor``, rounded up to an even number.
    """

    component: ClassVar[str] = "prior"

    def __init__(self, d_model: int, factor: float, *, has_variance: bool = False) -> None:
        super().__init__()
        width = max(2, 2 * math.ceil(d_model * factor / 2 - 1e-9))
        self.gate = nn.Parameter(torch.empty(width, d_model))
        self.up = nn.Parameter(torch.empty(width, d_model))
        self.down = nn.Parameter(torch.empty(d_model, width))
        self.log_variance = nn.Parameter(torch.empty(d_model, width)) if has_variance else None

    def reset_parameters(self, init: Any = nn.init) -> None:
        """Normal values of standard deviation 0.02; zeros for the variance, which makes it 1."""
        for parameter in (self.gate, self.up, self.down):
            init.normal_(parameter, std=INITIAL_STD)
        if self.log_variance is not None:
            init.zeros_(self.log_variance)

    def forward(self, h: Hidden) -> tuple[Hidden, Hidden | None]:
        """Returns the mean and the ``log σ²`` of the change, both in fp32."""
        h = h.float()
        # Divided by the norm where it is narrow: nothing as wide as h is written.
        scale = inverse_norm(h)[..., None]
        gate, up = (functional.linear(h, weight.float()) * scale for weight in (self.gate, self.up))
        hidden = functional.silu(gate) * up  # (batch, seq, width)
        mean = functional.linear(hidden, self.down.float()).float()
        if self.log_variance is None:
            return mean, None
        return mean, functional.linear(hidden, self.log_variance.float()).float()


def mean_square(change: Float[Tensor, "batch seq d_model"]) -> PerToken:
    """``‖change‖²/d`` in fp32."""
    return torch.linalg.vector_norm(change, dim=-1, dtype=torch.float32).square() / change.shape[-1]


def divergence(error: Hidden, log_variance: Hidden | None) -> PerToken:
    """Returns how far off a prior was: ``mean error²``, or ``½ mean[log σ² + (error² + 1) e^{−log σ²} − 1]``.

    The latter is the divergence from a Gaussian of variance 1 around what came. It is never negative, as D_st is not;
    without the −1 an unmistaken prior would count as ½ off, and the two could not be compared.
    """
    if log_variance is None:
        return mean_square(error)
    spread = (error.float().square() + 1) * torch.exp(-log_variance)
    return 0.5 * (log_variance + spread - 1).mean(-1)


def moving_average(
    values: PerToken, documents: Int[Tensor, "batch seq"] | None, memory: Memory | None
) -> Float[Tensor, "batch seq"]:
    """Returns the mean of each token's value and those of up to 99 tokens before it in its document.

    The first token of a document counts for itself alone: as attention's sink it changes many times as much as any
    other, and would hide the surprise of the next 99. Padding does not count. Each window is summed by itself, so that
    nothing drifts and no value depends on how the text was cut.

    Args:
        values: One value a token.
        documents: Document of each token, −1 for padding; ``None`` for one document and no padding.
        memory: Values and documents of earlier forwards; ``None`` without a cache.
    """
    values = values.detach()
    if documents is None and (memory is None or not memory.holds("documents")):
        return _plain_average(values, memory)
    rows, length = values.shape
    if documents is None:
        documents = values.new_zeros(rows, length, dtype=torch.long)
    if memory is not None:
        earlier = memory.recall("static")
        if memory.seen and not memory.holds("documents"):
            memory.remember("documents", documents.new_zeros(rows, memory.seen))
        owners = memory.recall("documents")
        memory.remember("static", values)
        memory.remember("documents", documents)
        if earlier is not None and owners is not None:
            values, documents = torch.cat((earlier, values), dim=1), torch.cat((owners, documents), dim=1)
    counted = documents >= 0
    total = values.shape[1]
    ranks = counted.cumsum(1) - 1  # of a token among those that count
    places = torch.where(counted, ranks, total)  # padding is written behind the others, and cut off
    packed = values.new_zeros(rows, total + 1).scatter(1, places, values)
    owners = documents.new_full((rows, total + 1), -1).scatter(1, places, documents)[:, :total]
    is_first = functional.pad(owners[:, 1:] != owners[:, :-1], (1, 0))
    order = torch.arange(total, device=values.device)
    starts = torch.where(is_first, order, 0).cummax(1).values  # of each one's document
    ends = ranks[:, -length:].clamp(min=0)
    firsts = (starts.gather(1, ends) + 1).minimum(ends)
    window = ends[..., None] + torch.arange(1 - WINDOW, 1, device=values.device)  # (batch, seq, window)
    present = window >= firsts[..., None]
    held = packed.gather(1, window.clamp(min=0).flatten(1)).view_as(window)
    return torch.where(present, held, 0.0).sum(-1) / present.sum(-1)


def _plain_average(values: PerToken, memory: Memory | None) -> Float[Tensor, "batch seq"]:
    """The moving average of rows that are one document each, without padding; its windows are added up the same way."""
    length = values.shape[1]
    earlier = None if memory is None else memory.recall("static")
    if memory is not None:
        memory.remember("static", values)
    past = 0 if earlier is None else earlier.shape[1]
    known = values if earlier is None else torch.cat((earlier[:, 1 - WINDOW :], values), dim=1)
    padded = functional.pad(known, (WINDOW - 1 + length - known.shape[1], 0))
    if past < WINDOW:
        padded[:, WINDOW - 1 - past] = 0.0  # the first token, which counts for itself alone
    sums = padded.unfold(1, WINDOW, 1).contiguous().sum(-1)
    if past >= WINDOW:
        return sums / WINDOW
    averages = sums / torch.arange(past, past + length, device=values.device).clamp(1, WINDOW)
    return averages if past else torch.cat((values[:, :1], averages[:, 1:]), dim=1)


class SurpriseRouter(Router):
    """Weighs the change of a token against what was foreseen (CE) and against the tokens before it (CU).

    ``CE = D_st − (D_ch − log(o + 1e-10))``, ``CU = D_st − m MA(sg[D_st])``, ``S = σ(β C)``. β, o and m are the softplus
    of the parameters, so that they stay positive.

    Attributes:
        expected_slope: What becomes β of CE; it starts at ``beta_ce_init``.
        expected_offset: What becomes o, from 1.025 on.
        unexpected_slope: What becomes β of CU; it starts at ``beta_cu_init``.
        unexpected_margin: What becomes m, from 1.1 on.
    """

    def __init__(self, layer_config: Any) -> None:
        super().__init__()
        criteria = layer_config.criteria
        self.starts = {
            "expected_slope": layer_config.beta_ce_init,
            "expected_offset": math.log(math.expm1(INITIAL_OFFSET)),
            "unexpected_slope": layer_config.beta_cu_init,
            "unexpected_margin": math.log(math.expm1(INITIAL_MARGIN)),
        }
        self.expected_slope = self.expected_offset = self.unexpected_slope = self.unexpected_margin = None
        if criteria != "cu":
            self.expected_slope, self.expected_offset = _scalar(), _scalar()
        if criteria != "ce":
            self.unexpected_slope, self.unexpected_margin = _scalar(), _scalar()

    def reset_parameters(self, init: Any = nn.init) -> None:
        super().reset_parameters(init)
        for name, value in self.starts.items():
            parameter = getattr(self, name)
            if parameter is not None:
                init.constant_(parameter, value)

    def forward(
        self,
        static: PerToken,
        changed: PerToken,
        documents: Int[Tensor, "batch seq"] | None = None,
        memory: Memory | None = None,
    ) -> tuple[PerToken, PerToken]:
        """Returns ``g``, that is S_ce, S_cu or ``S_ce + S_cu − S_ce S_cu``, and ``−log(1 − g) = Σ softplus(β C)``.

        The latter puts tokens in the same order, and still tells those apart whose g rounds to 1.

        Args:
            static: D_st.
            changed: D_ch.
            documents: Document of each token, −1 for padding; ``None`` for one document and no padding.
            memory: What is kept of earlier forwards; ``None`` without a cache.
        """
        scores = []
        if self.expected_slope is not None and self.expected_offset is not None:
            offset = (functional.softplus(self.expected_offset) + OFFSET_FLOOR).log()
            scores.append(functional.softplus(functional.softplus(self.expected_slope) * (static - (changed - offset))))
        if self.unexpected_slope is not None and self.unexpected_margin is not None:
            margin = functional.softplus(self.unexpected_margin) * moving_average(static, documents, memory)
            scores.append(functional.softplus(functional.softplus(self.unexpected_slope) * (static - margin)))
        score = scores[0] if len(scores) == 1 else scores[0] + scores[1]
        return -torch.expm1(-score), score


def check_numbers(config: Any, *names: str) -> None:
    """Raises a :class:`ConfigError` for a start value that is no finite number."""
    for name in names:
        if not is_number(getattr(config, name)):
            raise ConfigError(f"{name} must be a finite number; got {getattr(config, name)!r}. Leave it out.")


def check_factor(config: Any, *names: str) -> None:
    """Raises a :class:`ConfigError` for the relative width of a network outside (0, 4]."""
    for name in names:
        value = getattr(config, name)
        if not is_number(value) or not 0 < value <= 4:
            raise ConfigError(
                f"{name} must be in (0, 4], the width of the network over d_model; got {value!r}. 0.0625 costs about "
                "1% of a layer."
            )


def _scalar() -> nn.Parameter:
    return nn.Parameter(torch.empty(1))  # FSDP takes no parameter without a dimension
