"""Runs of a few steps on tiny bases."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig

STEPS = 8


@pytest.fixture
def base(tmp_path: Path, make_base: Callable[..., Any], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny base on disk, tokenizer included."""
    make_base("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty documents of counting numbers: easily learnt."""
    lines = (json.dumps({"text": " ".join(str(2 + (i + j) % 90) for j in range(10 + i % 17))}) for i in range(60))
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture
def calibration_text(tmp_path: Path) -> Path:
    """Text for the closed form of tiny keyed layers."""
    file = tmp_path / "calibration.txt"
    file.write_text(" ".join(str(2 + (7 * i * i + 3 * i) % 90) for i in range(40_000)), encoding="utf-8")
    return file


@pytest.fixture
def configure(tmp_path: Path, base: Path, texts: Path, calibration_text: Path) -> Callable[..., RunConfig]:
    """A function that makes the configuration of a run of eight steps."""

    def make(
        out: str = "run",
        *,
        model_type: str = "npt",
        model: dict | None = None,
        data: dict | None = None,
        **training: Any,
    ) -> RunConfig:
        chosen = {"preset": "keyed", "adapter_rank": 8, **(model or {})} if model_type == "npt" else dict(model or {})
        needs_text = chosen.get("preset", "").startswith("keyed") or model_type in ("mod", "dtf", "stt")
        if needs_text and "checkpoint_path" not in chosen:
            chosen = {"calibration": str(calibration_text), "calibration_tokens": 8_192, **chosen}
        return RunConfig(
            model_type=model_type,
            model=ModelConfig(base_model_name=str(base), **chosen),
            data=DataConfig(dataset_name=str(texts), max_length=16, **{"validation_fraction": 0.2, **(data or {})}),
            training=TrainingConfig(
                output_dir=str(tmp_path / out),
                **{"max_steps": STEPS, "batch_size": 2, "lr": 1e-2, "log_steps": 2, **training},
            ),
        )

    return make
