"""Claim: how much of the work that routed layers skip is saved as time, in a training step, prefill and decode.

Every other layer of the base is routed; each round times the routed model and the same model in base mode back to back,
in random order. `realised` is the share of the saved FLOPs (prefill, training) or of the saved weight traffic (decode
of one row) that shows as time: (1 − time ratio) / (1 − work ratio). Thresholds are calibrated on the very tokens that
are read, so that the share that runs is the one asked for; decoding feeds the tokens of a text one by one, and counts
what ran; at eight rows there is only the time. Keys and values are counted in bytes, as they lie in the cache.

Usage: python benchmarks/routed_speed.py [--phases prefill train decode] [--rounds 8] [--dtype float32]
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from record import RESULTS, environment, save
from speed import paired
from transformers import AutoTokenizer, DynamicCache

import pliant
from pliant.data import calibration_tokens

NAME = "routed-speed"
CONFIGS = {"mod": pliant.ModConfig, "dtf": pliant.DtfConfig, "stt": pliant.SttConfig}
CAPACITIES = (0.5, 0.125)
LENGTHS = (1024, 4096)
DECODE_STEPS = 32
ADDED = ("router", "prior")
"""Modules of a layer that routing adds."""
PHASES = {"prefill": tuple(CONFIGS), "train": ("mod", "dtf"), "decode": tuple(CONFIGS)}
"""STT's training runs every block anyway, once as the teacher."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    random.seed(0)
    rows = []
    for phase in arguments.phases:
        for architecture in PHASES[phase]:
            dtype = getattr(torch, arguments.dtype)
            model: Any = pliant.load("smollm2-135m", dtype=dtype).to(arguments.device).eval()
            torch.manual_seed(0)  # of the routers' start
            pliant.convert(model, CONFIGS[architecture](capacity_gamma=1.0))
            for capacity in CAPACITIES:
                for length in arguments.lengths:
                    for found in measure(model, phase, capacity, length, arguments.rounds):
                        rows.append({"phase": phase, "architecture": architecture, "rounds": arguments.rounds, **found})
                        print(rows[-1], flush=True)
    name = f"{NAME}-{torch.device(arguments.device).type}-{arguments.dtype}"
    file = RESULTS / f"{name}.json"
    measured = [(row["phase"], row["tokens"]) for row in rows]
    stored = json.loads(file.read_text()) if file.exists() else {"rows": [], "commands": []}
    kept = [row for row in stored["rows"] if (row["phase"], row["tokens"]) not in measured]
    found = {"environment": environment(arguments.device), "rows": kept + rows}
    save(name, {**found, "commands": stored["commands"]})


