"""Claim: how long an edit takes, many facts in one solve beside one fact after another, and the statistics before it.

ROME, the searching default and the gradient-free targets on the same CounterFact records, in turn, in random order; a
round of each takes other records. Statistics and prefixes are made before, as they are for every later edit of a base.
Ratios are of seconds per fact to ROME's in the same round. Runs best on an idle machine.

Usage: python benchmarks/editing_time.py counterfact-2000.json [--rounds 4] [--batch 50] [--singles 6]
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from record import environment, save
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import pliant
from pliant.consolidation import Consolidation
from pliant.data import calibration_tokens
from pliant.evaluation.editing.cases import EditCase, counterfact
from pliant.evaluation.editing.editors import editor_named
from pliant.key_moments import NUM_TOKENS, WINDOW, key_moments

BASE = "smollm2-135m"
SINGLE, BATCHED = ("rome", "auto"), ("context", "unembedding", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CounterFact in EasyEdit's form")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=50, help="facts in one solve")
    parser.add_argument("--singles", type=int, default=6, help="facts one after another")
    arguments = parser.parse_args()
    random.seed(0)
    model = pliant.load(BASE, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    cases = counterfact(arguments.data)

    def single(name: str) -> Callable[[Sequence[EditCase]], float]:
        def run(part: Sequence[EditCase]) -> float:
            some = part[: arguments.singles]
            return timed(lambda: [editor_named(name)(model, tokenizer, case) for case in some]) / len(some)

        return run

    def batched(name: str) -> Callable[[Sequence[EditCase]], float]:
        return lambda part: timed(lambda: editor_named(name).batch(model, tokenizer, part)) / len(part)

    ways = {name: single(name) for name in SINGLE} | {f"{name}, batched": batched(name) for name in BATCHED}
    for way in ways.values():  # statistics, prefixes and factorisations
        way(cases[-1:])
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        part = cases[number * arguments.batch : (number + 1) * arguments.batch]
        for name in random.sample(list(ways), len(ways)):
            taken[name].append(ways[name](part))
            print(f"{name:22} {taken[name][-1]:6.2f} s a fact", flush=True)
    save(
        "editing-time",
        {
            "environment": environment(),
            "model": BASE,
            "dtype": "bfloat16",
            "batch": arguments.batch,
            "singles": arguments.singles,
            "rows": [row(name, found, taken["rome"]) for name, found in taken.items()],
            "statistics": [read(model, tokenizer, target) for target in ("auto", "context")],
        },
    )


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def read(model: Any, tokenizer: PreTrainedTokenizerBase, target: str) -> dict[str, Any]:
    """Seconds that the statistics take for the layers which a target writes in."""
    subjects, answers = Consolidation(target=target).places(model)
    tokens = calibration_tokens(tokenizer, None, num_tokens=NUM_TOKENS, window=WINDOW)
    seconds = timed(lambda: key_moments(model, tokens, [*subjects, *answers]))
    return {"target": target, "layers": [*subjects, *answers], "tokens": tokens.numel(), "seconds": seconds}


def row(name: str, found: Sequence[float], rome: Sequence[float]) -> dict[str, Any]:
    """Seconds a fact, and how many times as fast as ROME in the same round."""
    ratios = sorted(theirs / own for theirs, own in zip(rome, found, strict=True))
    return {
        "way": name,
        "seconds": statistics.median(found),
        "times_as_fast_as_rome": {"value": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
    }


if __name__ == "__main__":
    main()
