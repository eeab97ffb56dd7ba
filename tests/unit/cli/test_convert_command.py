"""``pliant convert``: what it leaves, that every option acts, and what it refuses."""

import json

import pytest
import torch

import pliant

PARAMETERS_OF_V1_RANK_16 = 4 * 16 * (32 + 48)


def test_leaves_a_directory_that_loads(run, tiny, tmp_path):
    output = tmp_path / "out"
    result = run("convert", tiny, "--preset", "v1", "--output", output)
    model = pliant.load(output)
    assert sorted(model.spec.layers) == [0, 1, 2, 3]
    assert (output / "tokenizer.json").is_file()
    added = sum(p.numel() for _, p in model.dynamic_parameters())
    assert added == PARAMETERS_OF_V1_RANK_16
    assert f"{added:,}" in result.stdout
    assert f"pliant generate {output}" in result.stdout
    assert "Loading" not in result.stdout  # steps go to stderr
    assert "predicted" not in result.stdout


def test_keyed_reads_the_calibration_file_and_predicts(run, tiny, tmp_path, text_file, layers_of):
    output = tmp_path / "out"
    options = ("--calibration", text_file, "--calibration-tokens", 3072)
    result = run("convert", tiny, "--rank", 24, *options, "--output", output)
    assert {(c["form"], c["rank"]) for c in layers_of(output).values()} == {("keyed", 24)}
    assert "times the base's" in result.stdout
    assert "Reading calibration text: 1 of 2" in result.stderr


def test_more_calibration_tokens_are_read(run, tiny, tmp_path, text_file):
    options = ("--calibration", text_file, "--calibration-tokens", 4096)
    result = run("convert", tiny, "--rank", 24, *options, "--output", tmp_path / "out")
    assert "Reading calibration text: 4 of 4" in result.stderr


def test_default_is_keyed_with_automatic_rank(run, tiny, tmp_path, text_file, layers_of):
    calibration = ("--calibration", text_file, "--calibration-tokens", 3072)
    ranks = {}
    for energy in (0.5, 0.99):
        output = tmp_path / f"out{energy}"
        run("convert", tiny, "--energy", energy, *calibration, "--output", output)
        ranks[energy] = [layer["rank"] for layer in layers_of(output).values()]
    assert all(low < high for low, high in zip(ranks[0.5], ranks[0.99], strict=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--preset", "v2", "--rank", 5), {"form": "v2", "rank": 5}),
        (("--preset", "v1_single"), {"form": "v1_single", "rank": 16}),
        (("--preset", "keyed_pre", "--rank", 32), {"form": "keyed_pre", "rank": 32}),
        (("--rank", 32, "--tied"), {"form": "keyed", "rank": 32, "tied": True}),
        (
            ("--preset", "v2", "--modulation", "additive"),
            {"form": "v2", "rank": 16, "modulation": "additive"},
        ),
        (
            ("--preset", "outer", "--rank", 8, "--targets", "all", "--num-updates", 2),
            {"form": "outer", "rank": 8, "targets": "all", "num_updates": 2},
        ),
        (
            ("--preset", "v1", "--regulariser", "effect"),
            {"form": "v1", "rank": 16, "regulariser": "effect"},
        ),
    ],
)
def test_form_options_reach_the_configuration(run, tiny, tmp_path, options, expected, layers_of):
    run("convert", tiny, *options, "--output", tmp_path / "out")
    assert layers_of(tmp_path / "out") == {str(index): expected for index in range(4)}


@pytest.mark.parametrize(
    ("layers", "indices"),
    [("upper_half", "23"), ("1-2", "12"), ("0,3", "03")],
)
def test_layers_are_chosen(run, tiny, tmp_path, layers, indices, layers_of):
    run("convert", tiny, "--preset", "v1", "--layers", layers, "--output", tmp_path / "out")
    assert sorted(layers_of(tmp_path / "out")) == list(indices)


