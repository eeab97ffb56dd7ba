"""Errors as one line with an exit code, progress in few lines, the library's log on stderr."""

import errno
import logging

import pytest
import typer
from typer.testing import CliRunner

from pliant.cli import console
from pliant.errors import ConfigError


def run_raising(error: BaseException):
    """Runs a command that raises ``error``."""
    app = typer.Typer(cls=console.CommandGroup, pretty_exceptions_enable=False)

    @app.callback()
    def options() -> None:
        """Makes ``fail`` a subcommand."""

    @app.command()
    def fail() -> None:
        logging.getLogger("pliant.somewhere").warning("look out")
        logging.getLogger("pliant.somewhere").info("by the way")
        raise error

    return CliRunner().invoke(app, ["fail"])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("rank must be [1..8]; got 9"), 1, "error: rank must be [1..8]; got 9"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            1,
            "error: [Errno 13] Permission",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_line_and_a_code(error, code, line):
    result = run_raising(error)
    assert result.exit_code == code
    assert line in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_bug_is_not_hidden():
    result = run_raising(ZeroDivisionError("bug"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_library_log_is_shown_and_then_left_alone():
    logger = logging.getLogger("pliant")
    before = (logger.level, list(logger.handlers))
    result = run_raising(ConfigError("end"))
    assert "warning: look out" in result.stderr
    assert "by the way" in result.stderr
    assert (logger.level, logger.handlers) == before


def test_muted_logger_speaks_again():
    logger = logging.getLogger("pliant.muted")
    with console.library_muted("pliant.muted"):
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(("total", "lines"), [(1, 1), (3, 3), (100, 5), (7, 5)])
def test_plain_progress_prints_start_quarters_and_end(capsys, total, lines):
    show = console.PlainProgress()
    for done in range(1, total + 1):
        show("Reading", done, total)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == lines
    assert printed[0].startswith(f"Reading: 1 of {total}")
    assert printed[-1].startswith(f"Reading: {total} of {total}, ")


def test_plain_progress_begins_anew_with_each_label_and_round(capsys):
    show = console.PlainProgress()
    for label in ("one", "two", "two"):
        for done in (1, 2):
            show(label, done, 2)
    starts = [line for line in capsys.readouterr().err.splitlines() if " 1 of 2" in line]
    assert starts == ["one: 1 of 2", "two: 1 of 2", "two: 1 of 2"]


def test_a_terminal_gets_one_bar_a_label(monkeypatch):
    terminal = console.Console(stderr=True, force_terminal=True, width=80)
    monkeypatch.setattr(console, "notes", terminal)
    with console.progress_display() as show:
        for label in ("one", "two", "one"):
            show(label, 1, 2)
        assert [task.description for task in show.bars.tasks] == ["one", "two"]
        assert [task.completed for task in show.bars.tasks] == [1, 1]


@pytest.mark.parametrize(("number", "text"), [(950, "950"), (134_515_008, "134.5 M"), (2_600_000_000, "2.6 G")])
def test_counts_are_readable(number, text):
    assert console.count_text(number) == text


def test_bytes_are_readable():
    assert console.bytes_text(2**30) == "1.00 GiB"
    assert console.bytes_text(3 * 2**19) == "1.5 MiB"
    assert console.bytes_text(512) == "0.5 KiB"
