"""Claim: the modulation trains over an NF4 base, and its delta loads over the NF4 and over the bf16 base.

Fifty steps towards the NF4 base itself, on the embedded English text; then WikiText-like perplexity on held-out
embedded text (4,096 tokens, windows of 512) of both, each beside its own base. Needs bitsandbytes; runs on a CPU.
Usage: python benchmarks/nf4_training.py
"""

import argparse
import tempfile
from pathlib import Path

import torch
from record import environment, save
from transformers import AutoTokenizer, BitsAndBytesConfig

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.data import documents, token_windows
from pliant.metrics import compare_to_base

EVALUATION_TOKENS = 4_096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = pliant.train(configure(arguments, Path(folder) / "run"))
        checkpoint = result.checkpoint
        before, after = result.before, result.after
        del result
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        tokens = token_windows(documents("validation"), tokenizer, num_tokens=EVALUATION_TOKENS)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        rows = {
            "over NF4": measure(checkpoint, tokens, dtype=torch.bfloat16, quantization_config=nf4),
            "over bf16": measure(checkpoint, tokens, dtype=torch.bfloat16),
        }
    save(
        "nf4-training",
        {
            "environment": environment(),
            "steps": arguments.steps,
            "rank": arguments.rank,
            "tokens_trained": arguments.steps * arguments.batch_size * 512,
            "validation_before": {k: before[k] for k in ("eval_ratio", "eval_kl")},
            "validation_after": {k: after[k] for k in ("eval_ratio", "eval_kl")},
            "reloaded": rows,
        },
    )


def configure(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """A short run over the quantised embedded base."""
    return RunConfig(
        model=ModelConfig(
            base_model_name="smollm2-135m", preset="keyed", adapter_rank=arguments.rank, quantization="nf4"
        ),
        data=DataConfig(max_documents=4_000, max_validation_windows=8),
        training=TrainingConfig(
            output_dir=str(folder),
            max_steps=arguments.steps,
            batch_size=arguments.batch_size,
            lr=3e-4,
            warmup_steps=5,
            mixed_precision="bf16",
        ),
    )


def measure(checkpoint: Path | None, tokens: torch.Tensor, **options: object) -> dict[str, float]:
    """Perplexity of a delta over a base, beside that base."""
    assert checkpoint is not None
    compared = compare_to_base(pliant.load(checkpoint, **options).eval(), tokens)
    row = {
        "perplexity": compared.perplexity,
        "base_perplexity": compared.base_perplexity,
        "ratio": compared.ratio,
        "kl": compared.kl,
    }
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
