"""``pliant bench``: measure the paired ratios of the benchmark suite anew, and say what got slower."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pliant.cli.console import results, say_step
from pliant.errors import ConfigError, DataError
from pliant.json_files import read_object

SUITE = "suite.toml"
STDERR = 2
"""Where a script prints to: what this command prints stays by itself."""
SETTINGS = ("capacity", "tokens", "batch")
"""Numbers that say what a ratio is of; all others are measured."""
WITHOUT_INTERVAL = 0.05
"""A ratio that has no interval counts as changed by more than this share."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A measured ratio, 1 where both sides cost the same, and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Job:
    """One script of the suite: what it is started with, and the result file it writes."""

    name: str
    arguments: tuple[str, ...]
    result: str


def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Benchmarks; all by default.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the benchmark scripts.")] = Path("benchmarks"),
    listed: Annotated[bool, typer.Option("--list", help="Show what there is, and run nothing.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Let the new results take the place of the stored ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Measure speed and memory anew, in pairs, and show what got slower since the stored results.

    Needs a checkout: the scripts and their results are no part of the installed package. Leaves the
    stored results alone unless told to --keep the new ones. Ends with 1 if anything got slower.
    Other work on the machine spoils the figures.

    \b
    pliant bench --list
    pliant bench speed peers
    """
    jobs = suite(folder)
    if listed:
        for job in jobs.values():
            results.print(
                f"{job.name:18} {folder / job.name}.py {' '.join(job.arguments)}", markup=False, soft_wrap=True
            )
        return
    chosen = _chosen(jobs, names)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for job in chosen:
            if not as_json:
                say_step(f"Running {job.name}")
            new = run_script(job, folder, Path(temporary))
            stored = folder / "results" / job.result
            rows += compared(job.name, _read(stored), json.loads(new.read_text(encoding="utf-8")))
            if keep:
                from pliant.models.staging import replaced

                with replaced(stored, prefix=f".{stored.name}.") as staged:
                    Path(staged).write_bytes(new.read_bytes())
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        show(rows)
    if any(row["verdict"] == "slower" for row in rows):
        raise typer.Exit(1)


def suite(folder: Path) -> dict[str, Job]:
    """Reads the suite of a folder of benchmarks.

    Raises:
        DataError: There is none, or it is not one.
    """
    file = folder / SUITE
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
        return {
            name: Job(name=name, arguments=tuple(entry["arguments"]), result=entry["result"])
            for name, entry in entries.items()
        }
    except FileNotFoundError as error:
        raise DataError(
            f"--folder must hold the benchmark scripts and their {SUITE}; {str(folder)!r} does not. Run this in a "
            "checkout of the project, or name its folder."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{file} must give arguments and result for each script; {error!r}. Mend it.") from error


def run_script(job: Job, folder: Path, temporary: Path) -> Path:
    """Runs one script of the suite; returns its result file, in ``temporary``.

    Raises:
        DataError: The script failed.
    """
    command = [sys.executable, str(folder / f"{job.name}.py"), *job.arguments]
    environment = {**os.environ, "PLIANT_BENCHMARK_RESULTS": str(temporary)}
    finished = subprocess.run(command, env=environment, stdout=STDERR, check=False)
    result = temporary / job.result
    if finished.returncode or not result.exists():
        raise DataError(
            f"{job.name} must end with a result; it ended with {finished.returncode} and "
            f"{'one' if result.exists() else 'none'}. Its own message is above."
        )
    return result


def compared(name: str, stored: Any, new: Any) -> list[dict[str, Any]]:
    """Sets every ratio of ``new`` beside the same one of ``stored``; slower is where the intervals do not meet."""
    before, rows = dict(ratios(stored)), []
    for label, ratio in ratios(new):
        old = before.get(label)
        verdict = (
            "new" if old is None else "slower" if ratio.low > old.high else "faster" if ratio.high < old.low else "same"
        )
        row = {"benchmark": name, "what": label, "stored": None if old is None else old.value, "now": ratio.value}
        rows.append({**row, "verdict": verdict})
    return rows


def ratios(value: Any, label: tuple[str, ...] = ()) -> Iterator[tuple[str, Ratio]]:
    """Yields every ratio in a result, under the words that say what it is of."""
    if isinstance(value, list):
        for inner in value:
            yield from ratios(inner, label)
    if not isinstance(value, Mapping):
        return
    words = (f"{key} {word}" if key in SETTINGS else word for key, word in value.items())
    own = (*label, *(word for word in words if isinstance(word, str)))
    if {"ratio", "low", "high"} <= value.keys():
        yield ", ".join(own), Ratio(value=value["ratio"], low=value["low"], high=value["high"])
    for key, inner in value.items():
        if key.endswith("_ratio") and isinstance(inner, int | float):
            low, high = inner * (1 - WITHOUT_INTERVAL), inner * (1 + WITHOUT_INTERVAL)
            yield ", ".join((*own, key.replace("_", " "))), Ratio(value=inner, low=low, high=high)
        elif key != "environment":
            yield from ratios(inner, (*own, key) if isinstance(inner, Mapping) else own)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the comparison."""
    table = Table(title="time and memory ratios, stored and now")
    for heading in ("benchmark", "what", "stored", "now", ""):
        table.add_column(heading, justify="right" if heading in ("stored", "now") else "left")
    for row in rows:
        stored = "" if row["stored"] is None else f"{row['stored']:.3f}"
        verdict = "" if row["verdict"] == "same" else row["verdict"]
        table.add_row(row["benchmark"], row["what"], stored, f"{row['now']:.3f}", verdict)
    results.print(table)


def _chosen(jobs: Mapping[str, Job], names: list[str] | None) -> list[Job]:
    from pliant.architectures.base import nearest

    for name in names or ():
        if name not in jobs:
            known = list(jobs)
            raise ConfigError(f"NAME must be one of {', '.join(known)}; got {name!r}.{nearest(name, known)}")
    return [jobs[name] for name in names or jobs]


def _read(file: Path) -> Any:
    """What is stored; nothing where there is no such file."""
    return read_object(file, holds="figures by name", remedy="Restore it, or delete it.") if file.exists() else {}
