"""Suites: known cases and editors by name, from the model to the figures; and what a model has kept."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pliant.architectures.base import from_fields, nearest
from pliant.errors import ConfigError
from pliant.evaluation.editing.cases import EditCase, counterfact, squad, zsre
from pliant.evaluation.editing.editors import editor_named, editor_settings
from pliant.evaluation.editing.figures import MODES, as_json, report, run_name
from pliant.evaluation.editing.run import EditRun, prepare_folder
from pliant.evaluation.editing.runs import COUNTS, evaluate_batches, evaluate_edits, evaluate_sequence
from pliant.evaluation.intervals import paired_difference, summary
from pliant.evaluation.records import Record, Records
from pliant.evaluation.retention import (
    CHOICES_AT_ONCE,
    ChoiceQuestion,
    choice_records,
    held_out_tokens,
    hellaswag,
    mmlu,
)
from pliant.evaluation.tasks.run import evaluate_tasks
from pliant.evaluation.tasks.settings import Benchmarks
from pliant.evaluation.tasks.table import TASK_NAMES
from pliant.metrics import compare_to_base
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress

SUITES = ("counterfact", "zsre", "squad_closed_book", "retention")
RETENTION_TOKENS = 12_288
RECORDS = 100
EDITORS_SHOWN = ("untouched", "in_context", "auto")


def evaluate(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    suite: str | None = None,
    editors: Sequence[str] = EDITORS_SHOWN,
    *,
    output: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    data: str | os.PathLike | None = None,
    records: int | None = RECORDS,
    start: int = 0,
    mode: str = "single",
    counts: Sequence[int] = COUNTS,
    entropy: bool = False,
    progress: Progress | None = None,
    **benchmarks: Any,
) -> dict[str, Any]:
    """Measures editors on a suite of cases, or a model on benchmark tasks; a run that was stopped goes on.

    Exactly one of ``suite`` and ``tasks`` is given; ``records`` to ``entropy`` go with a suite only.

    Args:
        model: A pliant model, dense or converted; edits that it carries already count as part of it.
        tokenizer: Its tokenizer.
        suite: ``counterfact``, ``zsre``, ``squad_closed_book``, or ``retention``, which measures the model as it is
            beside its base and takes no editors.
        editors: Names in ``pliant.evaluation.EDITORS``.
        output: Folder for the records, one for each suite and model. Editors that were measured there before are
            reported too.
        tasks: Names in ``pliant.evaluation.TASK_NAMES``, such as ``perplexity`` and ``hellaswag``; where the hub is
            reachable, any of lm-eval's.
        data: File of the cases, for ``counterfact`` and ``zsre``; with tasks, of the text for perplexity.
        records: How many cases, or multiple-choice questions of each kind; None for all.
        start: The first case, counted from 0.
        mode: Edits stand alone (``single``), come one after another (``sequential``), or are made of many cases at
            once (``batched``).
        counts: After how many edits to measure, for the last two.
        entropy: Measure the generation entropy too, which is slow.
        progress: Called with a label, the cases done and the cases there are.
        benchmarks: With tasks, further fields of :class:`pliant.evaluation.Benchmarks`: ``limit``, ``num_fewshot``,
            ``batch_size``, ``seed``, ``data_dir``, ``base`` and others.

    Returns:
        What :func:`pliant.evaluation.report` returns; for ``retention``, what :func:`retention` does; for tasks, what
        :func:`pliant.evaluation.evaluate_tasks` does.

    Raises:
        ConfigError: A name or a number is wrong, or the folder holds results of other settings.
        DataError: The file cannot be read, or the embedded texts are not installed.
    """
    if (suite is None) == (tasks is None):
        raise ConfigError(
            f"evaluate needs exactly one of suite and tasks; got suite={suite!r} and tasks={tasks!r}. Suites are "
            f"{', '.join(SUITES)}; tasks are {', '.join(TASK_NAMES)}."
        )
    if tasks is not None:
        if (
            mode != "single"
            or start
            or entropy
            or records != RECORDS
            or counts != COUNTS
            or tuple(editors) != EDITORS_SHOWN
        ):
            raise ConfigError(
                "tasks take limit, and not editors, records, start, mode, counts or entropy; got one of these. Leave "
                "it out."
            )
        wanted: Benchmarks = from_fields(Benchmarks, {"tasks": tasks, "data": data, **benchmarks})
        return evaluate_tasks(model, tokenizer, wanted, output=output, progress=progress)
    if benchmarks:
        raise ConfigError(f"{next(iter(benchmarks))} goes with tasks only; got suite={suite!r}. Leave it out.")
    assert suite is not None
    if suite == "retention":
        if data is not None or start or mode != "single":
            raise ConfigError("suite='retention' takes no data, start or mode; got one of them. Leave it out.")
        return retention(model, tokenizer, output=output, records=records, progress=progress)
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}; got {mode!r}.{nearest(mode, MODES)}")
    made = {name: editor_named(name, mode=mode) for name in editors}
    if not made:
        raise ConfigError("editors must name at least one editor; got none. Try untouched, in_context and auto.")
    cases = cases_of(suite, data, start=start, records=records)
    common: dict[str, Any] = {"output": output, "entropy": entropy, "progress": progress}
    for name, editor in made.items():
        own = {**common, "name": run_name(name, mode), "settings": editor_settings(editor, model, tokenizer)}
        if name == "untouched":
            own = {**common, "name": name}
            EditRun(model, tokenizer, cases, **own)  # writes before.jsonl
        elif mode == "single":
            evaluate_edits(model, tokenizer, cases, editor, **own)
        elif mode == "sequential":
            remembers = getattr(editor, "memory", None) is not None
            evaluate_sequence(model, tokenizer, cases, editor, counts=counts, remembers=remembers, **own)
        else:
            evaluate_batches(model, tokenizer, cases, editor.batch, counts=counts, **own)
    return report(output, cases, mode=mode, counts=counts)


def cases_of(
    suite: str, data: str | os.PathLike | None = None, *, start: int = 0, records: int | None = None
) -> list[EditCase]:
    """Returns cases of a suite.

    Raises:
        ConfigError: The suite is unknown, a number is out of range, or the file is missing or not needed.
        DataError: The file cannot be read, or the embedded texts are not installed.
    """
    if suite not in SUITES[:-1]:
        raise ConfigError(f"suite must be one of {', '.join(SUITES)}; got {suite!r}.{nearest(suite, SUITES)}")
    if records is not None and records < 1:
        raise ConfigError(f"records must be at least 1; got {records}. Leave it out for 100.")
    if start < 0:
        raise ConfigError(f"start must be at least 0; got {start}. 0 is the first case.")
    if data is not None and suite == "squad_closed_book":
        raise ConfigError(f"data must be left out for suite={suite!r}, whose passages are embedded; got {data}.")
    if data is None and suite != "squad_closed_book":
        raise ConfigError(f"data must be a file of cases for suite={suite!r}; got None. Give one in EasyEdit's form.")
    cases = squad() if data is None else (counterfact if suite == "counterfact" else zsre)(data)
    stop = None if records is None else start + records
    if start >= len(cases):
        raise ConfigError(f"start must be below the number of cases, {len(cases)}; got {start}. 0 is the first.")
    return cases[start:stop]


def retention(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    output: str | os.PathLike,
    records: int | None = 100,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model as it is beside its base mode: held-out text, MMLU and HellaSwag.

    Args:
        model: A pliant model.
        tokenizer: Its tokenizer.
        output: Folder for the answers, question by question.
        records: How many questions of each kind; None for all.
        progress: Called with a label, the steps done and the steps there are.

    Returns:
        ``perplexity`` and its base's, their ``ratio``, ``kl`` and ``agreement``; and by kind the share of right
        answers, the base's, and their paired difference.
    """
    prepare_folder(model, output)
    tokens = held_out_tokens(tokenizer, num_tokens=RETENTION_TOKENS)
    compared = compare_to_base(model, tokens, progress=progress)
    found: dict[str, Any] = {**asdict(compared), "ratio": compared.ratio, "tokens": tokens.numel()}
    for kind, questions in (("mmlu", mmlu(records)), ("hellaswag", hellaswag(records))):
        answer = partial(_answered, tokenizer=tokenizer, questions=questions, progress=progress)
        own = answer(model, Records(Path(output) / f"{kind}.jsonl"))
        with model.base_mode():
            base = answer(model, Records(Path(output) / f"{kind}-base.jsonl"))
        found[kind] = {
            "model": as_json(summary(own)["correct"]),
            "base": as_json(summary(base)["correct"]),
            "difference": as_json(paired_difference(own, base, "correct")),
        }
    return found


def _answered(
    model: DynamicCausalLM,
    records: Records,
    *,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    progress: Progress | None,
) -> list[Record]:
    """Answers the questions that are not among ``records``, and returns the records of all."""
    missing = [question for question in questions if question.id not in records]
    for start in range(0, len(missing), CHOICES_AT_ONCE):
        part = missing[start : start + CHOICES_AT_ONCE]
        for record in choice_records(model, tokenizer, part):
            records.append(record)
        if progress is not None:
            progress("Answering questions", len(questions) - len(missing) + start + len(part), len(questions))
    return [records[question.id] for question in questions]
