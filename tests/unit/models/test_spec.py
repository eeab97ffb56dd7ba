"""What ``config.json`` says of a pliant model."""

import copy
import json
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from pliant.architectures import NptConfig
from pliant.errors import CheckpointError
from pliant.models import FAMILIES, PliantSpec
from pliant.models.graft import with_spec

LLAMA = FAMILIES["llama"]
SPEC = PliantSpec(
    architecture="npt",
    layers={2: NptConfig.preset("v1"), 0: NptConfig.preset("outer", rank=3, targets="all")},
    base={"name": "owner/name", "revision": "0123"},
)


def base_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, **options)


def entry(**changes: Any) -> Any:
    """A configuration whose ``pliant`` entry is ``SPEC`` with some fields changed."""
    config = with_spec(base_config(), LLAMA.config, SPEC)
    config.pliant = {**config.pliant, **changes}
    return config


def test_base_is_dense():
    assert PliantSpec.of(base_config()) == PliantSpec()
    assert PliantSpec().architecture == "dense"
    assert PliantSpec().layers == {}


def test_configuration_round_trip_through_json():
    config = with_spec(base_config(), LLAMA.config, SPEC)
    again = LLAMA.config.from_dict(json.loads(config.to_json_string(use_diff=True)))
    assert PliantSpec.of(again) == SPEC
    assert again.num_hidden_layers == 3


def test_entry_is_written_in_the_order_of_the_layers():
    written = SPEC.to_dict()
    assert written == {
        "format_version": 1,
        "architecture": "npt",
        "layers": {
            "0": {"form": "outer", "rank": 3, "targets": "all"},
            "2": {"form": "v1", "rank": 16},
        },
        "base": {"name": "owner/name", "revision": "0123"},
    }
    assert list(written["layers"]) == ["0", "2"]


def test_saved_configuration_is_found_by_auto_config(tmp_path):
    with_spec(base_config(), LLAMA.config, SPEC).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LLAMA.config
    assert loaded.model_type == "pliant_llama"
    assert PliantSpec.of(loaded) == SPEC


def test_base_configuration_is_left_alone_and_its_fields_are_kept():
    base = base_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, mlp_bias=True)
    base._name_or_path = "owner/name"
    before = copy.deepcopy(base.to_dict())
    config = with_spec(base, LLAMA.config, SPEC)
    assert base.to_dict() == before
    assert base.model_type == "llama"
    assert config._name_or_path == "owner/name"
    kept = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "pliant")}
    assert kept == {k: v for k, v in before.items() if k != "model_type"}


def test_parsed_spec_shares_nothing_with_the_configuration():
    config = entry()
    PliantSpec.of(config).base["name"] = "changed"
    assert PliantSpec.of(config) == SPEC


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_configuration_of_its_own(name: str):
    family = FAMILIES[name]
    assert issubclass(family.config, family.base_config)
    assert family.config.model_type == f"pliant_{name}"
    assert family.config().pliant is None
    with pytest.raises(StrictDataclassFieldValidationError, match="pliant"):
        family.config(pliant="npt")


@pytest.mark.parametrize("version", [2, 0, None, "1"])
def test_another_format_is_refused(version: Any):
    with pytest.raises(CheckpointError, match=rf"format_version must be 1.*got {version!r}\."):
        PliantSpec.of(entry(format_version=version))


def test_unknown_architecture_is_refused_with_a_suggestion():
    with pytest.raises(CheckpointError, match=r"one of dense, npt.*got 'ntp'\. Did you mean 'npt'\?"):
        PliantSpec.of(entry(architecture="ntp"))


@pytest.mark.parametrize("index", ["3", "-1"])
def test_layer_outside_the_model_is_refused(index: str):
    layers = {index: {"form": "v1", "rank": 4}}
    with pytest.raises(CheckpointError, match=rf"must be in 0\.\.2 \(num_hidden_layers\); got {index}\."):
        PliantSpec.of(entry(layers=layers))


def test_unknown_field_of_a_layer_is_refused():
    with pytest.raises(CheckpointError, match=r"pliant.layers .*no field 'rnak'.*Did you mean 'rank'\?"):
        PliantSpec.of(entry(layers={"0": {"form": "v1", "rnak": 4}}))
