"""Rows: the tokens of a prompt and its answer, the place of the subject, and filling up."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pliant.consolidation.rows import Row, fill_token, gathered, padded, row, subject_place
from pliant.errors import EditError

PROMPT = "The capital of France is"


def tokens_of(speaker: Any, text: str) -> list[str]:
    ids = speaker(text)["input_ids"]
    return speaker.convert_ids_to_tokens(ids[:-1] if ids[-1] == speaker.eos_token_id else ids)


@pytest.mark.parametrize(
    ("prompt", "lead"),
    [(PROMPT, " "), ("Question: What is the capital?\n", ""), (PROMPT + " ", ""), (PROMPT + "…", " ")],
)
@pytest.mark.parametrize("answer", ["Paris", "the violin in Lisbon", "Zoë", "  Paris "])
def test_a_row_has_the_tokens_of_the_whole_text(speaker: Any, prompt: str, lead: str, answer: str):
    found = row(speaker, prompt, answer, fact=3)
    assert speaker.convert_ids_to_tokens(found.ids) == tokens_of(speaker, prompt + lead + answer.strip())
    assert speaker.decode(found.answer).strip() == answer.strip()
    assert speaker.decode(found.ids[: -found.length], skip_special_tokens=True).strip() == prompt.strip()
    assert [found.ids[place + 1] for place in found.places] == list(found.answer)
    assert len(found.places) == found.length == len(found.answer)
    assert found.subject is None
    assert found.fact == 3


def test_an_answer_that_would_change_the_last_token_of_the_prompt_is_read_by_itself():
    vocabulary = {"<unk>": 0, "a": 1, "\n": 2, "b": 3, "\nb": 4}
    backend = Tokenizer(BPE(vocabulary, merges=[("\n", "b")], unk_token="<unk>"))
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert merging("a\nb")["input_ids"] == [1, 4]
    found = row(merging, "a\n", "b", subject="a")
    assert (found.ids, found.length, found.subject) == ((1, 2, 3), 1, 0)


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("The capital of France is", "France", "France"),
        ("The capital of France is", "The", "The"),
        ("The capital of France is", "capital of France", "France"),
        ("France is not France, says", "France", "France"),
        ("Zoë plays for Zoë in", "Zoë", "Zoë"),
        ("What plays Zoë 日本語 in", "Zoë 日本語", "語"),
        ("The 🎻 is", "🎻", "🎻"),
    ],
)
def test_the_subjects_place_is_the_last_token_of_its_last_mention(
    speaker: Any, prompt: str, subject: str, expected: str
):
    found = row(speaker, prompt, "Paris", subject=subject)
    assert found.subject is not None
    end = prompt.rfind(subject) + len(subject)
    upto = speaker.decode(found.ids[: found.subject + 1], skip_special_tokens=True).strip()
    assert upto == prompt[:end]
    before = speaker.decode(found.ids[: found.subject], skip_special_tokens=True).strip()
    assert before != prompt[:end]
    assert upto.endswith(expected)


@pytest.mark.parametrize("subject", [None, "", "Germany", "france"])
def test_a_subject_that_is_not_there_has_no_place(speaker: Any, subject: str | None):
    assert row(speaker, PROMPT, "Paris", subject=subject).subject is None


def test_a_subject_in_the_answer_alone_has_no_place(speaker: Any):
    assert row(speaker, PROMPT, "Paris", subject="Paris").subject is None


def test_special_tokens_hold_no_subject():
    assert subject_place("ab cd", "ab", [(0, 0), (0, 2), (2, 5), (0, 0)]) == 1
    assert subject_place("ab cd", "cd", [(0, 0), (0, 2), (2, 5), (0, 0)]) == 2
    assert subject_place("ab cd", "cd", [(0, 0)]) is None


@pytest.mark.parametrize(("prompt", "answer"), [(PROMPT, ""), (PROMPT, " \n")])
def test_a_row_without_text_is_refused(speaker: Any, prompt: str, answer: str):
    with pytest.raises(EditError, match=r"queries and answer must hold some text; got .*Give both"):
        row(speaker, prompt, answer)


def test_a_prompt_without_tokens_is_refused(tokenizer: Any):
    with pytest.raises(EditError, match=r"must hold some text; got '' and '5'"):
        row(tokenizer, "", "5")


def test_rows_are_filled_up_on_the_right_and_read_at_their_places():
    rows = [Row(ids=(3, 4, 5), length=2), Row(ids=(6, 7, 8, 9, 10), length=1)]
    ids = padded(rows, 1)
    assert ids.tolist() == [[3, 4, 5, 1, 1], [6, 7, 8, 9, 10]]
    assert ids.dtype == torch.int64
    values = torch.arange(20.0).view(2, 5, 2)
    read = gathered(values, [some.places for some in rows])
    assert read.tolist() == [values[0, 0].tolist(), values[0, 1].tolist(), values[1, 3].tolist()]


def test_what_fills_rows_up_changes_nothing(make_base: Any, row_of: Any):
    model, rows = make_base(), [row_of(0), row_of(1, length=14)]
    with torch.no_grad():
        one, other = (model(padded(rows, fill)).logits[0, : len(rows[0].ids)] for fill in (0, 96))
    assert torch.equal(one, other)


def test_the_fill_is_the_end_of_the_text_or_the_first_token(tokenizer: Any, speaker: Any):
    assert fill_token(tokenizer) == 0
    assert fill_token(speaker) == speaker.eos_token_id
