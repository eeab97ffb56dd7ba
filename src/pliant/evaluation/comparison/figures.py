"""From the runs of a comparison to its table: means over seeds, and differences to a reference with intervals."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from pliant.evaluation.comparison.methods import FROZEN
from pliant.evaluation.comparison.plan import ComparisonPlan
from pliant.evaluation.editing.figures import as_json
from pliant.evaluation.intervals import paired_difference, ratio_of_sums, summary
from pliant.evaluation.records import Record

Run = Mapping[str, Any]


def loss_of(run: Run, tokens: Sequence[int]) -> float:
    """Returns the mean −log p of the validation tokens, in nats."""
    return sum(run["nll"]) / sum(tokens)


def chosen_rates(plan: ComparisonPlan, runs: Sequence[Run], tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Returns by contender the ``learning_rate`` of the lowest loss at the first seed, and whether it ``is_at_edge``.

    A contender some of whose first runs are missing is left out, and so is one all of whose first runs failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for contender in plan.trained:
        rates = plan.rates[contender.method.name]
        own = [r for r in runs if r["contender"] == contender.id and r["seed"] == plan.seeds[0] and r["lr"] in rates]
        if len(own) < len(rates) or not ended(own):
            continue
        best = min(ended(own), key=lambda run: loss_of(run, tokens))["lr"]
        is_at_edge = len(rates) > 1 and best in (rates[0], rates[-1])
        found[contender.id] = {"learning_rate": best, "is_at_edge": is_at_edge}
    return found


def final_runs(plan: ComparisonPlan, runs: Sequence[Run], tokens: Sequence[int]) -> dict[str, list[Run]]:
    """Returns by contender the runs at the chosen learning rate, in the order of the seeds; some may have failed."""
    found: dict[str, list[Run]] = {}
    for name, chosen in chosen_rates(plan, runs, tokens).items():
        own = [r for r in runs if r["contender"] == name and r["lr"] == chosen["learning_rate"]]
        found[name] = sorted((r for r in own if r["seed"] in plan.seeds), key=lambda run: run["seed"])
    return found


def ended(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs that ended in a finite loss."""
    return [run for run in runs if "nll" in run]


def summarise(plan: ComparisonPlan, comparison: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns by contender what its runs so far come to.

    ``seeds`` is the number of runs that ended, which all else is about, and ``failed`` of those that did not.
    ``validation_loss`` and ``perplexity`` are means over seeds, with the ``deviation`` between them. ``difference`` is
    to the reference of the nearest budget, ``compared_with``: the mean over validation rows of what the seeds give on
    average, row by row, with a 95 % bootstrap interval over rows. ``forgetting`` has the perplexity on held-out text
    over that of the base, and ``KL(base ‖ model)`` with its own difference; ``in_context`` by task what the questions
    give, likewise.
    """
    tokens, runs, base = comparison["tokens"], comparison["runs"], comparison["base"]
    finals = final_runs(plan, runs, tokens)
    table: dict[str, dict[str, Any]] = {}
    for contender in plan.contenders:
        reference = ended(finals.get(plan.reference_of(contender).id, []))
        runs_of = [base] if contender.method.name == FROZEN and base else finals.get(contender.id, [])
        if own := ended(runs_of):
            table[contender.id] = {**_row(own, reference, tokens), "failed": len(runs_of) - len(own)}
            if contender.id != plan.reference_of(contender).id:
                table[contender.id]["compared_with"] = plan.reference_of(contender).id
    return table


def _row(own: Sequence[Run], reference: Sequence[Run], tokens: Sequence[int]) -> dict[str, Any]:
    losses = [loss_of(run, tokens) for run in own]
    row: dict[str, Any] = {
        "seeds": len(own),
        **_spread("validation_loss", losses),
        "perplexity": math.exp(min(mean(losses), 700.0)),
        "difference": _loss_difference(own, reference, tokens),
    }
    measured, against = ([run for run in side if "forgetting" in run] for side in (own, reference))
    if not measured:
        return row
    kept = [[run["forgetting"] for run in side] for side in (measured, against)]
    ratios = [math.exp(mean(window["nll"] - window["base_nll"] for window in windows)) for windows in kept[0]]
    row["forgetting"] = {
        **_spread("perplexity_ratio", ratios),
        "kl": mean(mean(window["kl"] for window in windows) for windows in kept[0]),
        "kl_difference": _difference(averaged(kept[0]), averaged(kept[1]), "kl"),
    }
    row["in_context"] = {
        task: _task(
            *([run["in_context"][task] for run in side if task in run["in_context"]] for side in (measured, against))
        )
        for task in measured[0]["in_context"]
    }
    return row


def _task(own: Sequence[Sequence[Record]], reference: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Every figure of a task with its interval over questions, and its difference to the reference."""
    mine, theirs = averaged(own), averaged(reference)
    return {
        name: {"value": as_json(interval), "difference": _difference(mine, theirs, name)}
        for name, interval in summary(mine).items()
    }


def averaged(seeds: Sequence[Sequence[Record]]) -> list[Record]:
    """Returns for each question or window that all seeds have the mean over seeds of every number."""
    by_id = [{record["id"]: record for record in records} for records in seeds]
    found: list[Record] = []
    for name, first in by_id[0].items() if by_id else ():
        own = [records[name] for records in by_id if name in records]
        if len(own) == len(by_id):
            numbers = [field for field in first if field != "id"]
            found.append({"id": name, **{field: mean(record[field] for record in own) for field in numbers}})
    return found


def _loss_difference(own: Sequence[Run], reference: Sequence[Run], tokens: Sequence[int]) -> dict[str, Any] | None:
    """By how much the loss of ``own`` is above that of the reference, rows resampled, seeds averaged."""
    if not reference:
        return None
    sides = [[mean(values) for values in zip(*(run["nll"] for run in side), strict=True)] for side in (own, reference)]
    rows = zip(*sides, tokens, strict=True)
    return as_json(ratio_of_sums([{"difference": a - b, "tokens": n} for a, b, n in rows], "difference", "tokens"))


def _difference(own: Sequence[Record], reference: Sequence[Record], name: str) -> dict[str, Any] | None:
    return as_json(paired_difference(own, reference, name)) if reference else None


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    return {name: mean(values), f"{name}_deviation": stdev(values) if len(values) > 1 else None}
