"""Editors by name, what they are told of a case, and suites that are measured with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import pliant
from pliant.consolidation import Consolidation, stages
from pliant.consolidation.queries import QUESTION
from pliant.errors import ConfigError, DataError, EditError
from pliant.evaluation import EDITORS, EditCase, Learn, evaluate, evaluate_edits, suites
from pliant.evaluation.baselines import RandomDirection
from pliant.evaluation.baselines.values import REUSED, ValueSearch
from pliant.evaluation.editing import editors, figures
from pliant.evaluation.editing.cases import counterfact
from pliant.evaluation.editing.editors import OWN, editor_named, editor_settings
from pliant.evaluation.records import Records
from pliant.models.edits import Delta, Edit

PATH = "layers.1.mlp.down_proj"
OPEN = Consolidation(target="unembedding", kl_budget=None)
STATEMENT = EditCase(id="0", context="5 6 7 20.", prompt="5 6 7", answer="20", subject="6 7", old_answer="21")
PASSAGE = EditCase(
    id="1",
    context="8 9 10 11 12",
    prompt=QUESTION.format("8 9 ?"),
    answer="10",
    subject="9",
    references=("10", "10 11"),
    questions=((QUESTION.format("11 "), ("12",)),),
)


@pytest.fixture
def model(make_base: Callable[..., Any], tmp_path: Path) -> Any:
    make_base().save_pretrained(tmp_path / "base")
    return pliant.load(tmp_path / "base").eval()


@pytest.fixture(autouse=True)
def small_texts(calibration: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neutral and held-out text of a few windows, and statistics in a folder of the test's own."""
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))
    for module in ("consolidation.resources", "key_moments"):
        monkeypatch.setattr(f"pliant.{module}.calibration_tokens", lambda *_, **__: calibration)
    monkeypatch.setattr("pliant.evaluation.editing.run.held_out_tokens", lambda _: calibration[:2])


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What ``consolidate`` is given, in place of learning it."""
    calls: list[tuple[Any, ...]] = []

    def record(model: Any, _tokenizer: Any, *given: Any, settings: Consolidation) -> Edit:
        calls.append((*given, settings))
        delta = Delta(left=torch.ones(32, 1), right=torch.ones(48, 1))
        return model.edits.add(Edit(context="", deltas={PATH: delta}))

    monkeypatch.setattr(editors, "consolidate", record)
    return calls


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five CounterFact records in the words of the tiny tokenizer."""
    records = [
        {
            "case_id": i,
            "prompt": f"{i} {i + 1} {i + 2}",
            "target_new": str(i + 20),
            "subject": f"{i + 1} {i + 2}",
            "ground_truth": str(i + 30),
            "rephrase_prompt": f"{i + 3} {i + 1} {i + 2}",
            "locality_prompt": f"{i + 4} {i + 5}",
            "locality_ground_truth": str(i + 40),
        }
        for i in range(2, 7)
    ]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    return tmp_path / "facts.json"


def test_a_statement_is_learned_from_its_prompt(model: Any, tokenizer: PreTrainedTokenizerFast, told: list[Any]):
    edit = Learn(settings=OPEN)(model, tokenizer, STATEMENT)
    assert told == [(["5 6 7 20."], [["5 6 7"]], ["20"], ["6 7"], OPEN)]
    assert edit.id not in model.edits


def test_a_passage_is_learned_from_its_questions_alone(model: Any, tokenizer: PreTrainedTokenizerFast, told: list[Any]):
    Learn(settings=OPEN).batch(model, tokenizer, [PASSAGE, STATEMENT])
    assert told == [
        (
            [PASSAGE.context, PASSAGE.context, STATEMENT.context],
            [["8 9 ?"], ["11?"], ["5 6 7"]],
            [None, None, "20"],
            ["9", None, "6 7"],  # only where the question names it
            OPEN,
        )
    ]


def test_made_queries_take_the_context_alone(model: Any, tokenizer: PreTrainedTokenizerFast, told: list[Any]):
    editor = EDITORS["made"]()
    editor(model, tokenizer, PASSAGE)
    assert told == [([PASSAGE.context], None, None, None, Consolidation(target="auto"))]


