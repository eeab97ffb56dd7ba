"""How ``pliant compare`` shows what it would do, and what it found."""

from typing import TYPE_CHECKING, Any

from rich.table import Table

from pliant.cli.console import bytes_text, notes, results

if TYPE_CHECKING:
    from pliant.evaluation.comparison.plan import ComparisonPlan

TASK_FIGURES = {"correct": "right", "f1": "F1", "gain": "gain, nats"}
"""What is shown of an in-context task; F1 in place of ``correct`` where there is one."""


def show_plan(plan: "ComparisonPlan") -> None:
    """Prints the contenders with their sizes and learning rates, and what is odd about the runs."""
    table = Table(title=f"{plan.num_runs} runs, {len(plan.seeds)} seeds")
    table.add_column("method", no_wrap=True)
    for heading in ("rank", "trainable", "learning rates", "what is trained"):
        table.add_column(heading, justify="left" if heading.startswith("what") else "right")
    for contender in plan.contenders:
        known = contender.parameters is not None
        rank = "" if not contender.method.has_rank else str(contender.rank) if known else "not checked"
        rates = ", ".join(f"{rate:g}" for rate in plan.rates.get(contender.method.name, ()))
        size = f"{contender.parameters:,}" if known else "not checked (offline)"
        table.add_row(contender.id, rank, size, rates, contender.method.summary)
    results.print(table)
    recipe = plan.recipe
    for check in next(iter(plan.checked.values())).data:
        results.print(f"{check.role}: {check.place}, {check.status}", markup=False, soft_wrap=True)
    steps = recipe.training.max_steps
    length = f"epochs: {recipe.training.num_epochs:g}" if steps is None else f"{steps:,} steps"
    results.print(f"{recipe.training.objective}, {length}, batch of {recipe.training.batch_size}")
    of_runs = (warning for checked in plan.checked.values() for warning in checked.warnings)
    for warning in dict.fromkeys((*plan.warnings, *of_runs)):
        notes.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    results.print("Nothing was trained. Leave out --dry-run to start.")


def show(found: dict[str, Any]) -> None:
    """Prints what :func:`pliant.compare` returned."""
    rows = found["summary"]
    if not rows:
        results.print("nothing measured yet")
        return
    results.print(_quality(found, rows))
    if any(row["failed"] for row in rows.values()):
        results.print("of some methods not every seed ended in a finite loss; their figures are of those that did")
    if any("forgetting" in row for row in rows.values()):
        results.print(_forgetting(rows))
    if found["cost"]:
        results.print(_cost(found))
    for task in next((row["in_context"] for row in rows.values() if row.get("in_context")), {}):
        results.print(_task(task, rows))
    if any(own.get("is_at_edge") for own in found["contenders"].values()):
        results.print("* the best of the learning rates is the lowest or the highest: a wider search may find better")


def show_versions(found: dict[str, Any]) -> None:
    """Prints what :func:`pliant.evaluation.comparison.versions.compare_versions` returned."""
    base, steps = found["base"], found["steps"]
    results.print(
        f"base: {base['num_hidden_layers']} layers of {base['hidden_size']}, {base['parameters']:,} parameters, "
        f"trained on bytes of source text to perplexity {base['perplexity']:.2f}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(title=f"the forms, before and after {steps} steps towards the base")
    table.add_column("form", no_wrap=True)
    for heading in ("rank", "adds", "ppl ÷ base", "after", "KL, nats", "after", "‖ΔW‖", "ms a step", "× first"):
        table.add_column(heading, justify="right")
    for form, own in found["versions"].items():
        table.add_row(
            form,
            str(own["rank"]),
            f"{own['parameters']:,}",
            *(f"{own[name]:.4f}" for name in ("start_ratio", "ratio", "start_kl", "kl")),
            f"{own['norm']:.3f}",
            f"{1000 * own['step_seconds']:.1f}",
            f"{own['step_ratio']:.2f}",
        )
    results.print(table)
    if "v1" in found["versions"]:
        results.print("v1 equals its base as converted: there is nothing to train it towards.")


def _quality(found: dict[str, Any], rows: dict[str, Any]) -> Table:
    table = _table("validation loss, nats a token", ("seeds", "rank", "trainable", "lr", "loss ± sd", "perplexity"))
    table.add_column("difference, 95 %", justify="right")
    for name, row in rows.items():
        own = found["contenders"][name]
        rate = f"{own['learning_rate']:g}{'*' if own['is_at_edge'] else ''}" if "learning_rate" in own else ""
        table.add_row(
            name,
            f"{row['seeds']} of {row['seeds'] + row['failed']}" if row["failed"] else str(row["seeds"]),
            "" if own["rank"] is None else str(own["rank"]),
            f"{own['parameters']:,}",
            rate,
            spread(row, "validation_loss"),
            f"{row['perplexity']:.3f}",
            difference(row, row["difference"]),
        )
    return table


def _forgetting(rows: dict[str, Any]) -> Table:
    table = _table("forgetting, on held-out text", ("ppl ÷ base ± sd", "KL, nats", "KL difference, 95 %"))
    for name, row in rows.items():
        if (kept := row.get("forgetting")) is not None:
            gap = difference(row, kept["kl_difference"])
            table.add_row(name, spread(kept, "perplexity_ratio"), f"{kept['kl']:.4f}", gap)
    return table


def _cost(found: dict[str, Any]) -> Table:
    table = _table("a step, paired", ("seconds", "time ×", "peak memory", "memory ×"))
    for name, own in found["cost"].items():
        memory = own["peak_bytes"]
        table.add_row(
            name,
            f"{own['seconds']:.3f}",
            f"{own['time_ratio']:.2f}",
            "not measured" if memory is None else bytes_text(round(memory)),
            "" if own["memory_ratio"] is None else f"{own['memory_ratio']:.2f}",
        )
    return table


def _task(task: str, rows: dict[str, Any]) -> Table:
    shown = {name: row for name, row in rows.items() if task in row.get("in_context", {})}
    figures = [name for name in TASK_FIGURES if any(name in row["in_context"][task] for row in shown.values())]
    figures = [name for name in figures if name != "correct" or "f1" not in figures]
    table = _table(f"in context: {task}", ())
    for name in figures:
        table.add_column(f"{TASK_FIGURES[name]}, 95 %", justify="right")
        table.add_column("difference", justify="right")
    for name, row in shown.items():
        own = row["in_context"][task]
        cells = [(interval(own[f]["value"]), difference(row, own[f]["difference"])) for f in figures]
        table.add_row(name, *(cell for pair in cells for cell in pair))
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title)
    table.add_column("method", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def spread(row: dict[str, Any], name: str) -> str:
    """A mean over seeds with its deviation."""
    deviation = row[f"{name}_deviation"]
    return f"{row[name]:.4f}" if deviation is None else f"{row[name]:.4f} ± {deviation:.4f}"


def interval(value: dict[str, Any]) -> str:
    """A mean with its interval."""
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def difference(row: dict[str, Any], value: dict[str, Any] | None) -> str:
    """A difference with its interval, or that the row is what the others are compared with."""
    if "compared_with" not in row:
        return "reference"
    return "" if value is None else f"{value['value']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
