"""``pliant evaluate``: tables and JSON of suites, runs that go on, and what is wrong named before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import pliant
from pliant.cli.console import CommandGroup
from pliant.cli.evaluate.command import evaluate
from pliant.evaluation import suites

FACTS = (("A small robot", "the hill", "water"), ("The river", "the sea", "memory"), ("Attention", "what", "later"))


@pytest.fixture(autouse=True)
def small_texts(tmp_path, monkeypatch):
    """Neutral and held-out text of a few windows, and statistics in a folder of the test's own."""
    windows = torch.randint(2, 250, (6, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("pliant.key_moments.cache_dir", lambda: tmp_path / "cache")
    for module in ("consolidation.resources", "key_moments"):
        monkeypatch.setattr(f"pliant.{module}.calibration_tokens", lambda *_, **__: windows)
    for module in ("editing.run", "suites"):
        monkeypatch.setattr(f"pliant.evaluation.{module}.held_out_tokens", lambda *_, **__: windows[:2])


@pytest.fixture
def measure():
    """A function that runs ``pliant evaluate`` in this process and checks its exit code."""
    app = typer.Typer(cls=CommandGroup)
    app.callback()(lambda: None)
    app.command()(evaluate)

    def call(*arguments: Any, exit_code: int = 0):
        result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
        assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
        return result

    return call


@pytest.fixture
def facts(tmp_path) -> Path:
    """Three CounterFact records."""
    records = [
        {
            "case_id": i,
            "prompt": f"{subject} looks for",
            "target_new": new,
            "subject": subject,
            "ground_truth": old,
            "rephrase_prompt": f"For later, {subject} keeps",
            "locality_prompt": "The memory meets",
            "locality_ground_truth": "the sea",
        }
        for i, (subject, old, new) in enumerate(FACTS)
    ]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    return tmp_path / "facts.json"


def test_a_suite_is_shown_and_goes_on(measure, tiny, facts, tmp_path, files_of):
    before = files_of(tiny)
    options = (tiny, "--suite", "counterfact", "--data", facts, "--output", tmp_path / "results")
    told = measure(*options, "--records", 2, "--editors", "untouched, in_context,unembedding")
    for part in ("one edit at a time", "untouched", "in_context", "unembedding", "s/edit", "records in"):
        assert part in told.stdout
    assert "Evaluating unembedding" in told.stderr
    lines = (tmp_path / "results" / "unembedding.jsonl").read_text()
    assert lines.count("\n") == 2
    found = json.loads(measure(*options, "--editors", "unembedding", "--json").stdout)
    assert (tmp_path / "results" / "unembedding.jsonl").read_text().startswith(lines)
    assert {name: own["records"] for name, own in found["editors"].items()} == {
        "untouched": 3,
        "in_context": 2,
        "unembedding": 3,
    }
    assert set(found["differences"]["unembedding"]) == {"untouched", "in_context"}
    assert files_of(tiny) == before


def test_batches_have_a_table_for_each_number(measure, tiny, facts, tmp_path):
    options = ("--suite", "counterfact", "--data", facts, "--mode", "batched", "--editors", "context")
    told = measure(tiny, *options, "--output", tmp_path / "results")
    assert "1 edits" in told.stdout
    assert (tmp_path / "results" / "context-batched-1.jsonl").is_file()


def test_what_is_kept_is_shown_beside_the_base(measure, tiny, run, tmp_path, monkeypatch):
    run("convert", tiny, "--preset", "v2", "--output", tmp_path / "converted")
    asked = [
        suites.ChoiceQuestion(id=str(i), prompt=f"The robot {i}", choices=("sea", "hill"), answer=i % 2)
        for i in range(6)
    ]
    for kind in ("mmlu", "hellaswag"):
        monkeypatch.setattr(suites, kind, lambda records: asked[:records])
    options = (tmp_path / "converted", "--suite", "retention", "--output", tmp_path / "kept", "--records", 4)
    told = measure(*options)
    for part in ("MMLU", "HellaSwag", "perplexity", "KL", "n=4"):
        assert part in told.stdout
    found = json.loads(measure(*options, "--json").stdout)
    assert found["mmlu"]["model"]["count"] == 4
    assert found["ratio"] != 1.0
    assert len(pliant.load(tiny).edits) == 0


FILE = ("--data", "{facts}")


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("counterfact",), "data must be a file of cases for suite='counterfact'; got None", 1),
        (("zsre",), "data must be a file of cases for suite='zsre'; got None", 1),
        (("squad_closed_book", *FILE), "data must be left out for suite='squad_closed_book'", 1),
        (("moon",), "'moon' is not one of", 2),
        (("counterfact", *FILE, "--records", "0"), "greater than or equal to 1", 2),
        (("counterfact", *FILE, "--start", "3"), "start must be below the number of cases, 3; got 3", 1),
        (("counterfact", *FILE, "--editors", ","), "must name at least one editor", 2),
        (("counterfact", *FILE, "--editors", "romeo"), "got 'romeo'. Did you mean 'rome'?", 1),
        (("counterfact", *FILE, "--editors", "rome", "--mode", "batched"), "for mode='batched'; got 'rome'", 1),
        (("counterfact", *FILE, "--mode", "sequential", "--editors", "untouched"), "got 'untouched'", 1),
        (("counterfact", "--data", "nowhere.json"), "nowhere.json must be a readable JSON file", 1),
        (("zsre", *FILE), "record 0: answers must be a list with a text; got None", 1),
        (("retention", *FILE), "does not go with --suite retention", 2),
        (("retention", "--editors", "auto"), "does not go with --suite retention", 2),
        (("retention", "--mode", "batched"), "does not go with --suite retention", 2),
        (("retention", "--start", "1"), "does not go with --suite retention", 2),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_written(
    measure, tiny, facts, tmp_path, files_of, options, message, code
):
    before = files_of(tmp_path)
    given = [option.format(facts=facts) for option in options]
    result = measure(tiny, "--suite", *given, "--output", tmp_path / "results", exit_code=code)
    assert "Loading" not in result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert files_of(tmp_path) == before


def test_results_of_another_run_are_not_mixed(measure, tiny, converted, facts, tmp_path):
    options = ("--suite", "counterfact", *("--data", facts), "--editors", "untouched", "--output", tmp_path / "results")
    measure(tiny, *options)
    assert "Choose another folder" in measure(converted, *options, exit_code=1).stderr
