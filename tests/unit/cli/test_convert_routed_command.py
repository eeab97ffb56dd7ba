"""``pliant convert --architecture``: routed layers, their fields, and what is refused."""

import json

import pytest
from transformers import AutoTokenizer

import pliant
from pliant.conversion import cheapest_layers
from pliant.data import calibration_tokens


@pytest.fixture
def calibration(text_file):
    """Options for six windows of text."""
    return ("--calibration", text_file, "--calibration-tokens", 3072)


@pytest.mark.parametrize(
    ("architecture", "options", "expected"),
    [
        ("mod", (), {"capacity_gamma": 0.5}),
        ("mod", ("--capacity", 0.25), {"capacity_gamma": 0.25}),
        (
            "mod",
            ("--set", "granularity=attention", "--set", "z_loss_weight=0.5", "--set", "capacity_gamma=0.75"),
            {"capacity_gamma": 0.75, "granularity": "attention", "z_loss_weight": 0.5},
        ),
        ("dtf", ("--set", "prior_factor=0.125", "--set", "forecast=true"), None),
        ("stt", ("--set", "criteria=ce"), {"capacity_gamma": 0.5, "criteria": "ce"}),
    ],
)
def test_fields_reach_the_configuration(run, tiny, tmp_path, calibration, layers_of, architecture, options, expected):
    output = tmp_path / "out"
    result = run("convert", tiny, "--architecture", architecture, *options, *calibration, "--output", output)
    if architecture == "dtf":
        dynamic = {"capacity_gamma": 0.5, "prior_factor": 0.125, "forecast": True}
        decision = {"role": "decision"}
        assert layers_of(output) == {"0": decision, "1": dynamic, "2": decision, "3": dynamic}
    else:
        assert layers_of(output) == {"1": expected, "3": expected}
    model = pliant.load(output)
    assert all(layer.router.threshold.isfinite() for layer in model.routed_layers.values())
    assert f"1,3 {architecture} capacity" in result.stdout
    assert "times the base's" in result.stdout
    assert "Setting thresholds: 4 of 4" in result.stderr


def test_capacity_one_reads_no_text_and_layers_are_chosen(run, tiny, tmp_path, layers_of):
    options = ("--capacity", 1, "--layers", "0,2-3")
    result = run("convert", tiny, "--architecture", "mod", *options, "--output", tmp_path / "out")
    assert sorted(layers_of(tmp_path / "out")) == ["0", "2", "3"]
    assert "predicted" not in result.stdout


def test_the_cheapest_layers_are_measured(run, tiny, tmp_path, calibration, layers_of):
    output, model = tmp_path / "out", pliant.load(tiny)
    result = run("convert", tiny, "--architecture", "mod", "--layers", "cheapest", *calibration, "--output", output)
    tokens = calibration_tokens(AutoTokenizer.from_pretrained(tiny), calibration[1], num_tokens=3072)
    expected = cheapest_layers(model, pliant.ModConfig(), calibration=tokens)
    assert sorted(layers_of(output)) == [str(index) for index in expected]
    assert "Measuring what each layer is worth: 4 of 4" in result.stderr


def test_alternate_layers_are_a_choice_of_plastic_ones_too(run, tiny, tmp_path, layers_of):
    run("convert", tiny, "--preset", "v1", "--layers", "alternate", "--output", tmp_path / "out")
    assert sorted(layers_of(tmp_path / "out")) == ["1", "3"]


def test_delta_loads_over_its_base(run, tiny, tmp_path, calibration):
    output = tmp_path / "out"
    run("convert", tiny, "--architecture", "mod", *calibration, "--delta", "--output", output)
    assert not (output / "model.safetensors").exists()
    assert all(layer.router.threshold.isfinite() for layer in pliant.load(output).routed_layers.values())
    assert json.loads((output / "config.json").read_text())["pliant"]["architecture"] == "mod"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            ("--architecture", "mdo"),
            1,
            "--architecture must be one of npt, mod, dtf, stt; got 'mdo'. Did you mean 'mod'?",
        ),
        (("--architecture", "dense"), 1, "--architecture must be one of npt, mod"),
        (("--capacity", 0.5), 1, "--capacity is for architectures that route tokens (mod, dtf, stt)"),
        (("--set", "rank=3"), 1, "--set is for architectures that route tokens"),
        (("--architecture", "mod", "--rank", 8), 1, "--rank is for --architecture npt; got mod"),
        (("--architecture", "mod", "--num-updates", 2), 1, "--num-updates is for --architecture npt; got mod"),
        (("--architecture", "mod", "--map", "0=v1"), 1, "--map is for --architecture npt; got mod"),
        (("--architecture", "mod", "--capacity", 1.5), 1, "got 1.5"),
        (("--architecture", "mod", "--set", "granularty=mlp"), 1, "Did you mean 'granularity'?"),
        (("--architecture", "mod", "--set", "granularity=head"), 1, "granularity must be one of"),
        (("--architecture", "mod", "--set", "granularity"), 2, "--set"),
        (("--architecture", "mod", "--set", "gate=raw", "--set", "gate=raw"), 2, "--set"),
        (("--architecture", "mod", "--capacity", 0.5, "--set", "capacity_gamma=0.5"), 1, "--capacity"),
        (("--architecture", "mod", "--capacity", 1, "--calibration", "x.txt"), 1, "--calibration is for the keyed"),
        (("--architecture", "dtf", "--capacity", 1, "--layers", "all"), 1, "layers must pair up"),
    ],
)
def test_what_is_wrong_is_named(run, tiny, tmp_path, options, code, message):
    result = run("convert", tiny, *options, "--output", tmp_path / "out", exit_code=code)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
