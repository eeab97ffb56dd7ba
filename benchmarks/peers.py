"""Claim: what v1 costs in time beside peft's LoRA with as many parameters, in prefill, decode and a training step.

Models of the embedded base: v1 at rank 16, LoRA of rank 16 on gate_proj, which has exactly as many parameters, and LoRA
of rank 4 on all linear projections. Times are taken in turn; a figure is the median of the paired ratios of v1 to LoRA,
with its 95 % bootstrap interval. Usage: python benchmarks/peers.py [--rounds 16] [--device cpu] [--dtype bfloat16]
"""

import argparse
import random
import statistics
from collections.abc import Callable
from typing import Any

import peft
import torch
from record import environment, save
from speed import decode, prefill
from transformers import PreTrainedModel

import pliant
from pliant.config import TrainingConfig
from pliant.evaluation.comparison.cost import stepper, take_turns
from pliant.evaluation.comparison.methods import ALL_LINEAR
from pliant.training.objectives import Student

ADAPTERS = {
    "LoRA r=16, gate_proj": {"r": 16, "target_modules": ["gate_proj"]},
    "LoRA r=4, all linear": {"r": 4, "target_modules": list(ALL_LINEAR)},
}
ROWS, WINDOW = 2, 512
WARM_UP = 2
"""Rounds that do not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    random.seed(0)
    place = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    models = {"v1 r=16": plastic(**place), **{name: adapted(options, **place) for name, options in ADAPTERS.items()}}
    rows = []
    for phase, make in (("prefill", prefill), ("decode", decode), ("training step", training_step)):
        with torch.inference_mode(mode=make is not training_step):
            runs = {name: make(inner(model)) for name, model in models.items()}
            times = take_turns(runs, arguments.rounds + WARM_UP)
        own, *others = (seconds[WARM_UP:] for seconds in times.values())
        for name, seconds in zip(ADAPTERS, others, strict=True):
            rows.append({"peer": name, "phase": phase, **paired(own, seconds)})
            print(f"{name:22} {phase:14} ×{rows[-1]['ratio']:.3f}", flush=True)
    parameters = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
    where = {"environment": environment(arguments.device), "dtype": arguments.dtype}
    save("peers", {**where, "trainable_parameters": parameters, "rows": rows})


def plastic(**place: Any) -> PreTrainedModel:
    """The base with v1 in every layer, its modulation trainable alone."""
    model = pliant.convert(base(**place), pliant.NptConfig.preset("v1", rank=16))
    return model.freeze_base()


def adapted(options: dict[str, Any], **place: Any) -> peft.PeftModel:
    """The base under LoRA."""
    return peft.get_peft_model(base(**place), peft.LoraConfig(task_type="CAUSAL_LM", **options))


def base(*, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """The embedded base."""
    return pliant.load("smollm2-135m", dtype=dtype).to(device).eval()


def inner(model: Any) -> PreTrainedModel:
    """The model itself; of an adapted one, the one inside, whose layers carry the adapters."""
    return model.get_base_model() if isinstance(model, peft.PeftModel) else model


def training_step(model: PreTrainedModel) -> Callable[[], None]:
    """One step of AdamW on 2 × 512 tokens."""
    rows = torch.randint(1_000, 40_000, (ROWS, WINDOW), device=model.device)
    student = Student(
        wrapped=model, model=model, adapted=None, teacher=None, config=TrainingConfig(output_dir="unused")
    )
    return stepper("causal_lm", student, {"input_ids": rows, "labels": rows})


def paired(own: list[float], other: list[float]) -> dict[str, float]:
    """Median of the ratios, and its interval."""
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {"ratio": statistics.median(ratios), "low": medians[50], "high": medians[1949]}


if __name__ == "__main__":
    main()
