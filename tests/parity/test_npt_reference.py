"""Every NPT form against its slow reference: outputs, and gradients of inputs and weights."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.architectures.npt.reference import reference_output

FP32_TOLERANCE = 2e-5
"""Largest difference over largest value: both take the same sums in another order."""
BF16_OUTPUT_TOLERANCE = 0.03
BF16_GRADIENT_TOLERANCE = 0.10
"""bf16 rounds each result by up to 2⁻⁹; forward and backward are a dozen operations in a row."""
ROWS, LENGTH = 2, 7

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("v1", {}),
    ("v1_single", {}),
    *(("v2", {"modulation": kind}) for kind in ("additive", "multiplicative", "both")),
    *(
        ("outer", {"targets": targets, "num_updates": updates, "key_bias": bias})
        for targets in ("gate", "gate_up", "all")
        for updates in (1, 3)
        for bias in (True, False)
    ),
    ("keyed", {"tied": False}),
    ("keyed", {"tied": True}),
    ("keyed_pre", {}),
]
IDS = ["-".join([form, *(f"{k}={v}" for k, v in options.items())]) for form, options in OPTIONS]
every_option = pytest.mark.parametrize(("form", "options"), OPTIONS, ids=IDS)


def inputs(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values for h and a, of the size that they have inside the model."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, ROWS, LENGTH, layer.hidden_size)
    h, a = torch.randn(shape, generator=generator).to(dtype)
    return h.requires_grad_(True), a.requires_grad_(True)


class GivenAttention(nn.Module):
    """Stands in for attention, so that its output is a leaf with a gradient."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, **_: Any) -> tuple[Tensor, None]:
        return self.output, None


def run(layer: nn.Module, h: Tensor, a: Tensor, *, fast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output and every gradient of a fixed weighted sum of it."""
    layer.zero_grad()
    h, a = (t.detach().clone().requires_grad_(True) for t in (h, a))
    if fast:
        attention, layer.self_attn = layer.self_attn, GivenAttention(a)
        output = layer(h)
        layer.self_attn = attention
    else:
        output = reference_output(layer, h, a)
    weights = torch.linspace(-1.0, 2.0, output.numel()).view_as(output)
    (output.float() * weights).sum().backward()
    parts = {
        "h": h,
        "a": a,
        **dict(layer.plastic.named_parameters()),
        **dict(layer.mlp.named_parameters()),
    }
    parts["norm"] = layer.post_attention_layernorm.weight
    assert all(tensor.grad is not None for tensor in parts.values())
    return output, {name: tensor.grad.clone() for name, tensor in parts.items()}


@every_option
@pytest.mark.parametrize("base", ["qwen2", "llama_mlp_bias"])
def test_fp32_output_and_gradients_equal_the_reference(
    form: str,
    options: dict[str, Any],
    base: str,
    make_converted: Callable,
    largest_difference: Callable,
) -> None:
    layer = make_converted(form, base, layers=[1], **options).model.layers[1]
    h, a = inputs(layer, torch.float32)
    output, gradients = run(layer, h, a, fast=True)
    expected, expected_gradients = run(layer, h, a, fast=False)
    assert largest_difference(output, expected) < FP32_TOLERANCE
    for name, gradient in gradients.items():
        assert expected_gradients[name].abs().max() > 0, name
        assert largest_difference(gradient, expected_gradients[name]) < FP32_TOLERANCE, name


@every_option
def test_bf16_output_and_gradients_stay_near_the_fp32_reference(
    form: str, options: dict[str, Any], make_converted: Callable, largest_difference: Callable
) -> None:
    layer = make_converted(form, "llama_mlp_bias", layers=[1], **options).model.layers[1]
    for module in layer.children():
        if module is not layer.plastic:
            module.bfloat16()
    exact = copy.deepcopy(layer).float()
    h, a = inputs(layer, torch.bfloat16)
    output, gradients = run(layer, h, a, fast=True)
    expected, expected_gradients = run(exact, h.float(), a.float(), fast=False)
    assert output.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in layer.plastic.parameters())
    assert largest_difference(output, expected) < BF16_OUTPUT_TOLERANCE
    for name, gradient in gradients.items():
        assert largest_difference(gradient, expected_gradients[name]) < BF16_GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("length", [1, 3])
def test_short_sequences_equal_the_reference(
    form: str, length: int, make_converted: Callable, largest_difference: Callable
) -> None:
    layer = make_converted(form, layers=[0]).model.layers[0]
    h, a = (t[:, :length] for t in inputs(layer, torch.float32))
    output, _ = run(layer, h, a, fast=True)
    assert largest_difference(output, run(layer, h, a, fast=False)[0]) < FP32_TOLERANCE


def test_layer_inside_its_model_equals_the_reference(
    form: str, family: str, make_converted: Callable, prompt: Tensor, largest_difference: Callable
) -> None:
    """The attention output is the family's own, with its RoPE, bias and window."""
    model = make_converted(form, family)
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[1]
    layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.update(a=out[0]))
    layer.register_forward_hook(lambda _m, args, out: seen.update(h=args[0], out=out))
    with torch.no_grad():
        model(prompt)
        expected = reference_output(layer, seen["h"], seen["a"])
    assert largest_difference(seen["out"], expected) < FP32_TOLERANCE