def test_no_cases_are_refused(model: Any, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(EditError, match="cases must hold at least one; got none"):
        Learn(settings=OPEN).batch(model, tokenizer, [])


def test_learning_makes_the_answer_likelier_and_leaves_the_model(
    model: Any, tokenizer: PreTrainedTokenizerFast, state_of: Callable[..., Any], tmp_path: Path
):
    before = state_of(model)
    learn = Learn(settings=OPEN)
    edit = learn(model, tokenizer, STATEMENT)
    assert state_of(model) == before
    assert not len(model.edits)
    control = RandomDirection(editor=learn)(model, tokenizer, STATEMENT)
    assert not len(model.edits)
    assert control.norm == pytest.approx(edit.norm, rel=1e-4)
    (record,) = evaluate_edits(model, tokenizer, [STATEMENT], learn, output=tmp_path / "results", name="learn")
    unedited = json.loads((tmp_path / "results" / "before.jsonl").read_text())
    assert record["log_prob"] > unedited["log_prob"]
    assert record["edited"] == 1.0
    assert not len(model.edits)


def test_the_table_makes_editors_with_settings_that_can_be_written_down(model: Any, tokenizer: PreTrainedTokenizerFast):
    def settings_of(name: str) -> Any:
        return editor_settings(editor_named(name), model, tokenizer)

    assert set(OWN) < set(EDITORS)
    for name in EDITORS:
        assert json.loads(json.dumps(settings_of(name))) == settings_of(name)
    assert settings_of("random")["editor"] == settings_of("unembedding")
    assert settings_of("context")["settings"]["target"] == "context"
    assert {"moments", "found"}.isdisjoint(settings_of("memit"))
    method = settings_of("auto")["settings"]["method"]
    assert (method["subject_layers"], method["answer_layers"]) == Consolidation().places(model)
    assert method["steps"] == stages.STEPS


@pytest.mark.parametrize(
    ("place", "value", "name"),
    [
        ("stages.STRENGTHS", (1.0,), "strengths"),
        ("stages.CLAMP", 2.0, "clamp"),
        ("solve.SUBJECT_BUDGET", 0.5, "subject_budget"),
        ("settings.SUBJECT_DEPTH", 0.4, "subject_layers"),
        ("resources.calibration_tokens", lambda *_, **__: torch.ones(2, 8, dtype=torch.long), "neutral_text"),
    ],
)
def test_a_run_does_not_go_on_with_another_method(
    place: str,
    value: Any,
    name: str,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[Any],
):
    options: dict[str, Any] = {"data": data, "records": 1, "output": tmp_path / "results"}
    evaluate(model, tokenizer, "counterfact", ["auto"], **options)
    monkeypatch.setattr(f"pliant.consolidation.{place}", value)
    with pytest.raises(ConfigError, match=rf"settings\.settings\.method\.{name} was"):
        evaluate(model, tokenizer, "counterfact", ["auto"], **options)
    assert len(told) == 1


def test_an_edit_that_is_refused_is_no_drift(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path):
    def refuse(*_: Any) -> None:
        raise EditError("it cannot be")

    (record,) = evaluate_edits(model, tokenizer, [STATEMENT], refuse, output=tmp_path / "results", name="refuse")
    assert (record["edited"], record["refusal"]) == (0.0, "it cannot be")
    assert (record["perplexity_ratio"], record["kl"]) == (1.0, 0.0)


def test_what_another_editor_searched_is_not_searched_again(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    searched: list[Any] = []
    search = ValueSearch.search
    monkeypatch.setattr(ValueSearch, "search", lambda self, *given: searched.append(given) or search(self, *given))
    output = tmp_path / "results"
    evaluate(model, tokenizer, "counterfact", ["memit", "alphaedit"], data=data, records=2, output=output)
    assert len(searched) == 2
    first, second = (Records(output / f"{name}.jsonl").all() for name in ("memit", "alphaedit"))
    assert not [record for record in first if REUSED in record["edit"]["details"]]
    for one, other in zip(first, second, strict=True):
        assert 0 < other["edit"]["details"][REUSED] < one["seconds"]
        assert other["seconds"] > other["edit"]["details"][REUSED]
    found = editor_named("memit")
    model.edits.add(Edit(context="", deltas={PATH: Delta(left=torch.ones(32, 1), right=torch.ones(48, 1))}))
    found(model, tokenizer, counterfact(data)[0])
    assert len(searched) == 3


def test_earlier_keys_are_remembered_only_where_edits_stay():
    assert editor_named("alphaedit").memory is None
    memories = [editor_named("alphaedit", mode="sequential").memory for _ in range(2)]
    assert None not in memories
    assert memories[0] is not memories[1]


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("romeo", "single", r"editor must be one of untouched, .*; got 'romeo'. Did you mean 'rome'\?"),
        ("untouched", "sequential", "editors must make edits for mode='sequential'; got 'untouched'"),
        ("in_context", "sequential", "editors must make edits for mode='sequential'; got 'in_context'"),
        ("rome", "batched", "editors must be of context, .*, lora for mode='batched'; got 'rome'"),
    ],
)
def test_names_that_do_not_fit_are_refused(name: str, mode: str, message: str):
    with pytest.raises(ConfigError, match=message):
        editor_named(name, mode=mode)


