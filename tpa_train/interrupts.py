"""Ctrl-C and SIGTERM: training stops after the current optimizer step and saves; other work stops at once."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import lightning as L


class Interrupted(BaseException):
    """The run was asked to stop; what was finished is on disk.

    Not an ``Exception``: it may arrive inside any library, whose ``except Exception`` must not swallow it.
    ``status`` is the shell's exit status for the signal (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


class InterruptHandler:
    """Turns signals into a request that training honours between steps, or into ``Interrupted`` elsewhere.

    A second signal raises ``Interrupted`` in the middle of a step too: somebody is in a hurry. (KeyboardInterrupt would
    make Lightning end the process itself, with a status that says nothing.)
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferred = False

    @contextmanager
    def installed(self):
        """Handles signals inside the context; restores the previous handlers after it."""
        previous = {s: signal.getsignal(s) for s in self.SIGNALS}
        self.install()
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        for signum in self.SIGNALS:
            signal.signal(signum, self._handle)

    @contextmanager
    def deferred(self):
        """Inside the context a signal only sets ``requested``; after it the request raises ``Interrupted``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raises ``Interrupted`` if a signal has come."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, _frame) -> None:
        hurried = self.requested is not None
        self.requested = signum
        if hurried or not self._deferred:
            raise Interrupted(signum)
        message = f"\n{signal.Signals(signum).name}: stopping after this step and saving; again to stop at once\n"
        os.write(2, message.encode())  # print() is not allowed inside another print(), and signals come anywhere


class SaveAndStop(L.Callback):
    """Writes the stage's checkpoint every so many minutes and when a signal asks the run to stop.

    Args:
        path: of the checkpoint; written to a temporary name and renamed.
        handler: where requests arrive.
        minutes: between periodic checkpoints.
    """

    def __init__(self, path: Path, handler: InterruptHandler, minutes: float) -> None:
        self.path, self.handler, self.seconds = Path(path), handler, 60.0 * minutes
        self._saved_at = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has put its own SIGTERM handler in place by now; it would raise in the middle of a step.
        self.handler.install()
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # half an accumulated step cannot be resumed
        # All processes must agree, or one would wait for the others in the next collective.
        stop = trainer.strategy.reduce_boolean_decision(self.handler.requested is not None, all=False)
        due = trainer.strategy.broadcast(time.monotonic() - self._saved_at > self.seconds)
        if stop or due:
            save_atomically(trainer, self.path)
            self._saved_at = time.monotonic()
        if stop:
            trainer.should_stop = True


def save_atomically(trainer: L.Trainer, path: Path) -> None:
    """Writes a Lightning checkpoint to a temporary name beside ``path`` and renames it."""
    temporary = path.with_name(f".{path.name}.partial")
    trainer.save_checkpoint(temporary, weights_only=False)
    if trainer.is_global_zero:
        os.replace(temporary, path)
