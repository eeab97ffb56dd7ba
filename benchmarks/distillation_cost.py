"""Claims: one copy of the weights is enough to match a model to its base, and the layer-wise stage is the cheap one.

Steps of AdamW on the modulation of the embedded base, every layer converted, bf16 weights, paired in turn within one
process: the teacher as base mode of the same module against a base loaded apart, and the layer-wise stage against the
end-to-end stage. Peak memory is the resident size (Linux), with an allocator that gives freed tensors back at once;
activation memory is what a step adds to it. Usage: python benchmarks/distillation_cost.py
"""

import argparse
import os
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from record import environment, save

import pliant
from pliant.config import TrainingConfig
from pliant.evaluation.comparison.cost import ALLOCATOR, resident, resident_peak, stepper, take_turns
from pliant.training.objectives import Student

FORMS = {"v1_single": 16, "v2": 16, "outer": 64, "keyed_pre": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    restart_with_allocator()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, 40_000, (arguments.batch_size, arguments.window), generator=generator)
    batch = {"input_ids": rows, "labels": rows}
    result: dict[str, Any] = {
        "environment": environment(),
        "tokens_per_step": rows.numel(),
        "stages": {form: stages(form, rank, batch, arguments.repeats) for form, rank in FORMS.items()},
        "one_copy": one_copy(batch, arguments.repeats),
    }
    save("distillation-cost", result)


def restart_with_allocator() -> None:
    """Starts the script anew with an allocator that gives freed tensors back at once, unless it has one."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})


def stages(form: str, rank: int, batch: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Time and activation memory of the layer-wise stage over those of the end-to-end stage."""
    student, _ = prepare(form, rank)
    step = {name: stepper(name, student, batch) for name in ("layerwise", "end_to_end")}
    times, peaks = measure(step, repeats)
    row = {
        "time_ratio": median(a / b for a, b in zip(times["layerwise"], times["end_to_end"], strict=True)),
        "memory_ratio": peaks["layerwise"] / peaks["end_to_end"],
        "layerwise_seconds": median(times["layerwise"]),
        "end_to_end_seconds": median(times["end_to_end"]),
        "layerwise_bytes": peaks["layerwise"],
        "end_to_end_bytes": peaks["end_to_end"],
    }
    print(
        f"{form:10} layer-wise / end to end: time {row['time_ratio']:.3f}, memory {row['memory_ratio']:.3f}", flush=True
    )
    return row


def one_copy(batch: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """Time and peak memory with base mode as the teacher, against a teacher loaded apart."""
    student, weights = prepare("keyed", 128)
    single = stepper("end_to_end", student, batch)
    single()
    alone = resident_peak(single)
    teacher = pliant.load("smollm2-135m", dtype=torch.bfloat16).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.clone()  # in memory of its own, not in the mapped file
    apart = Student(wrapped=student.wrapped, model=student.model, adapted=None, teacher=teacher, config=student.config)
    double = stepper("end_to_end", apart, batch)
    double()
    together = resident_peak(double)
    times, _ = measure({"one": single, "two": double}, repeats)
    row = {
        "base_bytes": weights,
        "peak_one_copy": alone,
        "peak_two_copies": together,
        "saved_share_of_base": (together - alone) / weights,
        "time_ratio": median(a / b for a, b in zip(times["one"], times["two"], strict=True)),
        "one_copy_seconds": median(times["one"]),
        "two_copies_seconds": median(times["two"]),
    }
    print(f"one copy: {row['saved_share_of_base']:.3f} of the base saved, time {row['time_ratio']:.3f}", flush=True)
    return row


def prepare(form: str, rank: int) -> tuple[Student, int]:
    """The embedded base, every layer converted, and the size of its weights."""
    model = pliant.load("smollm2-135m", dtype=torch.bfloat16)
    base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    calibration = torch.randint(1000, 40_000, (12, 256), generator=torch.Generator().manual_seed(1))
    pliant.convert(model, pliant.NptConfig.preset(form, rank=rank), calibration=calibration)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.freeze_base().train()
    return Student(wrapped=model, model=model, adapted=None, teacher=None, config=TrainingConfig()), base_bytes


def measure(steps: dict[str, Callable[[], None]], repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every step, taken in turn, and what one step of each adds to the resident memory at its peak."""
    peaks = {}
    for name, step in steps.items():
        step()
        before = resident("VmRSS")
        peaks[name] = resident_peak(step) - before
    return take_turns(steps, repeats), peaks


if __name__ == "__main__":
    main()
