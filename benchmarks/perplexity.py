"""Claim: what the closed form loses, by rank, allocation and form, as perplexity over the base's.

Protocol: the first 12,288 tokens of a text in windows of 512, token-weighted, fp32; the ratio is to the unconverted
base in the same run. With --text, a local file such as the WikiText-2 test file; without, the embedded validation
texts. With --calibration, a local file to calibrate on; without, the default calibration text.

Usage: python benchmarks/perplexity.py --name wikitext2 --text wikitext-2/test.txt
"""

import argparse
import time
from pathlib import Path

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.data import calibration_tokens, documents, read_text, token_windows
from pliant.statistics import attention_statistics

EVALUATION_TOKENS = 12_288
CALIBRATION_TOKENS = 65_536

preset = pliant.NptConfig.preset
ROWS = {
    "keyed r=64": preset("keyed", rank=64),
    "keyed r=128": preset("keyed", rank=128),
    "keyed r=192": preset("keyed", rank=192),
    "keyed r=256": preset("keyed", rank=256),
    "keyed r=384": preset("keyed", rank=384),
    "keyed mean r=64, by sensitivity": preset("keyed", rank=64, allocation="sensitivity"),
    "keyed mean r=128, by sensitivity": preset("keyed", rank=128, allocation="sensitivity"),
    "keyed mean r=192, by sensitivity": preset("keyed", rank=192, allocation="sensitivity"),
    "keyed tied r=256 (parameters of r=128)": preset("keyed", rank=256, tied=True),
    "keyed tied mean r=256, by sensitivity": preset("keyed", rank=256, tied=True, allocation="sensitivity"),
    "keyed_pre r=192": preset("keyed_pre", rank=192),
    "v1 r=16, as it starts": preset("v1"),
    "v1_single r=16, as it starts": preset("v1_single"),
    "v2 r=16, as it starts": preset("v2"),
    "outer r=64, as it starts": preset("outer"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="embedded", help="of the result file, perplexity-NAME.json")
    parser.add_argument("--text", type=Path)  # noted in the result as given
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    arguments = parser.parse_args()

    model = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    texts = [read_text(arguments.text)] if arguments.text else documents("validation")
    tokens = token_windows(texts, tokenizer, num_tokens=EVALUATION_TOKENS)
    amount = arguments.calibration_tokens
    if arguments.calibration:
        calibration = token_windows([read_text(arguments.calibration)], tokenizer, num_tokens=amount)
    else:
        calibration = calibration_tokens(tokenizer, num_tokens=amount)
    reader = pliant.load("smollm2-135m", dtype=torch.bfloat16).eval()
    start = time.perf_counter()
    statistics = attention_statistics(reader, calibration, layers=range(model.config.num_hidden_layers))
    print(f"calibration: {amount} tokens, {time.perf_counter() - start:.0f} s", flush=True)
    base_perplexity = pliant.perplexity(model, tokens)
    print(f"base perplexity {base_perplexity:.3f}", flush=True)
    rows = []
    for label in arguments.rows:
        start = time.perf_counter()
        model = pliant.load("smollm2-135m", dtype=torch.float32).eval()
        pliant.convert(model, ROWS[label], calibration=statistics)
        seconds = time.perf_counter() - start
        perplexity = pliant.perplexity(model, tokens)
        added = sum(parameter.numel() for _, parameter in model.dynamic_parameters())
        ranks = [layer.layer_config.rank for layer in model.dynamic_layers.values()]
        rows.append(
            {
                "form": label,
                "added_parameters": added,
                "ratio": perplexity / base_perplexity,
                "ranks": ranks,
                "convert_seconds": seconds,
            }
        )
        print(f"{label:40} +{added:>10,}  ×{perplexity / base_perplexity:.4f}", flush=True)
    save(
        f"perplexity-{arguments.name}",
        {
            "environment": environment(),
            "evaluation": f"{arguments.text or 'embedded validation'}, {tokens.numel()} tokens",
            "calibration": f"{arguments.calibration or 'embedded'}, {amount} tokens",
            "base_perplexity": base_perplexity,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
