"""Saving and loading, full and delta: the same model bitwise in a new process, and its size."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pliant
from pliant.architectures.npt import FORMS
from pliant.models.checkpoint import DELTA_NAME

CASES = dict(zip(FORMS, ["llama", "mistral", "qwen2", "qwen3", "smollm3", "llama_mlp_bias"], strict=True))
"""Each form on a base of its own, so that six models cover all forms and all bases."""
KINDS = ("full", "delta")
DELTA_OVERHEAD_BYTES = 64 * 1024
BF16_TOLERANCE = 0.05
"""Logits of a bf16 model against fp32: eight bits of mantissa over three layers."""

# Loads every folder as any user of transformers would, once pliant is imported.
CHILD = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import pliant

torch.set_num_threads(1)
tokens = load_file(sys.argv[1])["tokens"]
logits = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__.startswith("Pliant"), type(model)
    with torch.no_grad():
        logits[folder] = model(tokens).logits
save_file(logits, sys.argv[2])
"""


def folder_of(root: Path, form: str, kind: str) -> Path:
    return root / f"{form}-{kind}"


@pytest.fixture(scope="module")
def saved(
    make_base: Callable, convert_randomly: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, PreTrainedModel]]:
    """A folder with a base, a full and a delta checkpoint of every case; and the saved models."""
    root = tmp_path_factory.mktemp("checkpoints")
    models = {}
    for form, base in CASES.items():
        make_base(base).save_pretrained(root / f"{form}-base")
        model = convert_randomly(pliant.load(root / f"{form}-base").eval(), form, layers=[0, 2])
        model.save_pretrained(folder_of(root, form, "full"))
        model.save_pretrained(folder_of(root, form, "delta"), delta=True)
        models[form] = model
    return root, models


@pytest.fixture(scope="module")
def elsewhere(saved: tuple[Path, dict]) -> dict[str, Tensor]:
    """Logits that a new process gets from every checkpoint, by its folder."""
    root, models = saved
    tokens, logits = root / "tokens.safetensors", root / "logits.safetensors"
    save_file({"tokens": fixed_tokens()}, tokens)
    folders = [str(folder_of(root, form, kind)) for form in models for kind in KINDS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, str(tokens), str(logits), *folders]
    subprocess.run(command, env=environment, check=True, timeout=300)
    return load_file(logits)


def fixed_tokens() -> Tensor:
    return torch.randint(2, 97, (2, 9), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_process_gets_bitwise_the_same_logits(
    form: str, kind: str, saved: tuple[Path, dict], elsewhere: dict[str, Tensor]
) -> None:
    root, models = saved
    with torch.no_grad():
        expected = models[form](fixed_tokens()).logits
        with models[form].base_mode():
            assert not torch.allclose(models[form](fixed_tokens()).logits, expected, atol=0.01)
    assert torch.equal(elsewhere[str(folder_of(root, form, kind))], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_restores_every_parameter_and_the_spec(form: str, kind: str, saved: tuple[Path, dict]) -> None:
    root, models = saved
    loaded = pliant.load(folder_of(root, form, kind))
    assert type(loaded) is type(models[form])
    assert loaded.spec == models[form].spec
    assert loaded.config._name_or_path == str(folder_of(root, form, kind))
    assert not loaded.training
    actual, expected = loaded.state_dict(), models[form].state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_delta_is_no_larger_than_the_added_parameters(form: str, saved: tuple[Path, dict]) -> None:
    root, models = saved
    files = [f for f in folder_of(root, form, "delta").iterdir() if not f.name.startswith("tokenizer")]
    added = sum(p.numel() * p.element_size() for _, p in models[form].dynamic_parameters())
    assert added <= sum(file.stat().st_size for file in files) <= added + DELTA_OVERHEAD_BYTES
    assert DELTA_NAME in {file.name for file in files}
    assert not any(file.name.startswith(("model", "pytorch_model")) for file in files)


def test_loaded_model_is_saved_again_as_the_same_files(
    saved: tuple[Path, dict], tmp_path: Path, files_of: Callable
) -> None:
    root, _ = saved
    for kind in KINDS:
        source = folder_of(root, "outer", kind)
        pliant.load(source).save_pretrained(tmp_path / kind, delta=kind == "delta")
        again, before = files_of(tmp_path / kind), files_of(source)
        weights = DELTA_NAME if kind == "delta" else "model.safetensors"
        assert again.keys() == before.keys()
        assert load_file(tmp_path / kind / weights).keys() == load_file(source / weights).keys()
        for name, tensor in load_file(source / weights).items():
            assert torch.equal(load_file(tmp_path / kind / weights)[name], tensor), name
        entries = [json.loads((f / "config.json").read_text())["pliant"] for f in (source, tmp_path / kind)]
        assert entries[0] == entries[1]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_load_of_an_fp32_checkpoint_keeps_the_added_parameters_fp32(
    form: str, kind: str, saved: tuple[Path, dict], largest_difference: Callable
) -> None:
    root, models = saved
    loaded = pliant.load(folder_of(root, form, kind), dtype=torch.bfloat16)
    expected = dict(models[form].dynamic_parameters())
    for name, parameter in loaded.named_parameters():
        if name in expected:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[name])
        else:
            assert parameter.dtype == torch.bfloat16, name
    with torch.no_grad():
        logits, wanted = loaded(fixed_tokens()).logits, models[form](fixed_tokens()).logits
    assert largest_difference(logits, wanted) < BF16_TOLERANCE


def test_sharded_checkpoint_loads_bitwise(form: str, saved: tuple[Path, dict], tmp_path: Path) -> None:
    _, models = saved
    models[form].save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path)(fixed_tokens()).logits,
            models[form](fixed_tokens()).logits,
        )


