"""Claim: a small model learns from fresh weights in half an hour on two cores.

Trains the recipe ``from_scratch_50m`` on the embedded English text for a fixed number of steps, and sets its validation
loss beside the unigram entropy of the same tokens, which a model without any context cannot go below. A run that is
stopped goes on where it was. Usage: python benchmarks/from_scratch.py
"""

import argparse
import time
from pathlib import Path

import torch
from record import environment, finished, save
from transformers import AutoTokenizer

import pliant
from pliant.config import RunConfig
from pliant.config.composition import compose
from pliant.data import training_data
from pliant.data.packing import IGNORED
from pliant.training.build import tokenizer_for

PROMPTS = ("The city was founded in", "She looked at the door and")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--name", default="50m")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks"))
    arguments = parser.parse_args()
    config = compose(
        "from_scratch_50m",
        [
            f"training.output_dir={arguments.work / ('from-scratch-' + arguments.name)}",
            f"training.max_steps={arguments.steps}",
            f"training.batch_size={arguments.batch_size}",
            f"training.gradient_accumulation_steps={arguments.accumulation}",
            f"training.lr={arguments.lr}",
            "training.mixed_precision=bf16",
            "training.weight_decay=0.1",
            f"training.eval_steps={max(1, arguments.steps // 10)}",
            f"training.save_steps={max(1, arguments.steps // 10)}",
            "training.resume=true",
            "data.max_length=256",
        ],
    )
    entropy = unigram_entropy(config)
    print(f"unigram entropy {entropy:.3f} nats", flush=True)
    is_first_session, processor = not Path(config.training.output_dir).exists(), time.process_time()
    result = pliant.train(config)
    minutes = (time.process_time() - processor) / 60
    logs, seconds = finished(result)
    loss = result.after["eval_loss"]
    parameters = result.model.num_parameters()
    print(f"{parameters:,} parameters, validation loss {loss:.3f}, {entropy - loss:.3f} below unigram", flush=True)
    save(
        f"from-scratch-{arguments.name}",
        {
            "environment": environment(),
            "parameters": parameters,
            "tokens": result.steps * arguments.batch_size * arguments.accumulation * config.data.max_length,
            "seconds": seconds,
            "core_minutes": minutes if is_first_session else None,
            "unigram_entropy": entropy,
            "validation_loss": loss,
            "validation_perplexity": result.after["eval_perplexity"],
            "below_unigram": entropy - loss,
            "samples": samples(result.output_dir / "checkpoint-best"),
            "curve": [{"step": e["step"], "loss": e["eval_loss"]} for e in logs if "eval_loss" in e],
            "training_curve": [{"step": e["step"], "loss": e["loss"]} for e in logs if "loss" in e],
        },
    )


def unigram_entropy(config: RunConfig) -> float:
    """Cross-entropy of the validation tokens under the training tokens' frequencies (add-one), in nats."""
    tokenizer = tokenizer_for(config)
    data = training_data(config.data, tokenizer, kind="text", seed=config.training.seed)
    counts = torch.ones(len(tokenizer), dtype=torch.float64)
    for rows in data.train.iter(batch_size=256):
        ids = torch.tensor(rows["labels"]).flatten()
        counts += torch.bincount(ids[ids != IGNORED], minlength=len(tokenizer))
    validation = torch.tensor(data.validation["labels"][:]).flatten()
    log_p = (counts / counts.sum()).log()
    return -log_p[validation[validation != IGNORED]].mean().item()


def samples(checkpoint: Path) -> list[str]:
    """Greedy and sampled continuations."""
    model, tokenizer = pliant.load(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_p=0.9, temperature=0.8)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    main()
