"""Data of benchmark tasks as files, in words of the tiny tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

Records = list[dict[str, Any]]
SUBJECTS = 57


def words(start: int, count: int) -> str:
    """Words that the tiny tokenizer knows, the same ones every time."""
    return " ".join(str(2 + (start * 7 + i * 13) % 90) for i in range(count))


def write_arrow(folder: Path, records: Records) -> Path:
    """Writes records as datasets does."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(records)
    file = folder / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return file


def arc_records(count: int = 12) -> Records:
    """Questions of ARC's form, of different lengths."""
    return [
        {
            "id": str(i),
            "question": words(i, 3 + i % 5),
            "choices": {"text": [words(i + c, 1 + (i + c) % 3) for c in range(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(count)
    ]


def mmlu_records(subject: int, count: int) -> Records:
    """Questions of MMLU's form."""
    return [
        {"question": words(subject + i, 4), "choices": [words(i + c, 1) for c in range(4)], "answer": i % 4}
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def mmlu_subjects() -> list[str]:
    """The subjects of lm-eval's MMLU."""
    from pliant.evaluation.tasks.definitions import CONFIGS, load_yaml

    return [load_yaml(file)["dataset_name"] for file in sorted((CONFIGS / "mmlu/default").glob("mmlu_*.yaml"))]


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    """A folder with the validation split of ARC-Easy and of OpenBookQA."""
    folder = tmp_path / "task-data"
    write_arrow(folder / "hf_datasets/ai2_arc/ARC-Easy/validation", arc_records())
    records = [
        {"id": r["id"], "question_stem": r["question"], "choices": r["choices"], "answerKey": r["answerKey"]}
        for r in arc_records(6)
    ]
    write_arrow(folder / "hf_datasets/openbookqa/main/validation", records)
    return folder


@pytest.fixture
def mmlu_data(tmp_path: Path, mmlu_subjects: list[str]) -> Path:
    """A folder with all subjects of MMLU, three questions and five examples each."""
    folder = tmp_path / "mmlu-data"
    for index, subject in enumerate(mmlu_subjects):
        for split, count in (("test", 3), ("dev", 5)):
            write_arrow(folder / "hf_datasets/hails/mmlu_no_train" / subject / split, mmlu_records(index, count))
    return folder


@pytest.fixture
def replace_records() -> Callable[[Path, Records], Path]:
    """A function that writes other records in the place of those of a folder."""
    return write_arrow
