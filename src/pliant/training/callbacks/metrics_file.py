"""Everything that a run logs, as one JSON object a line."""

import os
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pliant.training.callbacks.step_lines import StepLines


class MetricsFile(TrainerCallback):
    """Appends ``step``, ``epoch``, ``time`` (s of training, over all sessions) and everything logged to a file.

    After an exact resume the file equals that of an unbroken run, but for ``time`` and the speeds. Only the main
    process writes.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.lines = StepLines(path)
        self.started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes up the file at the step of the checkpoint, or begins a new one."""
        if state.is_world_process_zero:
            last = self.lines.begin(state.global_step)
            before = last.get("time", 0.0) if last is not None and state.global_step > 0 else 0.0
            self.started = time.monotonic() - before

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Writes one line."""
        if state.is_world_process_zero:
            seconds = round(time.monotonic() - self.started, 3)
            self.lines.append({"step": state.global_step, "epoch": state.epoch, "time": seconds} | logs)
