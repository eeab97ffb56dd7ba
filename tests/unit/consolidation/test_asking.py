"""How facts are asked for: prefixes, sentences, surprise, subjects, cuts, wordings and answers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pliant.consolidation.facts import Ask, facts_of, repeated_words
from pliant.consolidation.queries import (
    OTHER_SUBJECTS,
    chat_prompt,
    cloze_cuts,
    greedy,
    likely_subject,
    sampled_prefixes,
    sentences,
    word_surprise,
)
from pliant.errors import EditError

CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]"
SENTENCE = "The capital of France is Paris."


@pytest.fixture
def model(make_base: Callable[..., Any], speaker: Any) -> Any:
    """A tiny base that knows every token of the speaker."""
    return make_base(vocab_size=len(speaker), max_position_embeddings=256, eos_token_id=speaker.eos_token_id)


def test_prefixes_are_the_same_on_every_call(model: Any, speaker: Any):
    state = torch.get_rng_state()
    prefixes = sampled_prefixes(model, speaker, count=4)
    assert prefixes == sampled_prefixes(model, speaker, count=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(prefixes) == 4
    assert prefixes[0] == ""
    assert all(prefix.endswith(". ") for prefix in prefixes[1:])
    assert len(set(prefixes)) == 4
    assert prefixes != sampled_prefixes(model, speaker, count=4, seed=1)
    assert sampled_prefixes(model, speaker, count=1) == ("",)


def test_a_tokenizer_that_drops_line_breaks_will_do(make_base: Callable[..., Any], tokenizer: Any):
    assert tokenizer("\n")["input_ids"] == []
    model = make_base()
    assert len(sampled_prefixes(model, tokenizer, count=3)) == 3
    assert [(start, end) for start, end, _ in word_surprise(model, tokenizer, "5 17 30")] == [(0, 1), (2, 4), (5, 7)]


@pytest.mark.parametrize("broken", ["lm_head.weight", "model.norm.weight"])
def test_prefixes_of_a_broken_model_are_refused(broken: str, model: Any, speaker: Any):
    model.get_parameter(broken).data[..., 3] = float("nan")
    with pytest.raises(EditError, match=r"logits must be finite to write text with.*Load the model"):
        sampled_prefixes(model, speaker, count=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("  No end ", ["No end"]),
        ("It is 3.5 m.\nNext", ["It is 3.5 m.", "Next"]),
        ("The head is Dr. Sarah Chen. Mrs. Lee left.", ["The head is Dr. Sarah Chen.", "Mrs. Lee left."]),
        (" \n", []),
    ],
)
def test_sentences(text: str, expected: list[str]):
    assert sentences(text) == expected


@pytest.mark.parametrize("text", [SENTENCE, "Zoë plays  the violin", "日本語 is 🎻 music", "x"])
def test_the_surprise_of_words_adds_up(text: str, model: Any, speaker: Any):
    words = word_surprise(model, speaker, text)
    assert [text[start:end] for start, end, _ in words] == text.split()
    lead = speaker("\n", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*lead, *speaker(text, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids).logits[0, len(lead) - 1 : -1].log_softmax(-1)
    expected = -log_p.gather(1, ids[0, len(lead) :, None]).sum()
    assert sum(value for *_, value in words) == pytest.approx(float(expected), rel=1e-4)
    assert all(value > 0 for *_, value in words)


def surprise(*values: float) -> tuple[list[tuple[int, int, float]], str]:
    """Words "a b c …" with these surprises."""
    text = " ".join("abcdefghij"[: len(values)])
    return [(2 * index, 2 * index + 1, value) for index, value in enumerate(values)], text


@pytest.mark.parametrize(
    ("values", "expected"), [((1, 9, 1), "b"), ((1, 9, 8, 1, 1), "b c"), ((9, 0, 0, 0), "a"), ((3,), "a"), ((), "")]
)
def test_the_subject_is_the_run_of_surprise(values: tuple[float, ...], expected: str):
    assert likely_subject(*surprise(*map(float, values))) == expected


def test_a_subject_has_no_marks_around_it():
    text = 'the "Zorblax", is'
    assert likely_subject([(0, 3, 1.0), (4, 14, 20.0), (15, 17, 1.0)], text) == "Zorblax"


def test_a_sentence_is_cut_before_its_surprises():
    words, text = surprise(1.0, 20.0, 1.0, 7.0, 2.0, 9.0)
    assert cloze_cuts(words, text) == [("a b c", "d e f"), ("a b c d e", "f")]
    assert cloze_cuts(words, text, count=1) == [("a b c d e", "f")]
    assert cloze_cuts(words[:2], text[:3]) == [("a", "b")]


def test_a_chat_prompt_is_that_of_the_template(speaker: Any):
    assert chat_prompt(speaker, "Who?") is None
    speaker.chat_template = CHAT
    for message in ("Who?", "What is {x}?"):
        expected = speaker.apply_chat_template(
            [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
        )
        assert chat_prompt(speaker, message) == expected


def test_greedy_answers_end_with_their_sentence(model: Any, speaker: Any, monkeypatch: pytest.MonkeyPatch):
    said = iter([" Paris. It is", "\n Paris\nIt is", " in Lisbon", " \n"])

    def generate(ids: Any, **_: Any) -> Any:
        return torch.cat((ids, torch.tensor([speaker(next(said), add_special_tokens=False)["input_ids"]])), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert greedy(model, speaker, list("abcd")) == ["Paris", "Paris", "in Lisbon", ""]


def test_greedy_answers_are_kept_until_the_model_changes(model: Any, speaker: Any, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **options: asked.append(ids) or generate(ids, **options))
    answer = greedy(model, speaker, ["The capital"], max_new_tokens=3)
    assert "\n" not in answer[0]
    assert greedy(model, speaker, ["The capital", "The capital"], max_new_tokens=3) == answer * 2
    assert len(asked) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert greedy(model, speaker, ["The capital"], max_new_tokens=3) != answer
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("\n Paris\nIt is in France", "\n Paris\n"),
        (" Paris. It is in France", " Paris. I"),
        (" Dr. Lee of Lisbon", " Dr. Lee of Lisbon"),
    ],
)
def test_nothing_is_written_after_the_answer(
    text: str, written: str, model: Any, speaker: Any, monkeypatch: pytest.MonkeyPatch
):
    tokens = speaker(text, add_special_tokens=False)["input_ids"]
    tokens = tokens[: len(tokens) - (tokens[-1] == speaker.eos_token_id)]
    steps: list[int] = []

    def head(hidden: Any) -> Any:
        steps.append(tokens[len(steps)])
        return torch.nn.functional.one_hot(torch.tensor([[steps[-1]]]), len(speaker)).float()

    monkeypatch.setattr(model.lm_head, "forward", head)
    answer = greedy(model, speaker, ["The capital"], max_new_tokens=len(tokens))
    assert answer == ["Dr. Lee of Lisbon" if "Lee" in text else "Paris"]
    assert str(speaker.decode(steps)).strip(" ").startswith(written.strip(" "))
    assert (len(steps) == len(tokens)) == (text == written)


def test_a_context_stands_before_the_query():
    assert Ask(query="Is it?", answer="").in_context("So.", "Pre. ") == "So. Pre. Is it?"
    ask = Ask(before="[user]", query="Is it?[assistant]", answer="", takes_prefix=False)
    assert ask.prompt == "[user]Is it?[assistant]"
    assert ask.in_context("So.") == "[user]So.\nIs it?[assistant]"


def test_facts_keep_their_order_and_texts(model: Any, speaker: Any):
    facts = facts_of(
        model,
        speaker,
        [SENTENCE, " Zoë plays the violin. "],
        [["The capital of France is", "Where is Paris?"], "Zoë plays the"],
        ["Paris", " violin "],
        ["France", "Zoë"],
    )
    assert [fact.context for fact in facts] == [SENTENCE, "Zoë plays the violin."]
    assert facts[0].prompts == (
        "The capital of France is", "Where is Paris?", "Question: Where is Paris?\nAnswer:",
    )  # fmt: skip
    assert facts[0].answers == ("Paris",) * 3
    assert [ask.takes_prefix for ask in facts[0].asks] == [True, True, False]
    assert facts[1].answers == ("violin",)
    assert [fact.subject for fact in facts] == ["France", "Zoë"]


def test_a_question_also_goes_to_the_chat(model: Any, speaker: Any):
    speaker.chat_template = CHAT
    (fact,) = facts_of(model, speaker, SENTENCE, "What is France?", "Paris", "France")
    assert fact.prompts[2] == "[user]What is France?\n[assistant]"
    assert fact.asks[2].in_context(SENTENCE) == f"[user]{SENTENCE}\nWhat is France?\n[assistant]"


def test_queries_are_made_of_every_sentence(model: Any, speaker: Any):
    text = f"{SENTENCE} Zoë plays the violin in Lisbon."
    (fact,) = facts_of(model, speaker, text, None, None, None)
    assert len(fact.asks) == 4
    for ask in fact.asks:
        assert f"{ask.query} {ask.answer}." in text
    assert fact.subject in text
    (fact,) = facts_of(model, speaker, text, None, "Lisbon", None)
    assert [(ask.query, ask.answer) for ask in fact.asks] == [("Zoë plays the violin in", "Lisbon")]


def test_an_answer_is_words_and_not_a_part_of_them(model: Any, speaker: Any):
    text = "Alice is 9 years old. She was born in 1999."
    for query in (None, "How old is Alice?"):
        (fact,) = facts_of(model, speaker, text, query, "9", "Alice")
        assert (fact.asks[-1].query, fact.asks[-1].answer) == ("Alice is", "9")
        assert not [ask for ask in fact.asks if ask.query.endswith("199")]
    (fact,) = facts_of(model, speaker, "So long, so so long.", None, "so", "")
    assert fact.prompts == ("So long, so",)


@pytest.mark.parametrize("query", ["?", "???", "...", "!"])
def test_a_query_without_words_has_no_subject(query: str, model: Any, speaker: Any):
    (fact,) = facts_of(model, speaker, SENTENCE, query, "Paris", None)
    assert fact.subject == ""


def test_other_subjects_differ():
    assert len(set(OTHER_SUBJECTS)) == len(OTHER_SUBJECTS) > 32


def test_the_first_word_is_never_the_subject():
    text = "The head of Zorblax is"
    words = [(0, 3, 30.0), (4, 8, 6.0), (9, 11, 0.5), (12, 19, 12.0), (20, 22, 1.0)]
    assert likely_subject(words, text) == "Zorblax"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The answer is: Dr. Sarah Chen", "Dr. Sarah Chen"),
        ("Dr. Sarah Chen is the CEO of TechCorp, a bank", "Dr. Sarah Chen"),
        ("It is a company.", ""),
        ("TechCorp", ""),
        ("", ""),
    ],
)
def test_words_of_the_context_are_the_answer(answer: str, expected: str):
    context = "The CEO of TechCorp is Dr. Sarah Chen."
    assert repeated_words(answer, context, "Who is the CEO of TechCorp?") == expected
