"""The measures of a case, each beside the same thing computed a text at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pliant.evaluation.answers import exact_match, f1, generation_entropy, normalised
from pliant.evaluation.editing import scores as editing
from pliant.evaluation.editing.cases import EditCase
from pliant.evaluation.editing.scores import neighbour_continuations, score_case, score_cases
from pliant.evaluation.scoring import answer_log_probs

CASE = EditCase(
    id="a",
    context="2 3 4",
    prompt="5 6",
    answer="7 8",
    subject="5",
    old_answer="9",
    paraphrases=("10 11 12", "13"),
    neighbours=(("14 15", "16"), ("17", "18 19")),
)


@pytest.fixture
def model(make_base: Callable[..., Any]) -> Any:
    return make_base()


def test_measures_are_those_of_each_pair_alone(model: Any, tokenizer: PreTrainedTokenizerFast):
    def log_p(prompt: str, answer: str) -> float:
        return answer_log_probs(model, tokenizer, [(prompt, answer)]).mean.item()

    found = score_case(model, tokenizer, CASE, neighbour_continuations(model, tokenizer, [CASE])[0])
    assert found["log_prob"] == pytest.approx(log_p("5 6", "7 8"), rel=1e-4)
    assert found["efficacy"] == float(log_p("5 6", "7 8") > log_p("5 6", "9"))
    magnitude = math.exp(log_p("5 6", "7 8")) - math.exp(log_p("5 6", "9"))
    assert found["efficacy_magnitude"] == pytest.approx(magnitude, abs=1e-5)
    asked = [(log_p(prompt, "7 8"), log_p(prompt, "9")) for prompt in CASE.paraphrases]
    assert found["paraphrase"] == sum(new > old for new, old in asked) / 2
    assert found["log_prob_paraphrase"] == pytest.approx(sum(new for new, _ in asked) / 2, rel=1e-4)
    near = [(log_p(prompt, true), log_p(prompt, "7 8")) for prompt, true in CASE.neighbours]
    assert found["neighbourhood"] == sum(true > new for true, new in near) / 2
    assert found["log_prob_neighbourhood"] == pytest.approx(sum(true for true, _ in near) / 2, rel=1e-4)
    assert found["neighbourhood_unchanged"] == 1.0
    assert "f1" not in found
    assert "generation_entropy" not in found


def test_cases_together_are_cases_alone(model: Any, tokenizer: PreTrainedTokenizerFast):
    cases = [CASE, EditCase(id="b", context="20", prompt="21 22 23", answer="24", subject="21"), CASE.in_context()]
    before = neighbour_continuations(model, tokenizer, cases)
    assert [len(written) for written in before] == [2, 0, 2]
    together = score_cases(model, tokenizer, cases, before)
    for case, written, found in zip(cases, before, together, strict=True):
        assert score_case(model, tokenizer, case, written) == pytest.approx(found, rel=1e-4, abs=1e-6)
    assert set(together[1]) == {"log_prob", "exact", "accuracy"}


def test_another_continuation_of_a_neighbour_is_seen(
    model: Any, tokenizer: PreTrainedTokenizerFast, make_base: Callable[..., Any]
):
    (before,) = neighbour_continuations(model, tokenizer, [CASE])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(-2)
    assert neighbour_continuations(model, tokenizer, [CASE])[0] != before
    assert score_case(model, tokenizer, CASE, before)["neighbourhood_unchanged"] < 1.0


def test_free_text_is_measured_over_all_questions(
    model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    case = replace(CASE, references=("7 8", "7"), questions=(("20 21", ("22",)),))
    prompts: list[str] = []

    def fake(_model: Any, _tokenizer: Any, asked: list[str]) -> list[str]:
        prompts.extend(asked)
        return ["7", "22 23"][: len(asked)]

    monkeypatch.setattr(editing, "free_answers", fake)
    found = score_case(model, tokenizer, case, [[2], [3]])
    assert prompts == ["5 6", "20 21"]
    assert found["answers"] == ["7", "22 23"]
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx((1 + 2 / 3) / 2)


def test_entropy_is_optional(model: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(editing, "ENTROPY_TOKENS", 8)
    found = score_case(model, tokenizer, CASE, [[2], [3]], entropy=True)
    assert 0.0 <= found["generation_entropy"] <= 100 * (math.log2(7) + 2 * math.log2(6)) / 3 + 1e-9


def test_entropy_of_ngrams():
    assert generation_entropy("") == generation_entropy("word") == 0.0
    assert generation_entropy("no no no no no no") == 0.0
    four = "a b c d e"  # four pairs, three triples, each once
    assert generation_entropy(four) == pytest.approx(100 * (2 / 3 * 2 + 4 / 3 * math.log2(3)) / 2)
    assert generation_entropy("it's so.") == generation_entropy("a b c")


def test_squad_compares_words_without_articles_and_punctuation():
    assert normalised("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert exact_match("the Rome.", ["Milan", "rome"]) == 1.0
    assert exact_match("Rome, Italy", ["Rome"]) == 0.0
    assert f1("Rome, Italy", ["Milan", "Rome"]) == pytest.approx(2 / 3)
    assert f1("", ["Rome"]) == 0.0
    assert f1("the", ["a"]) == 1.0
