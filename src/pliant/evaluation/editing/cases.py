"""Cases that an edit is judged by: what is to be learned, how it is asked for, and what must stay as it was."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pliant.consolidation.queries import QUESTION
from pliant.data.embedded import EMBEDDED_SOURCES, package_root, records
from pliant.errors import ConfigError, DataError

Pair = tuple[str, str]
"""A prompt and its answer."""

_NUMBERING = re.compile(r"^\s*\d+[.)]\s+", re.MULTILINE)
_SQUAD_FORM = re.compile(r"\nBackground: (.*)\nQuestion: (.*)\nAnswer:\s*\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class EditCase:
    """One thing to learn, with what tests it.

    Answers are held without the space before them; :func:`pair_tokens` puts it there.

    Attributes:
        id: Unique within its data set.
        context: The text to learn from.
        prompt: What the answer follows.
        answer: What the context says.
        subject: What the fact is about, as the prompt writes it; empty where there is no single one.
        old_answer: What held before; None where nothing did.
        paraphrases: The prompt in other words.
        neighbours: Prompts about other things with their true answers, which must stay.
        questions: Further questions that the context answers, with their answers.
        references: Every answer to ``prompt`` that counts as right, where it is free text; else empty.
    """

    id: str
    context: str
    prompt: str
    answer: str
    subject: str
    old_answer: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Pair, ...] = ()
    questions: tuple[tuple[str, tuple[str, ...]], ...] = ()
    references: tuple[str, ...] = ()

    @property
    def asked(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Every question whose answer is free text, with its right answers."""
        return ((self.prompt, self.references), *self.questions) if self.references else ()

    def in_context(self) -> "EditCase":
        """Returns the case with its context in a line before every prompt, the neighbours' too."""
        prefix = self.context + "\n"
        return replace(
            self,
            prompt=prefix + self.prompt,
            paraphrases=tuple(prefix + prompt for prompt in self.paraphrases),
            neighbours=tuple((prefix + prompt, answer) for prompt, answer in self.neighbours),
            questions=tuple((prefix + prompt, answers) for prompt, answers in self.questions),
        )


def pair_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of a prompt and of the answer that follows it.

    Together they are the tokens of ``prompt + " " + answer`` wherever those begin with the prompt's own, as with
    byte-level tokenizers; else the answer is tokenised alone, its space included. After white space there is no
    further space.

    Raises:
        DataError: One of them is empty.
    """
    if not prompt.strip() or not answer.strip():
        raise DataError(f"prompt and answer must hold some text; got {prompt!r} and {answer!r}. Leave the case out.")
    follow = answer.strip() if prompt[-1].isspace() else " " + answer.strip()
    prompt_ids, whole = _ids(tokenizer, prompt), _ids(tokenizer, prompt + follow)
    length = len(prompt_ids)
    if whole[:length] == prompt_ids and len(whole) > length:
        return prompt_ids, whole[length:]
    return prompt_ids, list(tokenizer(follow, add_special_tokens=False)["input_ids"])


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Returns the tokens of a prompt, as :func:`pair_tokens` makes them."""
    return _ids(tokenizer, prompt)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokenizer's own way, without an end token: more follows."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def counterfact(path: str | os.PathLike) -> list[EditCase]:
    """Reads CounterFact in EasyEdit's form: one paraphrase and one neighbour a record.

    The context is the statement itself, ``prompt + " " + target_new + "."``.

    Raises:
        DataError: The file or a record is not of this form.
    """

    def case(text: Callable[[str], str], record: Mapping[str, Any], index: int) -> EditCase:
        prompt, answer = text("prompt"), text("target_new")
        return EditCase(
            id=str(record.get("case_id", index)),
            context=f"{prompt} {answer}.",
            prompt=prompt,
            answer=answer,
            subject=text("subject"),
            old_answer=text("ground_truth"),
            paraphrases=(text("rephrase_prompt"),),
            neighbours=((text("locality_prompt"), text("locality_ground_truth")),),
        )

    return _read(path, case)


