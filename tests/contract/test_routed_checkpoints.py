"""Saving and loading models with routed layers: thresholds and logits are bitwise the same, full and delta."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import pliant
from pliant.errors import CheckpointError
from pliant.models.checkpoint import DELTA_NAME, replace_buffers, saved_thresholds

CASES = {"mod": "llama", "mod gated": "qwen2", "dtf": "mistral", "dtf gaussian": "qwen3", "stt": "smollm3"}
"""Kinds of routed layers, each on a base of its own."""
KINDS = ("full", "delta")
FULL_NAME = "model.safetensors"
TEXT = torch.randint(2, 97, (10, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=CASES)
def saved(
    request: pytest.FixtureRequest, make_routed: Callable, make_base: Callable, tmp_path: Path
) -> PreTrainedModel:
    """A routed model whose base, full and delta checkpoints lie in the test's folder."""
    base = CASES[request.param]
    make_base(base, num_hidden_layers=4).save_pretrained(tmp_path / "base")
    model = make_routed(request.param, base)
    model.config.pliant["base"]["name"] = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "delta", delta=True)
    return model


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def is_gated(model: PreTrainedModel) -> bool:
    return any(layer.layer_config.gate_share for layer in model.routed_layers.values())


def thresholds(model: PreTrainedModel) -> dict[int, float]:
    return {index: layer.router.threshold.item() for index, layer in model.routed_layers.items()}


def without_thresholds(file: Path) -> dict[str, list]:
    return {name: value.tolist() for name, value in load_file(file).items() if not name.endswith("threshold")}


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_models_have_the_tensors_bitwise_and_the_logits(
    kind: str, saved: PreTrainedModel, tmp_path: Path, prompt: Tensor
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    assert type(loaded) is type(saved)
    assert loaded.spec == saved.spec
    assert thresholds(loaded) == thresholds(saved)
    assert all(torch.isfinite(torch.tensor(list(thresholds(loaded).values()))))
    actual, expected = loaded.state_dict(), saved.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    with torch.no_grad():
        logits = loaded(prompt).logits
        expected_logits = saved(prompt).logits
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)
        # A gate is a product with one vector: where that lies in memory decides in which order some processors add.
        assert torch.equal(logits, expected_logits) or is_gated(saved)
        with saved.base_mode():
            assert (logits - saved(prompt).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_stay_fp32_beside_a_bf16_base(kind: str, saved: PreTrainedModel, tmp_path: Path) -> None:
    loaded = pliant.load(tmp_path / kind, dtype=torch.bfloat16)
    assert thresholds(loaded) == thresholds(saved)
    assert {layer.router.threshold.dtype for layer in loaded.routed_layers.values()} == {torch.float32}
    assert {parameter.dtype for _, parameter in loaded.dynamic_parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_writes_the_same_tensors(kind: str, saved: PreTrainedModel, tmp_path: Path) -> None:
    name = DELTA_NAME if kind == "delta" else FULL_NAME
    pliant.load(tmp_path / kind).save_pretrained(tmp_path / "again", delta=kind == "delta")
    before, after = load_file(tmp_path / kind / name), load_file(tmp_path / "again" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(value.nan_to_num(0.5), after[key].nan_to_num(0.5)) for key, value in before.items())


def test_a_model_that_lets_everything_run_keeps_minus_infinity(
    make_routed: Callable, make_base: Callable, tmp_path: Path, prompt: Tensor
) -> None:
    expected = make_base(num_hidden_layers=4)(prompt).logits
    model = make_routed("mod", capacity=1.0)
    model.save_pretrained(tmp_path)
    loaded = pliant.load(tmp_path)
    assert set(thresholds(loaded).values()) == {-torch.inf}
    assert torch.equal(loaded(prompt).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_a_threshold_is_refused(kind: str, saved: PreTrainedModel, tmp_path: Path) -> None:
    name = DELTA_NAME if kind == "delta" else FULL_NAME
    rewrite(tmp_path / kind / name, lambda tensors: tensors.pop("model.layers.1.router.threshold"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.router\.threshold"):
        pliant.load(tmp_path / kind)
    with pytest.raises(CheckpointError, match=r"threshold \(1 in all\) is not there"):
        replace_buffers(saved, tmp_path / kind)


def test_a_delta_with_a_threshold_of_another_shape_is_refused(saved: PreTrainedModel, tmp_path: Path) -> None:
    shape = {"model.layers.1.router.threshold": torch.zeros(2)}
    rewrite(tmp_path / "delta" / DELTA_NAME, lambda tensors: tensors.update(shape))
    with pytest.raises(CheckpointError, match=r"threshold must have shape \(\); got \(2,\)"):
        pliant.load(tmp_path / "delta")


@pytest.mark.parametrize("kind", [*KINDS, "sharded"])
def test_new_thresholds_are_written_into_a_checkpoint_and_nothing_else(
    kind: str, saved: PreTrainedModel, tmp_path: Path, prompt: Tensor
) -> None:
    folder = tmp_path / kind
    if kind == "sharded":
        saved.save_pretrained(folder, max_shard_size="40KB")
    files = sorted(file.name for file in folder.iterdir())
    weights = {file: without_thresholds(file) for file in folder.glob("*.safetensors")}
    config = json.loads((folder / "config.json").read_text())
    loaded = pliant.load(folder)
    pliant.calibrate(loaded, 0.25, calibration=TEXT)
    replace_buffers(loaded, folder)
    again = pliant.load(folder)
    assert thresholds(again) == thresholds(loaded) == saved_thresholds(folder)
    assert thresholds(again) != thresholds(saved)
    assert {layer.capacity for layer in again.routed_layers.values()} == {0.25}
    with torch.no_grad():
        assert torch.equal(again(prompt).logits, loaded(prompt).logits)
    assert sorted(file.name for file in folder.iterdir()) == files
    assert str({file: without_thresholds(file) for file in weights}) == str(weights)
    new = json.loads((folder / "config.json").read_text())
    assert new.pop("pliant") != config.pop("pliant")
    assert new == config


@pytest.mark.parametrize("failing", ["save", "config"])
def test_a_write_that_fails_leaves_the_checkpoint(
    failing: str, saved: PreTrainedModel, tmp_path: Path, files_of: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(tmp_path)
    if failing == "save":
        monkeypatch.setattr(
            "pliant.models.checkpoint.save_file", lambda *_a, **_k: (_ for _ in ()).throw(OSError("full"))
        )
    else:
        monkeypatch.setattr(Path, "write_text", lambda *_a, **_k: (_ for _ in ()).throw(OSError("full")))
    pliant.calibrate(saved, 0.25, calibration=TEXT)
    with pytest.raises(OSError, match="full"):
        replace_buffers(saved, tmp_path / "full")
    monkeypatch.undo()
    assert files_of(tmp_path) == before


def test_a_damaged_file_is_named(saved: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "full" / FULL_NAME).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="must be a whole safetensors file"):
        saved_thresholds(tmp_path / "full")


def test_plastic_deltas_hold_what_they_held(make_converted: Callable, tmp_path: Path) -> None:
    model = make_converted("v1")
    model.save_pretrained(tmp_path, delta=True)
    names = {name for name, _ in model.dynamic_parameters()}
    assert load_file(tmp_path / DELTA_NAME).keys() == names | {"base_fingerprint"}
    assert saved_thresholds(tmp_path) == {}
