"""Claim: what conversion and training leave of the base on the benchmarks that people know.

Models: the embedded base; keyed at each rank as its closed form makes it; the same trained towards the frozen base for
a few steps on the embedded text without LAMBADA's passages; and any checkpoint that --also names. Each runs LAMBADA,
HellaSwag, PIQA, ARC-Easy and questions of MMLU (five worked examples) in fp32 with lm-eval's prompts and metrics.
Intervals are over documents, those of differences to the base paired. Perplexity is that of the embedded validation
text. A run that is stopped goes on where it was, request by request; models that are measured are not measured again.

Usage: python benchmarks/evaluation_table.py --also v1-tuned=outputs/benchmarks/comparison/runs/…/checkpoint-best
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from equivalence_training import write_texts
from record import RESULTS, environment, finished, save
from transformers import AutoTokenizer

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.evaluation import paired_difference

NAME, BASE, TRAINED = "evaluation-table", "base", "-trained"
METRICS = {
    "lambada": "acc,none",
    "hellaswag": "acc_norm,none",
    "piqa": "acc_norm,none",
    "arc_easy": "acc_norm,none",
    "mmlu": "acc,none",
}
WINDOW, BATCH_SIZE = 512, 4
HELD_OUT_TOKENS = 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[64, 128, 192])
    parser.add_argument("--steps", type=int, default=12, help=f"of {BATCH_SIZE * WINDOW} tokens, towards the base")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=FOLDER", help="further rows of the table")
    parser.add_argument("--limit", type=int, default=100, help="documents of each task")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/evaluation-table"))
    arguments = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    settings = {key: getattr(arguments, key) for key in ("steps", "lr", "limit")}
    if result.get("settings", settings) != settings:
        raise SystemExit(f"{file} holds rows of other settings: {result['settings']}; move it away")
    result["settings"] = settings
    for name, folder in asked(arguments):
        is_known = any(row["model"] == name for row in result["rows"])
        if not is_known or (name == BASE and not samples_file(arguments, BASE, "mmlu").exists()):  # others need these
            make(name, folder, arguments)
            row = measured(name, folder, arguments)
            if is_known:
                continue
            result["rows"].append(row)
            print({task: figure["value"] for task, figure in result["rows"][-1]["tasks"].items()}, flush=True)
            save(NAME, result)


def asked(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """Names and folders of the models, those to be trained last."""
    closed = [f"keyed-{rank}" for rank in arguments.ranks]
    own = [(name, folder_of(name, arguments)) for name in (BASE, *closed, *(f"{name}{TRAINED}" for name in closed))]
    given = [(name, Path(folder)) for name, _, folder in (each.partition("=") for each in arguments.also)]
    return own[: 1 + len(closed)] + given + own[1 + len(closed) :]


def place_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where everything about a model lies; of a trained one, for these settings alone."""
    how = f"-{arguments.steps}-{arguments.lr:g}" if name.endswith(TRAINED) else ""
    return arguments.work / f"{name}{how}"


def folder_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where a model lies that is made here."""
    return place_of(name, arguments) / "model"


def samples_file(arguments: argparse.Namespace, name: str, task: str) -> Path:
    """What came of each document of a task."""
    return place_of(name, arguments) / f"scores/samples/model/{task}.jsonl"


def make(name: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Leaves the model of one row in its folder, if it is not there."""
    if (folder / "config.json").is_file():
        return
    if not folder.is_relative_to(arguments.work):
        raise SystemExit(f"--also {name}={folder}: no checkpoint is there")
    model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    if name.endswith(TRAINED):
        start = name.removesuffix(TRAINED)
        make(start, folder_of(start, arguments), arguments)
        trained = pliant.train(configure(name, arguments))
        finished(trained)
        model = trained.model.float().eval()
    elif name != BASE:
        rank = int(name.split("-")[1])
        pliant.convert(model, pliant.NptConfig.preset("keyed", rank=rank))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def configure(name: str, arguments: argparse.Namespace) -> RunConfig:
    """Training of the modulation towards the base; it goes on if its folder holds a part of it."""
    return RunConfig(
        model=ModelConfig(
            base_model_name="smollm2-135m",
            checkpoint_path=str(folder_of(name.removesuffix(TRAINED), arguments)),
        ),
        data=DataConfig(
            dataset_name=str(write_texts(arguments.work, None)[0]), max_length=WINDOW, max_validation_windows=4
        ),
        training=TrainingConfig(
            output_dir=str(place_of(name, arguments) / "run"),
            max_steps=arguments.steps,
            batch_size=BATCH_SIZE,
            lr=arguments.lr,
            warmup_steps=3,
            mixed_precision="no",
            save_steps=4,
            resume=True,
        ),
    )


def measured(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row, beside the base; ``pliant evaluate`` goes on where it was stopped."""
    found = pliant.evaluate(
        pliant.load(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
        tasks=["perplexity", *METRICS],
        output=place_of(name, arguments) / "scores",
        limit=arguments.limit,
        num_tokens=HELD_OUT_TOKENS,
        samples=False,
        base=False,
    )
    tasks = found["pliant"]["tasks"]
    row: dict[str, Any] = {
        "model": name,
        "environment": environment(),
        "perplexity": found["pliant"]["held_out"]["perplexity"],
        "tasks": {task: tasks[task]["metrics"][metric]["model"] for task, metric in METRICS.items()},
    }
    if name != BASE:
        row["differences"] = {
            task: asdict(paired_difference(records(arguments, name, task), records(arguments, BASE, task), metric))
            for task, metric in METRICS.items()
        }
    return row


def records(arguments: argparse.Namespace, name: str, task: str) -> list[dict[str, Any]]:
    """A record a document."""
    metric = METRICS[task].partition(",")[0]
    lines = samples_file(arguments, name, task).read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    return [{"id": f"{s['task']}-{s['doc_id']}", METRICS[task]: s[metric]} for s in samples]


if __name__ == "__main__":
    main()