def test_a_suite_is_reported_beside_what_was_measured_before(
    model: Any, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
):
    def run(*names: str, **options: Any) -> dict[str, Any]:
        return evaluate(model, tokenizer, "counterfact", names, data=data, output=tmp_path / "results", **options)

    first = run("unembedding", records=4)
    assert list(first["editors"]) == ["untouched", "unembedding"]
    own = first["editors"]["unembedding"]
    assert own["records"] == own["exact"]["count"] == 4
    assert own["score"]["low"] <= own["score"]["value"] <= own["score"]["high"]
    assert own["needed_gradients"] == 0.0
    assert own["median_seconds"] > 0
    ratios = [case["perplexity_ratio"] for case in own["worst_perplexity"]]
    assert ratios == sorted(ratios, reverse=True)
    assert len(ratios) == own["edited"]["value"] * 4
    untouched = first["editors"]["untouched"]
    drop = own["neighbourhood_drop"]["value"]
    assert drop == pytest.approx(untouched["neighbourhood"]["value"] - own["neighbourhood"]["value"])
    gain = first["differences"]["unembedding"]["untouched"]["exact"]["value"]
    assert gain == pytest.approx(own["exact"]["value"] - untouched["exact"]["value"])
    second = run("in_context", records=2)
    assert list(second["editors"]) == ["untouched", "in_context", "unembedding"]
    assert {own["records"] for own in second["editors"].values()} == {2}
    everything = figures.report(tmp_path / "results", counterfact(data))
    assert [own["records"] for own in everything["editors"].values()] == [4, 2, 4]
    assert everything["differences"]["unembedding"]["in_context"]["exact"]["count"] == 2
    assert json.dumps(everything, allow_nan=False)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_many_edits_are_reported_by_their_number(
    model: Any, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path, mode: str
):
    output = tmp_path / "results"
    options = {"data": data, "output": output, "mode": mode, "records": None, "counts": (1, 3, 100)}
    found = evaluate(model, tokenizer, "counterfact", ["unembedding"], **options)
    assert [part["count"] for part in found["counts"]] == [1, 3]
    for part in found["counts"]:
        assert part["editors"]["unembedding"]["records"] == part["count"]
        assert part["editors"]["untouched"]["records"] == part["count"]
    assert (output / f"unembedding-{mode}-3.jsonl").is_file()
    assert not len(model.edits)


