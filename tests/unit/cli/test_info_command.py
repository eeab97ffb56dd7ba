"""``pliant info``: shapes and directories, without weights, as a table and as JSON."""

import json
import shutil

import pytest

import pliant
from pliant.architectures.npt.config import FORMS


def info(run, *arguments):
    return json.loads(run("info", *arguments, "--json").stdout)


@pytest.fixture
def shape(tiny, tmp_path):
    """The tiny model's directory with its configuration and nothing else."""
    folder = tmp_path / "shape"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    return folder


def test_a_shape_needs_no_weights(run):
    told = info(run, "llama-3.2-1b", "--preset", "keyed", "--rank", 512)
    assert told["family"] == "llama"
    assert (told["num_layers"], told["d_model"], told["d_ffn"]) == (16, 2048, 8192)
    assert told["base_parameters"] == 1_235_814_400
    assert told["base_bf16_bytes"] == 2 * 1_235_814_400
    (form,) = told["forms"]
    assert form["added_parameters"] == 16 * 2 * 2048 * 512
    assert form["added_bytes"] == 4 * form["added_parameters"]
    assert form["added_flops"] == 2 * form["added_parameters"]
    assert not form["is_upper_bound"]


def test_every_preset_is_listed_without_options(run, shape):
    told = info(run, shape)
    assert [form["name"] for form in told["forms"]] == list(FORMS)
    keyed = next(form for form in told["forms"] if form["name"] == "keyed")
    assert keyed["is_upper_bound"]
    assert keyed["added_parameters"] == 4 * 2 * 32 * 32


def test_the_table_says_the_same(run, shape):
    told = info(run, shape)
    text = run("info", shape).stdout
    for form in told["forms"]:
        assert f"{form['added_parameters']:,}" in text
    assert f"{told['base_parameters']:,}" in text
    assert "rank auto: known after calibration" in text


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "v1", "--rank", 7),
        ("--preset", "v2", "--modulation", "additive"),
        ("--preset", "outer", "--rank", 8, "--targets", "gate_up", "--num-updates", 2),
        ("--rank", 32, "--tied", "--layers", "1-2"),
        ("--map", "0=v1,2-3=v2:3"),
    ],
)
def test_counts_are_those_of_the_conversion(run, tiny, tmp_path, options):
    (form,) = info(run, tiny, *options)["forms"]
    run("convert", tiny, *options, "--output", tmp_path / "out")
    model = pliant.load(tmp_path / "out")
    assert form["added_parameters"] == sum(p.numel() for _, p in model.dynamic_parameters())
    assert sorted(map(int, form["layers"])) == sorted(model.spec.layers)
    (saved,) = info(run, tmp_path / "out")["forms"]
    assert saved == {**form, "name": "as saved"}


def test_context_moves_the_base_and_not_the_addition(run, shape):
    short, long = (info(run, shape, "--preset", "v1", "--context", n) for n in (1, 1001))
    assert long["base_flops"] - short["base_flops"] == 4 * 1000 * 32 * 4
    assert long["forms"] == short["forms"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama-9b", (), "llama-9b"),
        ("llama-3.2-1b", ("--rank", 4096), "rank must be in 1..2048"),
        ("llama-3.2-1b", ("--preset", "v3"), "preset must be one of"),
        ("llama-3.2-1b", ("--map", "0-1=v1,1=v2"), "must name each layer once"),
    ],
)
def test_what_is_wrong_is_named(run, monkeypatch, model, options, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message in run("info", model, *options, exit_code=1).stderr


def test_a_converted_model_takes_no_form_options(run, converted):
    result = run("info", converted, "--preset", "v1", exit_code=1)
    assert "is converted already (0-3 v2 rank 16)" in result.stderr
