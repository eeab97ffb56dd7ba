"""A run that is told to stop saves first."""

import logging
import signal
import threading
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger("pliant.training")

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals(TrainerCallback):
    """On SIGTERM or SIGINT, saves a checkpoint after the current optimizer step and ends the training.

    A second Ctrl-C interrupts at once. All processes of a run agree on the step. Handlers are installed when training
    begins, in the main thread only, and signals that were ignored before stay ignored. Call :meth:`restore` after a
    training that raised: the trainer then does not say that it has ended.

    Attributes:
        received: The signal that ended the training, or ``None``.
    """

    received: signal.Signals | None

    def __init__(self) -> None:
        self.received = None
        self.stopping = False
        self.announced = False
        self.previous: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Installs the handlers."""
        self.restore()
        self.received, self.stopping, self.announced = None, False, False
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            before = signal.getsignal(number)
            if before not in (signal.SIG_IGN, None):  # None: installed from C, and could not be put back
                self.previous[number] = signal.signal(number, self._receive)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says that the signal has arrived, where the step takes long."""
        self._announce()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Asks for a checkpoint and the end, when any process has received a signal."""
        self.received = _agreed(self.received, args.device)
        if self.received is not None:
            self._announce()
            self.stopping = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Keeps the trainer from closing an epoch that the signal has cut short: the resumed run will close it."""
        if self.stopping and state.epoch is not None and not float(state.epoch).is_integer():
            control.should_log = control.should_evaluate = control.should_save = False
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the previous handlers back."""
        self.restore()

    def restore(self) -> None:
        """Puts the previous handlers back; harmless when there is nothing to put back."""
        while self.previous:
            signal.signal(*self.previous.popitem())

    def _receive(self, number: int, _frame: Any) -> None:
        """Runs between any two bytecodes, so it neither logs nor takes a lock."""
        if self.received is None:
            self.received = signal.Signals(number)
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, self.previous[signal.SIGINT])

    def _announce(self) -> None:
        if self.received is not None and not self.announced:
            self.announced = True
            logger.warning("received %s: saving after this step, then stopping", self.received.name)


def _agreed(received: signal.Signals | None, device: torch.device) -> signal.Signals | None:
    """Returns one signal that any process has received, the same in all of them."""
    if not distributed.is_available() or not distributed.is_initialized():
        return received
    number = torch.tensor(0 if received is None else int(received), device=device)
    distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
    return signal.Signals(int(number)) if int(number) else None
