"""Claim: how varied the long texts of routed models are beside the dense model's, and whether they stay finite.

Attention of every other layer at γ = 0.75, thresholds set on the default text, routers as conversion leaves them; and
any checkpoint that --also names. 2,000 tokens after one prompt, bf16: greedy, sampled (p = 0.95), with three beams, and
assisted by the base as a draft. The figures are the entropy of n-grams beside the dense model's in the same way of
decoding, and whether any logit was not finite, in bf16 and, over 128 greedy tokens, in fp16. Texts that are written are
not written again.

Usage: python benchmarks/routed_generation.py [--new-tokens 2000]
"""

import argparse
import json
import time
from itertools import product
from typing import Any

import torch
from quality import ngram_entropy
from record import RESULTS, environment, named_folder, save
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

import pliant

PROMPT = "The history of the city begins"
HALF_PRECISION_TOKENS = 128
NAME = "routed-generation"
CONFIGS: dict[str, Any] = {
    "dense": None,
    "mod": pliant.ModConfig(capacity_gamma=0.75, granularity="attention"),
    "dtf": pliant.DtfConfig(capacity_gamma=0.75, granularity="attention"),
    "stt": pliant.SttConfig(capacity_gamma=0.75, granularity="attention"),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_p": 0.95},
    "beams": {"num_beams": 3, "do_sample": False},
    "assisted": {"do_sample": False},
}


class Finite(LogitsProcessor):
    """Leaves the logits as they are, and remembers whether all were finite."""

    def __init__(self) -> None:
        self.holds = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.holds = self.holds and not scores.isnan().any() and not scores.isposinf().any()
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new-tokens", type=int, default=2000)
    parser.add_argument("--models", nargs="*", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument(
        "--also", nargs="*", default=[], type=named_folder, metavar="NAME=FOLDER", help="checkpoints to measure too"
    )
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    result = json.loads(file.read_text()) if file.exists() else {"new_tokens": arguments.new_tokens, "rows": []}
    if result["new_tokens"] != arguments.new_tokens:
        raise SystemExit(f"{file} holds texts of {result['new_tokens']} tokens; move it away")
    asked = [(way, way, torch.bfloat16, arguments.new_tokens) for way in arguments.ways]
    asked.append(("greedy, fp16", "greedy", torch.float16, HALF_PRECISION_TOKENS))
    given = dict(arguments.also)
    for name, (label, way, dtype, count) in product([*arguments.models, *given], asked):
        if any((row["model"], row["way"]) == (name, label) for row in result["rows"]):
            continue
        model = (pliant.load(given[name]) if name in given else made(name)).eval().to(dtype)
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        row = {"model": name, "way": label, "environment": environment()}
        row |= written(model, tokenizer, way, count)
        print({key: value for key, value in row.items() if key != "text"}, flush=True)
        result["rows"].append(row)
        save(NAME, result)


def made(name: str) -> Any:
    """The base, or a model routed from it, in fp32."""
    model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    torch.manual_seed(0)
    if CONFIGS[name] is not None:
        pliant.convert(model, CONFIGS[name])
    return model


def written(model: Any, tokenizer: Any, way: str, count: int) -> dict[str, Any]:
    """What a model writes in one way, and how varied it is."""
    inputs, finite = tokenizer(PROMPT, return_tensors="pt"), Finite()
    helper = {"assistant_model": pliant.load("smollm2-135m", dtype=model.dtype).eval()} if way == "assisted" else {}
    torch.manual_seed(0)
    start = time.perf_counter()
    tokens = model.generate(
        **inputs,
        **WAYS[way],
        **helper,
        min_new_tokens=count,
        max_new_tokens=count,
        logits_processor=LogitsProcessorList([finite]),
    )[0]
    new = tokens[inputs.input_ids.shape[1] :]
    return {
        "tokens": len(new),
        "seconds": time.perf_counter() - start,
        "ngram_entropy": ngram_entropy([new.tolist()]),
        "finite": finite.holds,
        "text": tokenizer.decode(new[:200]),
    }


if __name__ == "__main__":
    main()
