"""What every run of a comparison is measured on, the same for all: validation rows, held-out text, questions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pliant.config import RunConfig
from pliant.data import read_text, token_windows, training_data
from pliant.evaluation.comparison.in_context import ContextQuestion, in_context_records, task_questions
from pliant.evaluation.records import Record
from pliant.evaluation.retention import held_out_tokens
from pliant.metrics import compare_to_base
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress, evaluating, input_device
from pliant.training.build import autocast, load_model, tokenizer_for
from pliant.training.objectives import Student, evaluation_scores

WINDOW = 512


@dataclass(kw_only=True)
class Yardstick:
    """The texts and questions that models are compared on.

    Attributes:
        recipe: What all runs have in common.
        tokenizer: That of the base.
        validation: Rows, each of which gives one value a run.
        collate: Makes a batch of rows.
        held_out: Token windows (windows, window) of other text, for what is forgotten.
        questions: Those of each in-context task.
        digest: Of the tokens to train on, to validate on, and to measure forgetting on.
    """

    recipe: RunConfig
    tokenizer: PreTrainedTokenizerBase
    validation: Any
    collate: Any
    held_out: torch.Tensor
    questions: Mapping[str, Sequence[ContextQuestion]]
    digest: str
    _bases: dict[str, DynamicCausalLM] = field(default_factory=dict)

    def losses(self, model: DynamicCausalLM, config: RunConfig) -> tuple[list[float], list[int]]:
        """Returns ``Σ −log p`` over the labelled tokens of each validation row, in nats, and how many there are.

        ``model`` computes as in a run of ``config``: else a loss of weights in 32 bit would be more exact than others.
        """
        student = Student(wrapped=model, model=model, adapted=None, teacher=None, config=self.recipe.training)
        size = self.recipe.training.eval_batch_size or self.recipe.training.batch_size
        sums: list[float] = []
        counts: list[int] = []
        with evaluating(model), autocast(config, input_device(model)):
            for start in range(0, len(self.validation), size):
                stop = min(start + size, len(self.validation))
                batch = self.collate([self.validation[i] for i in range(start, stop)])
                batch = {name: value.to(input_device(model)) for name, value in batch.items() if name != "row"}
                scores, labelled = evaluation_scores(student, batch, beside_base=False)
                sums += scores[:, 0].double().tolist()
                counts += [int(count) for count in labelled.tolist()]
        return sums, counts

    def forgetting(self, model: DynamicCausalLM, config: RunConfig) -> list[Record]:
        """Returns for each held-out window ``nll`` and ``base_nll`` (nats a token), ``kl`` and ``agreement``."""
        base = self.base(config)
        found: list[Record] = []
        for index, window in enumerate(self.held_out):
            compared = compare_to_base(model, window[None], base=base)
            nll, base_nll = torch.tensor([compared.perplexity, compared.base_perplexity]).double().log().tolist()
            found.append(
                {
                    "id": str(index),
                    "nll": nll,
                    "base_nll": base_nll,
                    "kl": compared.kl,
                    "agreement": compared.agreement,
                }
            )
        return found

    def unanswered(self, known: Mapping[str, Sequence[Record]]) -> list[str]:
        """Returns the tasks with other questions than those that ``known`` has answers to."""
        return [task for task, asked in self.questions.items() if len(known.get(task, ())) != len(asked)]

    def in_context(self, model: DynamicCausalLM, task: str, progress: Progress | None = None) -> list[Record]:
        """Returns a record for each question of a task."""
        return in_context_records(model, self.tokenizer, self.questions[task], progress=progress)

    def base(self, config: RunConfig) -> DynamicCausalLM:
        """Returns the untouched base, held as ``config`` holds its own; the last one is kept."""
        if config.held_dtype not in self._bases:  # 32 bit for one whose weights are trained
            self._bases.clear()
            self._bases[config.held_dtype] = load_model(config, config.model.base_model_name).eval()
        return self._bases[config.held_dtype]

    def release(self) -> None:
        """Drops the base, so that a run has the memory for itself."""
        self._bases.clear()


def yardstick(
    recipe: RunConfig, *, held_out: str | None, held_out_size: int, tasks: Sequence[str], questions: int
) -> Yardstick:
    """Reads what the runs of a comparison are measured on.

    Args:
        recipe: What they have in common.
        held_out: A UTF-8 text file; by default the validation split of the embedded texts.
        held_out_size: Tokens of it to read.
        tasks: In-context tasks.
        questions: How many of each; 0 leaves them out.

    Raises:
        ConfigError: A task is unknown.
        DataError: Texts are missing or too short.
    """
    tokenizer = tokenizer_for(recipe)
    kind = "chat" if recipe.training.objective == "sft" else "text"
    data = training_data(recipe.data, tokenizer, kind=kind, seed=recipe.training.seed)
    if held_out is None:
        windows = held_out_tokens(tokenizer, num_tokens=held_out_size, window=WINDOW)
    else:
        window = min(WINDOW, held_out_size)
        windows = token_windows(read_text(held_out), tokenizer, num_tokens=held_out_size, window=window)
    asked = task_questions(tasks, questions, seed=recipe.training.seed) if questions else {}
    return Yardstick(
        recipe=recipe,
        tokenizer=tokenizer,
        validation=data.validation,
        collate=data.collate,
        held_out=windows,
        questions=asked,
        digest=_digest(data, windows),
    )


def _digest(data: Any, held_out: torch.Tensor) -> str:
    """A hash of the held-out windows and of the rows: of a stream only those to validate on."""
    digest = hashlib.sha256(held_out.numpy().tobytes())
    for rows in (data.validation, data.train if data.rows is not None else ()):
        for row in rows:
            for name in ("input_ids", "labels"):
                digest.update(torch.tensor(row[name]).numpy().tobytes())
    return digest.hexdigest()[:16]
