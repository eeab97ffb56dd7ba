"""Claim: at full capacity a routed model is its base, and calibrated thresholds let the wanted share of new text run.

For every architecture on all alternate layers: in fp32 the largest difference of logits to the base over the largest
logit at γ = 1, on twenty passages; then in bf16, for each γ, the share of held-out tokens that runs, its mean and the
layer furthest off, on embedded text after calibration on other text of the same mixture, and on windows from all over
--text after calibration on --domain, another text of its kind. Routers are as conversion leaves them, untrained.

Usage: python benchmarks/routed_capacity.py --text wikitext-2/test.txt --domain wikitext-2/valid.txt
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality import passages
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.data import calibration_tokens, read_text

CONFIGS = {"mod": pliant.ModConfig, "dtf": pliant.DtfConfig, "stt": pliant.SttConfig}
CAPACITIES = (0.75, 0.5)
CALIBRATION_TOKENS, MEASURED_TOKENS = 32_768, 16_384
PASSAGES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--domain", type=Path, required=True, help="to calibrate on for it")
    arguments = parser.parse_args()
    rows = []
    for architecture, config_class in CONFIGS.items():
        for row in (exactness(config_class, arguments.text), *capacities(config_class, arguments)):
            rows.append({"architecture": architecture, **row})
            print(rows[-1], flush=True)
    save("routed-capacity", {"environment": environment(), "rows": rows})


def exactness(config_class: Any, text: Path) -> dict[str, Any]:
    """How far the logits of a model of capacity 1 are from the base's, in fp32."""
    model: Any = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model.config._name_or_path)
    chosen = passages(read_text(text))[:PASSAGES]
    probes = [tokenizer(passage, return_tensors="pt").input_ids[:, :128] for passage in chosen]
    expected = [logits(model, ids) for ids in probes]
    pliant.convert(model, config_class(capacity_gamma=1.0))
    error = max(
        float((logits(model, ids) - wanted).abs().max() / wanted.abs().max())
        for ids, wanted in zip(probes, expected, strict=True)
    )
    return {"capacity": 1.0, "relative_logit_error": error}


def capacities(config_class: Any, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The share of held-out tokens that runs, in bf16: its mean over the layers, and that of the layer furthest off."""
    model: Any = pliant.load("smollm2-135m", dtype=torch.bfloat16).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(model.config._name_or_path)
    torch.manual_seed(0)  # of the routers' start
    pliant.convert(model, config_class(capacity_gamma=1.0))
    embedded = calibration_tokens(tokenizer, num_tokens=10 * 9 * 512)  # ten rounds of the nine kinds
    places = torch.arange(len(embedded)) // 9 % 3 == 2
    domain, measured = (
        calibration_tokens(tokenizer, file, num_tokens=count)
        for file, count in ((arguments.domain, CALIBRATION_TOKENS), (arguments.text, MEASURED_TOKENS))
    )
    texts = {"embedded": (embedded[~places], embedded[places]), arguments.text.name: (domain, measured)}
    for capacity in CAPACITIES:
        for name, (calibration, tokens) in texts.items():
            pliant.calibrate(model, capacity, calibration=calibration)
            shares = running(model, tokens)
            worst = max(shares, key=lambda share: abs(share - capacity))
            yield {"capacity": capacity, "text": name, "mean": sum(shares) / len(shares), "worst": worst}


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
