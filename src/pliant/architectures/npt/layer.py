"""How a decoder layer puts its modulation to work: one function a form, each read as its formula.

h (batch, seq, d_model) is the layer's input, a its attention output, x = LN₂(h), x⁺ = LN₂(h + a). Projections
are called as modules, never by their weight, so that quantised, offloaded and LoRA-wrapped ones keep working.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pliant.architectures.base import LayerReport, Write
from pliant.architectures.npt.config import NptConfig
from pliant.architectures.npt.modulation import MODULATIONS

Hidden = Float[Tensor, "batch seq d_model"]


class NptLayer(nn.Module):
    """Decoder layer whose attention output rewrites its MLP; mixed in before a family's decoder layer.

    Attributes:
        plastic: The modulation, all that conversion adds.
        active: Off, the layer is exactly the family's own.
        recording: ``None``, ``"norms"`` or ``"writes"``: what the next forward leaves in ``layer_report``.
    """

    # What the family's own layer brings.
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def __init__(self, config: Any, layer_idx: int, layer_config: NptConfig) -> None:
        super().__init__(config, layer_idx)
        self.layer_config = layer_config
        self.plastic = MODULATIONS[layer_config.form](layer_config, config.hidden_size, config.intermediate_size)
        self.active = True
        self.recording: str | None = None
        self.layer_report: LayerReport | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Returns the layer's output; keywords are those of the family's decoder layer, passed on untouched."""
        if not self.active:
            return super().forward(hidden_states, **kwargs)
        attention, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return COMPOSE[self.layer_config.form](self, hidden_states, attention)

    def gate(self, plain: Float[Tensor, "batch seq d_ffn"], a: Hidden, z: Hidden) -> Float[Tensor, "batch seq d_ffn"]:
        """``plain ⊙ (1 + tanh(B′ A′ a)) + B A a``; ``plain`` is the gate at z."""
        changes = self.plastic(a)
        add, half = changes.get("add"), changes.get("half")
        if self.recording:  # in fp32: a difference of bf16 gates would round small changes away
            added = None if add is None else add.float()
            effect = torch.zeros_like(plain, dtype=torch.float32) if added is None else added
            scale = None if half is None else 2 * half.float() - 1
            if scale is not None:
                effect = effect + plain.float() * scale
            self.report({"gate_proj": replace(smallest_write(effect, z), scale=scale, added=added)})
        if half is None:
            return plain + changes["add"] if self.recording else changes["add"].add_(plain)
        return 2 * plain * half if add is None else torch.addcmul(add, plain, half, value=2)

    def report(self, writes: dict[str, Write]) -> None:
        """Leaves the report of this forward in ``layer_report``; a no-op unless ``recording``."""
        if self.recording is None:
            return
        norm_squared = reduce(torch.add, (frobenius_squared(write) for write in writes.values()))
        self.layer_report = LayerReport(
            norm=norm_squared.detach().clamp_min(0.0).sqrt(),
            regulariser=penalty(self.layer_config.regulariser, writes, norm_squared),
            writes=writes if self.recording == "writes" else None,
        )


def v1(layer: NptLayer, h: Hidden, a: Hidden) -> Hidden:
    """``h + a + W_d(silu(W_g x⁺ + B A a) ⊙ W_u x⁺)``."""
    return gate_form(layer, residual := h + a, layer.post_attention_layernorm(residual), a)


def v1_single(layer: NptLayer, h: Hidden, a: Hidden) -> Hidden:
    """``h + W_d(silu(W_g x⁺ + B A a) ⊙ W_u x⁺)``: the MLP sees a, the stream does not."""
    return gate_form(layer, h, layer.post_attention_layernorm(h + a), a)


def v2(layer: NptLayer, h: Hidden, a: Hidden) -> Hidden:
    """``h + W_d(silu(W_g x ⊙ (1 + tanh(B′ A′ a)) + B A a) ⊙ W_u x)``."""
    return gate_form(layer, h, layer.post_attention_layernorm(h), a)


def gate_form(layer: NptLayer, residual: Hidden, z: Hidden, a: Hidden) -> Hidden:
    """``residual + MLP(z)`` with the gate's pre-activation changed by what ``plastic`` reads from a."""
    mlp = layer.mlp
    gate = layer.gate(mlp.gate_proj(z), a, z)
    return residual + mlp.down_proj(mlp.act_fn(gate) * mlp.up_proj(z))


