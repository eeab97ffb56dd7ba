"""Claim: at equal training FLOPs, a small routed model learns as much from fresh weights as a dense one.

A Llama of 8 layers, width 128 and 4,096 tokens of a vocabulary made from the embedded text. Methods: dense, mod (an
eighth of the tokens enter every other layer, as in its paper) and dtf (half of them enter every dynamic layer). Each
trains with the FLOPs that the dense model spends on --steps, so that the routed ones see more text. Learning rates are
searched on the first seed, alike for each. The metric was fixed beforehand: the loss on held-out text, in nats a token,
tokens by threshold. Runs that are done are not repeated.

Usage: python benchmarks/routed_from_scratch.py
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from record import RESULTS, environment, finished, save
from routed_speed import flops
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

import pliant
from pliant.config import DataConfig, LrMultipliers, ModelConfig, RunConfig, TrainingConfig
from pliant.data import documents
from pliant.models import fresh

NAME = "routed-from-scratch"
VOCABULARY, WINDOW, END = 4_096, 256, "<|end|>"
SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mod": {"capacity_gamma": 0.125, "gate": "raw", "gate_share": 1.0},
    "dtf": {"capacity_gamma": 0.5},
}
MULTIPLIERS = {"dtf": LrMultipliers(router=10.0, prior=10.0)}
"""Those of the recipe."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=250, help="of the dense model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is searched on")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks") / NAME)
    arguments = parser.parse_args()
    file = RESULTS / f"{NAME}.json"
    result = json.loads(file.read_text()) if file.exists() else {"runs": []}
    settings = {"steps": arguments.steps, "batch_size": arguments.batch_size, "window": WINDOW, **SIZES}
    if result.get("settings", settings) != settings:
        raise SystemExit(f"{file} holds runs of other settings: {result['settings']}; move it away")
    result |= {"environment": environment(), "settings": settings}
    base = written_base(arguments.work / "base")

    def loss_of(method: str, lr: float, seed: int) -> float:
        for known in result["runs"]:
            if (known["method"], known["lr"], known["seed"]) == (method, lr, seed):
                return known["validation_loss"]
        result["runs"].append(run(method, lr, seed, base, arguments))
        print(result["runs"][-1], flush=True)
        save(NAME, result)
        return result["runs"][-1]["validation_loss"]

    for method in arguments.methods:
        lr = min(arguments.lrs, key=lambda lr: loss_of(method, lr, arguments.seeds[0]))
        losses = [loss_of(method, lr, seed) for seed in arguments.seeds]
        spread = stdev(losses) if len(losses) > 1 else None
        result.setdefault("chosen", {})[method] = {"lr": lr, "validation_loss": mean(losses), "deviation": spread}
        save(NAME, result)


def written_base(folder: Path) -> Path:
    """Writes the shape and the tokenizer that every model starts from."""
    if (folder / "config.json").exists():  # written last
        return folder
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet)
    byte_pairs.train_from_iterator(documents("train"), trainer)
    PreTrainedTokenizerFast(tokenizer_object=byte_pairs, eos_token=END, pad_token=END).save_pretrained(folder)
    end = byte_pairs.token_to_id(END)
    shape = LlamaConfig(
        **SIZES, vocab_size=VOCABULARY, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end, pad_token_id=end
    )
    shape.architectures = ["LlamaForCausalLM"]
    shape.save_pretrained(folder)
    return folder


def run(method: str, lr: float, seed: int, base: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains one model, and measures it on held-out text."""
    work, start = work_ratio(method, base), time.process_time()
    steps = round(arguments.steps / work)
    trained = pliant.train(configure(method, lr, seed, base, steps, arguments))
    logs, seconds = finished(trained)
    assert trained.after is not None
    shares = [line["routing_capacity/mean"] for line in logs if "routing_capacity/mean" in line]
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "work_ratio": work,
        "steps": steps,
        "tokens": steps * arguments.batch_size * WINDOW,
        "parameters": trained.model.num_parameters(),
        "validation_loss": trained.after["eval_loss"],
        "capacity": shares[-1] if shares else None,
        "seconds": seconds,
        "core_minutes": (time.process_time() - start) / 60,
    }


def work_ratio(method: str, base: Path) -> float:
    """FLOPs of a training step over the dense model's: linear maps, head and attention."""
    if not (options := METHODS[method]):
        return 1.0
    config = pliant.DtfConfig(**options) if method == "dtf" else pliant.ModConfig(**options)
    model: Any = pliant.convert(fresh(str(base)), config)
    share = {i: options["capacity_gamma"] if layer.routes else 1.0 for i, layer in model.routed_layers.items()}
    return flops(model, WINDOW, share, "train")


def configure(method: str, lr: float, seed: int, base: Path, steps: int, arguments: argparse.Namespace) -> RunConfig:
    """The run of one model: only what is routed, and how many steps it may take, differs."""
    options = METHODS[method]
    return RunConfig(
        model_type=method if options else "dense",
        model=ModelConfig(base_model_name=str(base), init="scratch", **options),
        data=DataConfig(max_length=WINDOW, max_validation_windows=128),
        training=TrainingConfig(
            output_dir=str(arguments.work / f"{method}-{lr}-{seed}"),
            objective="causal_lm",
            trainable="all",
            max_steps=steps,
            batch_size=arguments.batch_size,
            lr=lr,
            lr_multipliers=MULTIPLIERS.get(method, LrMultipliers()),
            warmup_steps=steps // 20,
            weight_decay=0.1,
            mixed_precision="no",
            threshold_fraction=0.1 if options else 0.0,
            seed=seed,
            resume=True,
        ),
    )


if __name__ == "__main__":
    main()
