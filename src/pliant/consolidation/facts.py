"""What ``consolidate`` was asked to learn, as facts: a context, ways to ask for it, the answers, and the subject."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.queries import (
    QUESTION,
    chat_prompt,
    cloze_cuts,
    greedy,
    likely_subject,
    sentences,
    word_surprise,
)
from pliant.errors import EditError

TELLING = 4
"""Letters from which on a word in small letters can be an answer."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One wording of a query.

    Attributes:
        before: What stands before the place where a context goes: the opening of a chat, or nothing.
        query: The rest of the prompt.
        answer: What is to follow.
        takes_prefix: Whether other text may stand before it.
    """

    before: str = ""
    query: str
    answer: str
    takes_prefix: bool = True

    @property
    def prompt(self) -> str:
        """The prompt without a context."""
        return self.before + self.query

    def in_context(self, context: str, prefix: str = "") -> str:
        """Returns the prompt with a context in view."""
        return f"{self.before}{context}{' ' if self.takes_prefix else chr(10)}{prefix}{self.query}"


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One thing to learn.

    Attributes:
        context: The text that says it.
        asks: The ways to ask for it, at least one.
        subject: What it is about, as the prompts write it; empty if nothing was found.
    """

    context: str
    asks: tuple[Ask, ...]
    subject: str

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts of all ways to ask."""
        return tuple(ask.prompt for ask in self.asks)

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers of all ways to ask."""
        return tuple(ask.answer for ask in self.asks)


def facts_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str | Sequence[str],
    queries: str | Sequence[Any] | None,
    answer: str | Sequence[str | None] | None,
    subject: str | Sequence[str | None] | None,
) -> list[Fact]:
    """Returns one fact for each context; what is not given is made.

    Raises:
        EditError: A text is empty, or lists differ in length.
    """
    contexts = list(context) if isinstance(context, Sequence) and not isinstance(context, str) else [context]
    if not contexts:
        raise EditError("context must hold at least one text; got an empty list. Give a text to learn.")
    for index, text in enumerate(contexts):
        if not isinstance(text, str) or not text.strip():
            raise EditError(f"context must be a text that is not empty; got {text!r} at place {index}. Leave it out.")
    single = isinstance(context, str)
    asked = _per_context("queries", [_listed(queries)] if single and queries is not None else queries, len(contexts))
    answers = _per_context("answer", [answer] if isinstance(answer, str) else answer, len(contexts))
    subjects = _per_context("subject", [subject] if isinstance(subject, str) else subject, len(contexts))
    return [
        _fact(model, tokenizer, text.strip(), _listed(own) if own is not None else None, given, about)
        for text, own, given, about in zip(contexts, asked, answers, subjects, strict=True)
    ]


def _per_context(name: str, values: Any, count: int) -> list[Any]:
    if values is None:
        return [None] * count
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    if not listed or len(values) != count:
        got = len(values) if listed else "one text" if isinstance(values, str) else repr(values)
        raise EditError(
            f"{name} must have one entry for each of the {count} contexts; got {got}. Give a list of {count}, or leave "
            "it out."
        )
    return list(values)


def _listed(value: Any) -> list[str]:
    found = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not found or not all(isinstance(text, str) and text.strip() for text in found):
        raise EditError(
            f"queries must be texts that are not empty; got {value!r}. Leave queries out to have them made."
        )
    return found


def _fact(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: str,
    queries: list[str] | None,
    answer: str | None,
    subject: str | None,
) -> Fact:
    if subject is not None and not isinstance(subject, str):
        raise EditError(f"subject must be a text of a query; got {subject!r}. Leave it out to have it found.")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise EditError(
            f"answer must be a text that is not empty; got {answer!r}. Leave it out to take the model's own."
        )
    if queries is None:
        asks = _made(model, tokenizer, context, answer)
    else:
        asks = []
        for query in queries:
            asks += _answered(model, tokenizer, context, _wordings(tokenizer, query), answer)
        asks += [ask for ask in _stated(context, asks) if ask.prompt not in [known.prompt for known in asks]]
    if not asks:
        raise EditError(
            f"queries must be given for a context that the model cannot ask about; got {context!r}. Give a question "
            "or the beginning of a sentence, and its answer."
        )
    if subject is None:
        words = word_surprise(model, tokenizer, asks[0].query.rstrip("?"))
        subject = likely_subject(words, asks[0].query.rstrip("?"))
    elif not any(subject in ask.prompt for ask in asks):
        raise EditError(
            f"subject must be in a query as written; got {subject!r}, and the queries are "
            f"{[ask.prompt for ask in asks][:3]}. Leave it out to have it found."
        )
    return Fact(context=context, asks=tuple(asks), subject=subject)


