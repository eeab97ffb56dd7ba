"""Results of benchmark tasks in a folder: where they lie, and the figures of model and base that they give."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pliant.errors import DataError
from pliant.evaluation.editing.figures import as_json
from pliant.evaluation.intervals import is_number, paired_difference, summary
from pliant.evaluation.records import Record
from pliant.json_files import read_object
from pliant.models.staging import replaced

MODEL, BASE = "model", "base"
"""The two sides, and the folders of their files."""


def assemble(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the results of all tasks that are complete in a folder, in lm-eval's schema.

    Returns:
        lm-eval's keys for the model; under ``pliant`` its ``results`` and ``groups`` for the ``base``, and ``tasks``:
        name → what was measured, by ``metric,filter``: ``model``, ``base`` and their ``difference``, with intervals
        over documents.
    """
    root = Path(folder)
    sides: dict[str, dict[str, Any]] = {MODEL: {}, BASE: {}}
    tasks: dict[str, Any] = {}
    for name in sorted(path.stem for path in (root / "tasks" / MODEL).glob("*.json")):
        own = _side(root, name, MODEL)
        facts = own.pop("pliant")
        _merge(sides[MODEL], own)
        base_file = task_file(root, name, BASE)
        base_records = None
        if base_file.is_file():
            base = _side(root, name, BASE)
            facts["base_seconds"] = base.pop("pliant")["seconds"]
            _merge(sides[BASE], base)
            base_records = task_records(root, name, BASE)
        figures = _figures(task_records(root, name, MODEL), base_records, facts.pop("metrics"))
        tasks[name] = {**facts, "metrics": figures}
    base_results = {key: sides[BASE][key] for key in ("results", "groups") if key in sides[BASE]}
    return {"results": {}, **sides[MODEL], "pliant": {"tasks": tasks, "base": base_results}}


def _figures(records: list[Record], base: list[Record] | None, averaged: Sequence[str]) -> dict[str, Any]:
    means = summary(records)
    fields = [field for field in means if field.partition(",")[0] in averaged]
    base_means = {} if base is None else summary(base)
    return {
        field: {
            "model": as_json(means[field]),
            "base": as_json(base_means[field]) if field in base_means else None,
            "difference": None if base is None else as_json(paired_difference(records, base, field)),
        }
        for field in fields
    }


def _side(folder: Path, name: str, side: str) -> dict[str, Any]:
    """Returns what is complete of one side on a task.

    Raises:
        DataError: The file is damaged.
    """
    file = task_file(folder, name, side)
    found = read_json(file)
    facts = found.get("pliant")
    if not isinstance(facts, dict) or not {"metrics", "seconds"} <= facts.keys():
        raise DataError(
            f"{file} must hold the results of task {name!r}, with metrics and seconds under pliant; it does not. "
            "Delete it, and it is made again."
        )
    return found


def task_records(folder: Path, name: str, side: str) -> list[Record]:
    """Returns a record a document, its metrics named as lm-eval names them: ``metric,filter``.

    Raises:
        DataError: The file of samples is missing, empty or damaged.
    """
    file = samples_file(folder, name, side)
    again = f"Delete {task_file(folder, name, side)}, and the task is made again from the answers under requests."
    if not file.is_file() or not file.stat().st_size:
        raise DataError(f"{file} must hold a line for each document; it is missing or empty. {again}")
    found: dict[str, Record] = {}
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                sample = json.loads(line)
                record = found.setdefault(f"{sample['task']}-{sample['doc_id']}", {})
                values = {metric: sample[metric] for metric in sample["metrics"]}
                record |= {f"{key},{sample['filter']}": value for key, value in values.items() if is_number(value)}
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{file}: line {number} must be what was made of a document; it is damaged. {again}"
                ) from error
    return [{"id": name, **record} for name, record in found.items()]


def read_json(file: Path) -> dict[str, Any]:
    """Reads a file of results.

    Raises:
        DataError: It is damaged.
    """
    return read_object(file, holds="results by name", remedy="Delete it, and it is made again.")


def _merge(into: dict[str, Any], found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        into[key] = {**into.get(key, {}), **value} if isinstance(value, dict) else value


def write_json(file: Path, found: Mapping[str, Any]) -> None:
    """Writes a file of results, whole or not at all."""
    with replaced(file, prefix=".results-") as staged:
        Path(staged).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def task_file(folder: Path, name: str, side: str) -> Path:
    """Where the results of one side on a task lie; it is there when they are complete."""
    return folder / "tasks" / side / f"{name}.json"


def settings_file(folder: Path, name: str) -> Path:
    """Where it lies with what settings a task is measured."""
    return folder / "tasks" / f"{name}.settings.json"


def samples_file(folder: Path, name: str, side: str) -> Path:
    """Where it lies what one side made of every document."""
    return folder / "samples" / side / f"{name}.jsonl"
