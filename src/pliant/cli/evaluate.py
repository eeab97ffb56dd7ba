"""``pliant evaluate``: how well facts are learned, what else changes, and what a model has kept."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pliant.cli import options as o
from pliant.cli.console import progress_display, results, say_step

EDITING, CASES = "Editing", "Cases"


class Suite(StrEnum):
    """What is measured."""

    COUNTERFACT = "counterfact"
    ZSRE = "zsre"
    SQUAD = "squad_closed_book"
    RETENTION = "retention"


class Mode(StrEnum):
    """Whether edits stand alone, come one after another, or are made of many cases at once."""

    SINGLE = "single"
    SEQUENTIAL = "sequential"
    BATCHED = "batched"


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    suite: Annotated[Suite, typer.Option("--suite", help="What to measure.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the records, one for each suite and model; the same goes on."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="File of counterfact or zsre, in EasyEdit's form.", rich_help_panel=CASES),
    ] = None,
    records: Annotated[
        int, typer.Option(min=1, help="Cases, passages, or questions of each kind.", rich_help_panel=CASES)
    ] = 100,
    start: Annotated[int, typer.Option(min=0, help="The first case, counted from 0.", rich_help_panel=CASES)] = 0,
    editors: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: untouched, in_context, context, unembedding, auto, optimised, made, random, rome, "
            "memit, alphaedit, finetune, lora. Default: untouched,in_context,auto.",
            rich_help_panel=EDITING,
        ),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="Edits stand alone, come one after another, or are made of 1, 10, 100 and 1,000 cases at once.",
            rich_help_panel=EDITING,
        ),
    ] = Mode.SINGLE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Measure editors on cases of a suite, or, with retention, a model beside its base.

    Needs a file of cases for counterfact and zsre; passages and questions are embedded. Leaves a record
    a case under --output, and goes on there when it was stopped; editors that were measured there
    before are shown too. MODEL stays as it is.

    \b
    pliant evaluate smollm2-135m --suite counterfact --data counterfact.json -o outputs/facts
    pliant evaluate smollm2-135m --suite squad_closed_book --editors in_context,context -o outputs/squad
    pliant evaluate outputs/edited --suite retention -o outputs/kept
    """
    given = locals()  # every option by its name
    names = None if editors is None else [name.strip() for name in editors.split(",") if name.strip()]
    _check(suite, data, names, mode, start)
    if not as_json:
        say_step(f"Loading {model}")
    loaded = o.load_model(model, given)
    from pliant.cli.generation import tokenizer_of
    from pliant.evaluation import evaluate as measure

    chosen: dict[str, Any] = {} if names is None else {"editors": names}
    with progress_display() as progress:
        found = measure(
            loaded,
            tokenizer_of(loaded),
            suite.value,
            output=output,
            data=data,
            records=records,
            start=start,
            mode=mode.value,
            progress=progress,
            **chosen,
        )
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    show(found)
    results.print(f"records in {output}", markup=False, soft_wrap=True)


def _check(suite: Suite, data: Path | None, names: list[str] | None, mode: Mode, start: int) -> None:
    """Says what is wrong before a model is loaded."""
    if suite is Suite.RETENTION:
        for option, wrong in (
            ("--data", data is not None),
            ("--editors", names is not None),
            ("--mode", mode is not Mode.SINGLE),
            ("--start", start > 0),
        ):
            if wrong:
                raise typer.BadParameter("does not go with --suite retention; leave it out.", param_hint=option)
        return
    from pliant.evaluation.editors import editor_named
    from pliant.evaluation.suites import cases_of

    if names == []:
        raise typer.BadParameter("must name at least one editor.", param_hint="--editors")
    for name in names or ():
        editor_named(name, mode=mode.value)
    cases_of(suite.value, data, start=start)


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
    """Prints what :func:`pliant.evaluation.evaluate` returned."""
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
