"""How well a model uses what stands in its context: examples, pairs to look up, a passage to read.

Every question is scored with its context and without it. The difference of the log-probabilities of the right answer is
what the context gave. The model is taken as it is: converted, adapted or neither.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.architectures.base import nearest
from pliant.data.embedded import package_root, records
from pliant.errors import ConfigError, DataError
from pliant.evaluation.answers import exact_match, f1
from pliant.evaluation.editing.cases import pair_tokens, squad
from pliant.evaluation.records import Record
from pliant.evaluation.scoring import free_answers, score_tokens
from pliant.statistics import Progress

SST2_FILE = "hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
SHOTS = 32
PAIRS = 32
SENTIMENTS = ("negative", "positive")
ARBITRARY = ("lake", "door")
"""Labels that say nothing of a sentiment: only the examples do."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
AT_ONCE = 16
ANSWER_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class ContextQuestion:
    """A question whose answer stands in a context, or follows from it.

    Attributes:
        id: Unique within its task.
        context: What comes before the question; it ends where the question begins.
        question: What the answer follows.
        answers: Right answers; the first one's log-probability is measured.
        choices: The answers to choose from, where there are some.
        is_free: Whether the model writes an answer of its own, which is compared with the right ones.
    """

    id: str
    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    is_free: bool = False


def classification(
    limit: int, *, seed: int = 0, shots: int = SHOTS, labels: tuple[str, str] = SENTIMENTS
) -> list[ContextQuestion]:
    """Returns sentences of SST-2 after as many labelled ones, from the embedded texts.

    The first sentences of each sentiment are the examples, the same ones in another order for each question; the others
    are asked.

    Args:
        limit: How many questions, both sentiments in turn.
        seed: Of the orders.
        shots: Examples before each question, an even number: half of each sentiment.
        labels: What the sentiments are called, the negative one first.

    Raises:
        ConfigError: ``limit`` or ``shots`` is out of range.
        DataError: The embedded texts are not installed.
    """
    _check(limit)
    if shots < 2 or shots % 2:
        raise ConfigError(f"shots must be an even number of at least 2 (examples); got {shots}. 32 is the default.")
    by_label: dict[int, list[str]] = {0: [], 1: []}
    for record in records(package_root() / SST2_FILE):
        by_label[record["label"]].append(record["sentence"].strip())
    half = shots // 2
    examples = [(text, label) for label, texts in by_label.items() for text in texts[:half]]
    asked = [
        (text, i)
        for pair in zip(*(texts[half:] for texts in by_label.values()), strict=False)
        for i, text in enumerate(pair)
    ]
    found = []
    for index, (text, label) in enumerate(islice(asked, limit)):
        order = random.Random(f"{seed}-{index}").sample(examples, len(examples))
        found.append(
            ContextQuestion(
                id=str(index),
                context="".join(f"Review: {shown}\nLabel: {labels[own]}\n\n" for shown, own in order),
                question=f"Review: {text}\nLabel:",
                answers=(labels[label],),
                choices=labels,
            )
        )
    return found


def symbols(limit: int, *, seed: int = 0, shots: int = SHOTS) -> list[ContextQuestion]:
    """Returns the questions of :func:`classification` under labels that only the examples explain."""
    return classification(limit, seed=seed, shots=shots, labels=ARBITRARY)


def recall(limit: int, *, seed: int = 0, pairs: int = PAIRS) -> list[ContextQuestion]:
    """Returns lists of made-up names with numbers, and the name of one of them, whose number is wanted.

    Args:
        limit: How many lists, each with one question.
        seed: Of names, numbers and places.
        pairs: Names in a list.

    Raises:
        ConfigError: ``limit`` is below 1 or ``pairs`` below 2.
    """
    _check(limit)
    if pairs < 2:
        raise ConfigError(f"pairs must be at least 2 (names in a list); got {pairs}. 32 is the default.")
    found = []
    for index in range(limit):
        source = random.Random(f"{seed}-{index}")
        names: dict[str, int] = {}
        while len(names) < pairs:
            names[_name(source)] = source.randrange(1_000, 10_000)
        asked = source.choice(list(names))
        found.append(
            ContextQuestion(
                id=str(index),
                context="".join(f"The number of {name} is {number}.\n" for name, number in names.items()),
                question=f"The number of {asked} is",
                answers=(str(names[asked]),),
            )
        )
    return found


