"""The slow, obvious NPT layer: for every token, the rewritten matrices are formed and then applied.

The fast layer never forms them; it is tested against this one, outputs and gradients. Nothing here
works on quantised or offloaded projections, whose weights cannot be read.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pliant.architectures.npt.layer import NptLayer

Vector = Float[Tensor, " d_model"]
Wide = Float[Tensor, " d_ffn"]


def reference_output(
    layer: NptLayer, h: Float[Tensor, "batch seq d_model"], a: Float[Tensor, "batch seq d_model"]
) -> Float[Tensor, "batch seq d_model"]:
    """Returns the output of a converted layer from its input ``h`` and attention output ``a``."""
    form = REFERENCES[layer.layer_config.form]
    rows = []
    for h_row, a_row in zip(h, a, strict=True):
        rows.append(torch.stack([form(layer, h_t, a_t) for h_t, a_t in zip(h_row, a_row, strict=True)]))
    return torch.stack(rows)


def v1(layer: NptLayer, h: Vector, a: Vector) -> Vector:
    """``h + a + MLP′(x⁺)``, with ``W_g′ = W_g + δ ⊗ x⁺/‖x⁺‖²`` and ``δ = B A a``."""
    return h + a + gate_rewritten_mlp(layer, layer.post_attention_layernorm(h + a), a)


def v1_single(layer: NptLayer, h: Vector, a: Vector) -> Vector:
    """``h + MLP′(x⁺)``, with the rewrite of ``v1``."""
    return h + gate_rewritten_mlp(layer, layer.post_attention_layernorm(h + a), a)


def gate_rewritten_mlp(layer: NptLayer, z: Vector, a: Vector) -> Vector:
    """``MLP(z)`` with ``W_g + (B A a) ⊗ z/‖z‖²`` in place of ``W_g``."""
    mlp = layer.mlp
    change = factor(layer, "add_up", a) @ (factor(layer, "add_down", a) @ a)
    gate = mlp.gate_proj.weight + torch.outer(change, unit_read(z))
    m = mlp.act_fn(affine(gate, mlp.gate_proj.bias, z)) * mlp.up_proj(z)
    return mlp.down_proj(m)


def v2(layer: NptLayer, h: Vector, a: Vector) -> Vector:
    """``h + MLP′(x)``, with ``W_g′ = diag(1 + δ_mult) W_g + δ_add ⊗ x/‖x‖²``.

    The gate's bias, if there is one, is scaled like its rows.
    """
    mlp = layer.mlp
    x = layer.post_attention_layernorm(h)
    gate, bias = mlp.gate_proj.weight, mlp.gate_proj.bias
    if layer.layer_config.modulation in ("multiplicative", "both"):
        mult = torch.tanh(factor(layer, "mult_up", a) @ (factor(layer, "mult_down", a) @ a))
        gate = torch.diag(1 + mult) @ gate
        bias = None if bias is None else torch.diag(1 + mult) @ bias
    if layer.layer_config.modulation in ("additive", "both"):
        add = factor(layer, "add_up", a) @ (factor(layer, "add_down", a) @ a)
        gate = gate + torch.outer(add, unit_read(x))
    m = mlp.act_fn(affine(gate, bias, x)) * mlp.up_proj(x)
    return h + mlp.down_proj(m)


def outer(layer: NptLayer, h: Vector, a: Vector) -> Vector:
    """``h + MLP′(x)``, with ``W′ = W + Σ_k v_b^k ⊗ v_a^k`` for every targeted projection."""
    mlp = layer.mlp
    x = layer.post_attention_layernorm(h)
    gate, up, down = (outer_weight(layer, name, a) for name in ("gate_proj", "up_proj", "down_proj"))
    m = mlp.act_fn(affine(gate, mlp.gate_proj.bias, x)) * affine(up, mlp.up_proj.bias, x)
    return h + affine(down, mlp.down_proj.bias, m)


def outer_weight(layer: NptLayer, name: str, a: Vector) -> Float[Tensor, "d_out d_in"]:
    """One projection's matrix after its k updates ``(W_b^k D a/√d) ⊗ (W_a^k D a + c^k)``."""
    weight = getattr(layer.mlp, name).weight
    config = layer.layer_config
    if name not in config.target_names:
        return weight
    bottleneck = factor(layer, "down", a) @ a
    values = factor(layer, f"{name}_value", a) @ bottleneck / len(a) ** 0.5
    keys = factor(layer, f"{name}_key", a) @ bottleneck
    if config.key_bias:
        keys = keys + factor(layer, f"{name}_key_bias", a)
    for value, key in zip(values.chunk(config.num_updates), keys.chunk(config.num_updates), strict=True):
        weight = weight + torch.outer(value, key)
    return weight


