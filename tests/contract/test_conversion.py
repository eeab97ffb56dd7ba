"""Conversion in place: what it keeps, what it adds, and that every converted layer acts."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pliant
from pliant.architectures import NptLayer
from pliant.errors import ConversionError
from pliant.models import FAMILIES

RANK = 6


def assert_every_converted_layer_acts(model: PreTrainedModel, prompt: Tensor) -> None:
    """Switching any one converted layer off changes the logits."""
    with torch.no_grad():
        everything = model(prompt).logits
        for index in model.dynamic_layers:
            model.set_active(False, [index])
            without = model(prompt).logits
            model.set_active(True, [index])
            assert (without - everything).abs().max() > 1e-3 * everything.abs().max(), index
        assert torch.equal(model(prompt).logits, everything)


def test_same_object_same_base_parameters(form: str, family: str, make_base: Callable, calibration: Tensor) -> None:
    model = make_base(family)
    model.model.embed_tokens.weight.requires_grad_(False)
    inner, modules = model.model, dict(model.named_modules())
    before = {n: (p, p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}
    config = pliant.NptConfig.preset(form, rank=RANK)
    converted = pliant.convert(model, config, calibration=calibration)
    assert converted is model
    assert type(model) is FAMILIES[family].causal_lm
    assert isinstance(model, FAMILIES[family].base_causal_lm)
    assert model.model is inner
    assert model.model.layers[0].self_attn is modules["model.layers.0.self_attn"]
    after = dict(model.named_parameters())
    assert {n: (after[n], after[n].data_ptr(), after[n].requires_grad) for n in before} == before
    assert set(after) - set(before) == {name for name, _ in model.dynamic_parameters()}
    assert all(isinstance(layer, NptLayer) for layer in model.model.layers)
    assert model.config.model_type == f"pliant_{family}"
    assert all(m.config is model.config for m in model.modules() if "config" in vars(m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_parameters_are_fp32_beside_a_base_of_any_dtype(
    form: str, dtype: torch.dtype, make_base: Callable, calibration: Tensor, prompt: Tensor
) -> None:
    model = make_base().to(dtype)
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANK), calibration=calibration)
    added = dict(model.dynamic_parameters())
    assert added
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in added else dtype), name
        assert parameter.device.type == "cpu"
        assert parameter.requires_grad
        assert parameter.isfinite().all(), name
    assert model(prompt).logits.dtype == dtype
    assert model.dtype == dtype


def test_every_converted_layer_acts(form: str, family: str, make_converted: Callable, prompt: Tensor) -> None:
    assert_every_converted_layer_acts(make_converted(form, family), prompt)


@pytest.mark.parametrize("form", ["v1_single", "v2", "outer", "keyed", "keyed_pre"])
def test_every_layer_acts_from_the_start_where_the_start_is_lossy(
    form: str, make_base: Callable, calibration: Tensor, prompt: Tensor
) -> None:
    model = make_base()
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANK), calibration=calibration)
    assert_every_converted_layer_acts(model, prompt)


@pytest.mark.parametrize("ran_before", [False, True])
def test_hidden_states_and_attentions_are_complete_and_right(
    form: str,
    family: str,
    ran_before: bool,
    make_base: Callable,
    convert_randomly: Callable,
    prompt: Tensor,
) -> None:
    model = make_base(family, attn_implementation="eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    reference = copy.deepcopy(model)(prompt, **wanted)
    if ran_before:
        model(prompt, **wanted)
    convert_randomly(model, form, layers=[0, 2])
    inputs: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _m, args, _out, i=i: inputs.update({i: args[0]}))
        layer.self_attn.register_forward_hook(lambda _m, _a, out, i=i: weights.update({i: out[1]}))
    out = model(prompt, **wanted)
    assert len(out.hidden_states) == 4
    assert len(out.attentions) == 3
    for i in range(3):
        assert torch.equal(out.hidden_states[i], inputs[i])
        assert torch.equal(out.attentions[i], weights[i])
    assert torch.equal(model.lm_head(out.hidden_states[3]), out.logits)
    with model.base_mode():
        base = model(prompt, **wanted)
    for kind in ("hidden_states", "attentions"):
        pairs = zip(getattr(base, kind), getattr(reference, kind), strict=True)
        assert all(torch.equal(actual, expected) for actual, expected in pairs)


def test_layers_added_later_join_those_that_are_there(make_base: Callable, randomise: Callable, prompt: Tensor) -> None:
    model = make_base()
    expected = model(prompt).logits
    pliant.convert(model, pliant.NptConfig.preset("v1", rank=3), layers=[1])
    randomise(model)
    kept = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    with_one = model(prompt).logits
    same = pliant.convert(model, pliant.NptConfig.preset("v2", rank=4), layers=[0])
    assert same is model
    for name, parameter in model.named_parameters():
        if name in kept:
            assert parameter.data_ptr() == kept[name][0]
            assert torch.equal(parameter, kept[name][1])
    assert {i: layer.layer_config.form for i, layer in model.dynamic_layers.items()} == {
        0: "v2",
        1: "v1",
    }
    model.set_active(False, [0])
    assert torch.equal(model(prompt).logits, with_one)
    with model.base_mode():
        assert torch.equal(model(prompt).logits, expected)
    model.set_active(True)
    assert_every_converted_layer_acts(randomise(model), prompt)


def test_map_gives_each_selection_its_own_form(make_base: Callable, randomise: Callable, prompt: Tensor) -> None:
    model = make_base(num_hidden_layers=4)
    rank_2 = pliant.NptConfig.preset("outer", rank=2, targets="all", num_updates=2)
    pliant.convert(model, layers={"0-1": "v1", "2": "v1_single", "3": rank_2})
    forms = [layer.layer_config.form for layer in model.model.layers]
    assert forms == ["v1", "v1", "v1_single", "outer"]
    assert model.spec.layers[3] == rank_2
    assert_every_converted_layer_acts(randomise(model), prompt)


@pytest.mark.parametrize(
    ("layers", "converted"),
    [
        ("all", [0, 1, 2]),
        ("upper_half", [1, 2]),
        ("lower_half", [0]),
        ("1-2", [1, 2]),
        ([2, 0], [0, 2]),
        (1, [1]),
    ],
)
def test_layer_selections_convert_what_they_name(layers: Any, converted: list[int], make_base: Callable) -> None:
    model = make_base()
    pliant.convert(model, pliant.NptConfig.preset("v1"), layers=layers)
    assert list(model.dynamic_layers) == converted
    assert [isinstance(layer, NptLayer) for layer in model.model.layers] == [index in converted for index in range(3)]


def test_default_is_keyed_at_a_rank_that_keeps_the_energy(make_base: Callable, calibration: Tensor) -> None:
    model = pliant.convert(make_base(), calibration=calibration)
    for layer in model.dynamic_layers.values():
        assert layer.layer_config.form == "keyed"
        assert 1 <= layer.layer_config.rank <= 32
        assert layer.plastic.down.shape == (layer.layer_config.rank, 32)


@pytest.mark.parametrize("training", [False, True])
def test_training_flag_survives(form: str, training: bool, make_base: Callable, calibration: Tensor) -> None:
    model = make_base().train(training)
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANK), calibration=calibration)
    assert all(module.training is training for module in model.modules())


def test_checkpointing_turned_on_before_survives(
    form: str,
    make_base: Callable,
    calibration: Tensor,
    checkpoint_activations: Callable,
    prompt: Tensor,
) -> None:
    model = make_base().train()
    checkpoint_activations(model)
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANK), calibration=calibration)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    calls: list[int] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    model(prompt, labels=prompt).loss.backward()
    assert len(calls) == 6, "each layer runs once forwards and once more in backward"


def test_second_conversion_of_a_layer_is_refused(form: str, make_converted: Callable, state_of: Callable) -> None:
    model = make_converted(form)
    before = state_of(model)
    with pytest.raises(ConversionError, match=r"layer 1 already is .*Load the base again"):
        pliant.convert(model, pliant.NptConfig.preset("v1"), layers=[1])
    assert state_of(model) == before


def test_model_built_from_its_configuration_has_start_values(form: str, make_converted: Callable) -> None:
    config = make_converted(form).config
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.dynamic_parameters():
        kind = name.rpartition(".")[2]
        if form.startswith("keyed") and kind in ("down", "up"):
            assert torch.equal(parameter, torch.eye(*parameter.shape)), name
        elif kind.endswith(("add_up", "mult_up", "_value")):
            assert not parameter.any(), name
        else:
            assert parameter.isfinite().all()
            width = 1 if parameter.ndim == 1 else 32 if "_key" not in name else RANK
            assert 0.5 < parameter.std().item() * width**0.5 < 2.0, name


def test_conversion_leaves_no_hooks_and_no_second_copy(form: str, make_base: Callable, calibration: Tensor) -> None:
    model = make_base()
    pliant.convert(model, pliant.NptConfig.preset(form, rank=RANK), calibration=calibration)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert copy.deepcopy(model).spec == model.spec
