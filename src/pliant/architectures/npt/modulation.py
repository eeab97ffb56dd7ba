"""Maps from the attention output of a token to the change of that token's MLP.

Each module takes ``a`` (batch, seq, d_model), the attention output, and returns named tensors that
``layer.py`` puts into the block. Factors are bare parameters, held in fp32 and used in the dtype of ``a``:
an ``nn.Linear`` would be quantised together with the base.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.base import AddedModule
from pliant.architectures.npt.config import NptConfig

FEW_TOKENS = 16
GATE_PARTS = {"additive": ("add",), "multiplicative": ("mult",), "both": ("add", "mult")}


def parameter(*shape: int) -> nn.Parameter:
    """An fp32 parameter without values: ``reset_parameters`` or a checkpoint gives it some."""
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32))


class Modulation(AddedModule):
    """Base of the maps below."""

    def forward(self, attention: Float[Tensor, "batch seq d_model"]) -> dict[str, Any]:
        """Returns the named changes of every token, in the dtype of ``attention``."""
        raise NotImplementedError

    def apply_factor(self, name: str, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """``W x`` for each token, W the parameter ``name`` in the dtype of ``x``."""
        return functional.linear(x, getattr(self, name).to(x.dtype))


def working_copy(attention: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
    """``a`` in the dtype to multiply in: fp32 for a few tokens, where converting the factors would cost more than using
    them, and the dtype of ``a`` for many.
    """
    few = attention.shape[0] * attention.shape[1] <= FEW_TOKENS
    return attention.float() if few and attention.dtype.itemsize < 4 else attention


class GateModulation(Modulation):
    """V1 and V2: ``add = B A a`` and, if asked for, ``half = σ(2 B′ A′ a)``, each (batch, seq, d_ffn).

    ``1 + tanh(y) = 2 σ(2y)``, and σ is three times as fast in bf16 on a processor.
    B and B′ start at zero, so the first step's gradient reaches them and nothing else.
    """

    def __init__(self, config: NptConfig, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.parts = GATE_PARTS[config.modulation] if config.form == "v2" else ("add",)
        for part in self.parts:
            self.register_parameter(f"{part}_down", parameter(config.settled_rank, d_model))
            self.register_parameter(f"{part}_up", parameter(d_ffn, config.settled_rank))

    def reset_parameters(self, init: Any = nn.init) -> None:
        for part in self.parts:
            down = getattr(self, f"{part}_down")
            init.normal_(down, std=1.0 / math.sqrt(down.shape[1]))
            init.zeros_(getattr(self, f"{part}_up"))

    def forward(self, attention: Float[Tensor, "batch seq d_model"]) -> dict[str, Tensor]:
        a = working_copy(attention)
        changes = {part: self.apply_factor(f"{part}_up", self.apply_factor(f"{part}_down", a)) for part in self.parts}
        if "mult" in changes:
            changes["half"] = torch.sigmoid(2 * changes.pop("mult"))
        return {part: change.to(attention.dtype) for part, change in changes.items()}


class OuterModulation(Modulation):
    """``outer``: values ``v_b`` (batch, seq, k, d_out) and keys ``v_a`` (batch, seq, k, d_in) per projection.

    ``z = W_down a``; ``v_a^k = W_a^k z + c^k``; ``v_b^k = W_b^k z / √d_model``. W_b starts at zero and W_a does
    not: with both at zero their product has no gradient and never trains.
    """

    def __init__(self, config: NptConfig, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.targets = config.target_names
        self.num_updates = config.num_updates
        self.key_bias = config.key_bias
        self.scale = 1.0 / math.sqrt(d_model)
        self.down = parameter(config.settled_rank, d_model)
        for name in self.targets:
            d_out, d_in = (d_model, d_ffn) if name == "down_proj" else (d_ffn, d_model)
            self.register_parameter(f"{name}_value", parameter(config.num_updates * d_out, config.settled_rank))
            self.register_parameter(f"{name}_key", parameter(config.num_updates * d_in, config.settled_rank))
            if self.key_bias:
                self.register_parameter(f"{name}_key_bias", parameter(config.num_updates * d_in))

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.normal_(self.down, std=self.scale)
        for name in self.targets:
            key = getattr(self, f"{name}_key")
            init.normal_(key, std=1.0 / math.sqrt(key.shape[1]))
            init.zeros_(getattr(self, f"{name}_value"))
            if self.key_bias:
                init.normal_(getattr(self, f"{name}_key_bias"), std=1.0)

    def forward(self, attention: Float[Tensor, "batch seq d_model"]) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns, per projection, ``(value, key)`` with the updates as the axis before the last."""
        bottleneck = self.apply_factor("down", working_copy(attention))
        factors = {}
        for name in self.targets:
            value = self.apply_factor(f"{name}_value", bottleneck) * self.scale
            key = self.apply_factor(f"{name}_key", bottleneck)
            if self.key_bias:
                key = key + getattr(self, f"{name}_key_bias").to(key.dtype)
            shape = (self.num_updates, -1)
            factors[name] = tuple(part.unflatten(-1, shape).to(attention.dtype) for part in (value, key))
        return factors