def zsre(path: str | os.PathLike) -> list[EditCase]:
    """Reads zsRE in EasyEdit's form; the context is its made-up paragraph, without the numbers of its sentences.

    Prompts are put as ``Question: …\\nAnswer:``, neighbours too. Records without a new answer are left out.

    Raises:
        DataError: The file or a record is not of this form.
    """

    def case(text: Callable[[str], str], record: Mapping[str, Any], index: int) -> EditCase | None:
        if record.get("alt") == "":
            return None
        old = record.get("answers")
        if not isinstance(old, list) or not old or not isinstance(old[0], str):
            raise DataError(f"{path}: record {index}: answers must be a list with a text; got {old!r}. Check the file.")
        neighbour = text("loc").removeprefix("nq question: ")
        neighbour = neighbour[:1].upper() + neighbour[1:].rstrip("?") + "?"
        return EditCase(
            id=str(index),
            context=_NUMBERING.sub("", text("fake_evidence")).replace("\n\n", "\n").strip(),
            prompt=QUESTION.format(text("src")),
            answer=text("alt"),
            subject=text("subject"),
            old_answer=old[0],
            paraphrases=(QUESTION.format(text("rephrase")),),
            neighbours=((QUESTION.format(neighbour), text("loc_ans")),),
            references=(text("alt"),),
        )

    return _read(path, case)


def squad(limit: int | None = None) -> list[EditCase]:
    """Returns passages of SQuAD with all their questions, from the embedded texts.

    Args:
        limit: How many passages, from the first on; all 803 by default.

    Raises:
        ConfigError: ``limit`` is below 1.
        DataError: The embedded texts are not installed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 (passages); got {limit}. Leave it out for all.")
    source = next(source for source in EMBEDDED_SOURCES if source.name == "squad")
    passages: dict[str, list[Any]] = {}
    for record in records(package_root() / source.file):
        found = _SQUAD_FORM.search(record["doc"]["query"])
        if found is not None:
            answers = tuple(dict.fromkeys(record["doc"]["answers_text"]))
            passages.setdefault(found[1], []).append((record["doc"], QUESTION.format(found[2]), answers))
    cases = []
    for context, questions in list(passages.items())[:limit]:
        document, prompt, answers = questions[0]
        cases.append(
            EditCase(
                id=document["id"],
                context=context,
                prompt=prompt,
                answer=answers[0],
                subject=document["title"].replace("_", " "),
                questions=tuple((prompt, answers) for _, prompt, answers in questions[1:]),
                references=answers,
            )
        )
    return cases


def _read(
    path: str | os.PathLike, case: Callable[[Callable[[str], str], Mapping[str, Any], int], EditCase | None]
) -> list[EditCase]:
    """Makes a case of every record of a JSON file; ids are unique afterwards."""
    cases: dict[str, EditCase] = {}
    for index, record in enumerate(_records(path)):

        def text(field: str, record: Mapping[str, Any] = record, index: int = index) -> str:
            value = record.get(field)
            if not isinstance(value, str) or not value.strip():
                fact = f"got {value!r}" if field in record else "it is missing"
                raise DataError(
                    f"{path}: record {index}: {field} must be a text that is not empty; {fact}. Check the file."
                )
            return value.strip()

        made = case(text, record, index)
        if made is None:
            continue
        if made.id in cases:
            raise DataError(f"{path}: record {index}: case_id must be unique; got {made.id} again. Check the file.")
        cases[made.id] = made
    return list(cases.values())


def _records(path: str | os.PathLike) -> Iterator[Mapping[str, Any]]:
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} must be a readable JSON file; reading failed: {error}. Check the path.") from error
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} must hold a list of records; got {type(content).__name__}. Check the file.")
    for index, record in enumerate(content):
        if not isinstance(record, dict):
            raise DataError(f"{path}: record {index} must be an object; got {type(record).__name__}. Check the file.")
        yield record


def unique_ids(cases: Iterable[EditCase]) -> list[EditCase]:
    """Returns the cases as a list.

    Raises:
        DataError: There are none, or two have the same id.
    """
    listed = list(cases)
    if not listed:
        raise DataError("cases must hold at least one case; got none. Read them with pliant.evaluation.counterfact.")
    ids = [case.id for case in listed]
    if len(set(ids)) != len(ids):
        repeated = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"cases must have unique ids; got {repeated!r} twice. Leave one out.")
    return listed
