"""``pliant calibrate``, and what ``pliant info`` says of a routed model."""

import json

import pytest

import pliant


@pytest.fixture(params=["mod", "dtf", "stt"])
def routed(request, run, tiny, tmp_path, text_file):
    """The tiny model with every second layer routed; its folder."""
    calibration = ("--calibration", text_file, "--calibration-tokens", 3072)
    run("convert", tiny, "--architecture", request.param, *calibration, "--output", tmp_path / "routed")
    return tmp_path / "routed"


def thresholds(folder):
    return {index: layer.router.threshold.item() for index, layer in pliant.load(folder).routed_layers.items()}


def test_thresholds_and_capacities_are_changed_in_place(run, routed, text_file, layers_of, files_of):
    before, files = thresholds(routed), files_of(routed)
    result = run("calibrate", routed, "--target-capacity", 0.25, "--text", text_file, "--tokens", 1024)
    after = thresholds(routed)
    assert all(after[index] > before[index] for index in (1, 3))
    assert {layer["capacity_gamma"] for layer in layers_of(routed).values() if "role" not in layer} == {0.25}
    assert [line.split()[1:-1] for line in result.stdout.splitlines() if " 0.25 " in line]
    assert f"{after[1]:.4g}" in result.stdout
    changed = {name for name, digest in files_of(routed).items() if files.get(name) != digest}
    assert changed == {"config.json", "model.safetensors"}


def test_output_is_a_new_model_and_leaves_the_old_one(run, routed, text_file, tmp_path, files_of):
    before = files_of(routed)
    options = ("--text", text_file, "--tokens", 1024, "--output", tmp_path / "new")
    run("calibrate", routed, "--target-capacity", 0.75, *options)
    assert files_of(routed) == before
    assert files_of(tmp_path / "new").keys() == before.keys()
    assert pliant.load(tmp_path / "new").routed_layers[1].capacity == 0.75


def test_a_delta_stays_a_delta(run, tiny, tmp_path, text_file):
    calibration = ("--calibration", text_file, "--calibration-tokens", 3072)
    delta, copy = tmp_path / "delta", tmp_path / "copy"
    run("convert", tiny, "--architecture", "mod", *calibration, "--delta", "--output", delta)
    run("calibrate", delta, "--target-capacity", 0.25, "--text", text_file, "--tokens", 1024)
    run("calibrate", delta, "--text", text_file, "--tokens", 1024, "--output", copy)
    assert thresholds(delta) == thresholds(copy)
    assert not (copy / "model.safetensors").exists()


def test_capacity_one_needs_no_text(run, routed):
    result = run("calibrate", routed, "--target-capacity", 1)
    assert set(thresholds(routed).values()) == {-float("inf")}
    assert "−∞" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target-capacity", 0), "must be in (0, 1]"),
        (("--text", "missing.txt"), "text file 'missing.txt' does not exist"),
        (("--tokens", 100_000), "Give more text"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(run, routed, text_file, options, message, files_of):
    before = files_of(routed)
    text = () if "--text" in options else ("--text", text_file)
    result = run("calibrate", routed, *text, *options, exit_code=1)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert files_of(routed) == before


def test_a_model_without_routed_layers_is_refused(run, converted):
    result = run("calibrate", converted, "--target-capacity", 0.5, exit_code=1)
    assert "calibrate needs a model with routed layers" in result.stderr


def test_a_model_that_is_no_folder_needs_an_output(run, tmp_path):
    assert "--output must be given" in run("calibrate", "someone/routed", exit_code=1).stderr
    (tmp_path / "mine.txt").write_text("mine")
    message = "--output must be a new or an empty folder"
    assert message in run("calibrate", "someone/routed", "--output", tmp_path, exit_code=1).stderr


def test_help_teaches(run):
    text = " ".join(run("calibrate", "--help").stdout.split())
    assert "pliant calibrate outputs/mod --target-capacity 0.25" in text
    assert "Needs a model with routed layers" in text
    assert "Leaves" in text


def test_info_shows_capacities_and_thresholds(run, routed):
    told = json.loads(run("info", routed, "--json").stdout)
    architecture = told["routing"]["architecture"]
    assert {
        index: layer["threshold"] for index, layer in told["routing"]["layers"].items() if "threshold" in layer
    } == {str(index): value for index, value in thresholds(routed).items()}
    (form,) = told["forms"]
    assert form["name"] == "as saved"
    assert {layer["form"] for layer in form["layers"].values()} == {architecture}
    assert form["added_flops"] < 0
    model = pliant.load(routed)
    assert form["added_parameters"] == sum(p.numel() for _, p in model.dynamic_parameters())
    text = run("info", routed).stdout
    assert f"routed layers, {architecture}" in text
    assert f"{thresholds(routed)[3]:.4g}" in text
    result = run("info", routed, "--preset", "v1", exit_code=1)
    assert f"is converted already (1,3 {architecture} capacity 0.5)" in result.stderr


def test_info_of_a_configuration_alone_shows_no_thresholds(run, routed, tmp_path):
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_bytes((routed / "config.json").read_bytes())
    told = json.loads(run("info", tmp_path / "shape", "--json").stdout)
    assert "threshold" not in told["routing"]["layers"]["1"]
    assert told["routing"]["layers"]["1"]["capacity_gamma"] == 0.5
