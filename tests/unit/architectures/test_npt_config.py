"""``NptConfig``: presets, defaults, and what it refuses."""

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from pliant.architectures import NptConfig
from pliant.architectures.npt import FORMS
from pliant.architectures.npt.modulation import MODULATIONS
from pliant.errors import ConfigError

NON_DEFAULT: dict[str, dict[str, Any]] = {
    "v1": {"rank": 3, "regulariser": "effect"},
    "v1_single": {"rank": 5, "regulariser": "factors"},
    "v2": {"rank": 4, "modulation": "additive"},
    "outer": {"rank": 8, "targets": "all", "num_updates": 3, "key_bias": False},
    "keyed": {"rank": 6, "tied": True, "allocation": "sensitivity"},
    "keyed_pre": {"energy": 0.9},
}


def test_default_is_keyed_with_automatic_rank():
    assert NptConfig() == NptConfig.preset("keyed")
    assert NptConfig().form == "keyed"
    assert NptConfig().rank == "auto"
    assert NptConfig().energy == 0.99


@pytest.mark.parametrize(
    ("form", "rank"),
    [
        ("v1", 16),
        ("v1_single", 16),
        ("v2", 16),
        ("outer", 64),
        ("keyed", "auto"),
        ("keyed_pre", "auto"),
    ],
)
def test_preset_has_its_usual_rank(form: str, rank: int | str):
    assert NptConfig.preset(form) == NptConfig(form=form, rank=rank)


def test_options_change_the_preset(form: str):
    config = NptConfig.preset(form, **NON_DEFAULT[form])
    assert {name: getattr(config, name) for name in NON_DEFAULT[form]} == NON_DEFAULT[form]


def test_dictionary_round_trip_through_json(form: str):
    config = NptConfig.preset(form, **NON_DEFAULT[form])
    fields = json.loads(json.dumps(config.to_dict()))
    assert NptConfig.from_dict(fields) == config


def test_dictionary_names_form_rank_and_what_differs():
    assert NptConfig.preset("keyed").to_dict() == {"form": "keyed", "rank": "auto"}
    assert NptConfig.preset("v2", modulation="additive").to_dict() == {
        "form": "v2",
        "rank": 16,
        "modulation": "additive",
    }


def test_settled_rank_drops_how_it_was_chosen():
    config = NptConfig.preset("keyed", rank="auto", energy=0.9).with_rank(7)
    assert config == NptConfig.preset("keyed", rank=7)
    spread = NptConfig.preset("keyed_pre", rank=8, allocation="sensitivity", regulariser="effect")
    assert spread.with_rank(3) == NptConfig.preset("keyed_pre", rank=3, regulariser="effect")


def test_configuration_is_frozen_and_hashable():
    config = NptConfig.preset("v1")
    with pytest.raises(FrozenInstanceError):
        config.rank = 3
    assert len({config, NptConfig.preset("v1"), NptConfig.preset("v1", rank=3)}) == 2


def test_only_keyed_forms_have_a_closed_form(form: str):
    assert NptConfig.preset(form).has_closed_form is form.startswith("keyed")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("gate", ("gate_proj",)),
        ("gate_up", ("gate_proj", "up_proj")),
        ("all", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_targets_name_projections(targets: str, names: tuple[str, ...]):
    assert NptConfig.preset("outer", targets=targets).target_names == names


@pytest.mark.parametrize(
    ("option", "value", "owner"),
    [
        ("tied", True, "keyed"),
        ("modulation", "additive", "v2"),
        ("targets", "all", "outer"),
        ("num_updates", 2, "outer"),
        ("key_bias", False, "outer"),
    ],
)
def test_option_of_one_form_is_refused_by_every_other(option: str, value: Any, owner: str):
    assert getattr(NptConfig.preset(owner, **{option: value}), option) == value
    for form in set(FORMS) - {owner}:
        with pytest.raises(ConfigError, match=rf"{option}={value!r} .*form {owner}.*got form='{form}'"):
            NptConfig.preset(form, **{option: value})


@pytest.mark.parametrize(("option", "value"), [("allocation", "sensitivity"), ("energy", 0.5)])
def test_options_of_the_closed_form_are_refused_by_forms_without(option: str, value: Any):
    for form in ("v1", "v1_single", "v2", "outer"):
        with pytest.raises(ConfigError, match=rf"{option}=.*keyed and keyed_pre"):
            NptConfig.preset(form, **{option: value})


@pytest.mark.parametrize("rank", [0, -1, True, "wide", "16"])
def test_rank_is_auto_or_a_positive_integer(rank: Any):
    with pytest.raises(ConfigError, match=r"rank must be 'auto' or an integer in 1\.\.d_model; got"):
        NptConfig.preset("keyed", rank=rank)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.01])
def test_energy_is_a_share(energy: Any):
    with pytest.raises(ConfigError, match=r"energy must be in \(0, 1\]; got"):
        NptConfig.preset("keyed", energy=energy)
    assert NptConfig.preset("keyed", energy=1.0).energy == 1.0


SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "v1": {"add_down": (3, 8), "add_up": (20, 3)},
    "v2": {"add_down": (3, 8), "add_up": (20, 3), "mult_down": (3, 8), "mult_up": (20, 3)},
    "keyed": {"down": (3, 8), "up": (8, 3)},
    "keyed_pre": {"down": (3, 8), "up": (8, 3), "up_gate": (20, 3), "up_up": (20, 3)},
}


@pytest.mark.parametrize("form", SHAPES)
def test_modulation_has_these_parameters_and_no_others(form: str):
    module = MODULATIONS[form](NptConfig.preset(form, rank=3), 8, 20)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == SHAPES[form]
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_outer_modulation_has_keys_and_values_for_each_target():
    config = NptConfig.preset("outer", rank=3, targets="all", num_updates=2)
    module = MODULATIONS["outer"](config, 8, 20)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "down": (3, 8),
        **{f"{name}_value": (40, 3) for name in ("gate_proj", "up_proj")},
        **{f"{name}_key": (16, 3) for name in ("gate_proj", "up_proj")},
        **{f"{name}_key_bias": (16,) for name in ("gate_proj", "up_proj")},
        "down_proj_value": (16, 3),
        "down_proj_key": (40, 3),
        "down_proj_key_bias": (40,),
    }


def test_tied_modulation_stores_one_factor():
    module = MODULATIONS["keyed"](NptConfig.preset("keyed", rank=3, tied=True), 8, 20)
    assert [name for name, _ in module.named_parameters()] == ["down"]
    module.reset_parameters()
    attention = torch.randn(2, 5, 8)
    carry = module(attention)["carry"]
    assert torch.equal(carry[..., :3], attention[..., :3])
    assert not carry[..., 3:].any()
