"""The figures of editors, from their records: means with intervals, differences case by case, shares of a gap."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from pliant.evaluation.editing.cases import EditCase
from pliant.evaluation.editing.editors import EDITORS, OWN
from pliant.evaluation.editing.run import case_hash
from pliant.evaluation.editing.runs import COUNTS
from pliant.evaluation.intervals import SCORE, Interval, paired_difference, recovered, summary
from pliant.evaluation.records import Record, Records

MODES = ("single", "sequential", "batched")
MEASURES = (
    SCORE,
    "efficacy",
    "paraphrase",
    "neighbourhood",
    "exact",
    "exact_paraphrase",
    "neighbourhood_unchanged",
    "accuracy",
    "accuracy_paraphrase",
    "accuracy_neighbourhood",
    "exact_match",
    "f1",
    "generation_entropy",
    "perplexity_ratio",
    "kl",
    "edited",
)
"""What is told of an editor."""
COMPARED = (SCORE, "efficacy", "paraphrase", "neighbourhood", "exact", "exact_paraphrase", "exact_match", "f1")
"""What two editors are compared by, case by case."""
GAPS = ("efficacy", "paraphrase", "exact", "exact_paraphrase", "accuracy", "exact_match", "f1")
"""Where the share is told that was closed of the gap between the untouched model and another one."""
ENDS = {"untouched": "before", "in_context": "in_context"}
"""The ends of the scale, which no number of edits changes, and the files of their records."""
WORST = 10


def run_name(editor: str, mode: str) -> str:
    """Returns what the files of an editor's records begin with."""
    return editor if mode == "single" else f"{editor}-{mode}"


def report(
    output: str | os.PathLike, cases: Sequence[EditCase], *, mode: str = "single", counts: Sequence[int] = COUNTS
) -> dict[str, Any]:
    """Returns the figures of all editors whose records lie in a folder, as JSON values.

    Args:
        output: The folder.
        cases: The cases whose records to take.
        mode: As for :func:`evaluate`.
        counts: Likewise.

    Returns:
        ``editors``: name → figures, and ``differences``: name of one of pliant's → name of another → what it has over
        that. For a ``sequential`` or ``batched`` run, a list of these by ``count``.
    """
    if mode == "single":
        return _figures_of_all(output, cases, mode, "")
    found = [{"count": count, **_figures_of_all(output, cases[:count], mode, f"-{count}")} for count in sorted(counts)]
    return {"counts": [part for part in found if part["editors"].keys() - ENDS.keys()]}


def _figures_of_all(output: str | os.PathLike, cases: Sequence[EditCase], mode: str, suffix: str) -> dict[str, Any]:
    hashes = {case.id: case_hash([case]) for case in cases}

    def measured(name: str) -> list[Record]:
        path = Path(output) / f"{name}.jsonl"
        records = Records(path).all() if path.is_file() else []
        return [record for record in records if hashes.get(record["id"]) == record["case"]]

    found = {name: measured(ENDS.get(name, run_name(name, mode) + suffix)) for name in EDITORS}
    runs = {name: records for name, records in found.items() if records}
    return {"editors": {name: figures(name, runs) for name in runs}, "differences": differences(runs)}


def figures(name: str, runs: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Returns what is told of one editor beside the untouched one, the context in view and, for ``made``, ``auto``."""
    records, before = runs[name], runs["untouched"]
    means = summary(records)
    found: dict[str, Any] = {"records": len(records)}
    found |= {measure: as_json(means[measure]) for measure in MEASURES if measure in means}
    if name == "untouched":
        return found
    if "neighbourhood" in means:
        found["neighbourhood_drop"] = as_json(paired_difference(before, records, "neighbourhood"))
    if name == "in_context":
        return found
    for reference in ("in_context", "auto") if name == "made" else ("in_context",):
        if reference in runs and (shares := _gaps(before, runs[reference], records)):
            found[f"recovered_of_{reference}"] = shares
    if seconds := [record["seconds"] for record in records if "seconds" in record]:
        found["median_seconds"] = median(seconds)
    drifts = sorted(((r["perplexity_ratio"], r["id"]) for r in records if "perplexity_ratio" in r), reverse=True)
    found["worst_perplexity"] = [{"id": case, "perplexity_ratio": ratio} for ratio, case in drifts[:WORST]]
    details = [record["edit"]["details"] for record in records if "edit" in record]
    if counted := [detail for detail in details if "optimised" in detail]:
        found["needed_gradients"] = sum(detail["optimised"] > 0 for detail in counted) / len(counted)
    return found


def _gaps(before: Sequence[Record], upper: Sequence[Record], records: Sequence[Record]) -> dict[str, Any]:
    """Returns, by measure, the share of the gap between ``before`` and ``upper`` that ``records`` close."""
    ids = {record["id"] for record in upper} & {record["id"] for record in records}
    if not ids:
        return {}
    low, high, now = ([record for record in side if record["id"] in ids] for side in (before, upper, records))
    shared = summary(low).keys() & summary(high).keys() & summary(now).keys()
    return {field: as_json(recovered(low, high, now, field)) for field in GAPS if field in shared}


def differences(runs: Mapping[str, Sequence[Record]]) -> dict[str, dict[str, Any]]:
    """Returns what each of pliant's editors has over every other, on the cases that both have."""
    found: dict[str, dict[str, Any]] = {}
    for own in (name for name in OWN if name in runs):
        for other in (name for name in runs if name not in OWN):
            ids = {record["id"] for record in runs[own]} & {record["id"] for record in runs[other]}
            left, right = ([record for record in runs[name] if record["id"] in ids] for name in (own, other))
            if not ids:
                continue
            shared = summary(left).keys() & summary(right).keys()
            fields = [field for field in COMPARED if field in shared]
            found.setdefault(own, {})[other] = {
                field: as_json(paired_difference(left, right, field)) for field in fields
            }
    return found


def as_json(interval: Interval) -> dict[str, float | int | None]:
    """The interval as JSON values, None for what is not finite."""
    return {name: None if not math.isfinite(value) else value for name, value in asdict(interval).items()}
