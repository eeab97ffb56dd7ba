"""Harness and server of other people take an exported model, in processes that cannot import pliant."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import pliant
from pliant.models import export_merged

TASK = """
task: counting
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    {"question": "2 3 4", "choices": ["5 6", "90 17", "33 3"], "label": 0},
    {"question": "11 12 13 14 15 16", "choices": ["9 8", "17 18"], "label": 1},
    {"question": "40 42", "choices": ["44 46", "5 3"], "label": 0},
    {"question": "7 7 7 7 7 7 7 7 7", "choices": ["7 7", "2 96"], "label": 0},
    {"question": "88 87", "choices": ["3 4", "86 85"], "label": 1},
]


@pytest.mark.slow
def test_lm_eval_measures_what_this_process_does(
    make_routed: Callable[..., Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    without_pliant: dict[str, str],
):
    pytest.importorskip("lm_eval")
    make_routed("mod", "qwen3", overrides={"bos_token_id": 1}).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = pliant.load(tmp_path / "model").eval()
    export_merged(model, tmp_path / "exported", remote_code=True)
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "counting.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"), encoding="utf-8")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "counting", "--device", "cpu"),
            *("--model_args", f"pretrained={tmp_path / 'exported'},trust_remote_code=True,dtype=float32"),
            *("--include_path", tasks, "--output_path", tmp_path / "out", "--log_samples", "--batch_size", "1"),
        ],
        env=without_pliant,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    measured = json.loads(results.read_text(encoding="utf-8"))["results"]["counting"]
    (samples,) = (tmp_path / "out").rglob("samples_counting_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    correct = 0
    for question, line in zip(QUESTIONS, sorted(lines, key=lambda line: line["doc_id"]), strict=True):
        own = [log_likelihood(model, tokenizer, question["question"], choice) for choice in question["choices"]]
        theirs = [float(response[0]) for response in line["filtered_resps"]]
        assert theirs == pytest.approx(own, abs=1e-4)
        correct += own.index(max(own)) == question["label"]
    assert measured["acc,none"] == pytest.approx(correct / len(QUESTIONS))


def log_likelihood(model: Any, tokenizer: PreTrainedTokenizerFast, question: str, choice: str) -> float:
    """Returns the log-probability of ``choice`` behind ``question``."""
    before, after = (tokenizer(text)["input_ids"] for text in (question, choice))
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None]).sum())
