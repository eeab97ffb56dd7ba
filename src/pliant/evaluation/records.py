"""Results on disk, a line a record, so that a run that was stopped goes on with the record it was at."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pliant.errors import ConfigError, DataError
from pliant.json_files import read_object

Record = dict[str, Any]


class Records:
    """A file of JSON lines, each with an ``id``; what was appended is on disk when ``append`` returns.

    A last line that a stop has torn is dropped on opening, so its record is made again.

    Args:
        path: The file; it and its folder are made if missing.

    Raises:
        DataError: A line before the last is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, Record] = {}
        sound = self._read()
        if self.path.is_file() and sound < self.path.stat().st_size:
            with open(self.path, "r+b") as file:
                file.truncate(sound)
                os.fsync(file.fileno())

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __getitem__(self, name: str) -> Record:
        return self._records[name]

    def all(self) -> list[Record]:
        """Returns every record, in the order of the file."""
        return list(self._records.values())

    def append(self, record: Record) -> None:
        """Writes one record and waits until it is on disk.

        Raises:
            DataError: It has no id of its own, or a value that is not finite.
        """
        name = record.get("id")
        if not isinstance(name, str) or name in self._records:
            raise DataError(
                f"{self.path}: id must be a text that is new to the file; got {name!r}. Name each case once."
            )
        try:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise DataError(
                f"{self.path}: record {name} must hold finite JSON values: {error}. Check the model."
            ) from error
        with open(self.path, "ab") as file:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[name] = json.loads(line)

    def _read(self) -> int:
        """Fills the records, and returns how many bytes of the file are sound."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        sound = 0
        lines = content.split(b"\n")
        for number, line in enumerate(lines[:-1], start=1):  # after the last line end is nothing, or a torn line
            try:
                record = json.loads(line)
                name = record["id"]
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines) - 1:
                    break
                raise DataError(
                    f"{self.path}: line {number} must be a record; it is damaged. Delete the file."
                ) from error
            self._records[name] = record
            sound += len(line) + 1
        return sound


def read_settings(path: str | os.PathLike) -> Record:
    """Reads the settings beside the results of a run.

    Raises:
        ConfigError: The file is damaged.
    """
    return read_object(path, holds="settings by name", remedy="Choose another output folder.", error=ConfigError)


def check_settings(path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes ``settings`` to ``path``, beside the results, or checks that the ones there are the same.

    Raises:
        ConfigError: They differ, so the records of two runs would be mixed.
    """
    file = Path(path)
    wanted = json.loads(json.dumps(settings))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_suffix(f".{os.getpid()}.tmp")
        staged.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(staged, file)
        return
    for name, before, now in _differences(read_settings(file), wanted):
        raise ConfigError(
            f"output must be a new folder or one of the same run; {name} was {before!r} in {file} and is now {now!r}. "
            "Choose another folder."
        )


def _differences(found: Record, wanted: Record) -> Iterator[tuple[str, Any, Any]]:
    """Yields what differs by its dotted name; a setting that is missing counts as null."""
    for name in sorted(found.keys() | wanted.keys()):
        before, now = found.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            for inner, old, new in _differences(before, now):
                yield f"{name}.{inner}", old, new
        elif before != now:
            yield name, before, now
