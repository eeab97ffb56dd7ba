"""What all commands share at the terminal: consoles, progress, errors in one line, silence.

Results go to stdout, everything else (steps, progress, warnings, errors) to stderr, so that
``--json`` can be piped.
"""

import errno
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from pliant.errors import PliantError

PLAIN_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""

results = Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
notes = Console(stderr=True, highlight=False)

ProgressCallback = Callable[[str, int, int], None]

LIBRARY = "pliant"
LINES_PER_LABEL = 4
INTERRUPTED = 130


class CommandGroup(TyperGroup):
    """Turns pliant's own errors, and those of the system, into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; Ctrl-C ends it with exit code 130."""
        try:
            with library_log():
                return super().invoke(ctx)
        except PliantError as error:
            say_error(str(error))
            raise typer.Exit(1) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone; typer ends quietly
                raise
            say_error(str(error))
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            notes.print("interrupted")
            raise typer.Exit(INTERRUPTED) from interrupt


def say_error(message: str) -> None:
    """Writes ``error: …`` to stderr as one line, so that it can be searched for."""
    notes.print(f"error: {' '.join(message.split())}", style="bold red", markup=False, soft_wrap=True)


def say_step(what: str, why: str = "") -> None:
    """Announces what a command does next, and why."""
    notes.print(what, style="bold", markup=False, soft_wrap=True)
    if why:
        notes.print(f"  {why}", style="dim", markup=False, soft_wrap=True)


class _LogLines(logging.Handler):
    """Shows what the library logs as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {record.getMessage()}" if is_warning else record.getMessage()
        style = "yellow" if is_warning else "dim"
        notes.print(text, style=style, markup=False, soft_wrap=True)


@contextmanager
def library_log() -> Iterator[None]:
    """Within the block the library's own log messages are shown."""
    logger, handler = logging.getLogger(LIBRARY), _LogLines()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def library_muted(name: str) -> Iterator[None]:
    """Within the block the logger ``name`` says nothing below an error."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def hush_transformers() -> None:
    """Silences the bars and hints of transformers and its like; call it before anything is loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """Yields a ``progress`` for the library: bars on a terminal, a few lines elsewhere."""
    if not notes.is_terminal:
        yield PlainProgress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes) as bars:
        yield _BarProgress(bars)


class _BarProgress:
    """One bar a label; a label that begins anew takes its bar again."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        if label not in self.tasks:
            self.tasks[label] = self.bars.add_task(label, total=total)
        self.bars.update(self.tasks[label], completed=done, total=total)


class PlainProgress:
    """Prints the start, about every quarter, and the end of each label as plain lines."""

    def __init__(self) -> None:
        self.label = ""
        self.done = 0
        self.started = 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        is_new = label != self.label or done <= self.done
        if is_new:
            self.label, self.started = label, time.monotonic()
        before = 0 if is_new else LINES_PER_LABEL * self.done // total
        if is_new or LINES_PER_LABEL * done // total > before:
            seconds = f", {time.monotonic() - self.started:.0f} s" if done == total else ""
            notes.print(f"{label}: {done} of {total}{seconds}", markup=False, soft_wrap=True)
        self.done = done


def count_text(number: int) -> str:
    """``134,515,008`` as ``134.5 M``: three or four digits and a unit."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def bytes_text(number: int) -> str:
    """A size in KiB, MiB or GiB."""
    if number >= 2**30:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 else f"{number / 2**10:.1f} KiB"


def shortened(text: str, width: int = 60) -> str:
    """A text as one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
