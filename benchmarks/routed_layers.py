"""Claim: which layers tokens skip decides what routing costs a pretrained base; a short measurement finds them.

What the base loses without the attention, and without the whole, of each layer, in nats a token on 1,024 embedded
tokens; and its WikiText-2 perplexity over the untouched base's (first 4,096 tokens of --text, windows of 512) right
after conversion to mod, with routers as their random weights are, of every other layer and of the cheapest half.
All in fp32.

Usage: python benchmarks/routed_layers.py --text wikitext-2/test.txt
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from record import environment, save
from torch import Tensor
from transformers import AutoTokenizer

import pliant
from pliant.conversion import layer_costs
from pliant.conversion.cheapest import CHEAPEST, NUM_TOKENS, choose
from pliant.data import calibration_tokens, read_text, token_windows

PARTS = ("attention", "block")
CAPACITIES = (0.75, 0.5)
CALIBRATION_TOKENS, MEASURED_TOKENS = 10_240, 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    arguments = parser.parse_args()
    base = loaded()
    tokenizer: Any = AutoTokenizer.from_pretrained(base.config._name_or_path)
    calibration = calibration_tokens(tokenizer, num_tokens=CALIBRATION_TOKENS)
    measured = token_windows([read_text(arguments.text)], tokenizer, num_tokens=MEASURED_TOKENS)
    untouched = pliant.perplexity(base, measured)
    costs, seconds = {}, {}
    for part in PARTS:
        start = time.process_time()
        costs[part] = list(layer_costs(base, part, calibration_tokens(tokenizer, num_tokens=NUM_TOKENS)).values())
        seconds[part] = time.process_time() - start
        print(part, [round(cost, 3) for cost in costs[part]], flush=True)
    rows = []
    for part in PARTS:
        cheapest = choose(dict(enumerate(costs[part])), pliant.ModConfig(granularity=part))
        for name, layers in (("alternate", list(range(1, len(costs[part]), 2))), (CHEAPEST, cheapest)):
            for capacity in CAPACITIES:
                ratio = converted(part, layers, capacity, calibration, measured) / untouched
                rows.append({"part": part, "choice": name, "layers": layers, "capacity": capacity, "ratio": ratio})
                print(rows[-1], flush=True)
    save(
        "routed-layers",
        {"environment": environment(), "perplexity": untouched, "costs": costs, "core_seconds": seconds, "rows": rows},
    )


def loaded() -> Any:
    """The untouched base."""
    return pliant.load("smollm2-135m", dtype=torch.float32).eval()


def converted(part: str, layers: list[int], capacity: float, calibration: Tensor, measured: Tensor) -> float:
    """Perplexity of a model that has been converted and no more."""
    model = loaded()
    torch.manual_seed(0)  # routers
    pliant.convert(
        model, pliant.ModConfig(capacity_gamma=capacity, granularity=part), layers=layers, calibration=calibration
    )
    return pliant.perplexity(model, measured)


if __name__ == "__main__":
    main()