def reading(limit: int, *, seed: int = 0) -> list[ContextQuestion]:
    """Returns one question on each of some passages of SQuAD, from the embedded texts.

    Args:
        limit: How many passages.
        seed: Which of them.

    Raises:
        ConfigError: ``limit`` is below 1.
        DataError: The embedded texts are not installed.
    """
    _check(limit)
    cases = squad()
    chosen = random.Random(seed).sample(cases, min(limit, len(cases)))
    return [
        ContextQuestion(
            id=case.id, context=f"{case.context}\n", question=case.prompt, answers=case.references, is_free=True
        )
        for case in chosen
    ]


TASKS: dict[str, Callable[..., list[ContextQuestion]]] = {
    "classification": classification,
    "symbols": symbols,
    "recall": recall,
    "reading": reading,
}
"""Every task by its name."""


def task_questions(names: Sequence[str], limit: int, *, seed: int = 0) -> dict[str, list[ContextQuestion]]:
    """Returns the questions of several tasks.

    Raises:
        ConfigError: A task is unknown, or ``limit`` is below 1.
        DataError: The embedded texts are not installed.
    """
    known = tuple(TASKS)
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"tasks must be among {', '.join(known)}; got {name!r}.{nearest(name, known)}")
    return {name: TASKS[name](limit, seed=seed) for name in names}


def in_context_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ContextQuestion],
    *,
    progress: Progress | None = None,
) -> list[Record]:
    """Returns a record for each question, for :func:`pliant.evaluation.summary` and ``paired_difference``.

    ``log_prob`` is that of the right answer after context and question, in nats a token; ``gain``, by how much it is
    above that after the question alone. ``correct`` is 1.0 where, of the choices, the right one is the likeliest;
    without choices, where greedy decoding writes the right answer. Questions that are ``is_free`` have ``f1`` too, and
    ``correct`` is SQuAD's exact match.

    Raises:
        DataError: A question does not fit into the model's positions, or has no text.
    """
    found: list[Record] = []
    for start in range(0, len(questions), AT_ONCE):
        part = questions[start : start + AT_ONCE]
        found += _scored(model, tokenizer, part)
        if progress is not None:
            progress("Answering from context", len(found), len(questions))
    return found


def _scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[ContextQuestion]
) -> Iterator[Record]:
    pairs = []
    for question in questions:
        for prompt in (question.context + question.question, question.question):
            pairs.append((prompt, question.answers[0]))
        pairs += [(question.context + question.question, choice) for choice in question.choices]
    tokens = [pair_tokens(tokenizer, prompt, answer) for prompt, answer in pairs]
    _check_length(model, questions, max(len(prompt) + len(answer) for prompt, answer in tokens))
    scores = score_tokens(model, tokens)
    mean, total, exact = scores.mean.tolist(), scores.total.tolist(), scores.exact.tolist()
    free = [question for question in questions if question.is_free]
    prompts = [question.context + question.question for question in free]
    written = (
        dict(zip((q.id for q in free), free_answers(model, tokenizer, prompts, num_tokens=ANSWER_TOKENS), strict=True))
        if free
        else {}
    )
    at = 0
    for question in questions:
        record: Record = {"id": question.id, "log_prob": mean[at], "gain": mean[at] - mean[at + 1]}
        record |= _correct(question, exact[at], total[at + 2 : at + 2 + len(question.choices)], written)
        at += 2 + len(question.choices)
        yield record


def _correct(
    question: ContextQuestion, is_exact: bool, of_choices: Sequence[float], written: Mapping[str, str]
) -> Record:
    if question.is_free:
        text = written[question.id]
        return {"correct": exact_match(text, question.answers), "f1": f1(text, question.answers)}
    if question.choices:
        likeliest = question.choices[of_choices.index(max(of_choices))]
        return {"correct": float(likeliest in question.answers)}
    return {"correct": float(is_exact)}


def _check_length(model: PreTrainedModel, questions: Sequence[ContextQuestion], longest: int) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    needed = longest + (ANSWER_TOKENS if any(question.is_free for question in questions) else 0)
    if positions is not None and needed > positions:
        raise DataError(
            f"a question with its context must fit into the {positions:,} positions of the model; got {needed:,} "
            "tokens. Take fewer shots or pairs, or leave the task out."
        )


def _check(limit: int) -> None:
    if limit < 1:
        raise ConfigError(f"limit must be at least 1 (questions); got {limit}.")


def _name(source: random.Random) -> str:
    """Three syllables, such as Bodanu: no word of any text."""
    return "".join(source.choice(CONSONANTS) + source.choice(VOWELS) for _ in range(3)).capitalize()