def _wordings(tokenizer: PreTrainedTokenizerBase, query: str) -> list[Ask]:
    """A beginning as it is; a question as it is, after "Question:", and to the chat model."""
    query = query.strip()
    if not query.endswith("?"):
        return [Ask(query=query, answer="")]
    asks = [Ask(query=query, answer=""), Ask(query=QUESTION.format(query), answer="", takes_prefix=False)]
    if (chat := chat_prompt(tokenizer, query)) is not None:
        before, _, after = chat.partition(query)
        asks.append(Ask(before=before, query=query + after, answer="", takes_prefix=False))
    return asks


def _answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, asks: list[Ask], answer: str | None
) -> list[Ask]:
    """Gives each way to ask its answer: the given one, or the model's own with the context in view.

    Where the model's answers repeat words of the context, those words are the answer to every wording of the query.
    """
    if answer is not None:
        return [_with_answer(ask, answer) for ask in asks]
    said = greedy(model, tokenizer, [ask.in_context(context) for ask in asks])
    repeated = Counter(filter(None, (repeated_words(text, context, asks[0].query) for text in said)))
    if repeated:
        return [_with_answer(ask, repeated.most_common(1)[0][0]) for ask in asks]
    return [_with_answer(ask, text) for ask, text in zip(asks, said, strict=True) if text]


def repeated_words(answer: str, context: str, query: str) -> str:
    """Returns the longest run of words of ``answer`` that is in the context and not in the query; empty without one.

    A run that is only a short word in small letters does not count: any text repeats those.
    """
    words = answer.split()
    runs = (words[start:stop] for start in range(len(words)) for stop in range(len(words), start, -1))
    texts = (" ".join(run).strip(" ,.;:!?\"'()") for run in sorted(runs, key=len, reverse=True))
    telling = (text for text in texts if len(text) >= TELLING or text[:1].isupper() or text[:1].isdigit())
    return next((text for text in telling if _stands(text, context) and not _stands(text, query)), "")


def _stands(words: str, text: str) -> bool:
    return _last_place(words, text) is not None


def _last_place(words: str, text: str) -> int | None:
    """Where ``words`` begin for the last time in ``text``, as words of their own and not as parts of others."""
    found = re.match(rf"(?s:.*)(?<!\w)({re.escape(words)})(?!\w)", text)
    return None if found is None else found.start(1)


def _stated(context: str, asks: Sequence[Ask]) -> list[Ask]:
    """Returns sentences that say an answer, up to the answer: a question alone does not reach a beginning."""
    answers = dict.fromkeys(ask.answer for ask in asks)
    found = ((sentence, answer, _last_place(answer, sentence)) for answer in answers for sentence in sentences(context))
    return [Ask(query=sentence[:place].rstrip(), answer=answer) for sentence, answer, place in found if place]


def _with_answer(ask: Ask, answer: str) -> Ask:
    return Ask(before=ask.before, query=ask.query, answer=answer.strip(), takes_prefix=ask.takes_prefix)


def _made(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, answer: str | None) -> list[Ask]:
    """Cuts each sentence before its most surprising words; a given answer is cut off where it stands."""
    asks = []
    for sentence in sentences(context):
        if answer is not None:
            if place := _last_place(answer.strip(), sentence):
                asks.append(Ask(query=sentence[:place].rstrip(), answer=answer.strip()))
            continue
        words = word_surprise(model, tokenizer, sentence)
        if len(words) > 1:
            asks += [Ask(query=query, answer=rest) for query, rest in cloze_cuts(words, sentence) if query and rest]
    return asks
