"""Tables of what ``pliant evaluate`` measured."""

from typing import Any

from rich.table import Table
from rich.text import Text

from pliant.cli.console import results, shortened

SAMPLE_WIDTH = 160

COLUMNS = {
    "S": "score",
    "ES": "efficacy",
    "PS": "paraphrase",
    "NS": "neighbourhood",
    "exact": "exact",
    "rephr.": "exact_paraphrase",
    "same": "neighbourhood_unchanged",
    "EM": "exact_match",
    "F1": "f1",
    "of gap": "recovered_of_in_context",
    "ppl ×": "perplexity_ratio",
}
"""Heading → what is shown under it, where a suite has it: ``rephr.``, exact on paraphrases; ``same``, neighbours whose
text did not change; ``of gap``, the share of the way to the context in view, by F1; ``ppl ×``, perplexity over
that of the untouched model."""


def show(found: dict[str, Any]) -> None:
    """Prints what :func:`pliant.evaluation.editing.runs` returned."""
    if "pliant" in found:
        _show_tasks(found)
        return
    if "mmlu" in found:
        _show_retention(found)
        return
    parts = found.get("counts") or [found]
    for part in parts:
        title = f"{part['count']:,} edits" if "count" in part else "one edit at a time"
        _show_editors(title, part["editors"])
    if not parts[0].get("editors"):
        results.print("nothing measured yet")


def _show_editors(title: str, editors: dict[str, dict[str, Any]]) -> None:
    known = {heading: [_cell(key, own.get(key)) for own in editors.values()] for heading, key in COLUMNS.items()}
    columns = {heading: cells for heading, cells in known.items() if any(cells)}
    table = Table(title=title)
    table.add_column("editor", no_wrap=True)
    for heading in ("cases", *columns, "worst", "s/edit"):
        table.add_column(heading, justify="right")
    for row, (name, own) in enumerate(editors.items()):
        worst = own.get("worst_perplexity")
        seconds = own.get("median_seconds")
        table.add_row(
            name,
            f"{own['records']:,}",
            *(cells[row] for cells in columns.values()),
            f"{worst[0]['perplexity_ratio']:.4f}" if worst else "",
            "" if seconds is None else f"{seconds:.2f}",
        )
    results.print(table)


def _cell(key: str, interval: dict[str, Any] | None) -> str:
    if key == "recovered_of_in_context":
        interval = (interval or {}).get("f1")
    if interval is None or interval["value"] is None:
        return ""
    return f"{interval['value']:.{ {'score': 1, 'perplexity_ratio': 4}.get(key, 3) }f}"


def _show_retention(found: dict[str, Any]) -> None:
    table = Table(title="what the model keeps")
    for heading in ("", "model", "base", "difference, 95 %"):
        table.add_column(heading, justify="right" if heading else "left")
    ratio = f"× {found['ratio']:.4f}, KL {found['kl']:.4f}"
    table.add_row("perplexity", f"{found['perplexity']:.3f}", f"{found['base_perplexity']:.3f}", ratio)
    for label, kind in (("MMLU", "mmlu"), ("HellaSwag", "hellaswag")):
        own, base, gap = (found[kind][side] for side in ("model", "base", "difference"))
        spread = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}], n={gap['count']}"
        table.add_row(label, f"{own['value']:.3f}", f"{base['value']:.3f}", spread)
    results.print(table)


def _show_tasks(found: dict[str, Any]) -> None:
    own = found["pliant"]
    held_out = own["held_out"]
    is_compared = held_out is not None and "ratio" in held_out
    has_base = bool(own["base"]) or is_compared
    table = Table(title=Text(f"{found['config']['model']}{' beside its base' * has_base}"))
    columns = ("model", "base", "difference") if has_base else ("model",)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for heading in (*columns, "n"):
        table.add_column(heading, justify="right")
    if held_out is not None:
        beside = ["", ""]
        if is_compared:
            beside = [f"{held_out['base_perplexity']['value']:.3f}", f"× {_value(held_out['ratio'], 4)}"]
        table.add_row("perplexity", "", _value(held_out["perplexity"]), *beside * has_base, f"{held_out['tokens']:,}")
    for name, task in own["tasks"].items():
        for metric, sides in task["metrics"].items():
            cells = [_value(sides["model"]), *_beside(sides) * has_base, f"{sides['model']['count']:,}"]
            table.add_row(name, metric.removesuffix(",none"), *cells)
    results.print(table)
    _show_behaviour(own, held_out if is_compared else None)


def _beside(sides: dict[str, Any]) -> list[str]:
    """The base and what the model has over it; empty cells where the base was left out."""
    if sides["base"] is None or sides["difference"] is None:
        return ["", ""]
    gap = sides["difference"]
    return [f"{sides['base']['value']:.3f}", f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"]


def _value(interval: dict[str, Any], digits: int = 3) -> str:
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "" if value is None else f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _show_behaviour(own: dict[str, Any], compared: dict[str, Any] | None) -> None:
    if compared is not None:
        results.print(
            f"on held-out text: same top token {_value(compared['agreement'])}, KL {_value(compared['kl'], 4)} nats a "
            "token",
            markup=False,
        )
    if norms := [layer["ratio"] for layer in own.get("modulation", {}).values()]:
        results.print(f"modulation ‖ΔW‖/‖W‖: {min(norms):.4f} to {max(norms):.4f} over {len(norms)} layers")
    if shares := [layer["share"] for layer in own.get("routing", {}).values()]:
        results.print(f"tokens that run: {min(shares):.1%} to {max(shares):.1%} over {len(shares)} routed layers")
    if written := own.get("samples"):
        table = Table(title="greedy samples")
        for side in written[0]:
            table.add_column(side, overflow="fold")
        for sample in written:
            table.add_row(*(Text(shortened(text, SAMPLE_WIDTH)) for text in sample.values()))
        results.print(table)
