"""In-context tasks: what is asked, and that scores are those of the model, with the context and without it."""

import pytest
import torch

from pliant.errors import ConfigError, DataError
from pliant.evaluation.comparison.in_context import (
    ARBITRARY,
    SENTIMENTS,
    TASKS,
    ContextQuestion,
    classification,
    in_context_records,
    reading,
    recall,
    symbols,
    task_questions,
)


def log_p(model, ids, token):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()


@pytest.fixture
def model(make_base):
    return make_base("llama")


def test_scores_are_those_of_the_model_with_and_without_the_context(model, tokenizer):
    asked = ContextQuestion(id="a", context="5 6 7 8 ", question="5", answers=("6",))
    (record,) = in_context_records(model, tokenizer, [asked])
    within, alone = log_p(model, [5, 6, 7, 8, 5], 6), log_p(model, [5], 6)
    assert record["log_prob"] == pytest.approx(within, abs=1e-5)
    assert record["gain"] == pytest.approx(within - alone, abs=1e-5)
    assert record["correct"] in (0.0, 1.0)


def test_correct_is_what_the_model_would_say(model, tokenizer):
    with torch.no_grad():
        likeliest = int(model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
    assert likeliest > 1  # a word of the tokenizer
    other = 9 if likeliest != 9 else 10
    asked = [
        ContextQuestion(id=str(answer), context="5 6 ", question="7", answers=(str(answer),))
        for answer in (likeliest, other)
    ]
    assert [record["correct"] for record in in_context_records(model, tokenizer, asked)] == [1.0, 0.0]


def test_a_choice_is_the_likeliest_of_those_given(model, tokenizer):
    scores = {token: log_p(model, [5, 6, 7], token) for token in (20, 30)}
    best = max(scores, key=scores.__getitem__)
    asked = [
        ContextQuestion(id=str(right), context="5 6 ", question="7", answers=(str(right),), choices=("20", "30"))
        for right in scores
    ]
    found = {record["id"]: record["correct"] for record in in_context_records(model, tokenizer, asked)}
    assert found == {str(token): float(token == best) for token in scores}


def test_a_free_answer_is_what_the_model_writes(model, tokenizer):
    with torch.no_grad():
        written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=24, do_sample=False)[0, 3:]
    text = tokenizer.decode(written)
    first = text.split()[0]
    asked = [
        ContextQuestion(id="whole", context="5 6 ", question="7", answers=(text,), is_free=True),
        ContextQuestion(id="part", context="5 6 ", question="7", answers=(f"{first} 2 3 4",), is_free=True),
    ]
    whole, part = in_context_records(model, tokenizer, asked)
    assert (whole["correct"], whole["f1"]) == (1.0, 1.0)
    assert part["correct"] == 0.0
    assert part["f1"] < 1.0


def test_lists_to_look_up_hold_every_answer_once():
    asked = recall(20, seed=3, pairs=8)
    assert asked == recall(20, seed=3, pairs=8)
    assert asked != recall(20, seed=4, pairs=8)
    for question in asked:
        lines = question.context.splitlines()
        assert len(lines) == len(set(lines)) == 8
        assert lines.count(f"{question.question} {question.answers[0]}.") == 1


def test_examples_are_balanced_and_not_asked():
    asked = classification(30, shots=8)
    for question in asked:
        shown = [line.removeprefix("Label: ") for line in question.context.splitlines() if line.startswith("Label")]
        assert sorted(shown) == ["negative"] * 4 + ["positive"] * 4
        assert question.question.splitlines()[0] not in question.context.splitlines()
        assert question.choices == SENTIMENTS
    assert [question.answers[0] for question in asked[:4]] == ["negative", "positive"] * 2
    assert len({question.context for question in asked}) > 1  # the order differs


def test_symbols_say_nothing_of_the_sentiment():
    plain, hidden = classification(6), symbols(6)
    for left, right in zip(plain, hidden, strict=True):
        assert right.choices == ARBITRARY
        assert right.answers[0] == ARBITRARY[SENTIMENTS.index(left.answers[0])]
        assert not any(word in right.context for word in ("Label: negative", "Label: positive"))


def test_passages_hold_their_answers():
    asked = reading(10, seed=1)
    assert len({question.id for question in asked}) == 10
    assert all(question.answers[0] in question.context for question in asked)
    assert all(question.is_free for question in asked)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: recall(0), "limit"),
        (lambda: recall(1, pairs=1), "pairs"),
        (lambda: classification(1, shots=3), "shots"),
        (lambda: task_questions(["recalls"], 1), "Did you mean 'recall'"),
    ],
)
def test_what_is_out_of_range_is_named(call, word):
    with pytest.raises(ConfigError, match=word):
        call()


def test_a_context_beyond_the_positions_is_refused(model, tokenizer):
    asked = ContextQuestion(id="a", context="5 " * 80, question="5", answers=("6",))
    with pytest.raises(DataError, match=r"64 positions of the model; got 82"):
        in_context_records(model, tokenizer, [asked])


def test_every_task_has_as_many_questions_as_asked():
    assert {name: len(asked) for name, asked in task_questions(list(TASKS), 3).items()} == dict.fromkeys(TASKS, 3)
