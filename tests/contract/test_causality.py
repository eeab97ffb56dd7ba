"""No token sees a later one, attention runs once, and gradients reach what is trained."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pliant
from pliant.errors import ConfigError

GRADIENT_TOLERANCE = 1e-6
"""Checkpointing repeats the same operations on the same values."""
RANK = 6


@pytest.mark.parametrize("changed", [1, 4, 10])
def test_a_changed_token_moves_no_earlier_logit(
    form: str, family: str, changed: int, make_converted: Callable, prompt: Tensor
) -> None:
    model = make_converted(form, family)
    other = prompt.clone()
    other[:, changed] = (other[:, changed] + 7) % 90 + 2
    difference = (model(prompt).logits - model(other).logits).abs().amax((0, 2))
    assert torch.equal(difference[:changed], torch.zeros(changed))
    assert difference[changed] > 0


@pytest.mark.parametrize("active", [True, False])
def test_attention_runs_once_a_layer_and_forward(
    form: str, active: bool, make_converted: Callable, prompt: Tensor
) -> None:
    model = make_converted(form, layers=[0, 2])
    model.set_active(active)
    calls: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    with model.report():
        cache = model(prompt, use_cache=True).past_key_values
        assert calls == [0, 1, 2]
        model(prompt[:, :1], past_key_values=cache, use_cache=True)
    assert calls == [0, 1, 2] * 2
    assert cache.get_seq_length() == prompt.shape[1] + 1


def test_gradient_at_the_start_is_not_zero(
    form: str, family: str, make_base: Callable, calibration: Tensor, prompt: Tensor
) -> None:
    model = make_base(family).train()
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANK), calibration=calibration).freeze_base()
    model(prompt, labels=prompt).loss.backward()
    for index, layer in model.dynamic_layers.items():
        gradients = [parameter.grad for parameter in layer.plastic.parameters()]
        assert sum(float(g.norm()) for g in gradients if g is not None) > 1e-6, index
    assert all(p.grad is None for n, p in model.named_parameters() if "plastic" not in n)


@pytest.mark.parametrize("modulation", ["additive", "multiplicative"])
def test_gradient_at_the_start_of_each_half_of_v2_is_not_zero(
    modulation: str, make_base: Callable, prompt: Tensor
) -> None:
    config = pliant.NptConfig.preset("v2", modulation=modulation)
    model = pliant.convert(make_base().train(), config)
    model(prompt, labels=prompt).loss.backward()
    for layer in model.dynamic_layers.values():
        assert sum(float(p.grad.norm()) for p in layer.plastic.parameters()) > 1e-6


def gradients_of(model: torch.nn.Module, prompt: Tensor, *, weight: float) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of cross-entropy plus ``weight`` × the regulariser."""
    model.zero_grad()
    with model.report() as report:
        loss = model(prompt, labels=prompt).loss + weight * report.regulariser()
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_checkpointing_gives_the_same_gradients(
    form: str,
    weight: float,
    make_converted: Callable,
    checkpoint_activations: Callable,
    prompt: Tensor,
    largest_difference: Callable,
) -> None:
    model = make_converted(form).train()
    loss, expected = gradients_of(model, prompt, weight=weight)
    checkpoint_activations(model)
    passes: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: passes.append(1))
    checkpointed_loss, actual = gradients_of(model, prompt, weight=weight)
    assert len(passes) == 6, "each layer runs once forwards and once more in backward"
    assert checkpointed_loss == pytest.approx(loss, rel=GRADIENT_TOLERANCE)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert largest_difference(gradient, expected[name]) < GRADIENT_TOLERANCE, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_regulariser_alone_has_a_gradient(
    form: str,
    checkpointing: bool,
    make_converted: Callable,
    checkpoint_activations: Callable,
    prompt: Tensor,
) -> None:
    model = make_converted(form).train()
    if checkpointing:
        checkpoint_activations(model)
    with model.report() as report:
        model(prompt)
        report.regulariser().backward()
    for index, layer in model.dynamic_layers.items():
        for name, parameter in layer.plastic.named_parameters():
            assert parameter.grad is not None, (index, name)
            assert parameter.grad.abs().max() > 0, (index, name)


def test_reentrant_checkpointing_is_refused(make_converted: Callable, checkpoint_activations: Callable) -> None:
    model = make_converted("v1")
    with pytest.raises(ConfigError, match=r"use_reentrant must be false.*got True.*Leave it out"):
        checkpoint_activations(model, use_reentrant=True)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    checkpoint_activations(model, preserve_rng_state=False)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {
        "preserve_rng_state": False,
        "use_reentrant": False,
    }
