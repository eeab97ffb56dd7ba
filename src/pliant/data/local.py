"""Data sets in local files: text, json lines, parquet, arrow, or a folder of one of these."""

from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from pliant.data.text import read_text
from pliant.errors import DataError

BUILDERS: Mapping[str, str] = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = (".gz", ".zst")
SAVED = ("dataset_info.json", "state.json")
"""What `Dataset.save_to_disk` writes beside its arrow files."""


def is_path(name: str) -> bool:
    """Returns whether a data set's name can only be that of a local file or folder."""
    return name.startswith((".", "/", "~")) or _suffix(Path(name)) in BUILDERS or Path(name).exists()


def open_local(name: str, *, field: str, streaming: bool) -> Dataset | IterableDataset:
    """Opens a file, or the files of a folder in the order of their names, as one data set.

    A text file is one document, in the column ``text``; other files keep their columns.

    Raises:
        DataError: Nothing is there, formats are mixed, or a file is empty or damaged.
    """
    files, builder = _files(name, field)
    if builder == "text":
        texts = Dataset.from_dict({"text": [read_text(file) for file in files]})
        return texts.to_iterable_dataset() if streaming else texts
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{field}: the file {str(file)!r} must hold some records; it is empty.")
    try:
        return load_dataset(builder, data_files=[str(file) for file in files], split="train", streaming=streaming)
    except (DatasetsError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{field}={name!r} cannot be read as {builder}: {cause}. Check that the files are whole and of one layout."
        ) from error


def _files(name: str, field: str) -> tuple[list[Path], str]:
    """Returns the files that a name stands for and the builder that reads them."""
    path = Path(name).expanduser()
    if not path.exists():
        raise DataError(f"{field}={name!r} does not exist. Give a file ({', '.join(BUILDERS)}), or a folder of such.")
    if path.is_file():
        files = [path]
    else:
        _check_folder(path, field)
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
    builders = {BUILDERS.get(_suffix(file), "") for file in files}
    if not files or "" in builders:
        raise DataError(f"{field}={name!r} must be a file with one of the endings {', '.join(BUILDERS)}, or hold such.")
    if len(builders) > 1:
        raise DataError(
            f"{field}={name!r} must hold files of one format; got {', '.join(sorted(builders))}. Move one of them away."
        )
    return files, builders.pop()


def _check_folder(path: Path, field: str) -> None:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        raise DataError(
            f"{field}={str(path)!r} holds several splits ({', '.join(splits)}). Name the folder of one of them, and "
            "that of another in data.eval_dataset_name."
        )


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    return not hidden and file.name not in SAVED and _suffix(file) in BUILDERS


def _suffix(file: Path) -> str:
    """The ending that tells the format: ``.json`` for ``x.json.gz``."""
    ending = file.suffix.lower()
    return Path(file.stem).suffix.lower() if ending in COMPRESSIONS else ending
