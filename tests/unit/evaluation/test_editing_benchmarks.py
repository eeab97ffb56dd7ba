"""How the benchmarks of editors keep results: what was measured elsewhere or before stays, with where it ran."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pliant.evaluation.editing.cases import EditCase
from pliant.key_moments import key_moments

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the benchmarks as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "record", raising=False)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function that writes the result of some figures, as if they had been measured in a folder on a date."""
    monkeypatch.setenv("PLIANT_BENCHMARK_RESULTS", str(tmp_path / "benchmarks"))
    module = script("editing", monkeypatch)
    monkeypatch.setattr(module, "cases_of", lambda *_, **__: [])
    monkeypatch.setattr(module, "show", lambda _: None)

    def run(
        work: str, date: str, found: dict[str, Any], *editors: str, mode: str = "single", worst: Any = None
    ) -> dict[str, Any]:
        folder = tmp_path / work
        folder.mkdir(exist_ok=True)
        for name in editors:
            file = folder / f"{name if mode == 'single' else f'{name}-{mode}'}.settings.json"
            file.write_text(json.dumps({"settings": {"of": f"{name} in {work}"}}))
        monkeypatch.setattr(module, "report", lambda *_, **__: found)
        monkeypatch.setattr(module, "environment", lambda _: {"date": date})
        arguments = {"suite": "counterfact", "data": None, "model": "m", "device": "cpu", "dtype": "float32"}
        chosen = argparse.Namespace(**arguments, start=0, mode=mode, counts=[1, 10], editors=list(editors))
        module.write(chosen, folder, worst or {})
        (file,) = (tmp_path / "benchmarks").glob("*.json")
        return json.loads(file.read_text())["runs"]["m, cpu, float32"]

    return run


def figures(own: str, other: str, value: float) -> dict[str, Any]:
    """Figures of two editors, and of one beside the other."""
    editors = {name: {"exact": value} for name in (own, other)}
    return {"editors": editors, "differences": {own: {other: {"exact": value}}}}


def test_editors_of_other_folders_stay(write: Callable[..., dict[str, Any]]):
    write("one", "monday", figures("auto", "rome", 0.1), "auto", "rome")
    found = write("two", "friday", figures("auto", "memit", 0.2), "memit")
    assert found["editors"] == {name: {"exact": 0.1 if name == "rome" else 0.2} for name in ("auto", "rome", "memit")}
    assert found["differences"] == {"auto": {"rome": {"exact": 0.1}, "memit": {"exact": 0.2}}}
    dates = {name: own["environment"]["date"] for name, own in found["environments"].items()}
    assert dates == {"auto": "monday", "rome": "monday", "memit": "friday"}
    assert found["settings"] == {
        "auto": {"of": "auto in one"},
        "rome": {"of": "rome in one"},
        "memit": {"of": "memit in two"},
    }


def test_the_worst_edits_of_an_editor_stay(write: Callable[..., dict[str, Any]]):
    write("one", "monday", figures("auto", "rome", 0.1), "auto", worst={"auto": {"7": 1.02}})
    write("one", "friday", figures("auto", "rome", 0.1), "rome", worst={"rome": {"3": 1.01}})
    found = write("one", "sunday", figures("auto", "rome", 0.1))
    assert found["worst_on_text"] == {"auto": {"7": 1.02}, "rome": {"3": 1.01}}


def test_an_older_result_keeps_its_environment(write: Callable[..., dict[str, Any]], tmp_path: Path):
    write("one", "monday", figures("auto", "rome", 0.1))
    (file,) = (tmp_path / "benchmarks").glob("*.json")
    stored = json.loads(file.read_text())
    (run,) = stored["runs"].values()
    del run["environments"]
    run["environment"] = {"date": "sunday"}
    file.write_text(json.dumps(stored))
    found = write("one", "friday", figures("auto", "rome", 0.3), "rome")
    assert "environment" not in found
    dates = {name: own["environment"]["date"] for name, own in found["environments"].items()}
    assert dates == {"auto": "sunday", "rome": "friday"}


def test_counts_are_merged_one_by_one(write: Callable[..., dict[str, Any]]):
    first = {"counts": [{"count": count, **figures("auto", "memit", 0.1)} for count in (1, 10)]}
    write("one", "monday", first, "auto", "memit", mode="batched")
    second = {"counts": [{"count": count, **figures("auto", "lora", 0.2)} for count in (10, 100)]}
    found = write("two", "friday", second, "lora", mode="batched")
    assert [part["count"] for part in found["counts"]] == [1, 10, 100]
    assert [list(part["editors"]) for part in found["counts"]] == [
        ["auto", "memit"],
        ["auto", "memit", "lora"],
        ["auto", "lora"],
    ]
    assert found["counts"][1]["differences"] == {"auto": {"memit": {"exact": 0.1}, "lora": {"exact": 0.2}}}
    assert found["settings"]["lora"] == {"of": "lora in two"}
    assert found["environments"]["memit"]["environment"]["date"] == "monday"


def test_every_trial_searches_with_its_own_settings(
    make_base: Callable[..., Any],
    tokenizer: Any,
    calibration: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    module = script("editing_baselines", monkeypatch)
    monkeypatch.setattr(module, "STATE", tmp_path)
    model = make_base()
    moments = key_moments(model, calibration, "all")
    case = EditCase(id="0", context="5 6 7 20.", prompt="5 6 7", answer="20", subject="6 7", old_answer="21")
    search = module.Search("rome", [case])
    found = []
    for changed in ({}, {"kl_weight": 5.0}, {"stop_below": 100.0}, {"num_prefixes": 1}, {"seed": 1}, {}):
        settings = {"depth": 0.34, "steps": 3, "num_prefixes": 2, "prefix_length": 3, **changed}
        editor = module.Rome(**settings, moments=moments, found=module.FOUND)
        (edit,) = search.edits(editor, model, tokenizer, [case])
        (delta,) = edit.deltas.values()
        found.append(delta.left)
    assert torch.equal(found[0], found[-1])
    assert not [(i, j) for i in range(5) for j in range(i) if torch.equal(found[i], found[j])]
