"""Stops a run whose numbers are no longer finite, and says where to go on from."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pliant.errors import TrainingError
from pliant.training.checkpoints import last_checkpoint

MAX_ROWS_NAMED = 32

SCALER_STEPS = 32
"""Overflowing steps in a row that fp16's loss scaler may skip: it halves 65,536 until gradients fit, 16 times to 1."""


class FiniteGuard:
    """Raises when a loss or a gradient norm is not finite.

    Under fp16 the loss scaler skips steps whose gradients overflow; the guard then raises only after more in a row
    than the scaler can need. Each process checks its own loss: the launcher ends the others when one raises.

    Args:
        output_dir: Where the run keeps its ``checkpoint-N`` folders.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
    """

    def __init__(self, output_dir: str | os.PathLike, *, mixed_precision: str = "no") -> None:
        self.output_dir = Path(output_dir)
        self.mixed_precision = mixed_precision
        self.skipped = 0

    def check_loss(self, loss: Tensor, rows: Sequence[int], step: int) -> None:
        """Checks the loss of one batch.

        Args:
            loss: Any shape.
            rows: Which rows of the data set the batch holds.
            step: The optimizer step that the batch is part of, counted from 1.

        Raises:
            TrainingError: It is not finite.
        """
        if not bool(loss.detach().isfinite().all()):
            raise self._error("the loss", loss.detach().float().mean().item(), rows, step)

    def check_gradients(self, norm: Tensor | float, rows: Sequence[int], step: int) -> None:
        """Checks the norm of the gradients of one optimizer step, before it is taken.

        Raises:
            TrainingError: It is not finite.
        """
        value = float(norm)
        if math.isfinite(value):
            self.skipped = 0
            return
        self.skipped += 1
        if self.mixed_precision != "fp16" or self.skipped > SCALER_STEPS:
            raise self._error("the gradient norm", value, rows, step)

    def check_evaluation(self, nll: float, step: int) -> None:
        """Checks the mean negative log-likelihood of the validation rows.

        Raises:
            TrainingError: It is not finite.
        """
        if not math.isfinite(nll):
            raise self._error("the validation loss", nll, [], step)

    def _error(self, what: str, value: float, rows: Sequence[int], step: int) -> TrainingError:
        named = ", ".join(str(row) for row in rows[:MAX_ROWS_NAMED])
        more = f" and {len(rows) - MAX_ROWS_NAMED} more" if len(rows) > MAX_ROWS_NAMED else ""
        of_rows = f"rows [{named}{more}]; " if rows else ""
        checkpoint = last_checkpoint(self.output_dir)
        where = (
            f"there is no complete checkpoint in {self.output_dir}"
            if checkpoint is None
            else f"the last good checkpoint is {checkpoint}"
        )
        remedies = "Lower training.lr or raise training.warmup_steps"
        if self.mixed_precision != "bf16":
            remedies += ", or set training.mixed_precision=bf16"
        return TrainingError(
            f"{what} must be finite; got {value} at optimizer step {step}, {of_rows}{where}. {remedies}."
        )
