"""The training step of ``pliant demo``: a few minutes of matching a converted model to its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pliant.cli.console import library_muted, notes, results, say_step
from pliant.cli.demo import folder, rows
from pliant.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor

    from pliant.metrics import Comparison

START = "start"
BATCH, WINDOW = 4, 512
LR = 3e-4


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training changed.

    Attributes:
        row: What was trained.
        steps: Optimizer steps, each of ``BATCH`` × ``WINDOW`` tokens.
        before: Its figures as converted.
        after: Those of the trained model, on the same tokens.
        curve: Optimizer step → ``KL(base ‖ model)`` of the training text, nats a token.
        checkpoint: Where the model lies.
    """

    row: rows.Row
    steps: int
    before: rows.Measured
    after: "Comparison"
    curve: dict[int, float]
    checkpoint: Path

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as JSON values."""
        return {
            "name": self.row.name,
            "steps": self.steps,
            "tokens": self.steps * BATCH * WINDOW,
            "ratio_before": self.before.ratio,
            "ratio_after": self.after.ratio,
            "kl_before": self.before.kl,
            "kl_after": self.after.kl,
            "agreement_after": self.after.agreement,
            "curve": self.curve,
        }


def train(model: Any, before: rows.Measured, evaluation: "Tensor", steps: int, output: Path) -> Trained:
    """Trains what conversion added to ``model``, the base frozen, and measures it on the same tokens as before."""
    from pliant.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
    from pliant.metrics import compare_to_base
    from pliant.training import train as train_run

    say_step(
        f"8. Train {before.row.name} towards its base: {steps} steps of {BATCH * WINDOW:,} tokens",
        "Only what conversion added learns; the teacher is the same model in base mode.",
    )
    model.save_pretrained(output / folder.TRAINING / START, delta=True)
    config = RunConfig(
        model=ModelConfig(base_model_name=rows.BASE, checkpoint_path=str(output / folder.TRAINING / START)),
        data=DataConfig(max_length=WINDOW, max_documents=4_000, max_validation_windows=BATCH),
        training=TrainingConfig(
            output_dir=str(output / folder.TRAINING / "run"),
            max_steps=steps,
            batch_size=BATCH,
            lr=LR,
            warmup_steps=min(5, steps),
            mixed_precision="bf16" if rows.dtype_name() == "bfloat16" else "no",
            log_steps=max(1, steps // 10),
        ),
    )
    with library_muted("pliant.training"):
        result = train_run(config, console=notes)
    if result.stopped_by is not None:
        raise TrainingError(f"the demo was stopped by {result.stopped_by.name} while it trained. Run it again.")
    logs = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert result.checkpoint is not None
    return Trained(
        row=before.row,
        steps=steps,
        before=before,
        after=compare_to_base(result.model, evaluation),
        curve={line["step"]: line["kl"] for line in logs if "kl" in line},
        checkpoint=result.checkpoint,
    )


def table_of(trained: Trained) -> Table:
    """Returns a table with a line before and a line after."""
    table = Table(title=f"What {trained.steps * BATCH * WINDOW:,} tokens of training change in {trained.row.name}")
    table.add_column("")
    for column in ("× base", "same top 1", "KL, nats"):
        table.add_column(column, justify="right")
    for name, figures in (("as converted", trained.before), ("trained", trained.after)):
        table.add_row(name, f"{figures.ratio:,.3f}", f"{figures.agreement:.1%}", f"{figures.kl:.4f}")
    return table


def show(trained: Trained, output: Path) -> None:
    """Prints the table, and draws the curve."""
    from pliant.cli.plots import draw_training

    results.print(table_of(trained))
    draw_training(trained.curve, (trained.before.ratio, trained.after.ratio), output / folder.TRAINING_FIGURE)
