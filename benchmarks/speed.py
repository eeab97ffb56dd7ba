"""Claim: what a plastic layer costs in time, beside the same model in base mode, prefill and decode.

Each round times base and converted model back to back in random order; the figure is the median of the paired
ratios with its 95 % bootstrap interval. Usage: python benchmarks/speed.py [--rounds 40] [--device cpu]
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from record import environment, save
from transformers import DynamicCache, PreTrainedModel

import pliant
from pliant.statistics import AttentionStatistics

preset = pliant.NptConfig.preset
FORMS = {
    "keyed r=192": preset("keyed", rank=192),
    "keyed tied r=192": preset("keyed", rank=192, tied=True),
    "keyed r=576": preset("keyed", rank=576),
    "keyed_pre r=192": preset("keyed_pre", rank=192),
    "v1 r=16": preset("v1", rank=16),
    "v2 r=16": preset("v2", rank=16),
    "outer r=64": preset("outer", rank=64),
}
PREFILL_TOKENS = 512
DECODE_CONTEXT = 128
DECODE_STEPS = 16


def prefill(model: PreTrainedModel) -> Callable[[], None]:
    """One forward of 1 × 512 tokens without cache."""
    ids = torch.randint(0, model.config.vocab_size, (1, PREFILL_TOKENS), device=model.device)

    def run() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    return run


def decode(model: PreTrainedModel) -> Callable[[], None]:
    """Sixteen steps of one token each after a context of 128, which is read beforehand."""
    ids = torch.randint(0, model.config.vocab_size, (1, DECODE_CONTEXT), device=model.device)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    token = ids[:, :1]

    def run() -> None:
        for _ in range(DECODE_STEPS):
            model(token, past_key_values=cache)
        cache.crop(-DECODE_STEPS)

    return run


def seconds(run: Callable[[], None], model: PreTrainedModel, *, base: bool) -> float:
    """Wall-clock seconds of one run, in base mode or not."""
    with model.base_mode() if base else nullcontext():
        _wait(model)
        start = time.perf_counter()
        run()
        _wait(model)
        return time.perf_counter() - start


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def paired(run: Callable[[], None], model: PreTrainedModel, rounds: int, *, warm: int = 3) -> dict[str, float]:
    """Median of the paired ratios, its interval, and the base's own seconds; ``warm`` rounds before do not count."""
    ratios, base_seconds = [], []
    for number in range(warm + rounds):
        order = [True, False]
        random.shuffle(order)
        taken = {base: seconds(run, model, base=base) for base in order}
        if number >= warm:
            ratios.append(taken[False] / taken[True])
            base_seconds.append(taken[True])
    medians = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "ratio": statistics.median(ratios),
        "low": medians[50],
        "high": medians[1949],
        "base_seconds": statistics.median(base_seconds),
    }


def random_statistics(d_model: int, num_layers: int) -> AttentionStatistics:
    """Speed does not depend on the values: random directions stand in for those of a calibration text."""
    noise = torch.randn(d_model, d_model)
    token = torch.zeros(1, 2, dtype=torch.long)
    moments = dict.fromkeys(range(num_layers), noise @ noise.T)
    return AttentionStatistics(moments=moments, sample=token, held_out=token)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    arguments = parser.parse_args()
    random.seed(0)
    rows = []
    for label in arguments.forms:
        model = pliant.load("smollm2-135m", dtype=torch.bfloat16).to(arguments.device).eval()
        calibration = random_statistics(model.config.hidden_size, model.config.num_hidden_layers)
        pliant.convert(model, FORMS[label], calibration=calibration)
        added = sum(parameter.numel() for _, parameter in model.dynamic_parameters())
        for phase, make in (("prefill", prefill), ("decode", decode)):
            result = paired(make(model), model, arguments.rounds)
            rows.append({"form": label, "phase": phase, "added_parameters": added, **result})
            print(
                f"{label:18} {phase:8} ×{result['ratio']:.3f} [{result['low']:.3f}, {result['high']:.3f}]", flush=True
            )
    save("speed", {"environment": environment(arguments.device), "rounds": arguments.rounds, "rows": rows})


if __name__ == "__main__":
    main()