def test_a_map_gives_several_forms(run, tiny, tmp_path, layers_of):
    output = tmp_path / "out"
    result = run("convert", tiny, "--map", "0-1=v1:4,3=v2", "--output", output)
    forms = {index: (c["form"], c["rank"]) for index, c in layers_of(output).items()}
    assert forms == {"0": ("v1", 4), "1": ("v1", 4), "3": ("v2", 16)}
    assert "0-1 v1 rank 4; 3 v2 rank 16" in result.stdout


def test_dtype_is_that_of_the_base_only(run, tiny, tmp_path):
    output = tmp_path / "out"
    run("convert", tiny, "--preset", "v1", "--dtype", "bfloat16", "--output", output)
    model = pliant.load(output)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for _, p in model.dynamic_parameters()} == {torch.float32}


def test_delta_is_small_and_loads_over_its_base(run, tiny, tmp_path):
    output = tmp_path / "out"
    run("convert", tiny, "--preset", "v1", "--delta", "--output", output)
    assert not (output / "model.safetensors").exists()
    assert pliant.load(output).spec.layers
    base = json.loads((output / "config.json").read_text())["pliant"]["base"]["name"]
    assert base == str(tiny)


def test_layers_can_be_added_to_a_converted_model(run, tiny, tmp_path, layers_of):
    run("convert", tiny, "--preset", "v1", "--layers", "0", "--output", tmp_path / "one")
    options = ("--preset", "v2", "--layers", "1")
    run("convert", tmp_path / "one", *options, "--output", tmp_path / "two")
    assert {i: c["form"] for i, c in layers_of(tmp_path / "two").items()} == {"0": "v1", "1": "v2"}


def test_a_full_folder_is_refused_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run("convert", "nowhere/at/all", "--output", tmp_path, exit_code=1)
    assert "error: --output must be a new or an empty folder" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken(run, tiny, tmp_path, layers_of):
    run("convert", tiny, "--preset", "v1", "--output", tmp_path)
    assert layers_of(tmp_path)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--preset", "keyd"), 1, "Did you mean 'keyed'?"),
        (("--rank", "many"), 2, "--rank"),
        (("--rank", 64), 1, "rank must be in 1..32 (d_model); got 64"),
        (("--preset", "v1", "--layers", "9"), 1, "layers must be in 0..3"),
        (("--preset", "v1", "--tied"), 1, "tied=True is an option of form keyed"),
        (("--preset", "v1", "--map", "0=v1"), 2, "--map"),
        (("--dtype", "float8"), 2, "--dtype"),
        (("--preset", "v1", "--calibration", "x.txt"), 1, "--calibration is for the keyed forms"),
        (("--calibration", "x.txt"), 1, "text file 'x.txt' does not exist"),
        (("--preset", "v1", "--attn-implementation", "fast"), 1, "attn_implementation must be one"),
    ],
)
def test_what_is_wrong_is_named(run, tiny, tmp_path, options, code, message):
    result = run("convert", tiny, *options, "--output", tmp_path / "out", exit_code=code)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_named(run, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    options = ("--rank", 8, "--calibration", tmp_path / "short.txt", "--output", tmp_path / "out")
    assert "Give more text" in run("convert", tiny, *options, exit_code=1).stderr


def test_a_missing_base_is_named(run, tmp_path):
    result = run("convert", "./missing", "--output", tmp_path / "out", exit_code=1)
    assert "'./missing' does not exist" in result.stderr


def test_attention_implementation_is_passed_on(run, tiny, tmp_path, monkeypatch):
    seen = {}
    load = pliant.load

    def spy(name, **options):
        seen.update(options)
        return load(name, **options)

    monkeypatch.setattr("pliant.models.load", spy)
    options = ("--preset", "v1", "--attn-implementation", "eager", "--device-map", "cpu")
    run("convert", tiny, *options, "--output", tmp_path / "out")
    assert seen == {"dtype": "auto", "attn_implementation": "eager", "device_map": "cpu"}
