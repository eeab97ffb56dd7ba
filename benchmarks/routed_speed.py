"""Claim: how much of the work that routed layers skip is saved as time, in a training step, prefill and decode.

Every other layer of the base is routed; each round times the routed model and the same model in base mode back to back,
in random order. `realised` is the share of the saved FLOPs (prefill, training) or of the saved weight traffic (decode
of one row) that shows as time: (1 − time ratio) / (1 − work ratio). Thresholds are calibrated on the very tokens that
are read, so that the share that runs is the one asked for; decoding feeds the tokens of a text one by one, and counts
what ran; at eight rows there is only the time. Keys and values are counted in bytes, as they lie in the cache.

Every row says where it ran; a call replaces the rows of its own settings. Usage:

    python benchmarks/routed_speed.py [--phases prefill train decode] [--lengths 1024 4096] [--rounds 8]
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from record import environment, save_rows
from speed import paired
from transformers import AutoTokenizer, DynamicCache

import pliant
from pliant.data import calibration_tokens

NAME = "routed-speed"
CONFIGS = {"mod": pliant.ModConfig, "dtf": pliant.DtfConfig, "stt": pliant.SttConfig}
CAPACITIES = (0.5, 0.125)
LENGTHS = (1024, 4096)
BATCHES = (1, 8)
"""Rows that are decoded together."""
DECODE_STEPS = 32
ADDED = ("router", "prior")
"""Modules of a layer that routing adds."""
PHASES = {"prefill": tuple(CONFIGS), "train": ("mod", "dtf"), "decode": tuple(CONFIGS)}
"""STT's training runs every block anyway, once as the teacher."""
SETTINGS = ("phase", "architecture", "capacity", "tokens", "batch")
"""What tells one row from another."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", nargs="*", default=list(PHASES), choices=list(PHASES))
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS))
    parser.add_argument("--architectures", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES), help="rows decoded together")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    random.seed(0)
    name = f"{NAME}-{torch.device(arguments.device).type}-{arguments.dtype}"
    place = {"rounds": arguments.rounds, "environment": environment(arguments.device)}
    for phase in arguments.phases:
        for architecture in [name for name in PHASES[phase] if name in arguments.architectures]:
            dtype = getattr(torch, arguments.dtype)
            model: Any = pliant.load("smollm2-135m", dtype=dtype).to(arguments.device).eval()
            torch.manual_seed(0)  # of the routers' start
            pliant.convert(model, CONFIGS[architecture](capacity_gamma=1.0))
            for capacity in CAPACITIES:
                for length in arguments.lengths:
                    batches = arguments.batches if phase == "decode" else [1]
                    found = measure(model, phase, capacity, length, batches, arguments.rounds)
                    rows = [{"phase": phase, "architecture": architecture, **row, **place} for row in found]
                    for row in rows:
                        print({key: value for key, value in row.items() if key != "environment"}, flush=True)
                    save_rows(name, rows, SETTINGS)


def measure(
    model: Any, phase: str, capacity: float, length: int, batches: Sequence[int], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yields the figures of one setting, for each number of rows."""
    tokens = _tokens(length)
    pliant.calibrate(model, capacity, calibration=tokens[: max(batches)])
    for batch in batches:
        ids = tokens[:batch].to(model.device)
        run, share, extra = {"prefill": prefill, "train": train, "decode": decode}[phase](model, ids)
        times = paired(run, model, rounds, warm=1)
        work = weight_traffic(model, share) if phase == "decode" else flops(model, length, share, phase)
        yield {
            "capacity": capacity,
            "measured_capacity": statistics.mean(share.values()),
            "tokens": length,
            "batch": batch,
            **times,
            "work_ratio": work,
            "realised": (1 - times["ratio"]) / (1 - work) if batch == 1 else None,
            **extra,
        }


@cache
def _tokens(length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(pliant.load("smollm2-135m").config._name_or_path)
    return calibration_tokens(tokenizer, num_tokens=8 * length, window=length)


Prepared = tuple[Callable[[], None], dict[int, float], dict[str, int]]
"""What is timed, the share of the tokens that runs in each layer, and other figures."""


def prefill(model: Any, ids: torch.Tensor) -> Prepared:
    """One forward without a cache."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(ids, use_cache=False, logits_to_keep=1)

    return run, shares(model, ids), {}


def train(model: Any, ids: torch.Tensor) -> Prepared:
    """Forward and backward of the causal loss and the routers' losses; every weight has a gradient."""
    model.train()

    def run() -> None:
        is_routed = next(iter(model.routed_layers.values())).active
        with model.report() if is_routed else nullcontext() as report:
            loss = model(ids, labels=ids, use_cache=False).loss
        (loss if report is None else loss + report.regulariser()).backward()
        model.zero_grad(set_to_none=True)

    return run, shares(model, ids), {}


def decode(model: Any, ids: torch.Tensor) -> Prepared:
    """The last 32 tokens one by one, behind all others, which are read beforehand; and what the caches hold."""
    caches, sizes = {}, {}
    for active in (True, False):
        with nullcontext() if active else model.base_mode():
            caches[active] = DynamicCache(config=model.config)
            with torch.no_grad():
                model(ids, past_key_values=caches[active], logits_to_keep=1)
        sizes |= cache_bytes(model, caches[active], ids.numel(), "" if active else "base_")
        caches[active].crop(-DECODE_STEPS)
    share = shares(model, ids[:, -DECODE_STEPS:], caches[True])
    caches[True].crop(-DECODE_STEPS)

    @torch.no_grad()
    def run() -> None:
        cache = caches[next(iter(model.routed_layers.values())).active]
        for place in range(ids.shape[1] - DECODE_STEPS, ids.shape[1]):
            model(ids[:, place : place + 1], past_key_values=cache)
        cache.crop(-DECODE_STEPS)

    return run, share, sizes


@torch.no_grad()
def shares(model: Any, ids: torch.Tensor, cache: DynamicCache | None = None) -> dict[int, float]:
    """The share of the tokens that runs in each routed layer; behind others, of the steps in which a row runs."""
    with model.report() as report:
        model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    runs = {index: layer.routing.runs for index, layer in report.layers.items() if layer.routing}
    if cache is not None:
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


def cache_bytes(model: Any, cache: Any, tokens: int, prefix: str) -> dict[str, int]:
    """Bytes of keys and values in a cache, and those that the tokens that ran make."""
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    executed = sum(
        int((layer.columns >= 0).sum()) if getattr(layer, "columns", None) is not None else tokens
        for layer in cache.layers
        if layer.is_initialized
    )
    token = 2 * model.config.num_key_value_heads * model.config.head_dim * model.dtype.itemsize
    return {
        f"{prefix}cache_bytes": sum(tensor.numel() * tensor.element_size() for tensor in held),
        f"{prefix}executed_bytes": executed * token,
    }


if __name__ == "__main__":
    main()