def test_start_values_survive_a_round_trip(form: str, make_base: Callable, calibration: Tensor, tmp_path: Path) -> None:
    """Zeros and closed forms are not initialised anew by loading."""
    config = pliant.NptConfig.preset(form, rank=6)
    model = pliant.convert(make_base(), config, calibration=calibration)
    model.save_pretrained(tmp_path)
    loaded = dict(pliant.load(tmp_path).dynamic_parameters())
    for name, parameter in model.dynamic_parameters():
        assert torch.equal(loaded[name], parameter), name


def test_bf16_model_reloads_bitwise_with_its_added_parameters_in_fp32(
    form: str, make_base: Callable, convert_randomly: Callable, tmp_path: Path
) -> None:
    make_base().save_pretrained(tmp_path / "base")
    model = convert_randomly(pliant.load(tmp_path / "base", dtype=torch.bfloat16), form)
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for _, p in loaded.dynamic_parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(loaded(fixed_tokens()).logits, model(fixed_tokens()).logits)


def test_tokenizer_travels_with_either_kind(
    make_base: Callable, convert_randomly: Callable, tokenizer: object, tmp_path: Path
) -> None:
    make_base().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = convert_randomly(pliant.load(tmp_path / "base"), "v1")
    for kind in KINDS:
        model.save_pretrained(tmp_path / kind, delta=kind == "delta")
        assert AutoTokenizer.from_pretrained(tmp_path / kind)("5 6 7")["input_ids"] == [5, 6, 7]


def test_delta_loads_over_a_base_that_has_moved(saved: tuple[Path, dict], tmp_path: Path, files_of: Callable) -> None:
    root, models = saved
    moved = tmp_path / "moved"
    pliant.load(root / "v2-base").save_pretrained(moved)
    before = files_of(moved)
    loaded = pliant.load(folder_of(root, "v2", "delta"), base=str(moved))
    with torch.no_grad():
        assert torch.equal(loaded(fixed_tokens()).logits, models["v2"](fixed_tokens()).logits)
    assert files_of(moved) == before


def test_full_checkpoint_is_converted_further_after_loading(
    saved: tuple[Path, dict], randomise: Callable, tmp_path: Path
) -> None:
    root, _ = saved
    model = pliant.load(folder_of(root, "v1", "full"))
    pliant.convert(model, pliant.NptConfig.preset("v2"), layers=[1])
    randomise(model).save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path)
    assert {i: c.form for i, c in loaded.spec.layers.items()} == {0: "v1", 1: "v2", 2: "v1"}
    with torch.no_grad():
        assert torch.equal(loaded(fixed_tokens()).logits, model(fixed_tokens()).logits)
