r"""Claim: how near to its base a converted model gets by at most an hour or so of training on one core.

Trains the modulation alone, towards the frozen base, on text without any labels, and measures the model after it beside
its base: WikiText-2 perplexity over the base's (first 12,288 tokens, windows of 512, fp32), LAMBADA (500 passages), the
length of the greedy prefix that it shares with the base, and n-gram entropy. The training text is the embedded English
text without LAMBADA's passages and, with --domain, a file of the domain that is measured, such as WikiText-2's
validation file (never its test file); keyed forms are calibrated on that file too.

A run that is stopped goes on where it was. Core-minutes are processor time, noted where one session took all the steps:
30 minutes on two cores are 60.

Usage: python benchmarks/equivalence_training.py --name keyed-64 --text wikitext-2/test.txt \
           --domain wikitext-2/valid.txt
"""

import argparse
import json
import time
from pathlib import Path

import torch
from quality import passages, qualities
from record import environment, finished, save
from transformers import AutoTokenizer

import pliant
from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from pliant.data import EMBEDDED_SOURCES, documents, read_text

WINDOW = 512
DOMAIN_SHARE = 0.1
"""Of the documents; of the tokens it is about 0.4, as its passages are longer than the embedded texts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the result file, equivalence-training-NAME.json")
    parser.add_argument("--text", type=Path, required=True, help="to measure on")
    parser.add_argument("--domain", type=Path, help="more text to train and calibrate on")
    parser.add_argument("--preset", default="keyed")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--allocation", help="of keyed forms")
    parser.add_argument("--num-updates", type=int)
    parser.add_argument("--layers", default="all")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lambada", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmarks"), help="folder for texts and runs")
    arguments = parser.parse_args()

    config = configure(arguments)
    is_first_session, processor = not Path(config.training.output_dir).exists(), time.process_time()
    result = pliant.train(config)
    core_minutes = (time.process_time() - processor) / 60
    logs, seconds = finished(result)
    run, steps = result.output_dir, result.steps
    del result

    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint-best")
    text = read_text(arguments.text)
    model = pliant.load(run / "checkpoint-best", dtype=torch.float32).eval()
    after = qualities(model, tokenizer, text, lambada=arguments.lambada)
    print("after", after, flush=True)
    save(
        f"equivalence-training-{arguments.name}",
        {
            "environment": environment(),
            "arguments": {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "work"},
            "trained_parameters": sum(p.numel() for _, p in model.dynamic_parameters()),
            "tokens": steps * arguments.batch_size * WINDOW,
            "seconds": seconds,
            "core_minutes": core_minutes if is_first_session else None,
            "after": after,
            "curve": [
                {"step": line["step"], "ratio": line["eval_ratio"], "kl": line["eval_kl"]}
                for line in logs
                if "eval_ratio" in line
            ],
        },
    )


def configure(arguments: argparse.Namespace) -> RunConfig:
    """The run that ``arguments`` ask for; it goes on if its folder holds a part of it."""
    texts = write_texts(arguments.work, arguments.domain)
    mixed = len(texts) > 1
    closed = arguments.preset.startswith("keyed") and arguments.domain is not None
    weights = [1 - DOMAIN_SHARE, DOMAIN_SHARE] if mixed else []
    return RunConfig(
        model=ModelConfig(
            base_model_name="smollm2-135m",
            preset=arguments.preset,
            adapter_rank=arguments.rank,
            allocation=arguments.allocation,
            num_updates=arguments.num_updates,
            layers=arguments.layers,
            calibration=str(arguments.domain) if closed else None,
            calibration_tokens=65_536,
        ),
        data=DataConfig(
            dataset_name=str(texts[0]),
            mixed=mixed,
            dataset_names=[str(t) for t in texts] if mixed else [],
            dataset_weights=weights,
            max_length=WINDOW,
            max_validation_windows=24,
        ),
        training=TrainingConfig(
            output_dir=str(arguments.work / arguments.name),
            max_steps=arguments.steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            warmup_steps=10,
            mixed_precision="bf16",
            log_steps=10,
            eval_steps=max(1, arguments.steps // 5),
            save_steps=50,
            resume=True,
        ),
    )


def write_texts(work: Path, domain: Path | None) -> list[Path]:
    """Writes the training texts as lines of JSON: the embedded ones without LAMBADA, and the passages of ``domain``."""
    work.mkdir(parents=True, exist_ok=True)
    sources = [source.name for source in EMBEDDED_SOURCES if source.name != "lambada"]
    texts = {work / "embedded.jsonl": list(documents("train", sources=sources))}
    if domain is not None:
        texts[work / "domain.jsonl"] = passages(read_text(domain))
    for file, documents_ in texts.items():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents_), encoding="utf-8")
    return list(texts)


if __name__ == "__main__":
    main()
