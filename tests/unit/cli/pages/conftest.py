"""Folders to report on, made up; and tiny converted and edited models."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import pliant
from pliant.models.edits import Delta, Edit

HOSTILE = '"><script>alert(1)</script>'
"""What a model may write, and no page may run."""


def write_json(file: Path, value: Any) -> Path:
    """Writes JSON, and the folder for it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def write_lines(file: Path, records: list[dict[str, Any]]) -> Path:
    """Writes JSON lines, and the folder for them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def interval(value: float, spread: float = 0.05, count: int = 100) -> dict[str, Any]:
    """A mean with its interval, as results hold it."""
    return {"value": value, "low": value - spread, "high": value + spread, "count": count}


def training_run(folder: Path, *, speed: float = 1.0) -> Path:
    """The folder of a run of twenty steps."""
    lines: list[dict[str, Any]] = []
    for step in range(21):
        ratio = 1 + 0.2 / (1 + speed * step)
        if step:
            logged = {"loss": 3 / (1 + speed * step), "kl": ratio - 1, "learning_rate": 1e-4 * step, "grad_norm": 1.0}
            lines.append({"step": step, "epoch": 0.1, "time": 2.0 * step, **logged})
        if step % 10 == 0:
            layers = {f"modulation_norm/layer_{i}": 0.1 * (i + step) for i in range(4)}
            evaluation = {"eval_perplexity": 20 * ratio, "eval_ratio": ratio, "eval_kl": ratio - 1}
            lines.append({"step": step, "time": 2.0 * step + 1, **evaluation, **layers, "modulation_norm/mean": 0.2})
    write_lines(folder / "metrics.jsonl", lines)
    samples = [{"step": s, "prompt": "Once", "continuation": HOSTILE if s else " upon a time"} for s in (0, 10, 20)]
    write_lines(folder / "samples.jsonl", samples)
    (folder / "config.yaml").write_text(f"model_type: npt\ntraining:\n  lr: {1e-4 * speed}\n", encoding="utf-8")
    return folder


def demo(folder: Path) -> Path:
    """The folder of a demo with its training run."""
    rows = [
        {"name": f"keyed, rank {rank}", "preset": "keyed", "options": {"rank": rank}, "ratio": 1 + 64 / rank**2}
        | {
            "perplexity": 30.0,
            "base_perplexity": 28.0,
            "agreement": 0.8,
            "kl": 0.1,
            "added_parameters": 9,
            "share": 0.1,
        }
        for rank in (8, 16, 32)
    ]
    record = {
        "made_by": "pliant demo",
        "complete": True,
        "seconds": 12.0,
        "settings": {"base": "tiny"},
        "rows": rows,
        "energy": {str(i): {"1": 0.2 + 0.1 * i, "4": 0.6, "16": 1.0} for i in range(4)},
        "generations": [{"prompt": "Hi", "text": HOSTILE, "base_text": " there"}],
        "training": {"ratio_before": 1.2, "ratio_after": 1.1},
        "consolidation": {"context": "A fact.", "kl": 0.01, "before": {"Q": "no"}, "after": {"Q": "yes"}},
    }
    write_json(folder / "demo.json", record)
    training_run(folder / "training" / "run")
    return folder


def tasks(folder: Path) -> Path:
    """The folder of benchmark tasks on a model and its base."""
    figures = {
        name: {"metrics": {"acc,none": {"model": interval(0.5), "base": interval(0.6), "difference": interval(gap)}}}
        for name, gap in (("piqa", -0.1), ("sciq", 0.02))
    }
    held_out = {name: interval(value) for name, value in (("perplexity", 30.0), ("ratio", 1.07), ("kl", 0.08))}
    own = {
        "tasks": figures,
        "held_out": held_out,
        "modulation": {str(i): {"norm": 1.0, "weight_norm": 10.0, "ratio": 0.1 * i} for i in range(4)},
        "samples": [{"prompt": "Hi", "model": HOSTILE, "base": "there"}],
    }
    write_json(folder / "results.json", {"results": {"piqa": {"acc,none": 0.5}}, "pliant": own})
    return folder


def comparison(folder: Path) -> Path:
    """The folder of a comparison of two methods."""
    contenders = {name: {"method": name, "parameters": size} for name, size in (("v1", 1000), ("lora", 2000))}
    summary = {
        name: {
            "seeds": 3,
            "validation_loss": loss,
            "validation_loss_deviation": 0.01,
            "difference": interval(0.1),
            "forgetting": {"perplexity_ratio": 1.01, "kl": 0.02},
            "in_context": {"recall": {"correct": {"value": interval(0.4), "difference": interval(0.1)}}},
        }
        for name, loss in (("v1", 1.9), ("lora", 1.8))
    }
    cost = {"v1": {"time_ratio": 1.0, "memory_ratio": 1.0}, "lora": {"time_ratio": 1.2, "memory_ratio": 0.9}}
    record = {"contenders": contenders, "summary": summary, "cost": cost, "reference": "lora", "stopped_by": "SIGINT"}
    write_json(folder / "comparison.json", record)
    return folder


def editing(folder: Path) -> Path:
    """The folder of an editing suite: one edit at a time, and ten one after another."""

    def records(value: float, **more: Any) -> list[dict[str, Any]]:
        fields = {"efficacy": value, "paraphrase": value, "neighbourhood": 0.5, "case": "x"}
        return [{"id": str(i), **fields, "seconds": 1.0, **more} for i in range(10)]

    write_lines(folder / "before.jsonl", records(0.2))
    write_lines(folder / "in_context.jsonl", records(0.9))
    write_lines(folder / "auto.jsonl", records(0.8, perplexity_ratio=1.001))
    write_lines(folder / "auto-sequential-10.jsonl", records(0.7))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Everything that a report is made from, but models; no test may write to it."""
    root = tmp_path_factory.mktemp("folders")
    return {
        "fast": training_run(root / "fast", speed=2.0),
        "slow": training_run(root / "slow", speed=0.5),
        "demo": demo(root / "demo"),
        "tasks": tasks(root / "tasks"),
        "comparison": comparison(root / "comparison"),
        "editing": editing(root / "editing"),
    }


