"""``pliant compare``: what is asked for reaches the library, and what it finds is shown and drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pliant.cli.compare.command import parse_rates, whole_number
from pliant.cli.compare.plots import draw_comparison, frontier
from pliant.errors import ConfigError


@pytest.fixture
def calls(monkeypatch):
    """What the library was asked for; it answers with a result made by hand."""
    asked: list[Any] = []

    def compare(config, overrides, **options):
        asked.append((config, overrides, options))
        options["output"].mkdir(parents=True, exist_ok=True)
        return result()

    monkeypatch.setattr("pliant.evaluation.comparison.compare.compare", compare)
    return asked


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "count": 9}


def row(loss: float, kl: float, *, deviation: float | None = 0.01) -> dict[str, Any]:
    task = {name: {"value": interval(0.5), "difference": interval(0.25)} for name in ("correct", "gain", "log_prob")}
    return {
        "seeds": 3,
        "failed": 0,
        "validation_loss": loss,
        "validation_loss_deviation": deviation,
        "perplexity": 2.718,
        "difference": interval(loss - 2.0),
        "forgetting": {
            "perplexity_ratio": 1.05,
            "perplexity_ratio_deviation": deviation,
            "kl": kl,
            "kl_difference": interval(0.0),
        },
        "in_context": {"recall": task, "reading": {**task, "f1": task["correct"]}},
    }


def result(**changes: Any) -> dict[str, Any]:
    sizes = {"v1-r16": 1_013_760, "lora-r4": 900_000, "full": 134_515_008, "frozen": 0}
    described = {
        name: {"method": name.partition("-")[0], "rank": 4, "parameters": size} for name, size in sizes.items()
    }
    for name in ("v1-r16", "lora-r4", "full"):
        described[name] |= {"learning_rate": 1e-3, "is_at_edge": name == "full"}
    rows = {"v1-r16": row(1.9, 0.01), "lora-r4": row(2.0, 0.02), "full": row(1.8, 0.3)}
    rows["frozen"] = row(2.5, 0.0, deviation=None)
    for name in rows:
        if name != "lora-r4":
            rows[name]["compared_with"] = "lora-r4"
    cost = {"seconds": 1.5, "time_ratio": 1.25, "peak_bytes": 3.0 * 2**30, "memory_ratio": 1.5}
    return {
        "reference": "lora",
        "contenders": described,
        "summary": rows,
        "cost": {name: cost for name in ("v1-r16", "lora-r4")},
        "stopped_by": None,
        **changes,
    }


def test_what_is_asked_for_reaches_the_library(run, calls, tmp_path):
    run(
        *("compare", "--config-name", "compare_domain", "data.dataset_name=text.txt", "--output", tmp_path / "out"),
        *("--methods", "v1, full", "--budget", "5e5,1_000_000", "--seeds", 2, "--reference", "v1", "--equal", "time"),
        *("--learning-rates", "3e-4,1e-3", "--learning-rates", "full=1e-5,3e-5"),
        *("--in-context", 7, "--tasks", "recall", "--held-out", "kept.txt", "--no-cost"),
    )
    ((config, overrides, options),) = calls
    assert (config, overrides) == ("compare_domain", ["data.dataset_name=text.txt"])
    assert options["methods"] == ["v1", "full"]
    assert options["budgets"] == [500_000, 1_000_000]
    assert options["learning_rates"] == [3e-4, 1e-3]
    assert options["rates_of"] == {"full": [1e-5, 3e-5]}
    assert (options["seeds"], options["reference"], options["equal"]) == (2, "v1", "time")
    assert (options["questions"], options["tasks"], options["held_out"]) == (7, ["recall"], Path("kept.txt"))
    assert options["measure_cost"] is False


def test_tables_and_picture_show_what_was_found(run, calls, tmp_path):
    text = run("compare", "-o", tmp_path / "out").stdout
    words = ("1.9000 ± 0.0100", "2.5000", "reference", "-0.2000 [-0.3000, -0.1000]", "1,013,760", "0.001*", "1.0500")
    assert all(word in text for word in (*words, "3.00 GiB", "1.25", "in context: recall", "F1", "wider search"))
    picture = (tmp_path / "out/comparison.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_seeds_that_diverged_are_shown(run, monkeypatch, tmp_path):
    found = result(stopped_by="SIGTERM")
    monkeypatch.setattr("pliant.evaluation.comparison.compare.compare", lambda *_, **__: found)
    assert "not every seed" not in run("compare", "-o", tmp_path, exit_code=143).stdout
    found["summary"]["full"] |= {"seeds": 1, "failed": 2}
    text = run("compare", "-o", tmp_path, exit_code=143).stdout
    assert "1 of 3" in text
    assert "not every seed ended in a finite loss" in text


def test_json_is_what_the_library_returned(run, calls, tmp_path):
    assert json.loads(run("compare", "--json", "-o", tmp_path / "out").stdout) == result()


def test_a_signal_is_told_by_the_exit_code(run, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "pliant.evaluation.comparison.compare.compare",
        lambda *_, **__: result(stopped_by="SIGTERM", summary={}, cost={}),
    )
    stopped = run("compare", "-o", tmp_path, exit_code=143)
    assert "the same command goes on" in stopped.stderr
    assert "nothing measured yet" in stopped.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_sizes_and_leaves_nothing(run, tiny, text_file, tmp_path):
    text = run(
        *("compare", "--config-name", "compare_domain", f"model.base_model_name={tiny}"),
        *(f"data.dataset_name={text_file}", "data.max_length=64", "training.mixed_precision=no"),
        *("--methods", "v1,lora,ia3,full", "--budget", "3000,6000", "--dry-run", "-o", tmp_path / "out"),
    ).stdout
    assert all(word in text for word in ("v1-r9", "v1-r18", "lora-r1", "lora-r3", "ia3", "full", "Nothing was trained"))
    assert "2,880" in text
    assert not (tmp_path / "out").exists()


def test_a_dry_run_checks_text_and_folder_and_tells_what_has_no_effect(run, tiny, text_file, tmp_path):
    asked = ("compare", "--config-name", "compare_domain", f"model.base_model_name={tiny}")
    asked += (f"data.dataset_name={text_file}", "data.max_length=64", "training.mixed_precision=no")
    asked += ("--methods", "v1,ia3", "--budget", "3000", "--dry-run", "-o", tmp_path / "out")
    told = run(*asked, "model.adapter_rank=4", "training.lora_rank=2", "training.lr=1e-4", "training.weight_decay=0.1")
    for name in (
        "model.adapter_rank is set by each method",
        "training.lora_rank is",
        "training.lr is set by --learning",
    ):
        assert name in told.stderr
    assert "weight_decay" not in told.stderr
    assert "without effect" not in run(*asked).stderr
    missing = run(*asked, "--held-out", tmp_path / "nowhere.txt", exit_code=1)
    assert "nowhere.txt' does not exist" in missing.stderr
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text('{"recipe": {"training.weight_decay": 0.5}, "data": "of before"}')
    refused = run(*asked, exit_code=1).stderr
    assert "was" in refused
    assert "Choose another folder" in refused


@pytest.mark.parametrize("recipe", ["compare_sft", "compare_metamath"])
def test_recipes_resolve(run, tiny, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr("pliant.training.plan.hub_is_reachable", lambda: False)
    monkeypatch.setattr("pliant.training.estimate.hub_is_reachable", lambda: False)
    base = [f"model.base_model_name={tiny}"] if recipe == "compare_sft" else []
    text = run("compare", "--config-name", recipe, *base, "--dry-run", "-o", tmp_path / "out").stdout
    assert "Nothing was trained" in text
    assert recipe == "compare_sft" or "not checked (offline)" in text


@pytest.mark.parametrize(
    ("arguments", "words", "exit_code"),
    [
        ((), ("--output",), 2),
        (("-o", "out", "--methods", "v1,lorra"), ("'lorra'", "Did you mean 'lora'"), 1),
        (("-o", "out", "--budget", "many"), ("--budget", "'many'"), 2),
        (("-o", "out", "--budget", "1.5"), ("--budget", "whole numbers"), 2),
        (("-o", "out", "--methods", "v1,,lora"), ("--methods", "commas"), 2),
        (("-o", "out", "--learning-rates", "fast"), ("--learning-rates", "'fast'"), 1),
        (
            ("-o", "out", "--dry-run", "--learning-rates", "3e-4", "--learning-rates", "1e-3"),
            ("one list", "'1e-3'", "commas"),
            1,
        ),
        (
            ("-o", "out", "--dry-run", "--learning-rates", "v1=1", "--learning-rates", "v1=2"),
            ("of v1 must be one list",),
            1,
        ),
        (("-o", "out", "--seeds", "0"), ("seeds must be at least 1",), 1),
        (("-o", "out", "training.lrr=1"), ("training.lrr", "training.lr"), 1),
        (("-o", "out", "--config-name", "guide"), ("training.objective", "sft or causal_lm"), 1),
        (("--versions", "--budget", "5"), ("--budget", "--versions"), 2),
        (("--versions", "--seeds", "2"), ("--seeds", "does not go with --versions"), 2),
        (("-o", "out", "--steps", "20"), ("--steps", "goes with --versions only"), 2),
        (("--versions", "training.lr=1"), ("KEY=VALUE", "--versions"), 2),
        (("--versions", "--rank", "100"), ("rank must be in 1..64",), 1),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path, monkeypatch, arguments, words, exit_code):
    monkeypatch.chdir(tmp_path)
    text = " ".join(run("compare", *arguments, exit_code=exit_code).stderr.replace("│", " ").split())
    assert all(word in text for word in words), text
    assert list(tmp_path.iterdir()) == []


def test_versions_are_shown_and_kept_where_asked(run, monkeypatch, tmp_path):
    from pliant.evaluation.comparison import versions as module

    monkeypatch.setattr(module, "BASE_STEPS", 3)
    monkeypatch.setattr(module, "REPEATS", 1)
    text = run("compare", "--versions", "--steps", 1, "--rank", 4, "-o", tmp_path / "out").stdout
    assert all(word in text for word in ("v1_single", "v2", "outer", "keyed", "‖ΔW‖", "nothing to train it towards"))
    kept = json.loads((tmp_path / "out/versions.json").read_text())
    assert kept["versions"]["keyed"]["rank"] == 4


def test_numbers_are_read_as_people_write_them():
    assert [whole_number(text) for text in ("1000000", "1_000_000", "1e6")] == [1_000_000] * 3
    assert parse_rates(["3e-4, 1e-3", "full=1e-5"]) == ([3e-4, 1e-3], {"full": [1e-5]})
    with pytest.raises(ConfigError, match="3e-4,1e-3"):
        parse_rates(["full=fast"])


def test_the_frontier_is_what_no_other_beats():
    points = {"a": (1.0, 3.0, 0.0), "b": (2.0, 2.0, 0.0), "c": (3.0, 2.5, 0.0), "d": (4.0, 1.0, 0.0)}
    assert frontier(points) == ["a", "b", "d"]
    assert frontier({"a": (1.0, 2.0, 0.0), "b": (1.0, 1.0, 0.0)}) == ["b"]


def test_the_picture_holds_every_method_against_every_cost(monkeypatch, tmp_path):
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k)))
    draw_comparison(result(), tmp_path / "a.png")
    (figure,) = drawn
    parameters, forgetting, seconds = figure.axes
    assert "parameters" in parameters.get_xlabel()
    assert "KL" in forgetting.get_xlabel()
    assert "lora-r4" in seconds.get_xlabel()
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"v1-r16", "lora-r4", "full", "the frozen base"}
    assert [len(axes.containers) for axes in figure.axes] == [3, 3, 2]
    draw_comparison(result(cost={}), tmp_path / "b.png")
    assert len(drawn[1].axes) == 2
