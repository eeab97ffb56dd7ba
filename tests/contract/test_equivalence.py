"""A converted model is its base where it should be: at an exact start and in base mode."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pliant
from pliant.errors import ConfigError, ConversionError

FULL_RANK_TOLERANCE = 1e-5
"""The sums of the base in another order: ``W x⁺`` becomes ``ρ W x + s W (γ ⊙ a)``."""

every_base = pytest.mark.parametrize("base", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "llama_mlp_bias"])


@every_base
@pytest.mark.parametrize("form", ["keyed", "keyed_pre"])
def test_keyed_forms_at_full_rank_are_the_base(
    form: str, base: str, make_base: Callable, prompt: Tensor, largest_difference: Callable
) -> None:
    model = make_base(base)
    expected = model(prompt).logits
    pliant.convert(model, pliant.NptConfig.preset(form, rank=32))
    assert largest_difference(model(prompt).logits, expected) < FULL_RANK_TOLERANCE


def test_full_rank_tied_keyed_is_the_base(make_base: Callable, prompt: Tensor, largest_difference: Callable) -> None:
    model = make_base()
    expected = model(prompt).logits
    pliant.convert(model, pliant.NptConfig.preset("keyed", rank=32, tied=True))
    assert largest_difference(model(prompt).logits, expected) < FULL_RANK_TOLERANCE


@every_base
def test_v1_starts_bitwise_at_the_base(base: str, make_base: Callable, prompt: Tensor) -> None:
    model = make_base(base)
    expected = model(prompt).logits
    pliant.convert(model, pliant.NptConfig.preset("v1", rank=4))
    assert torch.equal(model(prompt).logits, expected)


@pytest.mark.parametrize("form", ["v1_single", "v2", "outer"])
def test_lossy_forms_start_as_the_base_with_attention_left_out_of_the_stream(
    form: str, make_base: Callable, prompt: Tensor
) -> None:
    model = make_base()
    pliant.convert(model, pliant.NptConfig.preset(form, rank=4), layers=[2])
    layer, seen = model.model.layers[2], {}
    layer.register_forward_hook(lambda _m, args, out: seen.update(h=args[0], out=out))
    layer.self_attn.register_forward_hook(lambda _m, _a, out: seen.update(a=out[0]))
    model(prompt)
    h, a = seen["h"], seen["a"]
    read = h + a if form == "v1_single" else h
    assert torch.equal(seen["out"], h + layer.mlp(layer.post_attention_layernorm(read)))


def test_base_mode_is_bitwise_the_base(
    form: str, family: str, make_base: Callable, convert_randomly: Callable, prompt: Tensor
) -> None:
    model = make_base(family)
    expected = model(prompt).logits
    convert_randomly(model, form)
    changed = model(prompt).logits
    assert not torch.allclose(changed, expected, atol=0.1)
    with model.base_mode() as inside:
        assert inside is model
        assert torch.equal(model(prompt).logits, expected)
    assert torch.equal(model(prompt).logits, changed)


def test_base_mode_covers_cached_generation(
    form: str, make_base: Callable, convert_randomly: Callable, prompt: Tensor
) -> None:
    model = make_base()
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    convert_randomly(model, form)
    assert not torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)
    with model.base_mode():
        assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), expected)


def test_base_mode_nests_and_survives_exceptions(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("v2")
    changed = model(prompt).logits
    with model.base_mode():
        base = model(prompt).logits
        with model.base_mode():
            assert torch.equal(model(prompt).logits, base)
        assert torch.equal(model(prompt).logits, base)
        with pytest.raises(ZeroDivisionError), model.base_mode():
            raise ZeroDivisionError
        assert torch.equal(model(prompt).logits, base)
    assert torch.equal(model(prompt).logits, changed)
    with pytest.raises(ZeroDivisionError), model.base_mode():
        raise ZeroDivisionError
    assert torch.equal(model(prompt).logits, changed)


def test_base_mode_leaves_layers_that_were_off_switched_off(make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted("v2")
    model.set_active(False, [1])
    partly = model(prompt).logits
    with model.base_mode():
        pass
    assert torch.equal(model(prompt).logits, partly)


def test_set_active_switches_the_named_layers_alone(form: str, make_converted: Callable, prompt: Tensor) -> None:
    model = make_converted(form)
    model.set_active(False, "0-1")
    partly = model(prompt).logits
    only_last = make_converted(form)
    only_last.model.layers[0].active = only_last.model.layers[1].active = False
    assert [layer.active for layer in model.dynamic_layers.values()] == [False, False, True]
    assert torch.equal(partly, only_last(prompt).logits)
    model.set_active(True, [0, 1])
    assert torch.equal(model(prompt).logits, make_converted(form)(prompt).logits)


def test_set_active_refuses_layers_that_were_not_converted(make_converted: Callable) -> None:
    model = make_converted("v1", layers=[0, 2])
    with pytest.raises(ConfigError, match=r"layers must be converted ones \(\[0, 2\]\); got \[1\]"):
        model.set_active(False, [0, 1])
    with pytest.raises(ConversionError, match=r"layers must be in 0\.\.2 .*; got 3"):
        model.set_active(False, [3])
    assert all(layer.active for layer in model.dynamic_layers.values())


def test_training_the_added_parameters_leaves_the_base_bitwise_unchanged(
    form: str, make_base: Callable, convert_randomly: Callable, prompt: Tensor
) -> None:
    model = make_base()
    expected = model(prompt).logits.detach()
    convert_randomly(model, form).freeze_base().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = {name: p.detach().clone() for name, p in model.dynamic_parameters()}
    model(prompt, labels=prompt).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.dynamic_parameters())
    with model.eval().base_mode():
        assert torch.equal(model(prompt).logits, expected)
