"""Checkpoints that do not fit, are damaged or are too new are refused, never filled in."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import pliant
from pliant.errors import CheckpointError
from pliant.models.checkpoint import DELTA_NAME, digest, fingerprint

FULL_NAME = "model.safetensors"


@pytest.fixture
def model(make_base: Callable, convert_randomly: Callable, tmp_path: Path) -> PreTrainedModel:
    """A converted model whose base, full and delta checkpoints lie in the test's folder."""
    make_base().save_pretrained(tmp_path / "base")
    converted = convert_randomly(pliant.load(tmp_path / "base"), "v2", layers=[0, 1])
    converted.save_pretrained(tmp_path / "full")
    converted.save_pretrained(tmp_path / "delta", delta=True)
    return converted


@pytest.fixture
def unchanged(
    model: PreTrainedModel, tmp_path: Path, files_of: Callable, state_of: Callable
) -> Iterator[Callable[[], None]]:
    """Call it once the damage is done: from there on neither the files nor the model may change."""
    taken: list[Any] = []
    yield lambda: taken.append((files_of(tmp_path), state_of(model)))
    assert taken, "the test must say when its own changes are done"
    assert (files_of(tmp_path), state_of(model)) == taken[0]


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    with safe_open(file, framework="pt") as reader:
        metadata = reader.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_delta_over_the_wrong_base_names_both_fingerprints(
    model: PreTrainedModel, make_base: Callable, tmp_path: Path, unchanged: Callable
) -> None:
    other = make_base(seed=1)
    other.save_pretrained(tmp_path / "other")
    unchanged()
    wanted = digest(fingerprint(model))
    got = digest(fingerprint(pliant.load(tmp_path / "other")))
    assert wanted != got
    with pytest.raises(CheckpointError, match=rf"{wanted}.*got .*other.*{got}.*base=") as refused:
        pliant.load(tmp_path / "delta", base=str(tmp_path / "other"))
    assert str(tmp_path / "base") in str(refused.value)


def test_delta_over_a_base_with_one_changed_matrix_is_refused(tmp_path: Path, unchanged: Callable) -> None:
    def shift(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.down_proj.weight"] += 0.01

    rewrite(tmp_path / "base" / FULL_NAME, shift)
    unchanged()
    with pytest.raises(CheckpointError, match="own base"):
        pliant.load(tmp_path / "delta")


def test_delta_over_a_base_of_another_family_is_refused(
    make_base: Callable, tmp_path: Path, unchanged: Callable
) -> None:
    make_base("qwen2").save_pretrained(tmp_path / "other")
    unchanged()
    with pytest.raises(CheckpointError, match=r"base must be of type llama; got .*qwen2"):
        pliant.load(tmp_path / "delta", base=str(tmp_path / "other"))


def test_delta_over_a_base_of_another_depth_is_refused(
    make_base: Callable, tmp_path: Path, unchanged: Callable
) -> None:
    make_base(num_hidden_layers=4).save_pretrained(tmp_path / "other")
    unchanged()
    with pytest.raises(CheckpointError, match="own base"):
        pliant.load(tmp_path / "delta", base=str(tmp_path / "other"))


def test_delta_whose_base_is_gone_says_how_to_give_it(tmp_path: Path, unchanged: Callable) -> None:
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    unchanged()
    with pytest.raises(CheckpointError, match=r"base.*does not exist"):
        pliant.load(tmp_path / "delta")


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_newer_format_is_refused(kind: str, tmp_path: Path, unchanged: Callable) -> None:
    edit_config(tmp_path / kind, lambda config: config["pliant"].update(format_version=2))
    unchanged()
    with pytest.raises(CheckpointError, match=r"format_version must be 1.*got 2.*later one"):
        pliant.load(tmp_path / kind)


def test_newer_delta_file_is_refused(tmp_path: Path, unchanged: Callable) -> None:
    file = tmp_path / "delta" / DELTA_NAME
    save_file(load_file(file), file, metadata={"format": "pt", "format_version": "2"})
    unchanged()
    with pytest.raises(CheckpointError, match=r"delta of format 1; got format '2'"):
        pliant.load(tmp_path / "delta")


@pytest.mark.parametrize(("kind", "name"), [("full", FULL_NAME), ("delta", DELTA_NAME)])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.9])
def test_truncated_file_is_refused(kind: str, name: str, kept: float, tmp_path: Path, unchanged: Callable) -> None:
    file = tmp_path / kind / name
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    unchanged()
    with pytest.raises(CheckpointError, match=r"whole safetensors file.*[Ss]ave it again"):
        pliant.load(tmp_path / kind)