def keyed(layer: NptLayer, h: Vector, a: Vector) -> Vector:
    """``h + MLP′(x⁺)``, with ``W_d′ = W_d + (U D a) ⊗ m/‖m‖²``, m the hidden state at x⁺."""
    mlp = layer.mlp
    x = layer.post_attention_layernorm(h + a)
    m = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return h + carried_down(layer, m, a)


def keyed_pre(layer: NptLayer, h: Vector, a: Vector) -> Vector:
    """``h + MLP′(x)``, with ``W′ = W + ((ρ − 1) W x + s B D a) ⊗ x/‖x‖²`` for gate and up.

    Down gets the write of ``keyed``.
    s = 1/rms(h + a) and ρ = rms(h)/rms(h + a), so at full rank ``W′ x = W x⁺``.
    """
    mlp = layer.mlp
    x = layer.post_attention_layernorm(h)
    epsilon = layer.post_attention_layernorm.variance_epsilon
    bottleneck = factor(layer, "down", a) @ a
    rms_before = (h.pow(2).mean() + epsilon).sqrt()
    rms_after = ((h + a).pow(2).mean() + epsilon).sqrt()

    def rewritten(projection: nn.Linear, change: Wide) -> Wide:
        shift = (rms_before / rms_after - 1) * (projection.weight @ x) + change / rms_after
        return affine(projection.weight + torch.outer(shift, unit_read(x)), projection.bias, x)

    gate = rewritten(mlp.gate_proj, factor(layer, "up_gate", a) @ bottleneck)
    up = rewritten(mlp.up_proj, factor(layer, "up_up", a) @ bottleneck)
    return h + carried_down(layer, mlp.act_fn(gate) * up, a)


def carried_down(layer: NptLayer, m: Wide, a: Vector) -> Vector:
    """``(W_d + (U D a) ⊗ m/‖m‖²) m`` and the bias, if there is one."""
    down_factor = factor(layer, "down", a)
    up_factor = down_factor.T if layer.layer_config.tied else factor(layer, "up", a)
    carry = up_factor @ (down_factor @ a)
    projection = layer.mlp.down_proj
    return affine(projection.weight + torch.outer(carry, unit_read(m)), projection.bias, m)


def unit_read(z: Float[Tensor, " d_in"]) -> Float[Tensor, " d_in"]:
    """``z/‖z‖²``: the key whose product with z is one."""
    return z / z.dot(z)


def factor(layer: NptLayer, name: str, like: Tensor) -> Tensor:
    """One parameter of the modulation, in the dtype that the layer computes in."""
    return getattr(layer.plastic, name).to(like.dtype)


def affine(
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None,
    z: Float[Tensor, " d_in"],
) -> Float[Tensor, " d_out"]:
    """``W z + b``."""
    return functional.linear(z, weight, bias)


REFERENCES: dict[str, Callable[[NptLayer, Tensor, Tensor], Tensor]] = {
    "v1": v1,
    "v1_single": v1_single,
    "v2": v2,
    "outer": outer,
    "keyed": keyed,
    "keyed_pre": keyed_pre,
}
