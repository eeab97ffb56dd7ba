"""What layers cost when tokens skip them, and which are chosen to be routed."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pliant
from pliant.architectures import NptConfig
from pliant.conversion import cheapest, cheapest_layers, layer_costs
from pliant.conversion.cheapest import choose
from pliant.errors import ConfigError, ConversionError, DataError
from pliant.models import FAMILIES
from pliant.statistics import AttentionStatistics

TEXT = torch.randint(2, 97, (24, 12), generator=torch.Generator().manual_seed(5))
ATTENTION = pliant.ModConfig(capacity_gamma=0.5, granularity="attention")


@pytest.fixture
def model(make_base: Callable) -> PreTrainedModel:
    """A tiny base of six layers."""
    return make_base(num_hidden_layers=6)


def zeroed(linear: nn.Module) -> None:
    """Makes a projection, and so its part of the layer, add nothing."""
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.zero_()


@pytest.mark.parametrize("granularity", ["attention", "mlp", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cost_is_that_of_a_base_without_the_part(make_base: Callable, family: str, granularity: str) -> None:
    model = make_base(family, num_hidden_layers=3)
    costs = layer_costs(model, granularity, TEXT)
    assert list(costs) == [0, 1, 2]
    whole = pliant.perplexity(model, TEXT)
    layer: Any = model.model.layers[1]
    if granularity != "mlp":
        zeroed(layer.self_attn.o_proj)
    if granularity != "attention":
        zeroed(layer.mlp.down_proj)
    assert costs[1] == pytest.approx(math.log(pliant.perplexity(model, TEXT) / whole), abs=1e-6)
    assert costs[1] != 0


def test_measuring_leaves_the_model_as_it_is(model: PreTrainedModel) -> None:
    steps: list[tuple] = []
    before = model.train()(TEXT).logits
    layer_costs(model, "block", TEXT, layers=[2, 4], progress=lambda *step: steps.append(step))
    assert torch.equal(model(TEXT).logits, before)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert [step[1:] for step in steps] == [(1, 2), (2, 2)]


def test_no_hook_is_left_when_the_loss_is_not_finite(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    with pytest.raises(DataError, match="finite"):
        layer_costs(model, "attention", TEXT)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("granularity", "layers", "error", "message"),
    [
        ("attentions", "all", ConfigError, "block, attention, mlp; got 'attentions'. Did you mean 'attention'"),
        ("block", [6], ConversionError, "0..5"),
        ("block", "8-2", ConversionError, "upwards"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    model: PreTrainedModel, granularity: str, layers: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        layer_costs(model, granularity, TEXT, layers=layers)


def test_a_converted_layer_is_measured_as_its_base(model: PreTrainedModel) -> None:
    expected = layer_costs(model, "attention", TEXT)
    pliant.convert(model, ATTENTION, layers=[3], calibration=TEXT)
    assert layer_costs(model, "attention", TEXT) == expected


def test_half_of_the_layers_is_chosen_and_routed(model: PreTrainedModel) -> None:
    for index in (0, 2, 5):
        zeroed(model.model.layers[index].self_attn.o_proj)
    costs = layer_costs(model, "attention", TEXT)
    assert costs[0] == costs[2] == costs[5] == 0
    pliant.convert(model, ATTENTION, layers="cheapest", calibration=TEXT)
    assert list(model.routed_layers) == sorted(sorted(costs, key=lambda index: costs[index])[:3])
    before = list(model.routed_layers)
    pliant.convert(model, ATTENTION, layers="cheapest", calibration=TEXT)
    assert len(model.routed_layers) == 4
    assert set(before) < set(model.routed_layers)


def test_where_every_layer_is_converted_none_is_chosen(model: PreTrainedModel) -> None:
    pliant.convert(model, ATTENTION, layers="all", calibration=TEXT)
    with pytest.raises(ConversionError, match="all 6 are"):
        pliant.convert(model, ATTENTION, layers="cheapest", calibration=TEXT)


def test_a_map_names_the_form_of_the_cheapest(model: PreTrainedModel) -> None:
    expected = cheapest_layers(model, ATTENTION, calibration=TEXT)
    pliant.convert(model, layers={"cheapest": ATTENTION}, calibration=TEXT)
    assert list(model.routed_layers) == expected


def test_of_pairs_a_third_is_chosen_and_none_in_a_row(model: PreTrainedModel) -> None:
    config = pliant.DtfConfig(capacity_gamma=0.5)
    chosen = cheapest_layers(model, config, calibration=TEXT)
    pliant.convert(model, config, layers="cheapest", calibration=TEXT)
    assert list(model.routed_layers) == chosen
    assert len(chosen) == 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("taken", [(), (0, 4), (7, 8)])
def test_the_choice_among_pairs_is_the_best_there_is(seed: int, taken: tuple[int, ...]) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed)).tolist()
    costs = {index: value for index, value in enumerate(values) if index not in taken}
    possible = [index for index in costs if index - 1 in costs]
    apart = [
        chosen
        for chosen in itertools.combinations(possible, len(costs) // 3)
        if all(b - a > 1 for a, b in itertools.pairwise(chosen))
    ]
    best = min(apart, key=lambda chosen: sum(costs[index] for index in chosen))
    assert choose(costs, pliant.DtfConfig()) == list(best)


def test_about_a_thousand_tokens_are_read(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def look(_model: Any, _granularity: str, tokens: Tensor, **_options: Any) -> dict[int, float]:
        seen.append(tokens)
        return dict.fromkeys(range(6), 0.0)

    monkeypatch.setattr(cheapest, "layer_costs", look)
    long = torch.randint(2, 97, (9, 300))
    cheapest_layers(model, ATTENTION, calibration=long)
    assert torch.equal(seen[0], long[[0, 3, 6]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": NptConfig()}, ConfigError, "some tokens skip"),
        ({"config": None}, ConfigError, "some tokens skip"),
        ({"layers": {"cheapest": "v1"}}, ConfigError, "some tokens skip"),
        ({"layers": {"cheapest": ATTENTION, "0": ATTENTION}}, ConfigError, "alone"),
        (
            {"config": ATTENTION, "calibration": AttentionStatistics(moments={}, sample=TEXT, held_out=TEXT)},
            ConfigError,
            "calibration must be token windows or texts for layers='cheapest'; got AttentionStatistics",
        ),
        ({"config": ATTENTION, "calibration": TEXT[:, :1]}, DataError, "two tokens"),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    model: PreTrainedModel, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    kind = type(model)
    with pytest.raises(error, match=message):
        pliant.convert(model, **{"layers": "cheapest", **arguments})
    assert type(model) is kind