def windows(length: int = 12) -> torch.Tensor:
    """Random token windows, enough to calibrate the tiny model."""
    return torch.randint(2, 290, (10, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def converted_to(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that saves the tiny model in a form, with added parameters that all act."""
    made: dict[Any, Path] = {}

    def convert(form: str, **options: Any) -> Path:
        key = (form, *sorted(options.items()))
        if key not in made:
            model = pliant.load(tiny)
            layers = options.pop("layers", "all")
            config = pliant.NptConfig.preset(form, rank=6, **options)
            pliant.convert(model, config, layers=layers, calibration=windows())
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for _, parameter in model.dynamic_parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            made[key] = tmp_path_factory.mktemp("models") / form
            model.save_pretrained(made[key])
        return made[key]

    return convert


def edit_of(*paths: str, seed: int = 0) -> Edit:
    """A random edit of rank 2 of projections of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for path in paths:
        out, into = (32, 48) if path.endswith("down_proj") else (48, 32)
        left, right = (0.1 * torch.randn(size, 2, generator=generator) for size in (out, into))
        deltas[path] = Delta(left=left, right=right)
    return Edit(context=f"A robot. {HOSTILE}", deltas=deltas, kl=0.002)


@pytest.fixture(scope="session")
def edited(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, dense, with two edits of three projections."""
    model = pliant.load(tiny)
    model.edits.add(edit_of("layers.1.mlp.down_proj", "layers.2.mlp.gate_proj"))
    model.edits.add(edit_of("layers.1.mlp.down_proj", seed=1))
    folder = tmp_path_factory.mktemp("edited") / "edited"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder
