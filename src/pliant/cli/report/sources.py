"""What ``pliant report`` is made from: which folder or file holds what, read without changing any of it."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from pliant.cli.demo.folder import FULL, MADE_BY, TRAINING
from pliant.errors import DataError
from pliant.json_files import read_object

METRICS, SAMPLES, SETTINGS = "metrics.jsonl", "samples.jsonl", "config.yaml"
DEMO, TASKS, COMPARISON, UNTOUCHED = "demo.json", "results.json", "comparison.json", "before.jsonl"
MODEL_CONFIG, BEST = "config.json", "checkpoint-best"
MARKS = (METRICS, DEMO, TASKS, COMPARISON, UNTOUCHED, MODEL_CONFIG)
"""Files by which a folder is known."""
QUESTIONS = {"mmlu": "MMLU", "hellaswag": "HellaSwag"}
"""Kinds of questions of the retention suite, by which its JSON is known, and their names."""

logger = logging.getLogger("pliant.report")


class Kind(StrEnum):
    """What a source is."""

    DEMO = "demo"
    TRAINING = "training run"
    TASKS = "benchmark"
    COMPARISON = "comparison"
    EDITING = "editing suite"
    RETENTION = "retention suite"
    MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One thing to report on.

    Attributes:
        kind: What it is.
        name: What it is called on the page.
        path: Where it lies.
        content: What was read: the record of a JSON file, or, by file, the records of JSON lines.
        notes: What was left out.
    """

    kind: Kind
    name: str
    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def model(self) -> Path | None:
        """The folder of the model that belongs to it."""
        if self.kind is Kind.MODEL:
            return self.path
        if self.kind is Kind.DEMO and (self.path / FULL / MODEL_CONFIG).is_file():
            return self.path / FULL
        if self.kind is not Kind.TRAINING:
            return None
        found = [self.path / BEST, *sorted(self.path.glob("checkpoint-[0-9]*"), key=_step, reverse=True)]
        return next((folder for folder in found if (folder / MODEL_CONFIG).is_file()), None)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """Reads every path; a folder may hold several things.

    Raises:
        DataError: A path is missing, holds nothing to report on, or is damaged.
    """
    unique = list(dict.fromkeys(path.resolve() for path in paths))
    found: list[Source] = []
    for path, name in zip(unique, _names(unique), strict=True):
        found += _of_file(path, name) if path.is_file() else _of_folder(path, name)
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""

    def end(path: Path, count: int) -> str:
        return "/".join(path.parts[-count:])

    def count_for(path: Path) -> int:
        others = [other for other in paths if other != path]
        counts = range(1, len(path.parts))
        return next((n for n in counts if end(path, n) not in [end(o, n) for o in others]), len(path.parts))

    return [end(path, count_for(path)) for path in paths]


def _of_folder(path: Path, name: str) -> list[Source]:
    if not path.is_dir():
        raise DataError(f"RUN must be a folder or a JSON file; {str(path)!r} does not exist. Check the path.")
    found: list[Source] = []
    for mark, read in READERS.items():
        if (path / mark).is_file():
            found += read(path, name)
    if found:
        return found
    if not any(path.iterdir()):
        raise DataError(f"RUN must hold something to report on; the folder {str(path)!r} is empty. Name another.")
    inside = sorted(child for child in path.iterdir() if any((child / mark).is_file() for mark in MARKS))
    hint = f" Inside it are {', '.join(str(child) for child in inside[:5])}: name those." if inside else ""
    raise DataError(
        f"RUN must be the folder of a training run ({METRICS}), a demo ({DEMO}), an evaluation ({TASKS}, {UNTOUCHED}), "
        f"a comparison ({COMPARISON}) or a model ({MODEL_CONFIG}); {str(path)!r} has none of these files.{hint}"
    )