@pytest.mark.parametrize(("kind", "name"), [("full", FULL_NAME), ("delta", DELTA_NAME)])
@pytest.mark.parametrize("change", ["missing", "surplus", "misshapen"])
def test_tensors_that_do_not_fit_the_config_are_refused(
    kind: str, name: str, change: str, tmp_path: Path, unchanged: Callable
) -> None:
    key = "model.layers.1.plastic.add_up"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        if change == "missing":
            del tensors[key]
        elif change == "surplus":
            tensors["model.layers.2.plastic.add_up"] = tensors[key].clone()
        else:
            tensors[key] = tensors[key][:-1].clone()

    rewrite(tmp_path / kind / name, damage)
    unchanged()
    with pytest.raises(CheckpointError, match=r"model\.layers\.[12]\.plastic\.add_up.*do not belong together"):
        pliant.load(tmp_path / kind)


def test_missing_base_tensor_of_a_full_checkpoint_is_refused(tmp_path: Path, unchanged: Callable) -> None:
    rewrite(tmp_path / "full" / FULL_NAME, lambda tensors: tensors.pop("model.norm.weight"))
    unchanged()
    with pytest.raises(CheckpointError, match=r"missing keys: model\.norm\.weight"):
        pliant.load(tmp_path / "full")


@pytest.mark.parametrize(("kind", "delta"), [("full", True), ("delta", False)])
def test_saving_beside_the_other_kind_is_refused(
    kind: str, delta: bool, model: PreTrainedModel, tmp_path: Path, unchanged: Callable
) -> None:
    unchanged()
    with pytest.raises(CheckpointError, match=rf"must not hold a {kind} checkpoint.*another folder"):
        model.save_pretrained(tmp_path / kind, delta=delta)


def test_folder_with_both_kinds_is_refused(tmp_path: Path, unchanged: Callable) -> None:
    (tmp_path / "full" / DELTA_NAME).write_bytes((tmp_path / "delta" / DELTA_NAME).read_bytes())
    unchanged()
    with pytest.raises(CheckpointError, match=r"either a full or a delta.*Move one of them away"):
        pliant.load(tmp_path / "full")


def test_dense_model_has_no_delta(tmp_path: Path, unchanged: Callable) -> None:
    unchanged()
    with pytest.raises(CheckpointError, match=r"delta=True needs a converted model.*without delta"):
        pliant.load(tmp_path / "base").save_pretrained(tmp_path / "new", delta=True)
    assert not (tmp_path / "new").exists()


def test_saving_over_a_file_is_refused(model: PreTrainedModel, tmp_path: Path, unchanged: Callable) -> None:
    (tmp_path / "file").write_text("kept")
    unchanged()
    for delta in (False, True):
        with pytest.raises(CheckpointError, match=r"save_directory must be a folder; got the file"):
            model.save_pretrained(tmp_path / "file", delta=delta)


def test_layer_outside_the_model_is_refused(tmp_path: Path, unchanged: Callable) -> None:
    def move(config: dict[str, Any]) -> None:
        config["pliant"]["layers"]["7"] = config["pliant"]["layers"].pop("1")

    edit_config(tmp_path / "full", move)
    unchanged()
    with pytest.raises(CheckpointError, match=r"pliant\.layers must be in 0\.\.2 .*got 7"):
        pliant.load(tmp_path / "full")