class CarryModulation(Modulation):
    """``keyed``: ``carry = U D a`` (batch, seq, d_model), the value of the rank-1 write on ``down_proj``.

    With ``tied`` only D is stored and U = Dᵀ. Starts as the first ``rank`` coordinates of the identity, which is
    exact at full rank; below it the closed form of ``conversion`` replaces the start.
    """

    def __init__(self, config: NptConfig, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.tied = config.tied
        self.down = parameter(config.settled_rank, d_model)
        if not self.tied:
            self.up = parameter(d_model, config.settled_rank)

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.eye_(self.down)
        if not self.tied:
            init.eye_(self.up)

    def forward(self, attention: Float[Tensor, "batch seq d_model"]) -> dict[str, Tensor]:
        bottleneck = self.apply_factor("down", working_copy(attention))
        carry = bottleneck @ self.down.to(bottleneck.dtype) if self.tied else self.apply_factor("up", bottleneck)
        return {"carry": carry.to(attention.dtype)}


class PreCarryModulation(Modulation):
    """``keyed_pre``: ``gate = B_g D a``, ``up = B_u D a`` (batch, seq, d_ffn) and ``carry = U D a``.

    D and U start as ``CarryModulation`` does; B_g and B_u, which hold ``W diag(γ) U`` of the base's own
    projections, get that value from ``conversion`` and small random numbers when trained from scratch.
    """

    def __init__(self, config: NptConfig, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.down = parameter(config.settled_rank, d_model)
        self.up = parameter(d_model, config.settled_rank)
        self.up_gate = parameter(d_ffn, config.settled_rank)
        self.up_up = parameter(d_ffn, config.settled_rank)

    def reset_parameters(self, init: Any = nn.init) -> None:
        init.eye_(self.down)
        init.eye_(self.up)
        for factor in (self.up_gate, self.up_up):
            init.normal_(factor, std=1.0 / math.sqrt(self.down.shape[1]))

    def forward(self, attention: Float[Tensor, "batch seq d_model"]) -> dict[str, Tensor]:
        bottleneck = self.apply_factor("down", working_copy(attention))
        changes = {"gate": "up_gate", "up": "up_up", "carry": "up"}
        return {change: self.apply_factor(factor, bottleneck).to(attention.dtype) for change, factor in changes.items()}


MODULATIONS: dict[str, Callable[[NptConfig, int, int], Modulation]] = {
    "v1": GateModulation,
    "v1_single": GateModulation,
    "v2": GateModulation,
    "outer": OuterModulation,
    "keyed": CarryModulation,
    "keyed_pre": PreCarryModulation,
}
