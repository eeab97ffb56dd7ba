"""How ``pliant train --dry-run`` shows what a run would do."""

from typing import TYPE_CHECKING

from rich.table import Table

from pliant.cli.console import bytes_text, notes, results
from pliant.cli.convert import describe_layers

if TYPE_CHECKING:
    from pliant.training.plan import Plan

UNKNOWN = "not checked (offline)"


def show_plan(plan: "Plan") -> None:
    """Prints tables of the model, the memory and the data, and what is odd about them."""
    results.print(_run_table(plan))
    if plan.memory:
        results.print(_memory_table(plan))
    results.print(_data_table(plan))
    for warning in plan.warnings:
        notes.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    results.print("Nothing was trained. Leave out --dry-run to start.")


def _run_table(plan: "Plan") -> Table:
    model, training = plan.model, plan.config.training
    table = Table(show_header=False, title="the run")
    fresh = ", fresh weights" if plan.config.model.init == "scratch" else ""
    table.add_row("model", f"{model.name}, {plan.config.model_type}{fresh}")
    table.add_row("family", model.family or model.not_checked)
    table.add_row("layers", UNKNOWN if model.num_layers is None else str(model.num_layers))
    table.add_row("converted", _converted(plan))
    most = "≤ " if model.is_upper_bound else ""
    for what, number in (("parameters", model.parameters), ("trainable", model.trainable)):
        table.add_row(what, UNKNOWN if number is None else f"{most}{number:,}")
    table.add_row("objective", f"{training.objective}, trains {training.trainable}")
    steps = (
        f"{training.num_epochs:g} epochs; known once the texts are read" if plan.steps is None else f"{plan.steps:,}"
    )
    table.add_row("steps", steps)
    table.add_row("tokens a step", f"{plan.tokens_per_step:,}")
    if plan.steps is not None:
        table.add_row("tokens in all", f"{plan.steps * plan.tokens_per_step:,}")
    table.add_row("device", plan.device)
    table.add_row("output", f"{training.output_dir}: {plan.output}")
    return table


def _converted(plan: "Plan") -> str:
    model = plan.model
    if model.not_checked:
        return UNKNOWN
    if not model.layers:
        return "none"
    if model.is_upper_bound and plan.config.is_routed:
        kind = plan.config.model_type
        return f"≤ {len(model.layers)} of {model.num_layers} layers {kind}, the cheapest: settled on calibration text"
    if model.is_upper_bound:
        forms = "+".join(sorted({form.to_dict()["form"] for form in model.layers.values()}))
        return f"{len(model.layers)} of {model.num_layers} layers {forms}, rank auto: settled on calibration text"
    return f"{len(model.layers)} of {model.num_layers} layers: {describe_layers(model.layers)}"


def _memory_table(plan: "Plan") -> Table:
    table = Table(title="memory of one process, estimated")
    table.add_column("what")
    table.add_column("MiB", justify="right")
    table.add_column("how")
    for line in plan.memory:
        table.add_row(line.what, f"{line.num_bytes / 2**20:,.1f}", line.how)
    total = sum(line.num_bytes for line in plan.memory)
    available = f"this {plan.device} has {bytes_text(plan.available_bytes)}" if plan.available_bytes else ""
    table.add_row("together", f"{total / 2**20:,.1f}", available, style="bold")
    return table


def _data_table(plan: "Plan") -> Table:
    table = Table(title="data")
    for column in ("name", "for", "found as", "status"):
        table.add_column(column)
    for check in plan.data:
        table.add_row(check.name, check.role, str(check.place), check.status)
    return table