def outer(layer: NptLayer, h: Hidden, a: Hidden) -> Hidden:
    """``h + MLP(x)`` with ``W + Σ_k v_b^k ⊗ v_a^k`` for each projection that the form targets."""
    mlp = layer.mlp
    x = layer.post_attention_layernorm(h)
    factors = layer.plastic(a)
    writes: dict[str, Write] = {}

    def project(name: str, z: Tensor) -> Tensor:
        out = getattr(mlp, name)(z)
        if name not in factors:
            return out
        value, key = factors[name]
        strength = key @ z.unsqueeze(-1)  # (B, T, k, 1)
        effect = (value * strength).sum(-2)
        if layer.recording:
            writes[name] = Write(value=value.float(), key=key.float(), effect=effect.float())
        return out + effect

    update = project("down_proj", mlp.act_fn(project("gate_proj", x)) * project("up_proj", x))
    layer.report(writes)
    return h + update


def keyed(layer: NptLayer, h: Hidden, a: Hidden) -> Hidden:
    """``h + (W_d + v_o ⊗ k) m``, v_o = U D a, k = m/‖m‖² and m the MLP's own hidden state at x⁺.

    k · m = 1, so the write adds v_o exactly and need not be formed.
    """
    mlp = layer.mlp
    x = layer.post_attention_layernorm(h + a)
    carry = layer.plastic(a)["carry"]
    m = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    if layer.recording:
        layer.report({"down_proj": smallest_write(carry, m)})
    return add_to(layer, carry, h) + mlp.down_proj(m)


def keyed_pre(layer: NptLayer, h: Hidden, a: Hidden) -> Hidden:
    """``keyed``, with gate and up rewritten too, so that no projection ever sees a.

    ``W x⁺ = ρ W x + s W (γ ⊙ a)``, s = 1/rms(h + a), ρ = rms(h)/rms(h + a) and γ the norm's weight; below full
    rank ``W (γ ⊙ a)`` is B D a.
    """
    mlp, norm = layer.mlp, layer.post_attention_layernorm
    x = norm(h)
    changes = layer.plastic(a)
    inverse_rms = reciprocal_rms(h + a, norm.variance_epsilon)  # s
    ratio = (inverse_rms / reciprocal_rms(h, norm.variance_epsilon)).to(h.dtype)  # ρ
    inverse_rms = inverse_rms.to(h.dtype)

    writes: dict[str, Write] = {}

    def project(name: str, change: Tensor) -> Tensor:
        projection = getattr(mlp, name)
        plain = projection(x)
        out = torch.addcmul(ratio * plain, inverse_rms, change)
        if projection.bias is not None:
            out = out + (1 - ratio) * projection.bias
        if layer.recording:
            writes[name] = smallest_write(out - plain, x)
        return out

    m = mlp.act_fn(project("gate_proj", changes["gate"])) * project("up_proj", changes["up"])
    if layer.recording:
        writes["down_proj"] = smallest_write(changes["carry"], m)
        layer.report(writes)
    return add_to(layer, changes["carry"], h) + mlp.down_proj(m)


COMPOSE: dict[str, Callable[[NptLayer, Tensor, Tensor], Tensor]] = {
    "v1": v1,
    "v1_single": v1_single,
    "v2": v2,
    "outer": outer,
    "keyed": keyed,
    "keyed_pre": keyed_pre,
}


def add_to(layer: NptLayer, carry: Hidden, h: Hidden) -> Hidden:
    """``h + carry``, in the memory of ``carry`` unless a report still reads it."""
    return h + carry if layer.recording else carry.add_(h)


def reciprocal_rms(x: Float[Tensor, "*batch d"], epsilon: float) -> Float[Tensor, "*batch 1"]:
    """``1/√(mean x² + ε)`` in fp32, as RMSNorm takes it."""
    return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)


def smallest_write(effect: Float[Tensor, "batch seq d_out"], z: Float[Tensor, "batch seq d_in"]) -> Write:
    """The weight change of smallest Frobenius norm that adds ``effect`` to ``W z``: ``effect ⊗ z/‖z‖²``."""
    z = z.float()
    energy = z.pow(2).sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return Write(value=effect.float().unsqueeze(-2), key=(z / energy).unsqueeze(-2), effect=effect.float())


def frobenius_squared(write: Write) -> Float[Tensor, "batch seq"]:
    """``‖Σ_k v_b^k ⊗ v_a^k‖²_F = Σ_kl (v_b^k·v_b^l)(v_a^k·v_a^l)``, without forming the matrix."""
    values = write.value @ write.value.transpose(-1, -2)  # (B, T, k, k)
    keys = write.key @ write.key.transpose(-1, -2)
    return (values * keys).sum((-1, -2))


def penalty(kind: str, writes: dict[str, Write], norm_squared: Tensor) -> Float[Tensor, "batch seq"]:
    """The regulariser of one layer: sum over features and matrices, one value a token."""
    if kind == "frobenius":
        return norm_squared
    if kind == "factors":
        return reduce(torch.add, (w.value.pow(2).sum((-1, -2)) + w.key.pow(2).sum((-1, -2)) for w in writes.values()))
    return reduce(torch.add, (w.effect.pow(2).sum(-1) for w in writes.values()))
