"""A file of JSON lines, one an event, that a resumed run takes up where its checkpoint was made."""

import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

logger = logging.getLogger("pliant.training")

SUMMARY_KEY = "train_runtime"
"""In what the trainer logs last, also when it was stopped early."""


class StepLines:
    """Appends objects with a ``step``, and on resume cuts what an unbroken run would not hold.

    Each line reaches the system at once, so that a killed process loses at most the line it was writing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.written = 0
        """Lines appended by this object and not cut since."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; numbers that are not finite become ``null``, which is all that JSON has for them."""
        if self.written == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._mend()
        plain = {name: _plain(value) for name, value in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        self.written += 1

    def begin(self, step: int) -> dict[str, Any] | None:
        """Prepares the file for a run that goes on after ``step``, and returns the last record that stays.

        At step 0 only what this object has itself written stays. Later, lines of an earlier session stay up to
        ``step``, without the summary with which that session ended and what came after it.
        """
        lines = self._read()
        own = len(lines) - self.written
        kept = lines[own:] if step == 0 else _until(lines[:own], step)
        if self.path.exists():
            self._replace("".join(line + "\n" for line in kept))
        self.written = len(kept) if step == 0 else 0
        return json.loads(kept[-1]) if kept else None

    def _read(self) -> list[str]:
        """Returns the lines that hold a record; any other is what a killed process has left."""
        if not self.path.exists():
            return []
        lines = [line for line in self.path.read_text(encoding="utf-8", errors="replace").split("\n") if line]
        whole = [line for line in lines if _step_of(line) is not None]
        if len(whole) < len(lines):
            logger.warning("%s: dropped %d unfinished line(s)", self.path, len(lines) - len(whole))
        return whole

    def _mend(self) -> None:
        """Gives a last line without an end its end, or drops it, so that the next line stands alone."""
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._replace("".join(line + "\n" for line in self._read()))

    def _replace(self, text: str) -> None:
        descriptor, staged = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(staged, self.path.stat().st_mode & 0o777)
            os.replace(staged, self.path)
        finally:
            Path(staged).unlink(missing_ok=True)


def _until(lines: list[str], step: int) -> list[str]:
    kept = []
    for line in lines:
        record = json.loads(line)
        if SUMMARY_KEY in record:
            break
        if record["step"] <= step:
            kept.append(line)
    return kept


def _step_of(line: str) -> int | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | numpy.generic | numpy.ndarray):
        value = value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value
