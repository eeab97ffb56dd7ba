"""``pliant report``: one page of what runs, evaluations and models have come to."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.cli import options as o
from pliant.cli.console import bytes_text, hush_transformers, results, say_step
from pliant.cli.report.sources import Kind, Source, read_sources
from pliant.errors import ConfigError, DataError

NEW_TOKENS = 48


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of training runs, demos, evaluations, comparisons and models, or JSON files of these.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Page to write: .html.")] = Path("report.html"),
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Text that the models among RUN run: layers, routes and continuations."),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens to write after the prompt.")
    ] = NEW_TOKENS,
    title: Annotated[str | None, typer.Option("--title", help="Heading of the page.")] = None,
    dtype: o.DtypeOption = o.Dtype.AUTO,
    device_map: o.DeviceMapOption = None,
    quantization: o.QuantizationOption = o.Quantization.NONE,
    attn_implementation: o.AttentionOption = None,
) -> None:
    """Write one page of what runs have come to.

    Needs at least one folder that pliant has written; several training runs are laid over each other.
    Leaves one HTML file that needs no network: curves, tables, spectra, edits and texts, a section for
    each thing that there is. Weights are only loaded for a --prompt.

    \b
    pliant report outputs/demo
    pliant report outputs/run-1 outputs/run-2 --output outputs/report.html
    pliant report outputs/keyed --prompt "The capital of France is"
    """
    given = locals()  # every option by its name
    from pliant.cli.page import check_page, write_page

    check_page(output)
    sources = read_sources(runs)
    if prompt is not None:
        _check_prompt(prompt, sources)
    hush_transformers()
    sections = [_overview(sources), *_sections(sources, given)]
    heading = title or (sources[0].name if len(runs) == 1 else f"{len(runs)} runs")
    size = write_page(output, heading, sections, subtitle=_subtitle(sources), kicker="pliant report")
    results.print(f"wrote {output} ({bytes_text(size)})", markup=False, soft_wrap=True)


def _check_prompt(prompt: str, sources: Sequence[Source]) -> None:
    if not prompt.strip():
        raise DataError(f"--prompt must hold some text; got {prompt!r}. Write what the models are to read.")
    if all(source.model is None for source in sources):
        raise ConfigError(
            "--prompt needs a model among RUN; none of them has one. Name a model folder, or leave it out."
        )


def _sections(sources: Sequence[Source], given: dict[str, Any]) -> Iterator[Any]:
    """Yields the sections that there is something to show in."""
    from pliant.cli.report import demo, evaluation, tasks, training

    by_kind = {kind: [source for source in sources if source.kind is kind] for kind in Kind}
    for source in by_kind[Kind.DEMO]:
        yield demo.section(source)
    if by_kind[Kind.TRAINING]:
        yield training.section(by_kind[Kind.TRAINING])
    if by_kind[Kind.TASKS]:
        yield tasks.tasks(by_kind[Kind.TASKS])
    for source in by_kind[Kind.COMPARISON]:
        yield evaluation.comparison(source)
    for source in by_kind[Kind.EDITING]:
        yield evaluation.editing(source)
    for source in by_kind[Kind.RETENTION]:
        yield evaluation.retention(source)
    yield from _models(sources, given)


def _models(sources: Sequence[Source], given: dict[str, Any]) -> Iterator[Any]:
    """Yields a section for each model: those named, and with a prompt those of runs too."""
    prompt = given["prompt"]
    for source in sources:
        folder = source.model
        if folder is None or (prompt is None and source.kind is Kind.TRAINING):
            continue
        from pliant.cli.report import models

        name = source.name if folder == source.path else f"{source.name}/{folder.name}"
        say_step(f"Reading {folder}")
        blocks = list(models.described(folder))
        if prompt is not None:
            model = o.load_model(str(folder), given)
            blocks += models.run(model, prompt, given["new_tokens"])
        yield models.section(name, blocks)


def _overview(sources: Sequence[Source]) -> Any:
    """What the page is made from, and the first figures of it."""
    from pliant.cli.page import Facts, Section, Table
    from pliant.cli.report import demo, tasks, training

    makers: dict[Kind, Any] = {
        Kind.DEMO: demo.tiles,
        Kind.TRAINING: training.tiles,
        Kind.TASKS: tasks.tiles,
    }
    tiles = [tile for source in sources for tile in makers.get(source.kind, lambda _: ())(source)]
    blocks: list[Any] = [Facts(tiles=tiles[:8])] if tiles else []
    here = Path.cwd()
    paths = [s.path.relative_to(here) if s.path.is_relative_to(here) else s.path for s in sources]
    rows = [[source.name, source.kind.value, str(path)] for source, path in zip(sources, paths, strict=True)]
    blocks.append(Table(title="Made from", columns=["name", "what it is", "path"], rows=rows, is_folded=True))
    return Section(title="Overview", blocks=blocks)


def _subtitle(sources: Sequence[Source]) -> str:
    from datetime import UTC, datetime

    counts = {kind: sum(source.kind is kind for source in sources) for kind in Kind}
    told = ", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items() if count)
    return f"{told}. {datetime.now(UTC):%d %B %Y, %H:%M} UTC."
