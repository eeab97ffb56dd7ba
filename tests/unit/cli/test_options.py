"""What the shared options mean."""

import importlib.util

import pytest
import typer

from pliant.architectures import NptConfig
from pliant.cli import options
from pliant.errors import CheckpointError, ConfigError

NOTHING = dict.fromkeys((*options.FORM_FIELDS, "preset", "rank", "layers", "mapping")) | {"tied": False}


def parse(**given):
    return options.parse_forms({**NOTHING, **given})


def test_nothing_given_asks_for_nothing():
    assert parse() is None


def test_a_map_names_forms_and_ranks():
    forms = parse(mapping="0-1,3=v1, 2=keyed:6")
    assert forms.resolve(4) == {
        0: NptConfig.preset("v1"),
        1: NptConfig.preset("v1"),
        3: NptConfig.preset("v1"),
        2: NptConfig.preset("keyed", rank=6),
    }


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("0-1", "has no form"),
        ("0=v1,1", "'1' has no form"),
        ("0=v1,0=v2", "twice"),
        ("0=v1:x", "must be auto or an integer"),
    ],
)
def test_a_bad_map_is_a_usage_error(mapping, message):
    with pytest.raises(typer.BadParameter, match=message):
        parse(mapping=mapping)


@pytest.mark.parametrize("other", [{"preset": "v1"}, {"rank": "4"}, {"layers": "0"}, {"tied": True}, {"energy": 0.9}])
def test_a_map_stands_alone(other):
    with pytest.raises(typer.BadParameter, match="leave out the other"):
        parse(mapping="0=v1", **other)


def test_a_map_names_each_layer_once():
    with pytest.raises(ConfigError, match=r"'1-2' repeats layer 1"):
        parse(mapping="0-1=v1,1-2=v2").resolve(4)


def test_layers_alone_mean_keyed():
    assert parse(layers="2").resolve(4) == {2: NptConfig()}


@pytest.mark.parametrize(("text", "rank"), [("auto", "auto"), ("12", 12)])
def test_rank(text, rank):
    assert options.parse_rank(text) == rank


def test_fresh_folder(tmp_path):
    assert options.fresh_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "empty").mkdir()
    options.fresh_folder(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"--output must be a folder"):
        options.fresh_folder(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"--output .* holds empty, file\. Choose another"):
        options.fresh_folder(tmp_path)


def test_quantisation_without_bitsandbytes_names_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        options._quantization_config(options.Quantization.NF4)


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_quantisation_is_passed_on(monkeypatch, kind, bits):
    pytest.importorskip("bitsandbytes")
    asked = {}
    monkeypatch.setattr("pliant.models.load", lambda name, **given: asked.update(given) or FakeModel())
    given = {
        "dtype": options.Dtype.BFLOAT16,
        "device_map": "cpu",
        "quantization": options.Quantization(kind),
        "attn_implementation": "eager",
    }
    options.load_model("somewhere", given)
    quantised = asked.pop("quantization_config")
    assert (quantised.load_in_4bit, quantised.load_in_8bit) == (bits == 4, bits == 8)
    assert asked == {"dtype": "bfloat16", "device_map": "cpu", "attn_implementation": "eager"}


class FakeModel:
    """Stands for a loaded model."""

    def eval(self):
        return self
