"""Editors on many cases: what is measured, what is taken back, and what a stop leaves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import pliant
from pliant.errors import ConfigError, DataError, EditError
from pliant.evaluation import EditCase, evaluate_batches, evaluate_edits, evaluate_sequence, summary
from pliant.evaluation.editing.run import json_hash, prepare_folder
from pliant.models.edits import Delta, Edit

CASES = [
    EditCase(
        id=str(i),
        context=f"{i} {i + 1}",
        prompt=f"{i} {i + 1}",
        answer=f"{i + 20}",
        subject=str(i),
        old_answer=f"{i + 30}",
        paraphrases=(f"{i + 2} {i}",),
        neighbours=((f"{i + 3} {i + 4}", f"{i + 40}"),),
    )
    for i in range(2, 8)
]
PATH = "layers.1.mlp.down_proj"


def write(_model: Any, _tokenizer: Any, case: EditCase) -> Edit | None:
    """A random rank-1 edit, the same one every time; none for case 3, and case 4 is refused."""
    if case.id == "3":
        return None
    if case.id == "4":
        raise EditError("alpha must be finite; got nan. Lower it.")
    generator = torch.Generator().manual_seed(int(case.id))
    delta = Delta(left=torch.randn(32, 1, generator=generator), right=torch.randn(48, 1, generator=generator))
    return Edit(context=case.context, deltas={PATH: delta}, details={"target": "context"}, id=f"{int(case.id):08x}")


def write_batch(model: Any, tokenizer: Any, cases: Any) -> Edit:
    edits = [edit for case in cases if case.id not in "34" and (edit := write(model, tokenizer, case))]
    deltas = [edit.deltas[PATH] for edit in edits]
    delta = Delta(left=torch.cat([d.left for d in deltas], 1), right=torch.cat([d.right for d in deltas], 1))
    return Edit(context="all", deltas={PATH: delta})


@pytest.fixture
def options(calibration: torch.Tensor, tmp_path: Path) -> dict[str, Any]:
    return {"output": tmp_path / "results", "name": "random", "held_out": calibration[:2]}


@pytest.fixture
def model(make_base: Callable[..., Any], tmp_path: Path) -> Any:
    make_base().save_pretrained(tmp_path / "base")
    return pliant.load(tmp_path / "base")


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_single_edits_are_measured_and_taken_back(
    model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], state_of: Callable[..., Any]
):
    before = state_of(model)
    steps: list[tuple[str, int, int]] = []
    records = evaluate_edits(model, tokenizer, CASES, write, **options, progress=lambda *step: steps.append(step))
    assert len(model.edits) == 0
    assert state_of(model) == before
    assert [record["id"] for record in records] == [case.id for case in CASES]
    assert steps == [("Measuring the unedited model", 6, 6), *(("Evaluating random", i, 6) for i in range(1, 7))]
    unedited = [json.loads(line) for line in (options["output"] / "before.jsonl").read_text().splitlines()]
    for record, old in zip(records, unedited, strict=True):
        if record["id"] in "34":
            assert record["edited"] == 0.0
            assert record["log_prob"] == pytest.approx(old["log_prob"], rel=1e-4)
            assert (record["perplexity_ratio"], record["kl"]) == (1.0, 0.0)
        else:
            assert record["edit"]["details"] == {"target": "context"}
            assert (record["edit"]["layers"], record["edit"]["rank"]) == ([1], 1)
            assert record["log_prob"] != pytest.approx(old["log_prob"], rel=1e-4)
            assert record["kl"] > 0
    assert records[2]["refusal"] == "alpha must be finite; got nan. Lower it."
    assert summary(records)["edited"].value == pytest.approx(4 / 6)


def test_a_stopped_run_goes_on(model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], tmp_path: Path):
    whole = evaluate_edits(model, tokenizer, CASES, write, **{**options, "output": tmp_path / "whole"})
    seen: list[str] = []

    def stops(model: Any, tokenizer: Any, case: EditCase) -> Edit | None:
        seen.append(case.id)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return write(model, tokenizer, case)

    with pytest.raises(KeyboardInterrupt):
        evaluate_edits(model, tokenizer, CASES, stops, **options)
    assert len(model.edits) == 0
    file = options["output"] / "random.jsonl"
    file.write_bytes(file.read_bytes()[:-5])  # a stop in the middle of a line
    resumed = evaluate_edits(model, tokenizer, CASES, stops, **options)
    assert seen == ["2", "3", "4", "5", "4", "5", "6", "7"]
    assert without_times(resumed) == without_times(whole)
    evaluate_edits(model, tokenizer, CASES, stops, **options)
    assert len(seen) == 8


def test_an_editor_may_apply_its_edit_itself(
    model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], tmp_path: Path
):
    def applies(model: Any, tokenizer: Any, case: EditCase) -> Edit | None:
        edit = write(model, tokenizer, case)
        return None if edit is None else model.edits.add(edit)

    whole = evaluate_edits(model, tokenizer, CASES, write, **{**options, "output": tmp_path / "whole"})
    assert without_times(evaluate_edits(model, tokenizer, CASES, applies, **options)) == without_times(whole)
    assert len(model.edits) == 0


def test_without_an_editor_the_context_is_in_view(
    model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
):
    records = evaluate_edits(model, tokenizer, CASES, None, **options)
    asked = [replace(case.in_context(), id="x" + case.id) for case in CASES]
    other = evaluate_edits(model, tokenizer, asked, lambda *_: None, **{**options, "name": "none"})
    for record, same in zip(records, other, strict=True):
        assert record["log_prob"] == pytest.approx(same["log_prob"], rel=1e-4)
        assert "seconds" not in record


def test_a_sequence_is_measured_at_its_counts(model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]):
    found = evaluate_sequence(model, tokenizer, CASES, write, counts=(1, 4, 6, 100), **options)
    assert {count: len(records) for count, records in found.items()} == {1: 1, 4: 4, 6: 6}
    assert len(model.edits) == 0
    alone = evaluate_edits(model, tokenizer, CASES, write, **{**options, "name": "alone"})
    assert found[1][0]["log_prob"] == pytest.approx(alone[0]["log_prob"], rel=1e-4)
    assert found[6][0]["log_prob"] != pytest.approx(alone[0]["log_prob"], rel=1e-4)
    assert found[4][0]["edited"] == 0.5
    assert found[4][0]["kl"] == found[4][3]["kl"]
    batches = evaluate_batches(model, tokenizer, CASES, write_batch, counts=(1, 6), **{**options, "name": "batch"})
    assert len(model.edits) == 0
    for count, records in batches.items():
        for record, same in zip(records, found[count], strict=True):
            assert record["log_prob"] == pytest.approx(same["log_prob"], rel=1e-3)


@pytest.mark.parametrize("remembers", [False, True])
def test_a_stopped_sequence_goes_on(
    model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], tmp_path: Path, remembers: bool
):
    arguments: dict[str, Any] = {"counts": (2, 6), "remembers": remembers}
    elsewhere = {**options, "output": tmp_path / "whole"}
    whole = evaluate_sequence(model, tokenizer, CASES, write, **arguments, **elsewhere)
    seen: list[str] = []

    def stops(model: Any, tokenizer: Any, case: EditCase) -> Edit | None:
        seen.append(case.id)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return write(model, tokenizer, case)

    with pytest.raises(KeyboardInterrupt):
        evaluate_sequence(model, tokenizer, CASES, stops, **arguments, **options)
    assert len(model.edits) == 0
    resumed = evaluate_sequence(model, tokenizer, CASES, stops, **arguments, **options)
    assert seen[5:] == (["2", "3", "4", "5", "6", "7"] if remembers else ["6", "7"])
    for count, records in whole.items():
        assert without_times(resumed[count]) == without_times(records)


def test_a_batch_is_made_once(model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]):
    first = evaluate_batches(model, tokenizer, CASES, write_batch, counts=(2, 6), **options)
    (options["output"] / "random-6.jsonl").unlink()
    again = evaluate_batches(model, tokenizer, CASES, lambda *_: pytest.fail("made again"), counts=(2, 6), **options)
    assert without_times(again[6]) == without_times(first[6])
    with pytest.raises(DataError, match="edit 2 must be of the same cases"):
        evaluate_batches(model, tokenizer, CASES[1:], write_batch, counts=(2,), **options)


def test_results_are_not_mixed(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    make_base: Callable[..., Any],
    tmp_path: Path,
):
    evaluate_edits(model, tokenizer, CASES[:2], write, **options)
    evaluate_edits(model, tokenizer, CASES[:3], write, **options)
    with pytest.raises(ConfigError, match=r"settings\.layers was None"):
        evaluate_edits(model, tokenizer, CASES[:2], write, **options, settings={"layers": [1]})
    with pytest.raises(ConfigError, match="entropy was False"):
        evaluate_edits(model, tokenizer, CASES[:2], write, **options, entropy=True)
    with pytest.raises(DataError, match="case 2 must be the one that was measured"):
        evaluate_edits(model, tokenizer, [replace(CASES[0], answer="50")], write, **options)
    model.edits.add(write(model, tokenizer, CASES[5]))
    with pytest.raises(ConfigError, match="edits was"):
        evaluate_edits(model, tokenizer, CASES[:2], write, **options)
    make_base(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="base was"):
        evaluate_edits(pliant.load(tmp_path / "other"), tokenizer, CASES[:2], write, **options)


def test_thresholds_are_part_of_the_model(make_routed: Callable[..., Any], calibration: torch.Tensor, tmp_path: Path):
    model = make_routed("mod")
    prepare_folder(model, tmp_path)
    prepare_folder(model, tmp_path)
    pliant.calibrate(model, calibration=calibration[:3])
    with pytest.raises(ConfigError, match="changes was"):
        prepare_folder(model, tmp_path)


def test_folders_of_models_without_thresholds_stay_theirs(make_converted: Callable[..., Any], tmp_path: Path):
    model = make_converted("v1")
    prepare_folder(model, tmp_path)
    added = [parameter.flatten()[:4].tolist() for _, parameter in model.dynamic_parameters()]
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["changes"] == json_hash([model.config.pliant, added])


@pytest.mark.parametrize("name", ["", "before", "a/b"])
def test_bad_names(model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], name: str):
    with pytest.raises(ConfigError, match="name must be a file name"):
        evaluate_edits(model, tokenizer, CASES, write, **{**options, "name": name})


def test_bad_arguments(model: Any, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]):
    with pytest.raises(DataError, match="at least one case"):
        evaluate_edits(model, tokenizer, [], write, **options)
    for counts in ((), (0, 1)):
        with pytest.raises(ConfigError, match="counts must be numbers of cases"):
            evaluate_sequence(model, tokenizer, CASES, write, counts=counts, **options)
