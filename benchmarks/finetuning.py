r"""Claim: what instruction tuning of the modulation gains and costs beside LoRA with as many trainable parameters.

The methods: v1 at rank 16 (1,013,760 parameters on the embedded base) and peft's LoRA on all linear projections at
rank 4 and on gate_proj at rank 16, which has exactly as many. Same rows, same order, same steps, bf16 base, fp32
adapters. Each method's learning rate is chosen by validation loss at seed 0 among the same three values, and among
further ones while the best lies at an end of those tried; then three seeds each at the chosen one. Step time is paired
in turn within one process, peak memory is that of one step.

Usage: python benchmarks/finetuning.py --data alpaca_en_demo.json
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from distillation_cost import restart_with_allocator
from record import RESULTS, environment, finished, save

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.data import training_data
from pliant.evaluation.comparison.cost import resident_peak, stepper, take_turns
from pliant.evaluation.comparison.methods import ALL_LINEAR
from pliant.training.build import build_model, tokenizer_for
from pliant.training.objectives import Student

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "v1 r=16": {},
    "LoRA r=4, all linear": {"lora_rank": 4, "lora_alpha": 8, "lora_targets": list(ALL_LINEAR)},
    "LoRA r=16, gate_proj": {"lora_rank": 16, "lora_alpha": 32, "lora_targets": ["gate_proj"]},
}
NAME = "finetuning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="json with instruction, input and output")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks/finetuning"))
    parser.add_argument("--part", choices=("quality", "cost"), default="quality")
    arguments = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    result = json.loads(file.read_text()) if file.exists() else {"runs": []}
    if arguments.part == "cost":
        restart_with_allocator()
        result["cost"] = {"environment": environment(), **cost(arguments)}
        save(NAME, result)
        return
    result |= {"environment": environment(), "epochs": arguments.epochs, "data": arguments.data.name}
    chosen = {method: search(result, method, arguments) for method in METHODS}
    for seed in SEEDS[1:]:
        for method, lr in chosen.items():
            run(result, method, lr, seed, arguments)
    result["summary"] = {
        method: summary([r for r in runs_of(result, method) if r["lr"] == lr]) for method, lr in chosen.items()
    }
    save(NAME, result)


def search(result: dict[str, Any], method: str, arguments: argparse.Namespace) -> float:
    """The learning rate with the lowest validation loss at the first seed; it has been beaten on both sides."""
    tried = list(LEARNING_RATES)
    while True:
        for lr in tried:
            run(result, method, lr, SEEDS[0], arguments)
        best = min(runs_of(result, method, seed=SEEDS[0]), key=lambda r: r["validation_loss"])["lr"]
        if min(tried) < best < max(tried):
            return best
        tried.append(float(f"{best * (1 / 3 if best == min(tried) else 3):.0e}"))


def runs_of(result: dict[str, Any], method: str, seed: int | None = None) -> list[dict[str, Any]]:
    """The runs of a method so far."""
    return [r for r in result["runs"] if r["method"] == method and seed in (None, r["seed"])]


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    losses = [r["validation_loss"] for r in runs]
    return {
        "lr": runs[0]["lr"],
        "validation_loss": mean(losses),
        "deviation": stdev(losses) if len(losses) > 1 else 0.0,
        "seeds": len(losses),
        "trainable_parameters": runs[0]["trainable_parameters"],
    }


def run(result: dict[str, Any], method: str, lr: float, seed: int, arguments: argparse.Namespace) -> None:
    """Trains once and notes it, unless that has been done."""
    if any(r["lr"] == lr for r in runs_of(result, method, seed=seed)):
        return
    folder = arguments.work / f"{method.replace(' ', '-').replace(',', '')}-{lr}-{seed}"
    is_first_session, start = not folder.exists(), time.process_time()
    trained = pliant.train(configure(method, lr, seed, arguments, folder))
    finished(trained)
    result["runs"].append(
        {
            "method": method,
            "lr": lr,
            "seed": seed,
            "steps": trained.steps,
            "loss_before": trained.before["eval_loss"],
            "validation_loss": trained.after["eval_loss"],
            "trainable_parameters": sum(p.numel() for p in trained.model.parameters() if p.requires_grad),
            "core_minutes": (time.process_time() - start) / 60 if is_first_session else None,
        }
    )
    print(result["runs"][-1], flush=True)
    save(NAME, result)


def configure(method: str, lr: float, seed: int, arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """The run of one method: what differs is what is trained, and its learning rate."""
    lora = METHODS[method]
    return RunConfig(
        model_type="dense" if lora else "npt",
        model=ModelConfig(base_model_name="smollm2-135m", preset="v1", adapter_rank=None if lora else 16),
        data=DataConfig(
            dataset_name=str(arguments.data), max_length=512, validation_fraction=0.1, max_validation_windows=1_000
        ),
        training=TrainingConfig(
            output_dir=str(folder),
            objective="sft",
            trainable="lora" if lora else "modulation",
            **lora,
            num_epochs=arguments.epochs,
            batch_size=2,
            lr=lr,
            warmup_steps=5,
            seed=seed,
            mixed_precision="bf16",
            resume=True,
        ),
    )


def cost(arguments: argparse.Namespace, repeats: int = 7) -> dict[str, Any]:
    """Step time over that of LoRA, paired, and the resident memory that a process of each needs at its peak."""
    steps = {}
    rows: dict[str, Any] = {}
    for method in METHODS:
        config = configure(method, 1e-4, 0, arguments, arguments.work / "cost")
        model, _ = build_model(config)
        tokenizer = tokenizer_for(config)
        data = training_data(config.data, tokenizer, kind="chat", seed=0)
        batch = data.collate([data.train[i] for i in range(2)])
        batch.pop("row")
        dynamic = model if method.startswith("v1") else model.get_base_model()
        model.train()
        student = Student(wrapped=model, model=dynamic, adapted=None, teacher=None, config=config.training)
        steps[method] = stepper("causal_lm", student, batch)
        steps[method]()
        before = resident_peak(lambda: None)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        rows[method] = {"step_bytes": resident_peak(steps[method]) - before, "weight_bytes": weights}
    times = take_turns(steps, repeats)
    ours = times["v1 r=16"]
    for name, row in rows.items():
        row["seconds"] = median(times[name])
        row["v1_time_ratio"] = median(a / b for a, b in zip(ours, times[name], strict=True))
        first = rows["v1 r=16"]
        total, own = row["step_bytes"] + row["weight_bytes"], first["step_bytes"] + first["weight_bytes"]
        row["v1_memory_ratio"] = own / total
        print(name, row, flush=True)
    return {"methods": rows}


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
