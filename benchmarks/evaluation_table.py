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
from record import RESULTS, environment, finished, named_folder, save
from transformers import AutoTokenizer

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.evaluation import Interval, paired_difference
from pliant.evaluation.tasks.results import MODEL, task_records

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
    parser.add_argument(
        "--also", nargs="*", default=[], type=named_folder, metavar="NAME=FOLDER", help="further rows of the table"
    )
    parser.add_argument("--limit", type=int, default=100, help="documents of each task")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/evaluation-table"))
    arguments = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
    settings = {key: getattr(arguments, key) for key in ("steps", "lr", "limit")}
    if result.get("settings", settings) != settings:
        raise SystemExit(f"{file} holds rows of other settings: {result['settings']}; move it away")
    result["settings"] = settings
    known = {row["model"] for row in result["rows"]}
    missing = [(name, folder) for name, folder in asked(arguments) if name not in known]
    if missing:  # all are compared with the base's documents, which a stored row does not hold
        scored(BASE, folder_of(BASE, arguments), arguments)
    for name, folder in missing:
        result["rows"].append(measured(name, folder, arguments))
        print({task: figure["value"] for task, figure in result["rows"][-1]["tasks"].items()}, flush=True)
        save(NAME, result)


def asked(arguments: argparse.Namespace) -> list[tuple[str, Path]]:
    """Names and folders of the models, those to be trained last."""
    closed = [f"keyed-{rank}" for rank in arguments.ranks]
    own = [(name, folder_of(name, arguments)) for name in (BASE, *closed, *(f"{name}{TRAINED}" for name in closed))]
    given = [(name, Path(folder)) for name, folder in arguments.also]
    return own[: 1 + len(closed)] + given + own[1 + len(closed) :]


def place_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where everything about a model lies; of a trained one, for these settings alone."""
    how = f"-{arguments.steps}-{arguments.lr:g}" if name.endswith(TRAINED) else ""
    return arguments.work / f"{name}{how}"


def folder_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where a model lies that is made here."""
    return place_of(name, arguments) / "model"


def scores_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where what ``pliant evaluate`` finds of a model lies."""
    return place_of(name, arguments) / "scores"


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


def scored(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``pliant evaluate`` finds of a model, which is made first; what is complete is not run again."""
    make(name, folder, arguments)
    return pliant.evaluate(
        pliant.load(folder, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(folder),
        tasks=["perplexity", *METRICS],
        output=scores_of(name, arguments),
        limit=arguments.limit,
        num_tokens=HELD_OUT_TOKENS,
        samples=False,
        base=False,
    )["pliant"]


def measured(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table, beside the base."""
    found = scored(name, folder, arguments)
    row: dict[str, Any] = {
        "model": name,
        "environment": environment(),
        "perplexity": found["held_out"]["perplexity"],
        "tasks": {task: found["tasks"][task]["metrics"][metric]["model"] for task, metric in METRICS.items()},
    }
    if name != BASE:
        row["differences"] = {task: asdict(difference(name, task, arguments)) for task in METRICS}
    return row


def difference(name: str, task: str, arguments: argparse.Namespace) -> Interval:
    """What a model has over the base, document by document."""
    own, base = (task_records(scores_of(side, arguments), task, MODEL) for side in (name, BASE))
    return paired_difference(own, base, METRICS[task])


if __name__ == "__main__":
    main()