def measure(model: Any, phase: str, capacity: float, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Yields the figures of one setting, of one and of eight rows where tokens are decoded."""
    tokens = _tokens(length)
    pliant.calibrate(model, capacity, calibration=tokens[: 8 if phase == "decode" else 1])
    for batch in (1, 8) if phase == "decode" else (1,):
        ids = tokens[:batch].to(model.device)
        run, share = {"prefill": prefill, "train": train, "decode": decode}[phase](model, ids)
        times = paired(run, model, rounds)
        work = weight_traffic(model, share) if phase == "decode" else flops(model, length, share, phase)
        found = {
            "capacity": capacity,
            "measured_capacity": statistics.mean(share.values()),
            "tokens": length,
            "batch": batch,
            **times,
            "work_ratio": work,
            "realised": (1 - times["ratio"]) / (1 - work) if batch == 1 else None,
        }
        if phase == "decode":
            found |= cache_bytes(model, ids)
        yield found


@cache
def _tokens(length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(pliant.load("smollm2-135m").config._name_or_path)
    return calibration_tokens(tokenizer, num_tokens=8 * length, window=length)


def prefill(model: Any, ids: torch.Tensor) -> tuple[Callable[[], None], dict[int, float]]:
    """One forward without a cache, and the share that runs in each layer."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    return run, shares(model, ids)


def train(model: Any, ids: torch.Tensor) -> tuple[Callable[[], None], dict[int, float]]:
    """Forward and backward of the causal loss and the routers' losses; every weight has a gradient."""
    model.train()

    def run() -> None:
        is_routed = next(iter(model.routed_layers.values())).active
        with model.report() if is_routed else nullcontext() as report:
            loss = model(ids, labels=ids, use_cache=False).loss
        (loss if report is None else loss + report.regulariser()).backward()
        model.zero_grad(set_to_none=True)

    return run, shares(model, ids)


def decode(model: Any, ids: torch.Tensor) -> tuple[Callable[[], None], dict[int, float]]:
    """The last 32 tokens one by one, behind all others, which are read beforehand."""
    caches: dict[bool, DynamicCache] = {}
    share = shares(model, ids[:, -DECODE_STEPS:], before=ids[:, :-DECODE_STEPS])

    @torch.no_grad()
    def run() -> None:
        active = next(iter(model.routed_layers.values())).active
        if active not in caches:
            caches[active] = DynamicCache(config=model.config)
            model(ids[:, :-DECODE_STEPS], past_key_values=caches[active], logits_to_keep=1)
        for place in range(ids.shape[1] - DECODE_STEPS, ids.shape[1]):
            model(ids[:, place : place + 1], past_key_values=caches[active])
        caches[active].crop(-DECODE_STEPS)

    return run, share


@torch.no_grad()
def shares(model: Any, ids: torch.Tensor, before: torch.Tensor | None = None) -> dict[int, float]:
    """The share of the tokens that runs in each routed layer; of the steps in which a row runs, behind others."""
    cache = None
    if before is not None:
        cache = DynamicCache(config=model.config)
        model(before, past_key_values=cache, logits_to_keep=1)
    with model.report() as report:
        model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    runs = {index: layer.routing.runs for index, layer in report.layers.items() if layer.routing}
    if before is not None:
        runs = {index: ran.any(0) for index, ran in runs.items()}
    return {index: ran.float().mean().item() for index, ran in runs.items()}


def flops(model: Any, length: int, share: dict[int, float], phase: str) -> float:
    """FLOPs over those of the base: linear maps, causal attention, what is added, and in training the head."""
    config = model.config
    total = base = 2.0 * model.lm_head.weight.numel() * length if phase == "train" else 0.0
    width = config.num_attention_heads * config.head_dim
    for index, layer in enumerate(model.model.layers):
        linear = sum(p.numel() for n, p in layer.named_parameters() if n.endswith("_proj.weight"))
        added = sum(parameter.numel() for parameter in _added(layer))
        kept = share.get(index, 1.0) * length
        base += 2 * linear * length + 2 * width * length**2
        total += 2 * linear * kept + 2 * width * kept**2 + 2 * added * length
    return total / base


def weight_traffic(model: Any, share: dict[int, float]) -> float:
    """Bytes of weights that a step reads, the head included, over those of the base."""

    def size(parameters: Iterable[torch.Tensor]) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    total = base = float(size([model.lm_head.weight]))
    for index, layer in enumerate(model.model.layers):
        own = size(p for name, p in layer.named_parameters() if name.split(".")[0] not in ADDED)
        base += own
        total += own * share.get(index, 1.0) + size(_added(layer))
    return total / base


def _added(layer: Any) -> list[torch.Tensor]:
    """What routing adds and every token reads; the transition network of stt is for training, which is not timed."""
    names = ("router",) if isinstance(getattr(layer, "layer_config", None), pliant.SttConfig) else ADDED
    return [parameter for name, parameter in layer.named_parameters() if name.split(".")[0] in names]


@torch.no_grad()
def cache_bytes(model: Any, ids: torch.Tensor) -> dict[str, int]:
    """Bytes of keys and values after all tokens, those of the base, and those that the tokens that ran make."""
    found = {}
    for name, active in (("cache_bytes", True), ("base_cache_bytes", False)):
        cache = DynamicCache(config=model.config)
        with nullcontext() if active else model.base_mode():
            model(ids, past_key_values=cache, logits_to_keep=1)
        found[name] = sum(
            tensor.numel() * tensor.element_size()
            for layer in cache.layers
            for tensor in (layer.keys, layer.values)
            if tensor is not None
        )
        if active:
            token = 2 * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
            executed = sum(
                int((layer.columns >= 0).sum()) if getattr(layer, "columns", None) is not None else ids.numel()
                for layer in cache.layers
                if layer.is_initialized
            )
            found["executed_bytes"] = executed * token
    return found


if __name__ == "__main__":
    main()
