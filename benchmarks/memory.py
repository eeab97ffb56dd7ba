"""Claim: converting needs no second copy of the model: peak memory beside base and new parameters.

Reads the process's own peak resident size (Linux). The base is loaded in fp32, read once, and then converted to keyed,
rank 192 on every layer, calibration included. Usage: python benchmarks/memory.py
"""

import gc
from pathlib import Path

import torch
from record import environment, save
from transformers import AutoTokenizer

import pliant
from pliant.data import calibration_tokens
from pliant.evaluation.comparison.cost import resident


def main() -> None:
    model = pliant.load("smollm2-135m", dtype=torch.float32).eval()
    base = sum(p.numel() * p.element_size() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    tokens = calibration_tokens(tokenizer, num_tokens=16_384)
    with torch.inference_mode():
        model(tokens[:1], use_cache=False)  # page the weights in, and let the kernels take their workspace
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    pliant.convert(model, pliant.NptConfig.preset("keyed", rank=192), calibration=tokens)
    peak = resident("VmHWM")
    added = sum(p.numel() * p.element_size() for _, p in model.dynamic_parameters())
    extra = peak - before
    result = {
        "environment": environment(),
        "base_bytes": base,
        "added_bytes": added,
        "resident_before": before,
        "peak": peak,
        "extra_over_added_share_of_base": (extra - added) / base,
        "within_base_plus_added_plus_10_percent": extra <= added + 0.1 * (base + added),
    }
    print(f"base {base / 2**20:.0f} MiB, added {added / 2**20:.0f} MiB, peak {extra / 2**20:.0f} MiB above the start")
    save("memory", result)


if __name__ == "__main__":
    main()
