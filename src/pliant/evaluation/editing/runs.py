"""Editors on many cases, each alone, one after another, or all in one edit; a run that was stopped goes on."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from pliant.errors import ConfigError, DataError
from pliant.evaluation.editing.cases import EditCase
from pliant.evaluation.editing.run import EditRun, case_hash
from pliant.evaluation.records import Record, Records
from pliant.models import DynamicCausalLM
from pliant.models.edits import Edit
from pliant.models.ledger_file import read_edits, snapshot, write_edits

Editor = Callable[[DynamicCausalLM, PreTrainedTokenizerBase, EditCase], Edit | None]
"""Makes an edit from a case; it may be in the ledger already. None where it cannot."""

BatchEditor = Callable[[DynamicCausalLM, PreTrainedTokenizerBase, Sequence[EditCase]], Edit | None]
"""Makes one edit from several cases."""

COUNTS = (1, 10, 100, 1_000)
NO_DRIFT = {"perplexity_ratio": 1.0, "kl": 0.0}
"""Of a model that is as it was, because the editor made no edit or it was refused."""


def evaluate_edits(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cases: Iterable[EditCase],
    editor: Editor | None,
    *,
    output: str | os.PathLike,
    name: str,
    **options: Any,
) -> list[Record]:
    """Edits the model for each case alone, measures it, and takes the edit back; returns a record a case.

    A record holds the measures of :func:`pliant.evaluation.editing.scores.score_cases`, ``perplexity_ratio`` and
    ``kl`` on held-out text, ``seconds`` that the edit took, ``edited`` (0.0 where the editor made none, or it was
    refused; then the drift is none), and the edit's own description. The unedited model's records lie in
    ``before.jsonl``.

    Args:
        model: A pliant model.
        tokenizer: Its tokenizer.
        cases: What to learn.
        editor: Makes the edits; None measures the unedited model with each case's context in view.
        output: The folder for results on this model.
        name: Name of the run.
        options: Those of :class:`EditRun`: ``settings``, ``held_out``, ``entropy``, ``progress``.

    Raises:
        ConfigError: The folder holds results of another model, or the run's of other settings.
        DataError: There are no cases, or the embedded texts are not installed.
    """
    run = EditRun(model, tokenizer, cases, output=output, name=name, **options)
    records = run.records()
    missing = run.missing(records, run.cases)
    for done, case in enumerate(missing, start=len(run.cases) - len(missing) + 1):
        if editor is None:
            records.append(run.score([case], in_context=True)[0])
        else:
            with _taken_back(model):
                edit, facts = run.edit(lambda case=case: editor(model, tokenizer, case))
                drift = NO_DRIFT if edit is None else run.held_out.compare(model)
                records.append({**run.score([case])[0], **facts, **drift})
        run.report(f"Evaluating {name}", done, len(run.cases))
    return [records[case.id] for case in run.cases]


def evaluate_sequence(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cases: Iterable[EditCase],
    editor: Editor,
    *,
    output: str | os.PathLike,
    name: str,
    counts: Sequence[int] = COUNTS,
    remembers: bool = False,
    **options: Any,
) -> dict[int, list[Record]]:
    """Edits the model for one case after another, and measures all cases edited so far after each of ``counts``.

    Every edit lies in a file of its own, so a run that was stopped applies those again. In the end all are taken back.

    Args:
        model: A pliant model.
        tokenizer: Its tokenizer.
        cases: What to learn, in this order.
        editor: Makes the edits, on the model that carries those before.
        output: The folder for results on this model.
        name: Name of the run.
        counts: After how many cases to measure; those above the number of cases are left out.
        remembers: The editor keeps something from one edit to the next, so that a run that was stopped makes its edits
            anew.
        options: Those of :class:`EditRun`.

    Returns:
        Count → the records of the first so many cases; ``seconds`` and ``edited`` are means over them.

    Raises:
        ConfigError: The folder holds results of another model, or the run's of other settings.
        DataError: There are no cases, or the embedded texts are not installed.
    """
    run = EditRun(model, tokenizer, cases, output=output, name=name, **options)
    wanted = _within(counts, len(run.cases))
    made, found = run.records("-edits"), {}
    facts: list[Record] = []
    with _taken_back(model):
        for index, case in enumerate(run.cases[: max(wanted, default=0)], start=1):
            if remembers and case.id in made:
                run.edit(lambda case=case: editor(model, tokenizer, case))
                facts.append(made[case.id])
            else:
                facts.append(_edit_once(run, made, [case], case.id, lambda case=case: editor(model, tokenizer, case)))
            run.report(f"Editing with {name}", index, max(wanted))
            if index in wanted:
                means = {key: sum(fact[key] for fact in facts) / index for key in ("seconds", "edited")}
                found[index] = run.score_together(index, means)
    return found


def evaluate_batches(
    model: DynamicCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    cases: Iterable[EditCase],
    editor: BatchEditor,
    *,
    output: str | os.PathLike,
    name: str,
    counts: Sequence[int] = COUNTS,
    **options: Any,
) -> dict[int, list[Record]]:
    """Makes one edit of the first so many cases, for each of ``counts``, measures them all, and takes it back.

    Args:
        model: A pliant model.
        tokenizer: Its tokenizer.
        cases: What to learn.
        editor: Makes one edit of several cases.
        output: The folder for results on this model.
        name: Name of the run.
        counts: Of how many cases to make an edit; those above the number of cases are left out.
        options: Those of :class:`EditRun`.

    Returns:
        Count → the records of the first so many cases; ``seconds`` is the time of the edit divided by them.

    Raises:
        ConfigError: The folder holds results of another model, or the run's of other settings.
        DataError: There are no cases, or the embedded texts are not installed.
    """
    run = EditRun(model, tokenizer, cases, output=output, name=name, **options)
    made, found = run.records("-edits"), {}
    for count in _within(counts, len(run.cases)):
        batch = run.cases[:count]
        with _taken_back(model):
            fact = _edit_once(run, made, batch, str(count), lambda batch=batch: editor(model, tokenizer, batch))
            facts = {"seconds": fact["seconds"] / count, "edited": fact["edited"]}
            found[count] = run.score_together(count, facts)
    return found


def _edit_once(
    run: EditRun, made: Records, cases: Sequence[EditCase], name: str, make: Callable[[], Edit | None]
) -> Record:
    """Makes an edit and keeps it in a file, or applies the one that is there; returns the record of it.

    Raises:
        DataError: The one that is there is of other cases.
    """
    own = case_hash(cases)
    folder = run.folder / f"{run.name}-edits" / own
    if name not in made:
        edit, fact = run.edit(make)
        if edit is not None:
            write_edits(folder, snapshot(run.model).with_edits([edit]))
        made.append({"id": name, "case": own, **fact})
    elif made[name]["case"] != own:
        raise DataError(
            f"{made.path}: edit {name} must be of the same cases; they differ. Choose another output folder."
        )
    elif made[name]["edited"]:
        for edit in read_edits(folder):
            run.model.edits.add(edit)
    return made[name]


@contextmanager
def _taken_back(model: DynamicCausalLM) -> Iterator[None]:
    """After the block the model carries the edits that it carried before."""
    before = {edit.id for edit in model.edits}
    try:
        yield
    finally:
        for edit in model.edits:
            if edit.id not in before:
                model.edits.revert(edit.id)


def _within(counts: Sequence[int], number: int) -> list[int]:
    if any(count < 1 for count in counts) or not counts:
        raise ConfigError(f"counts must be numbers of cases, at least 1; got {list(counts)}. The default is {COUNTS}.")
    return sorted({count for count in counts if count <= number})
