"""Claim: how many requests lm-eval hands a model at once changes its scores by rounding alone.

The embedded base, fp32, as it is, converted (keyed at rank 192) and routed (γ = 0.5, every other layer, thresholds set,
routers as conversion leaves them): the log-likelihoods of the same requests at batch sizes 1, 4, 8 and 16, the largest
difference to batch size 1. Requests of a batch are of unequal length, so rows are padded.

Usage: python benchmarks/evaluation_batching.py
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.evaluation import Benchmarks, evaluate_tasks

TASKS = ("arc_easy", "piqa")
CONFIGS = {
    "base": None,
    "keyed": pliant.NptConfig.preset("keyed", rank=192),
    "mod": pliant.ModConfig(capacity_gamma=0.5),
    "dtf": pliant.DtfConfig(capacity_gamma=0.5),
    "stt": pliant.SttConfig(capacity_gamma=0.5),
}
BATCH_SIZES = (1, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=16, help="documents of each task")
    arguments = parser.parse_args()
    rows = []
    for name, config in CONFIGS.items():
        model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        torch.manual_seed(0)
        if config is not None:
            pliant.convert(model, config)
        found = {size: scores(model, tokenizer, size, arguments.limit) for size in BATCH_SIZES}
        first = found.pop(1)
        for size, values in found.items():
            gap = max(abs(a - b) for a, b in zip(first, values, strict=True))
            rows.append({"model": name, "batch_size": size, "requests": len(first), "largest_difference": gap})
            print(rows[-1], flush=True)
    save("evaluation-batching", {"environment": environment(), "documents": arguments.limit, "rows": rows})


def scores(model: Any, tokenizer: Any, batch_size: int, limit: int) -> list[float]:
    """Log-likelihoods of all requests, in the order of the documents."""
    wanted = Benchmarks(tasks=TASKS, limit=limit, batch_size=batch_size, base=False, samples=False)
    with tempfile.TemporaryDirectory() as scratch:
        evaluate_tasks(model, tokenizer, wanted, output=Path(scratch) / "run")
        files = [Path(scratch) / f"run/samples/model/{task}.jsonl" for task in TASKS]
        samples = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    samples.sort(key=lambda sample: (sample["prompt_hash"], sample["doc_id"]))
    return [float(response[0]) for sample in samples for response in sample["filtered_resps"]]


if __name__ == "__main__":
    main()
