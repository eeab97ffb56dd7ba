"""Claim: at full capacity a routed model is its base, and calibrated thresholds let the wanted share of new text run.

For every architecture on all alternate layers, fp32: the largest difference of logits to the base over the largest
logit at γ = 1, on twenty passages; then, for each γ, the share of held-out tokens that runs, its mean and the layer
furthest off, on embedded text after calibration on embedded text, and, with --text and --domain, on a text after
calibration on another one of its kind. Routers are as conversion leaves them, untrained.

Usage: python benchmarks/routed_capacity.py --text wikitext-2/test.txt --domain wikitext-2/valid.txt
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from quality import passages
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.data import read_text, token_windows
from pliant.evaluation import held_out_tokens

CONFIGS = {"mod": pliant.ModConfig, "dtf": pliant.DtfConfig, "stt": pliant.SttConfig}
CAPACITIES = (0.75, 0.5, 0.25)
MEASURED_TOKENS = 8_192
PASSAGES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--domain", type=Path, required=True, help="to calibrate on for it")
    arguments = parser.parse_args()
    rows = []
    for architecture, config_class in CONFIGS.items():
        model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
        tokenizer: Any = AutoTokenizer.from_pretrained(model.config._name_or_path)
        measured, domain = (
            token_windows(read_text(file), tokenizer, num_tokens=MEASURED_TOKENS)
            for file in (arguments.text, arguments.domain)
        )
        embedded = held_out_tokens(tokenizer, num_tokens=MEASURED_TOKENS)
        texts = [("embedded", None, embedded), (arguments.text.name, domain, measured)]
        chosen = passages(read_text(arguments.text))[:PASSAGES]
        probes = [tokenizer(text, return_tensors="pt").input_ids[:, :128] for text in chosen]
        expected = [logits(model, ids) for ids in probes]
        torch.manual_seed(0)  # of the routers' start
        pliant.convert(model, config_class(capacity_gamma=1.0))
        error = max(
            float((logits(model, ids) - wanted).abs().max() / wanted.abs().max())
            for ids, wanted in zip(probes, expected, strict=True)
        )
        rows.append({"architecture": architecture, "capacity": 1.0, "relative_logit_error": error})
        print(rows[-1], flush=True)
        for capacity in CAPACITIES:
            for name, calibration, tokens in texts:
                pliant.calibrate(model, capacity, calibration=calibration)
                shares = running(model, tokens)
                worst = max(shares, key=lambda share: abs(share - capacity))
                mean = sum(shares) / len(shares)
                rows.append(
                    {"architecture": architecture, "capacity": capacity, "text": name, "mean": mean, "worst": worst}
                )
                print(rows[-1], flush=True)
    save("routed-capacity", {"environment": environment(), "rows": rows})


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of one text."""
    return model(ids, use_cache=False).logits


@torch.no_grad()
def running(model: Any, tokens: torch.Tensor) -> list[float]:
    """The share of the tokens that runs in each routed layer."""
    with model.report() as report:
        for window in tokens.split(4):
            model.model(window, use_cache=False)
    forwards = report.forwards
    return [
        torch.cat([forward[index].routing.runs.flatten() for forward in forwards]).float().mean().item()
        for index in model.routed_layers
    ]


if __name__ == "__main__":
    main()