def _of_file(path: Path, name: str) -> list[Source]:
    """What one JSON file holds, such as what ``pliant evaluate --json`` has printed."""
    if path.suffix.lower() != ".json":
        raise DataError(f"RUN must be a folder or a .json file; got {str(path)!r}. Name the folder that it lies in.")
    record = read_json(path)
    if record.get("made_by") == MADE_BY:
        kind = Kind.DEMO
    elif isinstance(record.get("results"), Mapping):
        kind = Kind.TASKS
    elif isinstance(record.get("contenders"), Mapping):
        kind = Kind.COMPARISON
    elif isinstance(record.get("editors"), Mapping) or isinstance(record.get("counts"), list):
        kind = Kind.EDITING
    elif all(isinstance(record.get(part), Mapping) for part in QUESTIONS):
        kind = Kind.RETENTION
    else:
        raise DataError(
            f"{path} must be the JSON of a demo, an evaluation or a comparison; its keys are "
            f"{', '.join(map(repr, list(record)[:6])) or 'none'}. Name what 'pliant evaluate --json' has printed, or a "
            "folder."
        )
    own = name if path.name in MARKS else name.removesuffix(path.suffix)
    return [Source(kind=kind, name=own, path=path, content=record)]


def _demo(path: Path, name: str) -> list[Source]:
    record = read_json(path / DEMO)
    if record.get("made_by") != MADE_BY:
        raise DataError(f"{path / DEMO} must be the record of 'pliant demo'; it is of something else. Leave it out.")
    notes = [] if record.get("complete") else ["The demo has not been finished; what there is of it is shown."]
    found = [Source(kind=Kind.DEMO, name=name, path=path, content=record, notes=notes)]
    run = path / TRAINING / "run"
    return found + (_training(run, f"{name}/{TRAINING}") if (run / METRICS).is_file() else [])


def _training(path: Path, name: str) -> list[Source]:
    metrics, notes = read_lines(path / METRICS)
    samples, more = read_lines(path / SAMPLES) if (path / SAMPLES).is_file() else ([], [])
    steps = [line for line in metrics if isinstance(line.get("step"), int)]
    if not steps:
        raise DataError(f"{path / METRICS} must hold the metrics of a step; it holds none. Has the run begun?")
    content = {"metrics": steps, "samples": samples, "settings": _settings(path / SETTINGS)}
    return [Source(kind=Kind.TRAINING, name=name, path=path, content=content, notes=[*notes, *more])]


def _settings(file: Path) -> Mapping[str, Any]:
    """The settings of a run by their keys, as they stand in its file."""
    if not file.is_file():
        return {}
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        tree = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise DataError(f"{file} must be the YAML of a run; it is damaged: {error}. Delete it.") from error
    return _flat(tree) if isinstance(tree, dict) else {}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _editing(path: Path, name: str) -> list[Source]:
    records: dict[str, Any] = {}
    notes: list[str] = []
    for file in sorted(path.glob("*.jsonl")):
        records[file.stem], more = read_lines(file)
        notes += more
        if any(not isinstance(record.get("id"), str) for record in records[file.stem]):
            raise DataError(f"{file} must hold a record a line, each with the id of its case; one has none. Move it.")
    return [Source(kind=Kind.EDITING, name=name, path=path, content={"records": records}, notes=notes)]


def _record(mark: str, kind: Kind) -> Callable[[Path, str], list[Source]]:
    return lambda path, name: [Source(kind=kind, name=name, path=path, content=read_json(path / mark))]


def _model(path: Path, name: str) -> list[Source]:
    read_json(path / MODEL_CONFIG)
    return [Source(kind=Kind.MODEL, name=name, path=path)]


READERS: dict[str, Callable[[Path, str], list[Source]]] = {
    DEMO: _demo,
    METRICS: _training,
    TASKS: _record(TASKS, Kind.TASKS),
    COMPARISON: _record(COMPARISON, Kind.COMPARISON),
    UNTOUCHED: _editing,
    MODEL_CONFIG: _model,
}


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object that a file holds.

    Raises:
        DataError: It is damaged, or holds something else.
    """
    return read_object(file, holds="a JSON object", remedy="Write it again, or leave it out.")


def read_lines(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the objects of a file of JSON lines, and a note where a last, unfinished line was left out.

    Raises:
        DataError: A line before the last is damaged.
    """
    lines = file.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"it holds a {type(record).__name__}")
        except ValueError as error:
            if number == len(lines):  # a run that is under way, or was killed
                note = f"The last line of {file.name} is unfinished and left out."
                logger.warning("%s: line %d is unfinished; left out", file, number)
                return found, [note]
            raise DataError(
                f"{file}: line {number} must be a JSON object; it is damaged: {error}. Delete the line, or leave the "
                "run out."
            ) from error
        found.append(record)
    return found, []