def test_shares_of_a_gap_are_reported():
    values = {"untouched": (0.2, 0.0), "in_context": (1.0, 0.8), "auto": (0.7, 0.5), "made": (0.6, 0.4)}
    runs = {name: [{"id": str(i), "f1": f1} for i, f1 in enumerate(pair)] for name, pair in values.items()}
    runs["auto"].append({"id": "2", "f1": 0.0})  # of one more case
    assert figures.figures("auto", runs)["recovered_of_in_context"]["f1"]["value"] == pytest.approx(5 / 8)
    made = figures.figures("made", runs)
    assert made["recovered_of_in_context"]["f1"]["value"] == pytest.approx(4 / 8)
    assert made["recovered_of_auto"]["f1"]["value"] == pytest.approx(4 / 5)
    assert "recovered_of_in_context" not in figures.figures("in_context", runs)


def test_retention_reads_the_model_beside_its_base(
    make_converted: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    calibration: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    asked = [
        suites.ChoiceQuestion(id=str(i), prompt=f"{i} {i + 1}", choices=("50 51", "7", "90"), answer=i % 3)
        for i in range(2, 7)
    ]
    monkeypatch.setattr(suites, "held_out_tokens", lambda *_, **__: calibration[:2])
    monkeypatch.setattr(suites, "mmlu", lambda records: asked[:records])
    monkeypatch.setattr(suites, "hellaswag", lambda records: asked[:records])
    model = make_converted("v2")
    found = evaluate(model, tokenizer, "retention", output=tmp_path / "kept", records=3)
    assert found["ratio"] == pytest.approx(found["perplexity"] / found["base_perplexity"])
    assert found["kl"] > 0
    for kind in ("mmlu", "hellaswag"):
        sides = found[kind]
        assert sides["difference"]["value"] == pytest.approx(sides["model"]["value"] - sides["base"]["value"])
        assert sides["model"]["count"] == 3
    monkeypatch.setattr(suites, "choice_records", lambda _model, _tokenizer, missing, **_: list(missing))
    assert evaluate(model, tokenizer, "retention", output=tmp_path / "kept", records=3)["mmlu"] == found["mmlu"]


@pytest.mark.parametrize(
    ("suite", "options", "message"),
    [
        ("counterfacts", {}, r"suite must be one of counterfact, .*; got 'counterfacts'. Did you mean 'counterfact'\?"),
        ("counterfact", {"data": None}, "data must be a file of cases for suite='counterfact'; got None"),
        ("squad_closed_book", {}, "data must be left out for suite='squad_closed_book'"),
        ("counterfact", {"records": 0}, "records must be at least 1; got 0"),
        ("counterfact", {"start": -1}, "start must be at least 0; got -1"),
        ("counterfact", {"start": 5}, "start must be below the number of cases, 5; got 5"),
        ("counterfact", {"mode": "batch"}, r"mode must be one of single, .*; got 'batch'. Did you mean 'batched'\?"),
        ("counterfact", {"editors": []}, "editors must name at least one editor; got none"),
        ("counterfact", {"editors": ["moon"]}, "editor must be one of"),
        ("counterfact", {"editors": ["context"], "mode": "batched", "counts": [0]}, "counts must be numbers of cases"),
        ("retention", {}, "suite='retention' takes no data, start or mode"),
    ],
)
def test_what_cannot_be_measured_is_named(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    data: Path,
    tmp_path: Path,
    suite: str,
    options: dict[str, Any],
    message: str,
):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, tokenizer, suite, **{"data": data, "output": tmp_path / "results", **options})


def test_a_missing_file_and_a_folder_of_another_model_are_named(
    model: Any, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
):
    with pytest.raises(DataError, match="must be a readable JSON file"):
        evaluate(model, tokenizer, "counterfact", data=tmp_path / "none.json", output=tmp_path / "results")
    output = tmp_path / "results"
    evaluate(model, tokenizer, "counterfact", ["untouched"], data=data, output=output)
    model.edits.add(Edit(context="", deltas={PATH: Delta(left=torch.ones(32, 1), right=torch.ones(48, 1))}))
    with pytest.raises(ConfigError, match="output must be a new folder or one of the same run; edits was"):
        evaluate(model, tokenizer, "counterfact", ["untouched"], data=data, output=output)
