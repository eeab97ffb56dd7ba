"""How far a run is: a bar on a terminal, a short line at each log step elsewhere."""

import logging
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

logger = logging.getLogger("pliant.training")

TRAINING, EVALUATION = "Training", "Evaluating"
SHOWN = {
    "loss": ("loss", ".4g"),
    "perplexity": ("perplexity", ".4g"),
    "learning_rate": ("lr", ".3g"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
"""Key in the logs → its name and format here."""
BAR_SHOWS = ("loss", "perplexity", "tokens_per_second")
EVAL_PREFIX = "eval_"
SPEEDS = ("_runtime", "_per_second", "_time")


class RunProgress(TrainerCallback):
    """Shows step, loss, perplexity, tokens/s and the time left; what is not logged is left out.

    On a terminal as a bar on stderr, elsewhere as messages of the logger ``pliant.training``, in the main process only.
    Call :meth:`close` after a training that raised, or the terminal's cursor stays hidden.

    Args:
        console: Where the bar goes; give the console that also prints messages, or they tear the bar.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True, highlight=False) if console is None else console
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.started = 0.0
        self.first_step = 0

    def attach(self, trainer: Trainer) -> None:
        """Takes the place of the trainer's own bar and printer."""
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock, and the bar on a terminal."""
        self.close()
        self.started, self.first_step = time.monotonic(), state.global_step
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.bars = Progress(*columns, console=self.console)
            self.bars.start()
            self._bar(TRAINING, state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar on."""
        if self.bars is not None:
            self.bars.update(self._bar(TRAINING, state.max_steps), completed=state.global_step)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Shows how far an evaluation is."""
        if self.bars is not None:
            self.bars.advance(self._bar(EVALUATION, _length(eval_dataloader)))

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the evaluation's bar away."""
        if self.bars is not None and EVALUATION in self.tasks:
            self.bars.remove_task(self.tasks.pop(EVALUATION))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        """Shows what has been logged."""
        if not state.is_world_process_zero:
            return
        if "loss" not in logs:
            self._say(state, _result(logs))
            return
        left = self._time_left(state)
        if self.bars is None:
            self._say(state, _parts(logs, SHOWN) + left)
        else:
            text = ", ".join(_parts(logs, BAR_SHOWS) + left)
            self.bars.update(self._bar(TRAINING, state.max_steps), text=escape(text))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends the bar, which stays on the screen."""
        self.close()

    def close(self) -> None:
        """Ends the bar and gives the terminal back; harmless when there is none."""
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.tasks = None, {}

    def _bar(self, name: str, total: int | None, completed: int = 0) -> TaskID:
        assert self.bars is not None
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, completed=completed, text="")
        return self.tasks[name]

    def _say(self, state: TrainerState, parts: list[str]) -> None:
        if not parts:
            return
        where = [f"step {state.global_step} of {state.max_steps}"] if state.max_steps > 0 else []  # 0: only evaluated
        line = ", ".join([*where, *parts])
        if self.bars is None:
            logger.info("%s", line)
        else:
            self.console.print(Text(line, style="dim"), soft_wrap=True)  # a style given to print would dim the bar too

    def _time_left(self, state: TrainerState) -> list[str]:
        done = state.global_step - self.first_step
        if done <= 0 or state.global_step >= state.max_steps:
            return []
        seconds = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
        return [f"{timedelta(seconds=round(seconds))} left"]


def _parts(logs: Mapping[str, Any], names: Any) -> list[str]:
    return [f"{SHOWN[name][0]} {float(logs[name]):{SHOWN[name][1]}}" for name in names if logs.get(name) is not None]


def _result(logs: Mapping[str, Any]) -> list[str]:
    """What an evaluation, or the whole training, has come to; speeds and single layers are for the file."""
    parts = [
        f"{name.removeprefix(EVAL_PREFIX)} {value:.4g}"
        for name, value in logs.items()
        if name.startswith(EVAL_PREFIX)
        and isinstance(value, int | float)
        and "/" not in name
        and not name.endswith(SPEEDS)
    ]
    if parts:
        return ["validation: " + ", ".join(parts)]
    if "train_runtime" in logs:
        return [f"trained for {timedelta(seconds=round(logs['train_runtime']))}"]
    return []


def _length(loader: Any) -> int | None:
    """Number of batches; a streamed data set does not know it."""
    try:
        return len(loader)
    except TypeError:
        return None
