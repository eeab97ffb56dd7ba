"""``pliant evaluate --tasks``: the table beside the base, going on, and what is refused before a model is loaded."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from pliant.evaluation.tasks import table as task_table

Measure = Callable[..., Any]
TEXT = "A small robot walks over the green hill and looks for water. The river bends twice before it meets the sea. "


def write_arrow(folder: Path, records: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(records)
    file = str(folder / "data-00000-of-00001.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """PIQA, TriviaQA and LAMBADA of four records each, and what is damaged or of another form."""
    folder = tmp_path / "data"
    piqa = [{"goal": f"find {i}", "sol1": "the sea", "sol2": "green hills", "label": i % 2} for i in range(4)]
    write_arrow(folder / "hf_datasets/piqa/plain_text/validation", piqa)
    trivia = [{"question": f"What meets {i}", "answer": {"aliases": ["the sea", "sea"]}} for i in range(4)]
    write_arrow(folder / "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation", trivia)
    write_arrow(folder / "hf_datasets/boolq/none/validation", [{"goal": "not this task"}])
    damaged = folder / "hf_datasets/sciq/none/validation"
    damaged.mkdir(parents=True)
    (damaged / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    lambada = folder / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    lambada.parent.mkdir(parents=True)
    with gzip.open(lambada, "wt", encoding="utf-8") as lines:
        for i in range(4):
            record = {"request": {"context": f"The river {i} meets the", "continuation": " sea"}}
            lines.write(json.dumps(record) + "\n")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    return folder


@pytest.fixture
def measure(run: Callable[..., Any]) -> Measure:
    def call(*arguments: Any, exit_code: int = 0) -> Any:
        return run("evaluate", *arguments, exit_code=exit_code)

    return call


def test_tasks_are_shown_beside_the_base_and_go_on(measure, converted, data, tmp_path, files_of):
    before = files_of(converted)
    text = ("--data", tmp_path / "text.txt", "--tokens", 64, "--window", 32, "--stride", 16)
    options = (*text, "--data-dir", data, "--limit", 3, "--output", tmp_path / "results")
    told = measure(converted, "--tasks", "perplexity, piqa,lambada", *options)
    for part in ("beside its base", "perplexity", "piqa", "acc_norm", "lambada", "difference", "same top token"):
        assert part in told.stdout
    assert "greedy samples" in told.stdout
    assert "piqa, base: 6 of 6" in told.stderr
    again = measure(converted, "--tasks", "triviaqa", *options, "--json")
    assert "piqa: " not in again.stderr
    found = json.loads(again.stdout)
    assert set(found["pliant"]["tasks"]) == {"piqa", "lambada", "triviaqa"}
    assert found["pliant"]["tasks"]["triviaqa"]["metrics"]["exact_match,remove_whitespace"]["model"]["count"] == 3
    assert files_of(converted) == before


def test_the_base_and_the_samples_can_be_left_out(measure, converted, data, tmp_path):
    told = measure(
        *(converted, "--tasks", "piqa", "--data-dir", data, "--no-base", "--no-samples", "-o", tmp_path / "results")
    )
    assert "difference" not in told.stdout
    assert "greedy" not in told.stdout
    assert not (tmp_path / "results/tasks/base").exists()


def test_tasks_are_listed_without_a_model(measure):
    told = measure("--list-tasks").stdout
    for name in task_table.TASK_NAMES:
        assert name in told


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (("--tasks", "helaswag"), "got 'helaswag'. Did you mean 'hellaswag'?", 1),
        (("--tasks", "ifeval"), "Other tasks of lm-eval need the hub", 1),
        (("--tasks", ","), "tasks must name at least one task; got none", 1),
        (("--tasks", "piqa", "--suite", "retention"), "give either --tasks or --suite", 2),
        ((), "give either --tasks or --suite", 2),
        (("--tasks", "piqa", "--limit", "0"), "should be greater than or equal to 1", 2),
        (("--tasks", "piqa", "--batch-size", "0"), "should be greater than or equal to 1", 2),
        (("--tasks", "piqa", "--num-fewshot", "-1"), "should be greater than or equal to 0", 2),
        (("--tasks", "piqa", "--num-fewshot", "9"), "num_fewshot must be at most 3 for task 'piqa'", 1),
        (("--tasks", "piqa", "--records", "5"), "goes with --suite; leave it out", 2),
        (("--tasks", "piqa", "--editors", "auto"), "goes with --suite; leave it out", 2),
        (("--suite", "retention", "--limit", "5"), "goes with --tasks; leave it out", 2),
        (("--suite", "retention", "--no-base"), "goes with --tasks; leave it out", 2),
        (("--tasks", "hellaswag"), "task 'hellaswag' needs", 1),
        (("--tasks", "sciq"), "it is damaged", 1),
        (("--tasks", "boolq"), "'question' is missing among goal", 1),
        (("--tasks", "piqa", "--data-dir", "nowhere"), "data_dir must be a folder of task data; 'nowhere'", 1),
        (("--tasks", "perplexity", "--data", "nowhere.txt"), "data must be a text file; 'nowhere.txt' is not", 1),
        (("--tasks", "perplexity", "--window", "64", "--stride", "65"), "stride must be in 1..64 (window); got 65", 1),
        (("--tasks", "perplexity", "--tokens", "64"), "num_tokens must be at least window=512; got 64", 1),
        (("--tasks", "piqa", "--output", "{data}.txt"), "output must be a folder", 1),
    ],
)
def test_what_is_wrong_is_named_before_a_model_is_loaded(
    measure, tiny, data, tmp_path, files_of, options, message, code
):
    (tmp_path / "data.txt").write_text("a file")
    before = files_of(tmp_path)
    given = [option.format(data=data) for option in options]
    ends = [] if "--output" in given else ["--output", tmp_path / "results"]
    ends += [] if "--data-dir" in given or "--tasks" not in given else ["--data-dir", data]
    result = measure(tiny, *given, *ends, exit_code=code)
    assert "Loading" not in result.stderr
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert files_of(tmp_path) == before


def test_lm_eval_and_the_model_are_named_where_they_are_missing(measure, tiny, data, tmp_path, monkeypatch):
    options = ("--data-dir", data, "-o", tmp_path / "results")
    missing = measure(tmp_path / "nowhere", "--tasks", "piqa", *options, exit_code=1)
    assert "nowhere" in missing.stderr
    monkeypatch.setattr(task_table, "find_spec", lambda _name: None)
    assert "pip install 'pliant[evaluation]'" in measure(tiny, "--tasks", "piqa", *options, exit_code=1).stderr


def test_results_of_another_run_are_not_mixed(measure, tiny, converted, data, tmp_path):
    options = ("--tasks", "piqa", "--data-dir", data, "--no-samples", "-o", tmp_path / "results")
    measure(tiny, *options)
    refused = measure(tiny, *options, "--limit", 2, exit_code=1)
    assert "limit was None" in refused.stderr
    assert "Loading" not in refused.stderr
    assert "Choose another folder" in measure(converted, *options, exit_code=1).stderr
