"""The command ``pliant``, one file a verb; only a verb that runs imports torch."""

from importlib import metadata
from typing import Annotated

import typer

from pliant.cli.bench import bench
from pliant.cli.calibrate import calibrate
from pliant.cli.chat import chat
from pliant.cli.compare.command import compare
from pliant.cli.console import CommandGroup
from pliant.cli.consolidate import consolidate
from pliant.cli.convert import convert
from pliant.cli.demo.command import demo
from pliant.cli.edits import edits
from pliant.cli.evaluate.command import evaluate
from pliant.cli.export import export
from pliant.cli.generate import generate
from pliant.cli.info import info
from pliant.cli.inject import inject
from pliant.cli.inspect.command import inspect
from pliant.cli.report.command import report
from pliant.cli.routes.command import routes
from pliant.cli.serve import serve
from pliant.cli.training import train

main = typer.Typer(
    name="pliant",
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
"""Entry point of the console script."""


def _version(wanted: bool) -> bool:
    if wanted:
        try:
            typer.echo(f"pliant {metadata.version('pliant')}")
        except metadata.PackageNotFoundError:
            typer.echo("pliant (run from its source folder, not installed)")
        raise typer.Exit
    return wanted


@main.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Turn a pretrained causal language model into a dynamic one, and measure what it cost.

    Where a command takes MODEL or BASE, that is a model directory, a hub id or smollm2-135m, the base
    that a Python package carries; what makes a model leaves an ordinary Hugging Face directory.

    \b
    New here?  pliant demo
    Then       pliant convert smollm2-135m --rank 192 --output outputs/keyed
               pliant chat outputs/keyed
               pliant inject outputs/keyed
    """


for _verb in (
    *(demo, convert, info, generate, chat, routes, inspect, report),
    *(calibrate, consolidate, inject, evaluate, export, serve, bench),
):
    main.command()(_verb)
main.command()(compare)
main.command(context_settings={"ignore_unknown_options": True})(train)  # Hydra's overrides, and flags that it explains
main.add_typer(edits, name="edits")

__all__ = ["main"]
