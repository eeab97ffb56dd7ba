"""Runs over a stream for longer than one pass: one endless epoch, which a resumed run continues exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_runs import _interrupting, metrics_of

from pliant.config import RunConfig
from pliant.training import train
from pliant.training.checkpoints import last_checkpoint
from pliant.training.trainer import PliantTrainer

MAX_STEPS, ACCUMULATION, BATCH_SIZE = 10, 2, 2
DOCUMENTS = 14
"""Three steps and a half in a pass: the fourth step takes its second half from the next one."""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The documents of a run, each a row, and beside them one to validate on."""
    for name, numbers in {"texts": range(DOCUMENTS), "validation": [DOCUMENTS]}.items():
        lines = (json.dumps({"text": " ".join(str(2 + (i + j) % 90) for j in range(10))}) for i in numbers)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "texts.jsonl"


@pytest.fixture
def streamed(configure: Callable[..., RunConfig], texts: Path) -> Callable[..., RunConfig]:
    """A function that configures a run over the documents for about three passes."""
    source = {"eval_dataset_name": str(texts.with_name("validation.jsonl")), "streaming": True}

    def make(out: str, *, data: dict[str, Any] | None = None, **options: Any) -> RunConfig:
        return configure(
            out,
            data={**source, "packing": False, "shuffle_buffer": 5, **(data or {})},
            **{
                "max_steps": MAX_STEPS,
                "batch_size": BATCH_SIZE,
                "gradient_accumulation_steps": ACCUMULATION,
                "log_steps": 1,
                **options,
            },
        )

    return make


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that runs have taken so far, in order."""
    taken: list[int] = []
    original = PliantTrainer.compute_loss

    def compute_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        taken.extend(inputs["row"].tolist())
        return original(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PliantTrainer, "compute_loss", compute_loss)
    return taken


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data": {"packing": True}},
        {"objective": "causal_lm", "trainable": "all", "lr_scheduler": "linear", "warmup_steps": 2},
        {"save_steps": 7, "stop_at": 9},
    ],
    ids=["rows", "packed", "all", "as pass 2 ends"],
)
def test_a_run_resumed_in_a_later_pass_equals_the_unbroken_one(
    streamed: Callable[..., RunConfig], options: dict[str, Any], tmp_path: Path, rows: list[int]
) -> None:
    options = {"save_steps": 5, "eval_steps": 4, "save_total_limit": 9, **options}
    stop_at, saved = options.pop("stop_at", 7), options["save_steps"]
    whole = train(streamed("whole", **options))
    per_step = BATCH_SIZE * ACCUMULATION
    assert rows == list(range(MAX_STEPS * per_step))  # every step is of whole batches, and nothing is read twice

    broken = streamed("broken", **options)
    with pytest.raises(KeyboardInterrupt), _interrupting(stop_at):
        train(broken)
    assert last_checkpoint(tmp_path / "broken").name == f"checkpoint-{saved}"
    rows.clear()
    broken.training.resume = True
    resumed = train(broken)
    assert rows == list(range(saved * per_step, MAX_STEPS * per_step))
    assert resumed.steps == MAX_STEPS
    for (name, expected), (_, found) in zip(
        sorted(whole.model.named_parameters()), sorted(resumed.model.named_parameters()), strict=True
    ):
        assert torch.equal(expected, found), name
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "broken")


def test_a_run_of_any_length_is_one_epoch(streamed: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(streamed("run", save_steps=5))
    for step in (5, MAX_STEPS):
        state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["epoch"] == pytest.approx(step / MAX_STEPS)
        epochs = {entry["step"]: entry["epoch"] for entry in state["log_history"] if "loss" in entry}
        assert epochs == {number: pytest.approx(number / MAX_STEPS) for number in range(1, step + 1)}
